"""Real torchrun processes over gloo, for tests, and the same without torchrun's start."""

import atexit
import contextlib
import functools
import json
import os
import socket
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


def forked(ranks, *command, check=True, timeout=600, env=None, kill_at=None):
    """As torchrun() or, with 0 ranks, a script alone, but nothing is imported anew, which takes
    longer than most runs do. For what a script does; how it is started, torchrun() tests. All its
    processes are killed as soon as the file kill_at is there."""
    env, more = env or {}, [{}]
    if ranks:  # as torchrun's agent has it
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        more = [{"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "RANK": rank,
                 "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "GROUP_RANK": 0, "TORCHELASTIC_USE_AGENT_STORE": True} for rank in range(ranks)]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        codes = ask([{"command": [*map(str, command)], "env": one | env, "out": out.name,
                       "err": err.name} for one in more], timeout, kill_at)
        code = next(filter(None, codes), 0)
        run = subprocess.CompletedProcess(command, code, out.read(), err.read())
    return completed(run, check)


def forked_nodes(*commands, ranks=1, check=True, timeout=500, env=None):
    """Each command by an agent of torchrun of its own, with so many ranks, agents and ranks forked
    like those above; returns [(exit code, what it printed)]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        outs = [stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in commands]
        codes = ask([{"command": ["torchrun", "--nnodes", str(len(commands)), "--node_rank", str(i),
                                   "--nproc_per_node", str(ranks), "--master_addr", "localhost",
                                   "--master_port", str(port), *map(str, command)],
                       "env": env or {}, "out": out.name, "err": out.name}
                      for i, (command, out) in enumerate(zip(commands, outs))], timeout, None)
        done = [(code, out.read()) for code, out in zip(codes, outs)]
    assert not check or not any(codes), f"exit codes {codes}\n{done[0][1][-3000:]}"
    return done


def ask(processes, timeout, kill_at):
    """-> the exit codes of these processes of forked.py."""
    job = {"processes": processes, "timeout": timeout, "kill_at": kill_at and str(kill_at)}
    print(json.dumps(job), file=forker().stdin, flush=True)
    return json.loads(forker().stdout.readline())
