"""Runs scripts in processes that have imported torch, transformers and our modules: ranks.forked().

They are forked from this one, for importing takes longer than most runs do. A line on stdin asks
for one run: {"processes": [{"command": a script, or torchrun, and its arguments, "env": more
variables, "out" and "err": files for what is printed}, ...], "timeout": in seconds, "kill_at": all
are killed as soon as there is such a file, or null}. A line on stdout answers with the exit codes.
After the first that is not 0 the other processes are ended, as torchrun does it."""

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

import forks  # noqa: E402


def become(command, env, out, err):
    """What a process has that was started from a shell, or by torchrun's agent."""
    for stream, file in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), stream)
    os.environ |= {k: str(v) for k, v in env.items()}
    random.seed()  # else what is random would be the same in all of them
    np.random.seed()
    sys.argv[:] = command
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))


def run(command):
    if command[0] == "torchrun":
        return forks.agent(command[1:])
    runpy.run_path(command[0], run_name="__main__")


def wait(children, timeout, kill_at):
    """-> their exit codes, in order."""
    deadline, codes = time.monotonic() + timeout, dict.fromkeys(children)
    while None in codes.values():
        left = [child for child, code in codes.items() if code is None]
        for child in left:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if (code := os.waitstatus_to_exitcode(status)) and not any(codes.values()):
                    deadline = min(deadline, time.monotonic() + 30)
                    [os.kill(other, signal.SIGTERM) for other in left if other != child]
                codes[child] = code
        if time.monotonic() > deadline or (kill_at and os.path.exists(kill_at)):
            [os.kill(child, signal.SIGKILL) for child in left if codes[child] is None]
            deadline, kill_at = float("inf"), None
        time.sleep(0.005)
    return [*codes.values()]


def main():
    answers = os.fdopen(os.dup(1), "w")
    for job in map(json.loads, sys.stdin):
        children = []
        for process in job.pop("processes"):
            if not (child := os.fork()):
                become(**process)
                return run(process["command"])
            children.append(child)
        print(wait(children, **job), file=answers, flush=True)


if __name__ == "__main__":
    main()
