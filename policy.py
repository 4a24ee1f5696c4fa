"""The model that is trained: sharding (FSDP2), packed rows, log-probs, optimizer, checkpoints.

A group is trained as packed rows [prompt | response a | response b | ...] in which every response
attends to the shared prompt and to itself only: prompt and images go through the model once.
Shapes: a row of T tokens has B responses of up to R tokens, N in all, to prompts of L tokens."""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

MODELS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
CHUNK_ELEMENTS = 2**26  # logits held at once by the log-prob step: 256 MB in fp32

def load(cfg, device, trainable=True):
    """A sharded Qwen-VL model whose forward gives the log-probs of a packed row (`row_forward`).
    cfg: .model (folder or hub id), .dtype (of the computation; a trainable model is kept in fp32),
    .freeze_vision, .activation_checkpointing. Rank 0 alone reads (8 fp32 copies of 8B: 280 GB)."""
    config, dtype = AutoConfig.from_pretrained(cfg.model), getattr(torch, cfg.dtype)
    if config.model_type not in MODELS:
        raise ValueError(f"model {cfg.model} is of type {config.model_type}, not one of {MODELS}")
    storage, weights, buffers = torch.float32 if trainable else dtype, {}, {}
    if dist.get_rank() == 0:
        full = AutoModelForImageTextToText.from_pretrained(cfg.model, dtype=storage)
        weights, buffers = full.state_dict(), dict(full.named_buffers())
    AttentionInterface.register("packed", packed_attention)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=storage, attn_implementation={
            "": "sdpa", "text_config": "packed", "vision_config": "sdpa"})
    model.requires_grad_(trainable)
    model.model.visual.requires_grad_(trainable and not cfg.freeze_vision)
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # once and for good: old and new log-probs must come from the same code path
    model.forward = functools.partial(row_forward, model)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives each use of a tied weight memory of its own
    set_model_state_dict(model, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # the rotary frequencies are in no state dict
        dist.broadcast(buffer.copy_(buffers.get(name, buffer)), 0)
    return model

def deal(groups, rank, world):
    """This rank's share of the groups: the longest first, each to the rank with the least work."""
    work, mine = [0] * world, []  # in tokens; the prompt counts once
    sized = [(len(g["ids"]) + sum(len(r["ids"]) for r in g["responses"]), g) for g in groups]
    for tokens, group in sorted(sized, key=lambda item: -item[0]):
        least = work.index(min(work))
        work[least] += tokens
        mine += [group] if least == rank else []
    return mine

def build_rows(model, groups, tokens_per_row):
    """Pack groups into rows of at most tokens_per_row tokens: first fit, longest first; responses
    beyond that go into a row that repeats the prompt; rows of weight 0 fill up to as many as other
    ranks have. groups: dicts of ids, images ((h, w, 3) uint8), grid, responses (dicts)."""
    pieces = []  # [tokens, group, responses]
    for group in groups:
        for i, response in enumerate(group["responses"]):
            if i == 0 or pieces[-1][0] + len(response["ids"]) > tokens_per_row:
                pieces.append([len(group["ids"]), group, []])
            pieces[-1][0] += len(response["ids"])
            pieces[-1][2].append(response)
    rows = [[] for _ in pieces]
    for piece in sorted(pieces, key=lambda p: -p[0]):
        if piece[0] > tokens_per_row:
            raise ValueError(f"a prompt with one response has {piece[0]} tokens, above "
                             f"tokens_per_micro_batch = {tokens_per_row}: raise it")
        next(r for r in rows if sum(p[0] for p in r) + piece[0] <= tokens_per_row).append(piece)
    rows = [_tensors(model, row) for row in rows if row]
    dist.all_reduce(count := torch.tensor(len(rows)), dist.ReduceOp.MAX)
    idle = {"ids": [0], "images": [], "grid": []}, [{"ids": [0], "logprobs": [0.0], "advantage": 0}]
    return rows + [_tensors(model, [(0, *idle)]) | {"weight": 0.0}] * (int(count) - len(rows))

def _tensors(model, pieces):
    """A row: input_ids (1, T), position_ids (4, 1, T): text, then mRoPE; segments [(L, [R, ...])];
    images, grid (n, 3); sources (N,), where a response token is predicted, targets (N,); mask,
    engine logprobs (B, R), advantage (B, 1); members, the responses; weight."""
    config, vision = model.config, model.config.vision_config
    ids, positions, sources = [], [], []
    for _, group, members in pieces:
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
    # The vision tower runs on every row, or FSDP's collectives would not line up.
    merge, side = vision.spatial_merge_size, vision.spatial_merge_size * vision.patch_size
    images = [x for _, g, _ in pieces for x in g["images"]] or [np.zeros((side, side, 3), np.uint8)]
    grid = [x for _, g, _ in pieces for x in g["grid"]] or [(1, merge, merge)]
    responses = [r for _, _, members in pieces for r in members]
    return {
        "input_ids": torch.tensor([ids]), "position_ids": torch.cat(positions, 1)[:, None],
        "segments": [(len(g["ids"]), [len(r["ids"]) for r in rs]) for _, g, rs in pieces],
        "images": images, "grid": torch.tensor(grid), "sources": torch.tensor(sources),
        "targets": torch.tensor([t for r in responses for t in r["ids"]]), "weight": 1.0,
        "mask": pad_sequence([torch.ones(len(r["ids"])) for r in responses], True).bool(),
        "logprobs": pad_sequence([torch.tensor(r["logprobs"]) for r in responses], True),
        "advantage": torch.tensor([[r["advantage"]] for r in responses]), "members": responses}

def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **_):
    """Attention of a packed row: query (1, heads, T, D), key and value (1, kv heads, T, D).
    One causal call for each prompt and one batched call for its responses, whose keys and values
    are [prompt; own]. Without segments attention_mask decides. Returns (1, T, heads, D), None."""
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    if segments is None:
        return attend(query, key, value, attn_mask=attention_mask).transpose(1, 2), None
    sizes = [n for prompt, lengths in segments for n in (prompt, sum(lengths))]
    parts, outputs = zip(*(x.split(sizes, 2) for x in (query, key, value))), []
    for (prompt, lengths), first, own in zip(segments, parts, parts):  # prompt, then responses
        outputs.append(attend(*first, is_causal=True))
        # (1, heads, sum R, D) -> (B, heads, R, D), padded on the right
        own = [pad_sequence(x[0].transpose(0, 1).split(lengths), True).transpose(1, 2) for x in own]
        k, v = (torch.cat([s.expand(len(o), -1, -1, -1), o], 2) for s, o in zip(first[1:], own[1:]))
        mask = torch.ones(max(lengths), k.shape[2], dtype=torch.bool, device=k.device).tril(prompt)
        outputs += [x[None, :, :n] for x, n in zip(attend(own[0], k, v, attn_mask=mask), lengths)]
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
                temperature, banned, attention_mask=None):
    """Forward of the FSDP root, where lm_head.weight is whole: (N,) log-probs, (N,) entropies."""
    images, idle = {"pixel_values": pixels, "image_grid_thw": grid}, 0.0
    if not (input_ids == model.config.image_token_id).any():
        # The dummy image takes part with weight 0, deepstack included. It comes first, as images
        # do: ranks with and without images must run their collectives in the same order.
        images, features = {}, model.model.get_image_features(pixels, grid, return_dict=True)
        levels = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
        idle = 0 * sum(f.sum() for level in levels for f in level)
    hidden = idle + model.model(input_ids, attention_mask, position_ids, use_cache=False,
                                segments=segments, **images).last_hidden_state[0]
    return TokenLogprobs.apply(hidden[sources], model.lm_head.weight, targets, temperature, banned)

def _chunks(hidden, weight, temperature, banned):
    size = max(1, CHUNK_ELEMENTS // len(weight))
    for rows in torch.arange(len(hidden), device=hidden.device).split(size):
        logits = (hidden[rows] @ weight.T).float().div_(temperature)
        logits[:, banned] = -1e30  # not -inf: 0 * -inf would make the entropy NaN
        yield rows, logits

class TokenLogprobs(torch.autograd.Function):
    """Log-probs and entropies (N,) of targets (N,) from hidden (N, H) and the head's weight (V, H).
    log p = z_target - logsumexp(z), so d/dz = onehot(target) - softmax(z). In chunks, recomputed in
    the backward pass, so that at most CHUNK_ELEMENTS logits exist at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned):
        logprobs, logz, entropy = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows, logits in _chunks(hidden, weight, temperature, banned):
            logz[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - logz[rows]
            entropy[rows] = logz[rows] - torch.einsum("nv,nv->n", logits.softmax(-1), logits)
        ctx.save_for_backward(hidden, weight, targets, logz)
        ctx.settings = temperature, banned
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logz = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # sums in bf16 lose small parts
        for rows, logits in _chunks(hidden, weight, *ctx.settings):
            scale = grad[rows, None] / ctx.settings[0]
            grad_logits = logits.sub_(logz[rows, None]).exp_().mul_(-scale)
            grad_logits = grad_logits.scatter_add_(1, targets[rows, None], scale).to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden[rows])  # no second (V, H) tensor
            else:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None

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

def named_weights(model):
    """Yield (Hugging Face name, whole tensor), a tied weight under both; every rank takes part."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def _state_tensors(model, optimizer):
    """Flat dict of the sharded weights (tied ones once) and AdamW's state, made where missing."""
    tensors = {}
    for n, p in model.named_parameters():
        if p.requires_grad and not (state := optimizer.state[p]):
            state |= {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.zeros((), device=p.device)
        tensors |= {f"{k}.{n}": x for k, x in [("model", p), *optimizer.state.get(p, {}).items()]}
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
    """Wait until files, or folders' lists of names, are on disk; os.sync() would wait for all."""
    for path in paths:
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
    dcp.save(_state_tensors(model, optimizer), storage_writer=writer)  # returns when all have saved
    manifest = _digests(aside)
    if dist.get_rank() == 0:
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _flush(aside / "state.json", aside / "manifest.json", aside)
        shutil.rmtree(Path(root, name), ignore_errors=True)
        aside.rename(Path(root, name))
        links = {"latest": name, "best": f"step_{state['best'][0]:06d}" if state["best"] else name}
        for link, target in links.items():  # a link is moved in one atomic step
            Path(root, "link").unlink(missing_ok=True)
            Path(root, "link").symlink_to(target)
            Path(root, "link").rename(Path(root, link))
        _flush(root)
        for old in {p.name for p in sorted(Path(root).glob("step_*"))[:-keep]} - {*links.values()}:
            shutil.rmtree(Path(root, old))
    dist.barrier()

def load_checkpoint(folder, model, optimizer):
    """Fill model and optimizer from a checkpoint of any number of ranks; returns its state."""
    manifest, found = json.loads(Path(folder, "manifest.json").read_text()), _digests(folder)
    for name, _ in manifest.items() - found.items():
        raise ValueError(f"{folder}/{name} is {'damaged' if name in found else 'missing'}: let the "
                         "link `latest` beside that folder point to another checkpoint")
    dcp.load(_state_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(folder))
    return json.loads(Path(folder, "state.json").read_text())
