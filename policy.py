"""The model that is trained: sharding (FSDP2), packed rows, log-probs, optimizer, checkpoints.
A group is trained as packed rows [prompt | response a | response b | ...] in which every response
attends to the shared prompt and to itself only: prompt and images go through the model once.
Shapes: a row of T tokens has B responses of up to R tokens, N in all, to prompts of L tokens."""
import contextlib
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

MODELS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
CHUNK_ELEMENTS = 2**26  # of the logits, of which the log-prob step makes a chunk at a time
FLASH = {("cuda", torch.bfloat16)}  # where packed attention is one call of flash attention

def load(cfg, device, reference_of=None):
    """A sharded Qwen-VL model whose forward is row_forward(), or the frozen start of reference_of.
    cfg: .model (folder or hub id), .dtype (of the computation; what is trained is kept in fp32) and
    what is read below. Rank 0 alone reads the weights (8 fp32 copies of 8B: 280 GB)."""
    if reference_of and cfg.lora_rank:  # the same, less its adapter
        return lambda *args: reference_of(*args, adapter=False)
    config, dtype = AutoConfig.from_pretrained(cfg.model), getattr(torch, cfg.dtype)
    if config.model_type not in MODELS:
        raise ValueError(f"model {cfg.model} is of type {config.model_type}, not one of {MODELS}")
    weights, buffers, rank, world = {}, {}, dist.get_rank(), dist.get_world_size()
    trainable, storage = not reference_of, dtype if reference_of or cfg.lora_rank else torch.float32
    if rank == 0:
        full = AutoModelForImageTextToText.from_pretrained(
            cfg.model, dtype=storage, use_safetensors=True)
        choose_trained(full, cfg, trainable)
        weights, buffers = full.state_dict(), dict(full.named_buffers())
    AttentionInterface.register("packed", packed_attention)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=storage, attn_implementation={
            "": "sdpa", "text_config": "packed", "vision_config": "sdpa"})
        choose_trained(model, cfg, trainable)
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # once and for good: old and new log-probs must come from the same code path
    model.forward = lambda *args, **more: row_forward(model, *args, **more)
    conv = model.model.visual.patch_embed.proj  # of one patch each; in bf16 many times slower than:
    conv.forward = lambda x: F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)
    shard = cfg.shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    mesh = dist.init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=(
        "replicate", "shard"))
    options = dict(mesh=mesh if shard < world else mesh["shard"], offload_policy=(
        fsdp.CPUOffloadPolicy(device.type == "cuda") if cfg.offload else fsdp.OffloadPolicy()))
    for part in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        fsdp.fully_shard(part, mp_policy=fsdp.MixedPrecisionPolicy(dtype, torch.float32), **options)
    model.to_empty(device="cpu" if cfg.offload else device)
    model.tie_weights()  # to_empty gives each use of a tied weight memory of its own
    set_model_state_dict(model, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # the rotary frequencies are in no state dict
        dist.broadcast(whole := buffers.get(name, buffer).to(device, copy=True), 0)
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], whole)
    return model

def choose_trained(model, cfg, trainable=True):
    """Freeze what is not trained, in place: with .freeze_vision the vision tower, with .lora_rank
    all but a new adapter (LoRA, arXiv 2106.09685) of linear layers, without lm_head and experts."""
    model.requires_grad_(trainable and not cfg.lora_rank)
    if trainable and cfg.lora_rank:
        import peft
        torch.manual_seed(cfg.seed)
        model.add_adapter(peft.LoraConfig(  # 32: with 10 times the learning rate of full training
            r=cfg.lora_rank, lora_alpha=32, target_modules="all-linear",
            exclude_modules=r".*\.visual\..*" if cfg.freeze_vision else None))
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.data = p.data.float()
    elif cfg.freeze_vision:
        model.model.visual.requires_grad_(False)

def build_rows(model, groups, tokens_per_row, rank=0, world=1, load=dict, map=map):
    """This rank's rows, as many as each rank has, of at most tokens_per_row tokens. Groups, longest
    first, go into the row with the fewest tokens; responses that do not fit repeat the prompt in
    another; a row left over has none. groups: the same on all ranks, dicts of ids, grid and
    responses (dicts); load(group) adds images, [(h, w, 3) uint8], to those trained here."""
    pieces = []  # [tokens, group, responses]
    for group in groups:
        for i, response in enumerate(group["responses"]):
            if i == 0 or pieces[-1][0] + len(response["ids"]) > tokens_per_row:
                pieces.append([len(group["ids"]), group, []])
            pieces[-1][0] += len(response["ids"])
            pieces[-1][2].append(response)
    pieces.sort(key=lambda piece: -piece[0])
    if pieces and pieces[0][0] > tokens_per_row:
        raise ValueError(f"a prompt with one response has {pieces[0][0]} tokens, above "
                         f"tokens_per_micro_batch = {tokens_per_row}: raise it")
    fewest = -(-sum(piece[0] for piece in pieces) // (tokens_per_row * world))
    for count in itertools.count(fewest * world, world):
        rows = [[0] for _ in range(count)]  # each: its tokens, then its pieces
        for piece in pieces:
            row = min(rows, key=lambda row: row[0])
            row[0] += piece[0]
            row.append(piece)
        rows.sort(key=lambda row: -row[0])  # at a time all ranks work on about equal ones
        if not rows or rows[0][0] <= tokens_per_row:
            return [*map(lambda row: _tensors(model, row[1:], load), rows[rank::world])]

def _tensors(model, pieces, load):
    """A row: input_ids (1, T), position_ids (4, 1, T): text, then mRoPE; segments [(L, [R, ...])];
    images, grid (n, 3); sources (N,), where a response token is predicted, targets (N,); mask,
    engine logprobs (B, R), advantage (B, 1); members, the responses."""
    config, merge = model.config, model.config.vision_config.spatial_merge_size
    parts = [(load(group), responses) for _, group, responses in pieces]
    if not any(group["images"] for group, _ in parts):
        # The vision tower runs on every row, or FSDP's collectives would not line up: on an image
        # of one token more, to which nothing attends.
        side = merge * config.vision_config.patch_size
        parts.append(({"ids": [config.image_token_id], "grid": [(1, merge, merge)],
                       "images": [np.zeros((side, side, 3), np.uint8)]}, []))
    ids, positions, sources = [], [], []
    for group, members in parts:
        prompt, grid = torch.tensor([group["ids"]]), torch.tensor(group["grid"])
        mrope = model.model.get_rope_index(
            prompt, (prompt == config.image_token_id).int(), image_grid_thw=grid)[0][:, 0]  # (3, L)
        positions.append(torch.cat([torch.arange(prompt.shape[1])[None], mrope]))
        ids += group["ids"]
        # `last` predicts each first token. A prompt ends in text, hence at its mRoPE's maximum.
        last, after = len(ids) - 1, positions[-1][:, -1:] + 1
        for response in members:
            sources += [last, *range(len(ids), len(ids) + len(response["ids"]) - 1)]
            ids += response["ids"]
            positions.append(after + torch.arange(len(response["ids"])))
    responses = [r for _, members in parts for r in members] or [
        {"ids": [], "logprobs": [], "advantage": 0.0}]
    return {
        "input_ids": torch.tensor([ids]), "position_ids": torch.cat(positions, 1)[:, None],
        "segments": [(len(g["ids"]), [len(r["ids"]) for r in rs]) for g, rs in parts],
        "images": [x for g, _ in parts for x in g["images"]], "members": responses,
        "sources": torch.tensor(sources, dtype=torch.long),
        "grid": torch.tensor([x for g, _ in parts for x in g["grid"]]),
        "targets": torch.tensor([t for r in responses for t in r["ids"]], dtype=torch.long),
        "mask": pad_sequence([torch.ones(len(r["ids"])) for r in responses], True).bool(),
        "logprobs": pad_sequence([torch.tensor(r["logprobs"]) for r in responses], True),
        "advantage": torch.tensor([[r["advantage"]] for r in responses])}

def packed_attention(module, query, key, value, attention_mask, scaling, segments, **_):
    """Attention of a packed row, (1, heads or kv heads, T, D) each -> (1, T, heads, D), None: each
    prompt and each response is a sequence, and a response's keys and values are [prompt; own]."""
    sizes, seen = [], []  # tokens of each sequence; the ones that it sees, its own the last
    for prompt, lengths in segments:
        seen += [(len(sizes),), *((len(sizes), len(sizes) + i + 1) for i in range(len(lengths)))]
        sizes += [prompt, *lengths]
    queries = query.split(sizes, 2)
    keys, values = ([torch.cat([parts[i] for i in some], 2) for some in seen]
                    for parts in (key.split(sizes, 2), value.split(sizes, 2)))
    if (query.device.type, query.dtype) in FLASH:
        # (1, heads, sum, D) -> (sum, heads, D). Its causal mask is aligned to the bottom right.
        q, k, v = (torch.cat(x, 2)[0].transpose(0, 1) for x in (queries, keys, values))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        lengths = [[x.shape[2] for x in some] for some in (queries, keys)]
        starts = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(q.device) for n in lengths)
        return varlen_attn(q, k, v, *starts, *map(max, lengths), scale=scaling,
                           window_size=(-1, 0))[None], None
    outputs = []
    for q, k, v in zip(queries, keys, values):
        more = k.shape[2] - q.shape[2]  # of the prompt, all of which is seen
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(more) if more else None
        outputs.append(F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=not more, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2), None

def logprobs(model, row, pixels, temperature, banned):
    """(log-probs, entropies), (B, R) and 0 outside row["mask"], of the sampling distribution.
    pixels: (patches, C) of row["images"], made where they are used. temperature and banned (token
    ids that are never sampled) must be the engine's. Gradients flow through the log-probs only."""
    *tensors, mask = (row[name].to(pixels.device) for name in (
        "input_ids", "position_ids", "grid", "sources", "targets", "mask"))
    flat = model(pixels, *tensors, row["segments"], temperature, banned)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in flat)

def row_forward(model, pixels, input_ids, position_ids, grid, sources, targets, segments,
                temperature, banned, adapter=True):
    """Forward of the FSDP root, where lm_head.weight is whole: (N,) log-probs, (N,) entropies."""
    for layer in [x for x in model.modules() if hasattr(x, "lora_A")]:
        layer.set_scale("default", float(adapter))  # peft's own switch also changes requires_grad
    out = model.model(input_ids, None, position_ids, pixel_values=pixels, image_grid_thw=grid,
                      use_cache=False, segments=segments)
    hidden = out.last_hidden_state[0, sources]
    return token_logprobs(hidden, model.lm_head.weight, targets, temperature, banned)

def token_logprobs(hidden, weight, targets, temperature, banned):
    """Log-probs and entropies (N,) of targets (N,) from hidden (N, H) and the head's weight (V, H).
    In chunks, which the backward pass makes again: (N, V) logits never exist."""
    def of_chunk(hidden, targets):
        logits = (hidden @ weight.T).float().div_(temperature)
        logits[:, banned] = -1e30  # not -inf: 0 * -inf would make the entropy NaN
        logz = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = logz - torch.einsum("nv,nv->n", logits.softmax(-1), logits)
        return logits.gather(1, targets[:, None])[:, 0] - logz, entropy
    size = max(1, CHUNK_ELEMENTS // len(weight))
    chunks = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
              for chunk in zip(hidden.split(size), targets.split(size))]
    return tuple(torch.cat(x) for x in zip(*chunks))

def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product on this device, measured: perf/mfu is a share of that."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n**3 / Timer("x @ x", globals={"x": x}).timeit(10).median

def work(model, row):
    """A row's tokens ("packed"), those of a row per response ("alone"), its FLOPs, forward and back
    ("flops"): 2 a pass for each weight and token, 4 a channel and pair of tokens in attention, but
    for the vision tower's (PaLM, arXiv 2204.02311, appendix B)."""
    text, layers = model.config.text_config, model.model.language_model.layers
    tokens, patches = row["input_ids"].numel(), row["grid"].prod(1).sum().item()
    pairs = sum(p * p / 2 + sum(r * p + r * r / 2 for r in rs) for p, rs in row["segments"])
    flops = 12 * len(layers) * layers[0].self_attn.q_proj.out_features * pairs
    share = getattr(text, "num_experts_per_tok", 1) / getattr(text, "num_experts", 1)
    passing = {"lm_head": len(row["targets"]), "patch_embed": patches, "embed": 0,
               "merger": patches / model.config.vision_config.spatial_merge_size**2,
               "visual": patches, "experts": share * tokens, "": tokens}  # by the first in a name
    tower = any(p.requires_grad for p in model.model.visual.parameters())  # is gone back through
    for name, p in model.named_parameters(remove_duplicate=False):
        passes = 1 + (tower or "visual" not in name) + p.requires_grad
        flops += 2 * passes * p.numel() * next(n for part, n in passing.items() if part in name)
    alone = sum(p + r for p, rs in row["segments"] for r in rs)
    return {"packed": tokens, "alone": alone, "flops": flops}

def adamw(model, learning_rate, beta2, weight_decay):
    """AdamW over what is trained; norms, biases and embeddings are not decayed."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, p in model.named_parameters():
        decayed = p.ndim > 1 and "embed_tokens" not in name and "pos_embed" not in name
        groups[decayed]["params"].append(p)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)

def optimizer_step(model, optimizer, learning_rate, max_grad_norm):
    """Clip, step, clear; returns the global gradient norm. If it is not finite nothing changes."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).full_tensor().item()
    if np.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm

@torch.no_grad()
def named_weights(model):
    """Yield (Hugging Face name, whole tensor in the type of the computation), a tied weight under
    both names, an adapter merged; every rank takes part. One gather a block."""
    for prefix, part in model.named_modules():
        if isinstance(part, fsdp.FSDPModule):
            part.unshard()
            for name, p in part.named_parameters(prefix, remove_duplicate=False):
                if hasattr(p, "full_tensor") or ".lora_" in name:  # of a block within; an adapter
                    continue
                layer, adapted, kind = name.rpartition(".base_layer")
                p = p.clone()  # an engine may keep it for longer than the block is whole
                if adapted and kind == ".weight":
                    p += model.get_submodule(layer).get_delta_weight("default")
                yield layer + kind, p
            part.reshard()

def _state_tensors(model, optimizer):
    """Flat dict of what is trained (tied weights once) and AdamW's state, made where missing."""
    tensors = {}
    for n, p in model.named_parameters():
        if p.requires_grad:
            if not (state := optimizer.state[p]):
                state |= {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                state["step"] = torch.zeros((), device=p.device)
            tensors |= {f"{k}.{n}": x for k, x in [("model", p), *state.items()]}
    return tensors

def _digests(folder):
    """{name: sha256} of a folder's files, on a shared disk: each rank hashes its share."""
    mine, world = {}, dist.get_world_size()
    for path in sorted(Path(folder).iterdir())[dist.get_rank() :: world]:
        with path.open("rb") as file:
            mine[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    dist.all_gather_object(everyone := [None] * world, mine)
    return {name: digest for part in everyone for name, digest in part.items()}

def _flush(*paths):
    for path in paths:  # files, or folders' lists of names; os.sync() would wait for everybody's
        os.fsync(handle := os.open(path, os.O_RDONLY))
        os.close(handle)

def save_checkpoint(root, step, model, optimizer, state, keep):
    """Write root/step_000100 aside, flush, rename, then move `latest`: whole whenever it crashes.
    All but the newest `keep` and step state["best"][0] are removed. state: JSON values."""
    name, aside = f"step_{step:06d}", Path(root, f"step_{step:06d}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a crash
        aside.mkdir(parents=True)
        (aside / "state.json").write_text(json.dumps(state))
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
    try:  # returns when all have saved
        dcp.save(_state_tensors(model, optimizer), storage_writer=writer)
    except dcp.api.CheckpointException as error:  # of any rank, and no Exception to Python
        raise OSError(f"{aside}: {next(iter(error.failures.values()))[0]}") from error
    manifest = _digests(aside)
    if dist.get_rank() == 0:
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _flush(aside / "state.json", aside / "manifest.json", aside)
        shutil.rmtree(Path(root, name), ignore_errors=True)
        aside.rename(Path(root, name))
        best = f"step_{state['best'][0]:06d}" if state["best"] else name
        links = {"latest": name, "best": best if Path(root, best).exists() else name}
        for link, target in links.items():  # a link is moved in one atomic step
            Path(root, "link").unlink(missing_ok=True)
            Path(root, "link").symlink_to(target)
            Path(root, "link").rename(Path(root, link))
        _flush(root)
        for old in {p.name for p in sorted(Path(root).glob("step_*"))[:-keep]} - {*links.values()}:
            shutil.rmtree(Path(root, old))
    dist.barrier()

def find_checkpoint(root):
    """The newest whole checkpoint, up to the one that root/latest names if it is there; or None.
    A harmed one is named and set aside as damaged_step_000100. ValueError: no other is whole."""
    root, harmed = Path(root), {}
    names, last = sorted(x.name for x in root.glob("step_??????")), (root / "latest").resolve().name
    names = [names[:[*names, last].index(last) + 1]]  # all if the link leads nowhere
    dist.broadcast_object_list(names)
    while names[0]:
        found, manifest = _digests(folder := root / names[0].pop()), {"manifest.json": "readable"}
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads((folder / "manifest.json").read_text())
        wrong = [file for file, digest in manifest.items() if found.get(file) != digest]
        if wrong:
            harmed[folder] = f"{folder / wrong[0]} is damaged or missing"
            continue
        for old in harmed if dist.get_rank() == 0 else ():
            print(f"{harmed[old]}: set aside as damaged_{old.name}, going on from {folder.name}")
            shutil.rmtree(root / f"damaged_{old.name}", ignore_errors=True)  # of another time
            old.rename(root / f"damaged_{old.name}")
        return folder
    if harmed:
        raise ValueError(f"no checkpoint is whole: {', '.join(harmed.values())}. Copy one back or "
                         "choose another out_dir")

def load_checkpoint(folder, model, optimizer):
    """Fill model and optimizer from a checkpoint of any number of ranks; returns its state."""
    dcp.load(_state_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(folder))
    return json.loads(Path(folder, "state.json").read_text())
