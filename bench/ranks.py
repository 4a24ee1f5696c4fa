"""An update on two ranks against one, a thread each, on a model whose arithmetic dominates.

    python bench/ranks.py

The same four groups (L = 400, five responses of 160 tokens) in rows of two: one rank trains two
rows, two ranks train one each, and FSDP moves every weight and gradient between them. Both runs
are there all the time and take turns. Seconds of the clock: two idle cores are needed. Model:
bench/updates.py. The ranks are started with the variables that torchrun sets.
"""

import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import updates

import train_grpo

GOAL, GOAL_GRADIENT = 1.7, 1e-4
PROMPTS, SIZE, SIDE, PROMPT, RESPONSE = 4, 5, 16, 400, 160


def rank(case, asked):
    """A worker, one of a run's ranks: each command is an update; a path also saves its gradient."""
    run = updates.set_up(
        case["folder"], SIDE, out_dir=f"{case['folder']}/out_{case['world']}",
        prompts_per_step=PROMPTS, group_size=SIZE, max_prompt_tokens=PROMPT,
        max_response_tokens=RESPONSE, tokens_per_micro_batch=2 * (PROMPT + SIZE * RESPONSE))
    groups = updates.make_groups(run, updates.given(PROMPTS, SIZE, RESPONSE))
    gradient = {}
    run.optimizer.register_step_pre_hook(lambda *_: gradient.update(
        {n: p.grad.full_tensor() for n, p in run.model.named_parameters()}) if path else None)
    for path, reply in asked:
        dist.barrier()
        begin = time.perf_counter(), time.process_time()
        train_grpo.train(run, groups)
        seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
        if path and run.rank == 0:
            torch.save(gradient, path)
        reply(clock=seconds[0], processor=seconds[1])


def start(folder, world):
    """A run's workers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [updates.start(
        __file__, "rank", {"folder": folder, "world": world}, RANK=str(i), LOCAL_RANK=str(i),
        WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost",
        MASTER_PORT=str(port)) for i in range(world)]


def main():
    updates.print_machine()
    with tempfile.TemporaryDirectory() as folder:
        length = updates.make_start(folder, PROMPTS, PROMPT, SIDE)
        runs = {world: start(folder, world) for world in (1, 2)}
        for worker in sum(runs.values(), []):
            updates.listen(worker)
        saved = {world: Path(folder, f"gradient_{world}") for world in runs}
        for world, workers in runs.items():  # a first update warms up, too
            updates.ask(workers, str(saved[world]))
        one, two = (torch.load(path, weights_only=True) for path in saved.values())
        norm = torch.stack([g.norm() for g in one.values()]).norm()
        gap = (torch.stack([(g - two[n]).norm() for n, g in one.items()]).norm() / norm).item()
        times = {world: [] for world in runs}
        for _ in range(5):
            for world, workers in runs.items():
                replies = updates.ask(workers, "")
                times[world].append([max(r[k] for r in replies) for k in ("clock", "processor")])
        updates.end(sum(runs.values(), []))
    print(f"{PROMPTS} groups: {length} prompt tokens, {SIZE} responses of {RESPONSE}")
    print("ranks | update, s of the clock | of the busiest rank's processor")
    clock, busy = ({w: statistics.median(t[i] for t in times[w]) for w in runs} for i in (0, 1))
    for world in runs:
        print(f"{world:5d} | {clock[world]:22.2f} | {busy[world]:31.2f}")
    print(f"gradient, relative difference: {gap:.1e} (goal <= {GOAL_GRADIENT})")
    print(f"processor, one rank / the busier one of two: {busy[1] / busy[2]:.2f} (no goal)")
    print(f"two ranks, times faster than one: {clock[1] / clock[2]:.2f} (goal >= {GOAL})")
    sys.exit(not (clock[1] / clock[2] >= GOAL and gap <= GOAL_GRADIENT))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        updates.work({"rank": rank})
    else:
        main()
