"""Under torchrun: train_grpo.py whose rank 1 meets numbers that are not finite.

    POISON='{"2": "engine"}' poisoned.py CONFIG --key=value ...

POISON: {step: where}. "engine": a log-prob of the engine is NaN; "trainer": one of the forward pass
is; "engine inf", "trainer inf"; "gradient": a gradient is infinite, the loss is not.
"""
import json
import os
import sys

import torch

import common
import policy
import rollout
import train_grpo

plan, now = json.loads(os.environ["POISON"]), {"where": ""}
value = lambda: float("-inf") if "inf" in now["where"] else float("nan")  # noqa: E731
collect, generate, logprobs = train_grpo.collect, rollout.generate, policy.logprobs
optimizer_step, finish_step = policy.optimizer_step, common.finish_step


def poisoned_collect(run, step):
    now["where"] = plan.get(str(step), "") if run.rank == 1 else ""
    return collect(run, step)


def poisoned_generate(*args, **sampling):
    for i, (prompt, responses) in enumerate(generate(*args, **sampling)):
        if "engine" in now["where"] and i == 0:
            responses[0]["logprobs"][0] = value()
        yield prompt, responses


def poisoned_logprobs(*args):
    result, entropy = logprobs(*args)
    if "trainer" in now["where"] and torch.is_grad_enabled():
        first = torch.zeros_like(result, dtype=torch.bool)
        first[0, 0] = True
        result = torch.where(first, result * value(), result)
    return result, entropy


def poisoned_optimizer_step(model, *args):
    if now["where"] == "gradient":
        next(model.parameters()).grad.to_local().view(-1)[0] = float("inf")
    return optimizer_step(model, *args)


def poisoned_finish_step(*args):
    now["where"] = ""
    return finish_step(*args)


train_grpo.collect, rollout.generate, policy.logprobs = (
    poisoned_collect, poisoned_generate, poisoned_logprobs)
policy.optimizer_step, common.finish_step = poisoned_optimizer_step, poisoned_finish_step
sys.argv[0] = "train_grpo.py"
train_grpo.main()
os._exit(0)  # as it does
