"""Trains a little under FSDP2 and saves as train_grpo.py does; says what the trainer then computes.

    torchrun --nproc_per_node 2 tests/merge_worker.py '[[MODEL, KIND, RUN, SETTINGS, CHECKPOINT]]'

Any number of such runs. SETTINGS: of tests/tiny_models.settings. With a CHECKPOINT, not "", nothing
is trained: it is loaded and saved again by as many ranks as there are. Beside RUN/checkpoints:
weights.safetensors, whole, under the trainer's names, and logprobs.json of every response of
tiny_models.groups()."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import groups, processor, settings

import common
import data
import policy


def logprobs(model, row, kind):
    """At temperature 1, no id banned: what other engines say of a prompt, too."""
    pixels = data.patches(row["images"], processor(kind))
    return policy.logprobs(model, row, pixels, 1.0, [])[0]


def work(device, path, kind, run, more, checkpoint):
    run, cfg = Path(run), settings(path, **more)
    model = policy.load(cfg, device)
    optimizer = policy.adamw(model, 1e-2, 0.999, 0.0)
    rows = policy.build_rows(model, groups(processor(kind)), 1000)
    if checkpoint:
        policy.load_checkpoint(checkpoint, model, optimizer)
    else:
        for step in range(2):  # large steps: every tensor moves far from the base model's
            torch.manual_seed(step)
            for row in rows:
                values = logprobs(model, row, kind)
                # Random weights: to raise or lower all would end in one token with probability 1.
                (values * torch.randn(values.shape)).sum().backward()
            norm = policy.optimizer_step(model, optimizer, 1e-2, 1.0)
            assert 0 < norm < float("inf"), f"no update: gradient norm {norm}"
    with torch.no_grad():
        found = [logprobs(model, row, kind)[row["mask"]].tolist() for row in rows]
    whole = dict(policy.named_weights(model))
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(vars(cfg)))
        (run / "logprobs.json").write_text(json.dumps(found))
        save_file({k: v.clone() for k, v in whole.items()}, run / "weights.safetensors")
    policy.save_checkpoint(run / "checkpoints", 100, model, optimizer, {"best": None}, keep=1)


device = common.start()[2]
for job in json.loads(sys.argv[1]):
    work(device, *job)
os._exit(0)  # as train_grpo.py does
