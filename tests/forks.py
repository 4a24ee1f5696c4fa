"""torchrun with its agent and ranks forked from this process, which has imported all that they do:
a start takes a second, not twelve on each of three processes. The agent, the ranks' code and what a
signal does to them are the real ones. Or, real=True, started as a user does."""
import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from ranks import ROOT
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

sys.path.insert(0, str(ROOT))

import train_dapo
import train_grpo

TRAINERS = {"train_grpo.py": train_grpo, "train_dapo.py": train_dapo}
TORCHRUN = "--nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0".split()
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def fork(function, log=None):
    """Run it in a forked process, the leader of a session; returns what Popen would."""
    sys.stdout.flush()
    if not (pid := os.fork()):
        code = 1
        try:
            os.setsid()
            for number in SIGNALS:  # as after an exec
                signal.signal(number, signal.SIG_DFL)
            if log:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
            function()
            code = 0
        except SystemExit as why:  # as the interpreter does
            code = why.code if isinstance(why.code, int) else int(why.code is not None)
            if isinstance(why.code, str):
                print(why.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)
    while os.getpgid(pid) != pid:  # a signal to its group must find it
        time.sleep(0.0005)
    process = subprocess.Popen.__new__(subprocess.Popen)
    process.__dict__.update(
        pid=pid, args=[], returncode=None, stdin=None, stdout=None,
                             stderr=None, _child_created=True, _waitpid_lock=threading.Lock())
    return process


def rank(args, env):
    """What torchrun would start: python -u train_grpo.py and its arguments, or train_dapo.py."""
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(args[2:])
    TRAINERS[args[2]].main()


def agent(command):
    """torchrun with these arguments, its ranks forked."""
    if "SHIFT_CLOCK" in os.environ:
        ctypes.CDLL(None).shift_clock(1)
    sys.argv = ["torchrun", *command]
    subprocess_handler.SubprocessHandler._popen = lambda self, args, env: fork(
        lambda: rank(args, env))
    torch_run.main()


def launch(command, log, env, real=False):
    """torchrun of two ranks, its output appended to log; -> what Popen would return."""
    command, env = [*map(str, command)], {"OMP_NUM_THREADS": "1", **env}
    os.chdir(ROOT)
    if not real:
        def start():
            os.environ.update(env)
            agent([*TORCHRUN, *command])
        return fork(start, log)
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, *command],
            env={**os.environ, **env}, stdout=file, stderr=file, start_new_session=True)


def children(pid):
    """The ids of a process's children, oldest first: torchrun's are the ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after[1]) == pid and after[0] != "Z":
                found.append(int(folder.name))
    return sorted(found)


def kill(*pids, number=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
