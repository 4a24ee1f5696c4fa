"""How the GPU benchmark counts FLOPs, takes time and memory, and says what it found.

A run here is a namespace with .cuda (is it a GPU?), .size.repeats and .results."""

import contextlib
import gc
import json
import operator
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import transformers

NAN = float("nan")  # what is not known


def seen(segments):
    """Pairs of (token, token that it sees) of a packed row. segments: [(L, [R, ...])]"""
    return sum(p * p / 2 + sum(r * p + r * r / 2 for r in lengths) for p, lengths in segments)


def channels(vision):
    """Numbers in a patch."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def forward_flops(config, segments, images=()):
    """FLOPs that the forward pass of a packed row needs, all of matrix products.
    segments: [(L, [R, ...])], in tokens; images: patches of each."""
    text, vision = config.text_config, config.vision_config
    hidden, width = text.hidden_size, text.num_attention_heads * text.head_dim
    weights = 2 * hidden * (width + text.num_key_value_heads * text.head_dim)  # q and o, k and v
    if experts := getattr(text, "num_experts", 0):
        weights += hidden * (experts + 3 * text.moe_intermediate_size * text.num_experts_per_tok)
    else:
        weights += 3 * hidden * text.intermediate_size
    predicted = sum(sum(lengths) for _, lengths in segments)
    tokens = predicted + sum(prompt for prompt, _ in segments)
    flops = text.num_hidden_layers * (2 * tokens * weights + 4 * width * seen(segments))
    flops += 2 * hidden * text.vocab_size * predicted
    v, merge = vision.hidden_size, vision.spatial_merge_size**2
    block = 4 * v * v + 2 * v * vision.intermediate_size
    merger = merge * v * (merge * v + vision.out_hidden_size)  # one, and one for each deepstack
    mergers = merger * (1 + len(vision.deepstack_visual_indexes))
    return flops + sum(2 * n * (channels(vision) * v + vision.depth * (block + 2 * n * v)
                                + mergers / merge) for n in images)


def row_flops(config, rows):
    """FLOPs of forward and backward of rows: the backward pass has two products for each one."""
    return 3 * sum(forward_flops(config, row["segments"], row["grid"].prod(1).tolist())
                   for row in rows)


def note(run, name, value, goal=""):
    """Keep a number, or {name: number} as of now ({}: "OOM"), for the table; goal: ">= NUMBER"."""
    run.results[name] = {"value": dict(value) if isinstance(value, dict) else value, "goal": goal}


def missed(result):
    """Whether a result has a goal and misses it; nan does."""
    if not result["goal"]:
        return False
    sign, bound = result["goal"].split()
    return not {">=": operator.ge, "<=": operator.le}[sign](result["value"], float(bound))


def line(name, result, judged):
    """name: value (goal ...)"""
    value, goal = result["value"], result["goal"]
    said = f"{value:.4g}" if not isinstance(value, dict) else ", ".join(
        f"{k} {v:.4g}" for k, v in value.items()) or "OOM"
    verdict = ("MISSED" if missed(result) else "met") if judged else "not judged on a CPU"
    return f"{name}: {said}" + (f" (goal {goal}, {verdict})" if goal else "")


def write_json(path, run):
    """All numbers, nan as null, and what they were measured with."""
    numbers = json.dumps({k: r | {"missed": run.cuda and missed(r)}
                          for k, r in run.results.items()})
    Path(path).write_text(json.dumps({
        "device": torch.cuda.get_device_name(run.device) if run.cuda else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__,
        "numbers": json.loads(numbers, parse_constant=lambda _: None)}, indent=1))


def now(run):
    """Seconds, when all GPU work is done."""
    if run.cuda:
        torch.cuda.synchronize()
    return perf_counter()


def seconds(run, work, prepare=lambda: None):
    """Median seconds of work(), after prepare() each time; the first one, a warm-up, apart."""
    times = []
    for _ in range(run.size.repeats + 1):
        prepare()
        begin = now(run)
        work()
        times.append(now(run) - begin)
    return median(times[1:])


def peak_gb(run, work):
    """GB allocated while work() runs, at most; nan on a CPU."""
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9 if run.cuda else NAN


@contextlib.contextmanager
def forward_times(run, modules):
    """Yields {name: seconds} of modules' forward passes in the block. modules: {name: module}"""
    times, hooks = dict.fromkeys(modules, 0.0), []

    def add(name, sign):
        times[name] += sign * now(run)

    for name, module in modules.items():
        hooks += [module.register_forward_pre_hook(lambda *_, name=name: add(name, -1)),
                  module.register_forward_hook(lambda *_, name=name: add(name, 1))]
    yield times
    for hook in hooks:
        hook.remove()


def release(run):
    """Free the model."""
    run.loaded = None, None
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def attempt(run, case, *args):
    """What case(run, *args) returns or, if memory is too small, a dict of nan for every key."""
    try:
        return case(run, *args)
    except torch.OutOfMemoryError:
        pass  # leave first: the error's traceback holds the tensors
    release(run)  # half a backward pass leaves FSDP in no state to go on from
    return defaultdict(lambda: NAN)
