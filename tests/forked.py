"""Runs scripts in processes that have imported torch, transformers and our modules: ranks.forked().

They are forked from this one, for importing takes longer than most runs do. A line on stdin asks
for one run: {"ranks": how many, 0 for a script alone, "command": the script and its arguments,
"env": more variables, "out" and "err": files for what is printed, "timeout": in seconds}. A line on
stdout answers with the exit code: 0, or that of the first rank to fail, after which the others are
ended, as torchrun does it."""

import importlib.util
import json
import os
import random
import runpy
import signal
import sys
import time

import numpy as np

OURS = ("common", "data", "loss", "policy", "reward", "rollout")
LAZY = ("datasets", "peft", "transformers.models.qwen3_vl.modeling_qwen3_vl", "vllm")
for name in (*OURS, *LAZY):
    if importlib.util.find_spec(name):  # vLLM: in an environment of its own
        importlib.import_module(name)


def become(rank, ranks, command, env, out, err):
    """What a rank has of torchrun or, if there are none, a script of the shell."""
    for stream, file in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), stream)
    if ranks:
        env = env | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GROUP_RANK": 0,
                     "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {k: str(v) for k, v in env.items()}
    random.seed()  # else what is random would be the same in all of them
    np.random.seed()
    sys.argv[:] = command
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))


def wait(children, timeout):
    """-> the exit code of all."""
    deadline, code = time.monotonic() + timeout, 0
    while children:
        for child in [*children]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            children.remove(child)
            if not code and (code := os.waitstatus_to_exitcode(status)):
                deadline = min(deadline, time.monotonic() + 30)
                [os.kill(other, signal.SIGTERM) for other in children]
        if time.monotonic() > deadline:
            [os.kill(child, signal.SIGKILL) for child in children]
            deadline, code = float("inf"), code or 124
        time.sleep(0.01)
    return code


def main():
    answers = os.fdopen(os.dup(1), "w")
    for job in map(json.loads, sys.stdin):
        timeout, children = job.pop("timeout"), []
        for rank in range(job["ranks"] or 1):
            if not (child := os.fork()):
                become(rank, **job)
                return runpy.run_path(sys.argv[0], run_name="__main__")
            children.append(child)
        print(wait(children, timeout), file=answers, flush=True)


if __name__ == "__main__":
    main()
