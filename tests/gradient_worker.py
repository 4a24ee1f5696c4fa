"""Under torchrun: gradients of one update for fixed groups, computed by the trainer's own code.

    gradient_worker.py MODEL OUT '[{"loss": "gspo"}, ...]' ['{"shard_ranks": 2}']

The last are settings with which the model is loaded. One case for each dict of settings. Beside
the trainer's own: old ("noise": an old policy that differs, "pass": the trainer's own pass before
the update), one_image (only the longest group, which rank 0 trains, has any).
Saves for each case {"gradient": {name: tensor}, "sums": what the trainer logs, "rows": number}.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import tiny_models
import torch

import common
import data
import policy
import train_grpo


def make_groups(one_image):
    """Six groups; the fourth has equal rewards. The same on all ranks."""
    processor = tiny_models.processor("qwen3_vl")
    groups = tiny_models.groups(processor) + tiny_models.groups(processor, seed=1)
    generator = torch.Generator().manual_seed(0)
    for slot, group in enumerate(groups):
        for i, r in enumerate(group["responses"]):
            r["logprobs"] = (-4 + 0.1 * torch.randn(len(r["ids"]), generator=generator)).tolist()
            r["advantage"] = 0.0 if slot == 3 else (-1) ** i * (1 + 0.1 * slot + 0.05 * i)
        group |= {"row": slot, "slot": slot, "scored": True, "kept": slot != 3}
        if one_image and slot:
            group |= {
                "ids": [i for i in group["ids"] if i not in tiny_models.BANNED],
                "images": [],
                "grid": [],
            }
    return groups

def gradient(model, reference, rank, world, options):
    settings = {
        "prompts_per_step": 6,
        "updates_per_step": 1,
        "temperature": 0.9,
        "kl_coef": 0.0,
        "tokens_per_micro_batch": 4096,
        **options,
    }
    run = SimpleNamespace(
        cfg=SimpleNamespace(**{**train_grpo.defaults, **settings}),
        times={},
        rank=rank,
        world=world,
        threads=ThreadPoolExecutor(1),
        train=make_groups(options.get("one_image")),
        model=model,
        reference=reference,
    )
    patches = partial(data.patches, processor=tiny_models.processor("qwen3_vl"))
    run.logprobs = lambda model, row: policy.logprobs(  # as set_up() does it
        model, row, patches(row["images"]), run.cfg.temperature, tiny_models.BANNED)
    update = train_grpo.plan_update(run, [g | {"images": None} for g in run.train])
    for row in update.rows if options.get("old") == "noise" else []:
        row["old_logprobs"] = row["logprobs"]
    passes = {"old_logprobs": model} if options.get("old") == "pass" else {}
    passes |= {"ref_logprobs": reference} if run.cfg.kl_coef else {}
    for key, other in passes.items():  # as train() does it
        for row in update.rows:
            with torch.no_grad():
                row[key], _ = run.logprobs(other, row)
    sums = [train_grpo.backward(run, update, row) for row in update.rows]
    result = {
        "sums": {k: float(sum(s[k] for s in sum(common.gather(sums), []))) for k in sums[0]},
        "rows": len(update.rows),
        "gradient": {
            n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad
        },
    }
    model.zero_grad()
    return result

def main():
    path, out, cases, *settings = sys.argv[1:]
    rank, world, device = common.start()
    data.prompt = lambda groups, slot: groups[slot]  # no file to read images from
    cfg = tiny_models.settings(path, **json.loads(*settings or ["{}"]))
    model = policy.load(cfg, device)
    reference = policy.load(cfg, device, model)
    results = [gradient(model, reference, rank, world, case) for case in json.loads(cases)]
    if rank == 0:
        torch.save(results, out)
    os._exit(0)  # as train_grpo.py does

if __name__ == "__main__":
    main()
