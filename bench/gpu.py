"""What one GPU gives, and how much of it the trainer uses: random weights, no data, no download.

    python bench/gpu.py                                # all parts of a 2B, on one GPU
    python bench/gpu.py update packing --out a.json    # some of them, and all numbers as JSON
    python bench/gpu.py --size tiny --device cpu       # does this script run? Nothing is judged

At the end comes a table, a line for each number, and exit status 1 if a goal is missed. A case that
memory is too small for is "OOM": what is derived from it is nan and misses its goal, and the others
go on. Shares are of the matmul or copy rate that `ceilings`, which always runs, has measured on the
same GPU, not of a data sheet; FLOPs are those that a row needs, whatever the code really does."""

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]
import published_models  # noqa: E402
import tiny_models  # noqa: E402
from measure import (  # noqa: E402
    NAN,
    attempt,
    channels,
    forward_flops,
    forward_times,
    line,
    missed,
    note,
    now,
    peak_gb,
    release,
    row_flops,
    seconds,
    seen,
    write_json,
)

import policy  # noqa: E402
import train_grpo  # noqa: E402

GROUP = 5  # responses to a prompt
SIZES = {  # tokens: T of the updates; judged: T of what has a goal; packed: T that fits into 80 GB
    "2b": SimpleNamespace(  # without checkpointing; shapes: (L, R)
        config=published_models.MODELS["Qwen/Qwen3-VL-2B-Instruct"][1],
        moe=published_models.MODELS["Qwen/Qwen3-VL-30B-A3B-Instruct"][1],
        matmul=8192, copied=4 * 10**9, tokens=(4096, 8192, 16384, 32768), judged=16384,
        packed=8192, shapes=((700, 250), (1000, 400), (2000, 1000)), repeats=5),
    "tiny": SimpleNamespace(
        config=tiny_models.config("qwen3_vl"), moe=tiny_models.config("qwen3_vl_moe"),
        matmul=256, copied=10**6, tokens=(64, 128), judged=128,
        packed=128, shapes=((20, 8), (25, 10)), repeats=1)}


# --- what it is measured on -----------------------------------------------------------------------


def load(run, checkpointing=False):
    """The sharded model with random weights, kept until another one is asked for. Nobody who
    calls attempt() may hold it: it could not be freed."""
    if run.loaded[0] is not checkpointing:
        release(run)
        if not Path(run.folder, "config.json").exists():
            with run.device:
                model = AutoModelForImageTextToText.from_config(run.size.config, dtype=run.dtype)
            model.save_pretrained(run.folder)
            del model
        cfg = SimpleNamespace(**train_grpo.defaults | {
            "model": run.folder, "dtype": str(run.dtype).removeprefix("torch."),
            "activation_checkpointing": checkpointing})
        run.loaded = checkpointing, policy.load(cfg, run.device)
    return run.loaded[1]


def make_groups(run, count, prompt, response):
    """Groups as the trainer has them, of GROUP responses each; 60 % of a prompt is its image."""
    config, side = run.size.config, int((0.6 * prompt) ** 0.5)
    grid = side * config.vision_config.spatial_merge_size
    pixels = np.zeros((*[grid * config.vision_config.patch_size] * 2, 3), np.uint8)
    image = [config.vision_start_token_id, *[config.image_token_id] * side**2,
             config.vision_end_token_id]

    def words(n):  # special tokens come first in the tiny vocabulary, last in the real one
        return run.random.integers(10, int(0.99 * config.text_config.vocab_size), n).tolist()

    return [{"ids": image + words(prompt - len(image)), "grid": [(1, grid, grid)],
             "images": [pixels], "responses": [
                 {"ids": words(response), "logprobs": [0.0] * response, "advantage": 1.0}
                 for _ in range(GROUP)]} for _ in range(count)]


def split_up(groups):
    """The same responses, each in a group of its own."""
    return [group | {"responses": [r]} for group in groups for r in group["responses"]]


def filling(tokens):
    """(groups, L, R) that fill a row of T tokens, with L : R = 2.5 : 1."""
    count = max(1, tokens // 4096)
    response = tokens // count * 2 // 15
    return count, tokens // count - GROUP * response, response


def objective(run, model, row):
    """Sum of a row's log-probs, with random pixels."""
    config = run.size.config
    pixels = torch.randn(int(row["grid"].prod(1).sum()), channels(config.vision_config),
                         device=run.device)
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id,
              config.vision_end_token_id]
    return policy.logprobs(model, row, pixels, 1.0, banned)[0].sum()


def random_heads(run, tokens):
    """query, key and value: (1, heads or kv heads, T, D)."""
    text = run.size.config.text_config
    heads = text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads
    return [torch.randn(1, n, tokens, text.head_dim, device=run.device, dtype=run.dtype,
                        requires_grad=True) for n in heads]


# --- parts ----------------------------------------------------------------------------------------


def ceilings(run):
    """The rates that the other parts are compared with, of 20 in a row: not those of a cool GPU
    that rests in between."""
    n, size, times = run.size.matmul, run.size.copied, 20
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    source, target = (torch.ones(size, device=run.device, dtype=torch.uint8) for _ in range(2))

    def repeat(work):
        for _ in range(times):
            work()

    run.matmul = times * 2 * n**3 / seconds(run, lambda: repeat(lambda: a @ b))
    run.copy = times * 2 * size / seconds(run, lambda: repeat(lambda: target.copy_(source)))
    note(run, f"matmul of {n} x {n}, TFLOP/s", run.matmul / 1e12)
    note(run, "copy, TB/s read and written", run.copy / 1e12)


def packed_attention(query, key, value, segments):
    return policy.packed_attention(None, query, key, value, None,
                                   scaling=query.shape[-1] ** -0.5, segments=segments)[0]


def dense_attention(query, key, value, mask):
    """The reference: one boolean mask, keys and values repeated for the heads that share them."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def attention_errors(run):
    """{name: relative error} of the output and of three gradients, against the mask in fp32."""
    segments = [(300, [17, 1, 130]), (64, [200, 33])]
    heads = random_heads(run, 745)
    output = packed_attention(*heads, segments)
    weights = torch.randn_like(output)
    ours = output, *torch.autograd.grad(output, heads, weights)
    exact = [x.detach().float().requires_grad_() for x in heads]
    output = dense_attention(*exact, tiny_models.dense_mask(segments).to(run.device))
    theirs = output, *torch.autograd.grad(output, exact, weights.float())
    return {name: ((a.float() - b).norm() / b.norm()).item() for name, a, b in zip(
        ("output", "gradient of query", "gradient of key", "gradient of value"), ours, theirs)}


def alignment_error(run):
    """Equal keys weigh all that is seen alike, and only the prompt has value 1: token i of a
    response to 8 tokens gives 8 / (9 + i), or 1 if the causal mask is aligned to the top left."""
    query, key, value = (torch.zeros_like(x) for x in random_heads(run, 14))
    value[:, :, :8] = 1
    expected = torch.tensor([1.0] * 8 + [8 / (9 + i) for i in (0, 1, 2, 3, 0, 1)])
    given = packed_attention(query, key, value, [(8, [4, 2])])[0].float().cpu()
    return (given - expected[:, None, None]).abs().max().item()


def attention_case(run, attend, how):
    """Seconds of forward and backward of a whole row."""
    heads = random_heads(run, run.size.judged)

    def work():
        output = attend(*heads, how)
        torch.autograd.grad(output, heads, output.detach())

    return {"seconds": seconds(run, work)}


def attention(run):
    """packed_attention: is it right (bf16 rounds to 0.004), and is it fast?"""
    for name, error in attention_errors(run).items():
        note(run, f"attention, error of the {name}", error, "<= 0.02")
    note(run, "attention, error of what is seen", alignment_error(run), "<= 0.01")
    count, prompt, response = filling(run.size.judged)
    segments = [(prompt, [response] * GROUP)] * count
    mask, text = tiny_models.dense_mask(segments).to(run.device), run.size.config.text_config
    ours = attempt(run, attention_case, packed_attention, segments)
    dense = attempt(run, attention_case, dense_attention, mask)
    flops = 3 * 4 * text.num_attention_heads * text.head_dim * seen(segments)
    name = f"attention, {run.size.judged} tokens"
    note(run, f"{name}, ours", ours)
    note(run, f"{name}, one mask", dense)
    note(run, f"{name}, share of the matmul rate", flops / ours["seconds"] / run.matmul)
    note(run, f"{name}, times as fast as one mask", dense["seconds"] / ours["seconds"], ">= 1")


def head_case(run, work, *tensors):
    """Seconds of forward and backward, and what it needs besides the tensors."""
    before = torch.cuda.memory_allocated() / 1e9

    def both():
        output = work(*tensors)
        torch.autograd.grad(output, tensors[:2], output.detach())

    return {"seconds": seconds(run, both), "peak GB": peak_gb(run, both) - before}


def head(run):
    """The log-prob step of a row's every token: matmuls only, full logits, ours."""
    release(run)
    text, tokens, found = run.size.config.text_config, run.size.judged, {}
    hidden, weight = (
        (0.1 * torch.randn(n, text.hidden_size, device=run.device, dtype=run.dtype))
        .requires_grad_() for n in (tokens, text.vocab_size))
    targets = torch.randint(text.vocab_size, (tokens,), device=run.device)
    for name, work in {
            "matmuls only": lambda h, w, t: h @ w.T,
            "full logits": lambda h, w, t: (h @ w.T).float().log_softmax(-1).gather(1, t[:, None]),
            "ours": lambda h, w, t: policy.token_logprobs(h, w, t, 1.0, [0])[0]}.items():
        found[name] = attempt(run, head_case, work, hidden, weight, targets)
        note(run, f"head, {tokens} x {text.vocab_size}, {name}", found[name])
    times = found["ours"]["seconds"] / found["matmuls only"]["seconds"]
    note(run, "head, peak GB besides its inputs", found["ours"]["peak GB"], "<= 4")
    note(run, "head, time / that of its matmuls", times, "<= 1.4")


def moe_case(run, model, embeds):
    """Seconds of forward and backward."""
    def work():
        output = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        output.backward(embeds)

    return {"seconds": seconds(run, work, model.zero_grad)}


def moe(run):
    """Four layers with experts: grouped_mm, which is transformers' default, and one by one."""
    release(run)
    config, tokens = copy.deepcopy(run.size.moe), run.size.judged
    config.text_config.num_hidden_layers = 4
    with run.device:
        model = AutoModel.from_config(config.text_config, dtype=run.dtype).train()
        embeds = torch.randn(1, tokens, config.text_config.hidden_size, dtype=run.dtype)
    found, results = {}, []
    for kind in ("grouped_mm", "eager"):
        model.set_experts_implementation(kind)
        x = embeds.clone().requires_grad_()  # one layer: the next would route by what was rounded
        output = model.layers[0].mlp(x)
        results.append([output.detach(), *torch.autograd.grad(output, x, embeds)])
        found[kind] = attempt(run, moe_case, model, embeds)
        note(run, f"moe, 4 layers, {tokens} tokens, {kind}", found[kind])
    errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*results)]
    ours, loop = (case["seconds"] for case in found.values())
    share = 3 * forward_flops(config, [(tokens, [])]) / ours / run.matmul
    note(run, "moe, difference of output and gradient", max(errors), "<= 0.02")
    note(run, "moe, times as fast as one by one", loop / ours, ">= 8")
    note(run, "moe, share of the matmul rate", share, ">= 0.2")


def update_case(run, tokens, checkpointing):
    """An update on one row of T tokens, the optimizer's step included."""
    model = load(run, checkpointing)
    [row] = policy.build_rows(model, make_groups(run, *filling(tokens)), tokens)
    optimizer = policy.adamw(model, 1e-6, 0.999, 0.01)

    def step():
        objective(run, model, row).backward()
        policy.optimizer_step(model, optimizer, 1e-6, 1.0)

    taken, peak = seconds(run, step), peak_gb(run, step)
    # To time its parts is to wait for the GPU after each: that needs a pass of its own.
    parts = {"vision": model.model.visual, "text": model.model.language_model}
    begin = now(run)
    with forward_times(run, parts) as split:
        loss = objective(run, model, row)
    forward = now(run)
    loss.backward()
    backward = now(run)
    policy.optimizer_step(model, optimizer, 1e-6, 1.0)
    split |= {"head": forward - begin - sum(split.values()), "backward": backward - forward,
              "optimizer": now(run) - backward}
    share = row_flops(run.size.config, [row]) / taken / run.matmul
    return {"ms": 1e3 * taken, "share of the matmul rate": share, "peak GB": peak} | {
        f"{part} ms": 1e3 * value for part, value in split.items()}


def update(run):
    """With checkpointing and without; the better one is judged, as a small card must take the
    first."""
    shares = []
    for checkpointing, how in (True, "with"), (False, "without"):
        for tokens in run.size.tokens:
            found = attempt(run, update_case, tokens, checkpointing)
            note(run, f"update, {tokens} tokens, {how} checkpointing", found)
            if found and tokens == run.size.judged:
                shares.append(found["share of the matmul rate"])
    note(run, f"update, {run.size.judged} tokens, share of the matmul rate",
         max(shares, default=NAN), ">= 0.4")


def packing_case(run, prompt, response):
    """Seconds of forward and backward of the same responses in three ways; predicted gain."""
    model, budget = load(run), run.size.packed
    groups = make_groups(run, max(1, budget // (prompt + GROUP * response)), prompt, response)
    ways = {"shared": (groups, budget), "repeated": (split_up(groups), budget),
            "alone": (split_up(groups), prompt + response)}
    rows = {way: policy.build_rows(model, *how) for way, how in ways.items()}

    def work(way):
        for row in rows[way]:
            objective(run, model, row).backward()

    found = {way: seconds(run, lambda way=way: work(way), model.zero_grad) for way in ways}
    model.zero_grad()
    once, often = (row_flops(run.size.config, rows[way]) for way in ("shared", "alone"))
    return found | {"predicted gain": often / once}


def packing(run):
    """A prompt once for its responses or once for each: is the gain what the FLOPs predict?"""
    for prompt, response in run.size.shapes:
        found, name = attempt(run, packing_case, prompt, response), f"L {prompt}, R {response}"
        note(run, f"packing, {name}, seconds", found)
        for way, text, goal in (("alone", "one row per response", ">= 0.85"),
                                ("repeated", "rows that repeat the prompt", ">= 0.9")):
            gain = found[way] / found["shared"] / found["predicted gain"]
            note(run, f"packing, {name}, gain on {text} / predicted", gain, goal)


def tower_ms(run, model, groups):
    """{part: median milliseconds} of the vision tower's forward pass within the model's."""
    [row], found = policy.build_rows(model, groups, 10**9), []
    parts = {"tower": model.model.visual, "patch embed": model.model.visual.patch_embed}
    for _ in range(run.size.repeats + 1):
        with torch.no_grad(), forward_times(run, parts) as times:
            objective(run, model, row)
        found.append(times)
    return {part: 1e3 * median(times[part] for times in found[1:]) for part in parts}


def vision(run):
    """The patch embed, which is a matmul, against one (as a convolution it is more than 10 times
    as slow on some builds of PyTorch); the tower once a group, not once a response."""
    model, config = load(run), run.size.config.vision_config
    groups = make_groups(run, GROUP, *run.size.shapes[1])
    images = [int(np.prod(grid)) for group in groups for grid in group["grid"]]
    once, often = (tower_ms(run, model, g) for g in (groups, split_up(groups)))
    x, weight = (torch.randn(n, channels(config), device=run.device, dtype=run.dtype)
                 for n in (sum(images), config.hidden_size))
    matmul = 1e3 * seconds(run, lambda: F.linear(x, weight))
    note(run, "vision, once a group, ms", once)
    note(run, "vision, once a response, ms", often)
    note(run, "vision, share of the matmul rate", forward_flops(run.size.config, [], images)
         / (once["tower"] / 1e3) / run.matmul)
    note(run, "vision, patch embed / matmul", once["patch embed"] / matmul, "<= 3")
    note(run, "vision, gain of once a group", often["tower"] / once["tower"], ">= 4.5")


def sync(run):
    """The trainer's weights in bf16, as an engine takes them; the floor reads fp32 and writes."""
    model = load(run)
    target = {name: torch.empty_like(tensor, dtype=torch.bfloat16)
              for name, tensor in policy.named_weights(model)}

    def work():
        for name, tensor in policy.named_weights(model):
            target[name].copy_(tensor)

    taken, floor = seconds(run, work), 6 * sum(x.numel() for x in target.values()) / run.copy
    note(run, "sync, seconds", taken)
    note(run, "sync, share of the copy rate", floor / taken)
    note(run, "sync, time / floor", taken / floor, "<= 10")


def adamw(run):
    """AdamW alone, and an optimizer step, which clips. The floor of the first is 28 bytes a weight:
    it reads weight, gradient and two moments, and writes all but the gradient."""
    model = load(run)
    optimizer, parameters = policy.adamw(model, 1e-6, 0.999, 0.01), list(model.parameters())

    def gradients():
        for p in parameters:
            p.grad = torch.full_like(p, 1e-3)

    def step():
        policy.optimizer_step(model, optimizer, 1e-6, 1.0)

    alone, whole = (seconds(run, work, gradients) for work in (optimizer.step, step))
    floor = 28 * sum(p.numel() for p in parameters) / run.copy
    note(run, "adamw, seconds", {"AdamW": alone, "with clipping": whole})
    note(run, "adamw, share of the copy rate", floor / alone, ">= 0.7")


PARTS = {part.__name__: part for part in (
    ceilings, attention, head, moe, update, packing, vision, sync, adamw)}


def run_parts(args, folder):
    """The parts, one after the other; returns the run with its results, which --out holds after
    each part: a machine that is taken away leaves what was measured."""
    cuda = torch.device(args.device).type == "cuda"
    run = SimpleNamespace(
        size=SIZES[args.size], device=torch.device(args.device), cuda=cuda, folder=folder,
        dtype=torch.bfloat16 if cuda else torch.float32, loaded=(None, None),
        random=np.random.default_rng(1), results={})
    torch.manual_seed(1)
    for name in [p for p in PARTS if p == "ceilings" or p in args.parts or not args.parts]:
        begin = now(run)
        if attempt(run, PARTS[name]) is not None:
            note(run, f"{name}, memory is enough", 0, ">= 1")
        print(f"{name}: {now(run) - begin:.0f} s", flush=True)
        if args.out:
            write_json(args.out, run)
    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no GPU; --size tiny --device cpu shows that the script runs")
    disable_progress_bar()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        run = run_parts(args, folder)
    print("", *(line(name, r, run.cuda) for name, r in run.results.items()), sep="\n")
    dist.destroy_process_group()
    sys.exit(run.cuda and any(map(missed, run.results.values())))


if __name__ == "__main__":
    main()
