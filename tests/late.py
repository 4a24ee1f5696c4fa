"""train_grpo.py, when threads of its process group still receive as it ends: each frees a tensor,
which takes Python's lock, and a Python that is ending kills a thread that asks for that."""

import runpy
import threading
import time

import torch
import torch.distributed as dist

import common

finish_step = common.finish_step


def send(group):
    for _ in range(300):
        time.sleep(0.005)
        dist.broadcast(torch.ones(9), 1, group)


def busy_finish_step(run, metrics, validate, save, last=False):
    finish_step(run, metrics, validate, save, last)
    if last:
        group = dist.new_group()
        if run.rank == 0:
            run.busy = group
            for _ in range(300):
                dist.broadcast(torch.ones(9), 1, group, async_op=True)
        else:
            threading.Thread(target=send, args=[group], daemon=True).start()
            time.sleep(0.1)  # rank 0 ends first


common.finish_step = busy_finish_step
runpy.run_path("train_grpo.py", run_name="__main__")
