"""Trainer and real vLLM side by side, under torchrun: what they say of the same tokens, as JSON.

    torchrun --nproc_per_node 2 tests/vllm_worker.py MODEL KIND RANKS ENGINE_ARGS OUT.json CHECK...

RANKS share one engine (tensor parallel). ENGINE_ARGS may also have a lora_rank."""

import json
import os
import sys
from functools import partial

import torch
import torch.distributed as dist
from tiny_models import groups, processor, settings

import common
import data
import policy
import rollout

TEMPERATURE = 0.9


def ask(engine, prompts, **sampling):
    sampling = {"group_size": 3, "temperature": TEMPERATURE, "max_tokens": 20} | sampling
    got = {id(p): responses for p, responses in rollout.generate(engine, prompts, **sampling)}
    return [prompt | {"responses": [r | {"advantage": 0.0} for r in got[id(prompt)]]}
            for prompt in prompts]


def gap(model, engine, asked):
    """Token mean of |vLLM's log-prob - the trainer's|."""
    total = tokens = 0.0
    for row in policy.build_rows(model, asked, 1000):
        with torch.no_grad():
            ours, _ = policy.logprobs(
                model, row, engine.patches(row["images"]), TEMPERATURE, engine.banned)
        total += ((ours - row["logprobs"]).abs() * row["mask"]).sum().item()
        tokens += row["mask"].sum().item()
    return total / tokens


def update(model, optimizer, engine, asked):
    """Two optimizer steps with a large learning rate: every tensor changes, the vision tower's
    too."""
    for _ in range(2):
        for row in policy.build_rows(model, asked, 1000):
            pixels = engine.patches(row["images"])
            logprobs, _ = policy.logprobs(model, row, pixels, TEMPERATURE, engine.banned)
            # Random weights: to raise or lower all would end in one token with probability 1.
            (logprobs * torch.randn(logprobs.shape)).sum().backward()
        norm = policy.optimizer_step(model, optimizer, 1e-2, 1.0)
        assert 0 < norm < float("inf"), f"no update: gradient norm {norm}"


def ids(asked):
    return [[r["ids"] for r in g["responses"]] for g in asked]


def send(engine, weights):
    """sync(), and what the CPU build forgets: it packs experts for its kernels only when they are
    loaded first, so that a reload leaves them unpacked (kernels of GPUs take them as they are)."""
    rollout.sync(engine, weights)
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    for layer in worker.model_runner.model.modules():
        if hasattr(layer, "w13_weight"):
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def check_gap(model, optimizer, engine, prompts):
    """Before and after two large steps, the same images asked again."""
    send(engine, policy.named_weights(model))
    first = ask(engine, prompts)  # fills every cache with what the old weights made
    result = {"before": gap(model, engine, first)}
    update(model, optimizer, engine, first)
    result["not sent"] = gap(model, engine, ask(engine, prompts))
    weights = policy.named_weights(model)
    send(engine, ((name, w) for name, w in weights if name != "lm_head.weight"))
    result["head not sent"] = gap(model, engine, ask(engine, prompts))
    send(engine, policy.named_weights(model))
    again = ask(engine, prompts)
    result["after"] = gap(model, engine, again)
    result["logprob"] = sum(sum(r["logprobs"]) for g in again for r in g["responses"])
    result["repeats"] = ids(again) == ids(ask(engine, prompts))
    result["alone"] = [ids(ask(engine, [p]))[0] for p in prompts] == ids(again)
    shifted = ask(engine, [p | {"seed": p["seed"] + 1} for p in prompts])
    result["seeds"] = [g[1:] for g in ids(again)] == [g[:2] for g in ids(shifted)]
    stop_ids, engine.stop_ids = engine.stop_ids, {*range(0, 336, 30)}
    every = [r for g in ask(engine, prompts) for r in g["responses"]]
    result["reasons"] = sorted({r["finish_reason"] for r in every})
    result["ends"] = all((r["ids"][-1] in engine.stop_ids) == (r["finish_reason"] == "stop")
                         and not engine.stop_ids & {*r["ids"][:-1]}
                         and len(r["ids"]) == len(r["logprobs"]) <= 20 for r in every)
    engine.stop_ids = stop_ids
    return result


def check_traps(model, optimizer, engine, prompts):
    """What happens where a cure is left out; the last one leaves the engine useless."""
    result, first = {}, ask(engine, prompts)
    hot = {"temperature": 2.0, "max_tokens": 60}
    result["banned"] = sum(t in engine.banned for g in ids(ask(engine, prompts, **hot))
                           for r in g for t in r)
    banned, engine.banned = engine.banned, []
    result["not banned"] = sum(t in banned for g in ids(ask(engine, prompts, **hot))
                               for r in g for t in r)
    engine.banned, enqueue = banned, engine.llm.enqueue
    engine.llm.enqueue = partial(enqueue, mm_processor_kwargs={"min_pixels": 200 * 200})
    try:
        ask(engine, prompts[:1])
    except RuntimeError as error:
        result["resized"] = str(error)
    engine.llm.enqueue = enqueue
    ask(engine, prompts)
    update(model, optimizer, engine, first)
    for cache in (engine.llm, engine.llm.llm_engine):  # a sync that forgets the caches
        for name in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
            if hasattr(cache, name):
                setattr(cache, name, lambda: None)
    send(engine, policy.named_weights(model))
    try:
        result["old caches"] = gap(model, engine, ask(engine, prompts))
    except RuntimeError as error:
        result["old caches"] = str(error)
    return result


def main():
    path, kind, size, args, out, *checks = sys.argv[1:]
    device, args = common.start()[2], json.loads(args)
    cfg = settings(path, engine="vllm", tensor_parallel=int(size), gpu_memory_utilization=0.2,
                   lora_rank=args.pop("lora_rank", 0),
                   max_prompt_tokens=400, max_response_tokens=112, max_pixels=512 * 512,
                   engine_args={"enforce_eager": True} | args)
    model = policy.load(cfg, device)
    optimizer = policy.adamw(model, 1e-2, 0.999, 0.0)  # a forward would leave whole weights behind
    pixels = partial(data.patches, processor=processor(kind), device=device)
    engine = rollout.load(cfg, device, pixels)
    prompts = [g | {"seed": 1000 * i, "row": i} for i, g in enumerate(groups(processor(kind)))]
    result = {}
    for check in checks:
        result |= globals()[f"check_{check}"](model, optimizer, engine, prompts)
    if dist.get_rank() == 0:
        with open(out, "w") as f:
            json.dump(result, f)
    dist.barrier()
    os._exit(0)  # vLLM's threads would keep the process


main()
