"""300 steps on two ranks: nothing grows that should not, and nothing is lost on the way.
    python tests/soak.py [--steps 300] [--no-restarts] [--start FOLDER]
First in one life of the processes, with only a judge that is away now and then; then with a fault
every 20 steps, after which the run is started again; both must log the same. Of each rank, after
each step: memory, open files, threads; of out_dir: its size. Prints a table; exit code 1 where
something grows by more than 5 % after the warm-up."""
import os

if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import contextlib
import itertools
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import forks
import lives
from judge_server import free_port

EVERY, WARM_UP = 20, 50
SETTINGS = dict(prompts_per_step=2, group_size=2, max_response_tokens=8, val_prompts=2,
                validate_every=100, save_every=5, judge="http", judge_check=False)


def look(pid):
    """A process's memory in MB, open files, threads."""
    status = dict(line.split(":", 1) for line in
                  Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(status["VmRSS"].split()[0]) / 1e3, len(os.listdir(f"/proc/{pid}/fd")),
            int(status["Threads"]))


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def strike(room, what, life, ranks):
    """A fault; all but the judge's end this life."""
    if what == "judge":
        forks.kill(room.server.pid)
        room.server.wait()
        time.sleep(1.5)
        lives.open_judge(room)
    elif what == "sigterm":
        forks.kill(life.pid, number=signal.SIGTERM)
    else:
        victims = {"rank": ranks[:1], "all": [*ranks, life.pid], "torchrun": [life.pid]}[what]
        forks.kill(*victims)
        if what == "torchrun":
            time.sleep(0.3)
            forks.kill(*ranks)


def live(room, kinds, samples, deadline):
    """One life, a fault of `kinds` every EVERY steps; its exit code. samples gets (age in steps,
    step, rank, memory, files, threads)."""
    room.lives += 1
    log = room.folder / f"life_{room.lives}.log"
    life, path = forks.launch(lives.command(room), log, room.env, room.real), room.out
    first = seen = lives.newest(path) if room.lives > 1 else -1
    ranks = []
    try:
        while life.poll() is None:
            assert time.monotonic() < deadline, f"step {seen} only: {log.read_text()[-1000:]}"
            lines = room.out / "metrics.jsonl"
            step = lines.read_bytes().count(b"}\n") - 1 if lines.exists() else -1
            ranks = ranks if len(ranks) == 2 else forks.children(life.pid)
            if step > seen and "step" in log.read_text():  # the old lines are cut by now
                seen = step
                for rank, pid in enumerate(ranks):
                    with contextlib.suppress(OSError, KeyError):  # it ends just now
                        samples.append((step - max(first, 0), step, rank, *look(pid)))
                if step >= room.due and step < room.settings["steps"]:
                    room.due, room.faults = room.due + EVERY, room.faults + 1
                    strike(room, next(kinds), life, ranks)
            time.sleep(0.002)
        return life.wait()
    finally:
        forks.kill(life.pid, *ranks)


def soak(room, kinds, patience):
    """A run from its first step to its last, over as many lives as its faults make of it."""
    samples, deadline, kinds = [], time.monotonic() + patience, itertools.cycle(kinds)
    room.due = EVERY  # each step that is due is hit once, though a restart may come by again
    lives.open_judge(room)
    try:
        while live(room, kinds, samples, deadline):
            assert room.lives <= room.settings["steps"] // EVERY + 3, "restarts do not help"
    finally:
        forks.kill(room.server.pid)
    return samples


def growth(room, samples, warm):
    """{what: (early, late, largest change in %)} per rank: in one life its first steps after the
    warm-up and its last; over many lives each one's mean at the same age, first and last."""
    table = {}
    for rank, (column, name) in itertools.product((0, 1), enumerate(("MB", "files", "threads"), 3)):
        if room.lives == 1:
            values = [s[column] for s in samples if s[2] == rank and s[0] >= warm]
            part = max(len(values) // 5, 1)
            early, late = statistics.mean(values[:part]), statistics.mean(values[-part:])
            spread = [late]
        else:
            lives, last = [[]], -1  # a new life begins where the age falls
            for s in (s for s in samples if s[2] == rank):
                lives += [[]] if s[0] <= last else []
                last = s[0]
                lives[-1] += [s[column]] if EVERY // 2 <= s[0] <= EVERY else []
            spread = [statistics.mean(values) for values in lives if len(values) > 2]
            early, late = spread[0], spread[-1]
        table[f"rank {rank} {name}"] = early, late, 100 * (max(spread) / early - 1)
    return table


def check_files(room, steps):
    """out_dir has grown as it should: a file a step, and no more checkpoints than are kept."""
    lines = lives.step_lines(room.out)
    assert [*lines] == [*range(steps + 1)], f"steps in metrics.jsonl: {[*lines]}"
    names = {f.name for f in (room.out / "rollouts").iterdir()}
    assert names == {f"step_{i:06d}.jsonl" for i in range(1, steps + 1)} | {
        f"val_{i:06d}.jsonl" for i in range(steps + 1) if i % 100 == 0 or i == steps}
    per_step = [len(lines[i]) + (room.out / f"rollouts/step_{i:06d}.jsonl").stat().st_size
                for i in range(1, steps + 1) if i % 100]
    half = len(per_step) // 2
    ratio = sum(per_step[half:]) / sum(per_step[:half])
    assert 0.8 < ratio < 1.25, f"the second half's files are {ratio:.2f} times as large"
    folders = sorted(f.name for f in (room.out / "checkpoints").iterdir() if not f.is_symlink())
    best = os.readlink(room.out / "checkpoints/best")
    assert {*folders} == {f"step_{i:06d}" for i in (steps - 10, steps - 5, steps)} | {best}, folders
    one = size(room.out / f"checkpoints/step_{steps:06d}")
    total, kept = size(room.out), size(room.out / "checkpoints")
    assert kept <= len(folders) * one * 1.01
    rest = total - kept - sum(per_step) * steps / len(per_step)
    assert abs(rest) < 0.2 * sum(per_step) + 20_000, f"{rest} bytes are of nothing known"
    return f"{total / 1e6:.1f} MB: {len(folders)} checkpoints of {one / 1e6:.1f}, " \
           f"{sum(per_step) / len(per_step) / 1e3:.2f} kB a step"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--no-restarts", action="store_true", help="the first of the two runs only")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--patience", type=int, default=1200, help="seconds for each of the runs")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    start, failed, logged = args.start or lives.make_start(folder / "start"), [], {}
    lives.STEPS = args.steps
    plans = {"one life": ["judge"]}
    if not args.no_restarts:
        plans["with faults"] = ["rank", "sigterm", "judge", "all", "torchrun"]
    for name, kinds in plans.items():
        room = lives.new_room(folder / name.replace(" ", "_"), start, port=free_port(),
                               rng=random.Random(1), real=name == "one life")
        room.settings = SETTINGS | dict(
            steps=args.steps, judge_url=f"http://127.0.0.1:{room.port}/v1")
        room.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "60"
        begin = time.monotonic()
        samples = soak(room, kinds, args.patience)
        print(f"{name}: {args.steps} steps in {time.monotonic() - begin:.0f} s, {room.faults} "
              f"faults, {room.lives} lives, {check_files(room, args.steps)}", flush=True)
        print(f"{'':16}{'early':>10}{'late':>10}{'most, %':>10}")
        for what, (early, late, most) in growth(room, samples, WARM_UP).items():
            print(f"{what:16}{early:10.1f}{late:10.1f}{most:10.1f}", flush=True)
            failed += [f"{name}, {what}: +{most:.1f} %"] if most > 5 else []
        logged[name] = lives.contents(room).lines
    if len({*map(str, logged.values())}) > 1:
        failed.append("the run with faults has logged something else")
    if failed:
        sys.exit(f"{'; '.join(failed)}; see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
