"""Real torchrun processes over gloo, for tests, and the same without torchrun's start."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent


def environment(more=None):
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **paths, **(more or {})}


def completed(run, check):
    if check and run.returncode:
        raise AssertionError(
            f"exit code {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-5000:]}")
    return run


def torchrun(ranks, *command, check=True, timeout=600, env=None):
    """Run a Python script on `ranks` processes; returns the completed process."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
              "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    run = subprocess.run([sys.executable, *launch, *map(str, command)], cwd=ROOT, text=True,
                         capture_output=True, timeout=timeout, env=environment(env))
    return completed(run, check)


@functools.cache
def forker():
    """The process of forked.py, one for all tests in ours; it ends with us."""
    process = subprocess.Popen(
        [sys.executable, "tests/forked.py"], cwd=ROOT, text=True, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.communicate)
    return process


def forked(ranks, *command, check=True, timeout=600, env=None):
    """As torchrun() or, with 0 ranks, a script alone, but nothing is imported anew, which takes
    longer than most runs do. For what a script does; how it is started, torchrun() tests."""
    command, env = [*map(str, command)], env or {}
    if ranks:  # as torchrun's agent has it
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, **env}
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        job = {"ranks": ranks, "command": command, "env": env, "timeout": timeout}
        print(json.dumps(job | {"out": out.name, "err": err.name}), file=forker().stdin, flush=True)
        code = int(forker().stdout.readline())
        run = subprocess.CompletedProcess(command, code, out.read(), err.read())
    return completed(run, check)
