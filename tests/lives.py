"""One run that is broken and started again, for faults.py and soak.py: its folder, its lives, and
what must be the same as in the unbroken run."""
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import SkipTest

import forks
import numpy as np
from judge_server import judge
from ranks import ROOT
from safetensors.numpy import load_file  # torch's threads would not survive a fork

STEPS = 8
SETTINGS = dict(steps=STEPS, prompts_per_step=2, group_size=4, val_prompts=2, save_every=1,
                max_response_tokens=20, val_temperature=0.0, validate_every=4, keep_checkpoints=3,
                embed_soft=True)
DAPO = dict(keep="reward", max_rounds=3, overlong_buffer_tokens=8)


def new_room(folder, start, **more):
    """A place for one run: its folder and command, and what has happened so far."""
    folder.mkdir()
    room = SimpleNamespace(folder=folder, out=folder / "run", start=start, faults=0, lives=0,
                           env={}, settings={}, real=False, trainer="train_grpo.py")
    room.__dict__.update(more)
    return room


def command(room):
    settings = dict(model=room.start / "model", train_data=room.start / "data",
                    val_data=f"{room.start}/data@val", out_dir=room.out)
    settings |= SETTINGS | (DAPO if room.trainer == "train_dapo.py" else {}) | room.settings
    return [room.trainer, "configs/tiny.py", *(f"--{k}={v}" for k, v in settings.items())]


# --- what a run has -------------------------------------------------------------------------------


def step_lines(out):
    """{step: line} of metrics.jsonl, the whole ones; a step must not come twice."""
    path = out / "metrics.jsonl"
    text = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [(json.loads(x)["step"], x) for x in text if x.endswith(b"}\n")]
    assert len(dict(found)) == len(found), f"a step is there twice: {[s for s, _ in found]}"
    return dict(found)


def is_whole(folder):
    """Our own check: the manifest names all files, and with their sums."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return bool(manifest) and {"state.json"} < set(manifest) and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def checkpoints(out):
    """The folders of all whole checkpoints, oldest first."""
    return [f for f in sorted((out / "checkpoints").glob("step_??????")) if is_whole(f)]


def newest(out):
    """The step from which a restart must go on: that of `latest`, or of the newest whole one."""
    latest = (out / "checkpoints/latest").resolve()
    found = [latest] if is_whole(latest) else checkpoints(out)
    return int(found[-1].name[-6:]) if found else -1


def contents(room):
    """All of a finished run that must not depend on faults."""
    lines = {step: {k: v for k, v in json.loads(line).items()
                    if not k.startswith(("time/", "perf/"))}
             for step, line in step_lines(room.out).items()}
    last = room.out / f"checkpoints/step_{STEPS:06d}"
    weights = {f"{f.name}:{k}": v for f in sorted(last.glob("*.safetensors"))
               for k, v in load_file(f).items()}
    rollouts = {f.name: f.read_bytes() for f in (room.out / "rollouts").glob("*.jsonl")}
    return SimpleNamespace(lines=lines, weights=weights, rollouts=rollouts)


def compare(room, whole):
    """AssertionError, unless this run is the unbroken one."""
    ours, last = contents(room), room.out / "checkpoints/latest"
    assert [*ours.lines] == [*whole.lines], f"steps in metrics.jsonl: {[*ours.lines]}"
    for step, line in whole.lines.items():
        wrong = {k: (ours.lines[step].get(k), v) for k, v in line.items()
                 if ours.lines[step].get(k) != v}
        assert ours.lines[step] == line, f"step {step}, (ours, unbroken): {wrong}"
    for name in ("rollouts", "weights"):
        a, b = getattr(ours, name), getattr(whole, name)
        assert a.keys() == b.keys(), f"{name}: {a.keys() ^ b.keys()}"
        wrong = [k for k in a if not np.array_equal(a[k], b[k])]
        assert not wrong, f"{name} differ: {wrong}"
    assert os.readlink(last) == f"step_{STEPS:06d}" and is_whole(last)


# --- lives ----------------------------------------------------------------------------------------


def moment(room, first=0):
    """When to strike: seconds after the start, or after a step's line, rollouts, or folder."""
    what = room.rng.choice(["start", "line", "line", "rollouts", "partial", "partial"])
    seconds = {"start": 14 if room.real else 4, "line": 0.4, "rollouts": 0.1, "partial": 0.08}[what]
    step = room.rng.randrange(max(first, 1), STEPS)
    return what if not first else "line", step, room.rng.uniform(0, seconds)


def reach(room, life, moment):
    """Wait for the moment; False: the run has ended before."""
    what, step, seconds = moment
    names = {"rollouts": f"rollouts/step_{step:06d}.jsonl",
             "partial": f"checkpoints/step_{step:06d}.partial"}
    until = time.monotonic() + 150
    while life.poll() is None and time.monotonic() < until:
        if what == "start" or (step in step_lines(room.out) if what == "line" else
                               (room.out / names[what]).exists()):
            time.sleep(seconds)
            return life.poll() is None
        time.sleep(0.001)
    return False


def play(room, when=None, hit=None, patience=150):
    """One life of the run, hit(life) at a moment: exit code and output, whether it was hit. What
    was logged up to the newest whole checkpoint is still there afterwards."""
    kept = {s: x for s, x in step_lines(room.out).items() if s <= newest(room.out)}
    room.lives, struck = room.lives + 1, False
    log = room.folder / f"life_{room.lives}.log"
    life = forks.launch(command(room), log, room.env, room.real)
    try:
        if hit and reach(room, life, when):
            room.faults, struck = room.faults + 1, True
            hit(life)
        code = life.wait(patience)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"no end after {patience} s: {log.read_text()[-2000:]}") from late
    finally:
        if life.poll() is None:
            forks.kill(*forks.children(life.pid), life.pid)
            life.wait()
    after = step_lines(room.out)
    lost = [step for step, line in kept.items() if after.get(step) != line]
    assert not lost, f"steps {lost} were saved and are lost, or were logged again"
    return SimpleNamespace(code=code, text=log.read_text(), hit=struck)


def finish(room):
    """Start it again: it must end well, and go on from where it was."""
    step, life = newest(room.out), play(room)
    assert life.code == 0, f"the restart fails: {life.text[-3000:]}"
    found = re.findall(r"continuing .* after step (\d+)", life.text)
    assert found == [str(step)] * (step >= 0), f"not from {step}: {found}"


def advice(life, *words):
    """The run has ended with one line that has all the words; after SIGTERM each rank says it."""
    lines = [*{x for x in life.text.splitlines() if x.startswith("error: ")}]
    assert life.code, "it ended as if all were well"
    assert len(lines) == 1, f"not one line of advice: {lines}\n{life.text[-3000:]}"
    assert all(str(w) in lines[0] for w in words), f"{words} are not all in: {lines[0]}"


# --- what is around a run ------------------------------------------------------------------------


def make_start(folder):
    """The model of tiny.py, barely warmed up."""
    tiny = [sys.executable, "tiny.py", "--out", folder, "--rows", "64", "--iterations", "40"]
    subprocess.run(tiny, cwd=ROOT, check=True, capture_output=True)
    return folder


def unbroken(folder, start, trainer):
    room = new_room(folder, start, trainer=trainer)
    life = play(room)
    assert life.code == 0, life.text
    whole = contents(room)
    assert [*whole.lines] == [*range(STEPS + 1)]
    learnt = sum("grad_norm" in line for line in whole.lines.values())
    assert learnt > STEPS // 2, f"only {learnt} steps have an update: nothing to lose"
    return whole


@contextlib.contextmanager
def small_disk(room, *options):
    """room.out on a disk of 64 MB in memory. SkipTest where this user may not mount one."""
    disk = room.folder / "disk"
    disk.mkdir()
    kind = ",".join(["size=64m", *options])
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", kind, "none", disk], capture_output=True)
    if done.returncode:
        raise SkipTest(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        room.out = disk / "run"
        yield disk
    finally:
        if sys.exc_info()[0] not in (None, SkipTest):  # a loss: keep what there is
            shutil.copytree(disk, room.folder / "disk_as_it_was", symlinks=True)
        subprocess.run(["umount", "-l", disk], check=True)


def harm(path, how):
    """Damage a file as disks and people do."""
    content = bytearray(path.read_bytes())
    if how == "deleted":
        return path.unlink()
    if how == "a bit":
        content[len(content) // 2] ^= 4
    path.write_bytes(content if how == "a bit" else content[:len(content) // 2 * (how == "half")])


def open_judge(room):
    """A judge at room.port, in a process that can be killed: room.server."""
    def rule(*_):
        with open(room.folder / "asked", "a") as f:
            f.write("?")
        return "NO"  # as the exact match says of what is not equal

    def serve():
        with judge(rule=rule, port=room.port):
            signal.pause()

    room.server = forks.fork(serve)
