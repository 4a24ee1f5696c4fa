"""A run cannot be lost: faults at random moments, restarts, and then all as in the unbroken run.
    python tests/faults.py --rounds 5 [--seed 1] [--only kill_rank,damaged] [--short]
Each kind below is a function that breaks one run in its way. A round's seed fixes what it does and
when, but for the machine's speed. Prints a table; exit code 1 and the folder kept on a loss."""
import os

import clock

if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    clock.preload()

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest

import forks
from judge_server import free_port
from lives import (
    STEPS,
    advice,
    checkpoints,
    compare,
    finish,
    harm,
    make_start,
    moment,
    new_room,
    newest,
    open_judge,
    play,
    small_disk,
    step_lines,
    unbroken,
)

# --- kinds: what happens to a run -----------------------------------------------------------------


def kill_rank(room):
    """One rank is killed, as by a lack of memory: torchrun ends the other, nothing saved is lost.
    Twice, so that a restart is hit as well."""
    for _ in range(room.twice):
        def hit(life):
            forks.kill(*room.rng.sample(forks.children(life.pid)[:2], 1))
        play(room, moment(room), hit)
    finish(room)


def kill_all(room):
    """Both ranks and torchrun are killed, as by a loss of power, but for the disk's cache."""
    for _ in range(room.twice):
        play(room, moment(room), lambda life: forks.kill(*forks.children(life.pid), life.pid))
    finish(room)


def kill_torchrun(room):
    """torchrun is killed, its ranks a moment later, as a scheduler does."""
    def hit(life):
        ranks = forks.children(life.pid)
        forks.kill(life.pid)
        time.sleep(room.rng.uniform(0, 0.5))
        forks.kill(*ranks)
    for _ in range(room.twice):
        play(room, moment(room), hit)
    finish(room)


def orphans(room):
    """torchrun is killed, its ranks hang, as on a disk that does not answer, and wake up when the
    run has been started again, which is refused as long as they live."""
    left, step = [], room.rng.randrange(1, 4)

    def hit(life):
        left.extend(forks.children(life.pid))
        forks.kill(life.pid)
        forks.kill(*left, number=signal.SIGSTOP)

    def wake():
        time.sleep(room.rng.uniform(2, 15))
        forks.kill(*left, number=signal.SIGCONT)
        time.sleep(room.rng.uniform(0.5, 5))
        forks.kill(*left)

    play(room, ("line", step, room.rng.uniform(0, 0.3)), hit)
    waker = forks.fork(wake)
    while waker.poll() is None:
        play(room)
    finish(room)


def twice(room):
    """The same command is started by mistake while the run goes on: the second one is refused."""
    second = SimpleNamespace(**vars(room))
    second.lives, code = 100, []

    def hit(life):
        ranks = forks.children(life.pid)
        forks.kill(*ranks, number=signal.SIGSTOP)  # it must not end before the other has begun
        code.append(play(second))
        forks.kill(*ranks, number=signal.SIGCONT)

    life = play(room, ("line", room.rng.randrange(1, 4), 0), hit)
    advice(code[0], room.out)
    assert life.code == 0, life.text[-3000:]


def sigterm(room, choose=lambda room, life: life.pid):
    """A scheduler's SIGTERM to torchrun: within 60 s the run ends, and all logged steps are saved.
    """
    room.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "60"
    room.settings["save_every"] = room.rng.choice([1, 2, 100])
    when = moment(room, room.rng.choice([0, 1, 1]))
    life = play(room, when, lambda life: forks.kill(choose(room, life), number=signal.SIGTERM), 60)
    logged = max(step_lines(room.out), default=-1)
    if life.hit and life.code and logged >= 0:
        advice(life, "SIGTERM")
        assert logged == 0 or newest(room.out) == logged, \
            f"step {logged} was logged, {newest(room.out)} saved"
    finish(room)


def sigterm_rank(room):
    """SIGTERM to one rank only: the others follow it."""
    sigterm(room, lambda room, life: room.rng.choice(forks.children(life.pid)[:2] or [life.pid]))


def disk_full(room):
    """The disk is full from some moment on: in a checkpoint, in metrics.jsonl or in rollouts. One
    line says so, what is saved stays whole, and with room again the run goes on."""
    with small_disk(room) as disk:
        ballast, leave = disk / "ballast", room.rng.choice([0, 50_000, 2_000_000, 6_000_000])

        def hit(life):
            while life.poll() is None:  # what is pruned is taken, too
                free = shutil.disk_usage(disk).free - leave
                if free > 0:
                    with open(ballast, "ab") as f, contextlib.suppress(OSError):
                        f.write(bytes(free))
                time.sleep(0.01)

        life = play(room, moment(room, room.rng.choice([0, 1])), hit)
        if life.hit and life.code:  # else its last file had room: compare() tells
            advice(life, "No space left", room.out)
        ballast.unlink(missing_ok=True)
        finish(room)
        compare(room, room.whole)


def readonly(room):
    """The disk cannot be written to, from the start or from some moment on: as if it were full."""
    late = room.rng.random() < 0.5
    with small_disk(room, *([] if late else ["ro"])) as disk:
        def mount(*options):
            return subprocess.run(["mount", *options, disk], capture_output=True).returncode

        def hit(life):  # by another mount over it: what is open for writing, the lock, stays so
            assert not mount("--bind", disk)
            while life.poll() is None and mount("-o", "remount,bind,ro"):  # a file is being written
                time.sleep(0.001)

        life = play(room, moment(room, 1), hit if late else None)
        if (life.hit and life.code) or not late:
            room.faults += not late
            advice(life, "Read-only file system", room.out)
        if life.hit:
            subprocess.run(["umount", disk], check=True)
        elif not late:
            assert not mount("-o", "remount,rw")
        finish(room)
        compare(room, room.whole)


def damaged(room):
    """A file of the checkpoint that `latest` names is damaged: said, and the one before is taken.
    All checkpoints are damaged: said, and nothing is touched."""
    when = ("line", room.rng.randrange(3, STEPS), room.rng.uniform(0, 0.2))
    play(room, when, lambda life: forks.kill(*forks.children(life.pid), life.pid))
    folders, n = checkpoints(room.out), newest(room.out)
    if room.rng.random() < 0.25:
        shutil.copytree(room.out, room.folder / "copy", symlinks=True)
        for folder in folders:
            harm(room.rng.choice(sorted(folder.iterdir())), "a bit")
        advice(play(room), *(folder.name for folder in folders))
        shutil.rmtree(room.out)
        shutil.copytree(room.folder / "copy", room.out, symlinks=True)
        return finish(room)
    folder = room.out / f"checkpoints/step_{n:06d}"
    file = room.rng.choice(sorted(folder.iterdir()))
    harm(file, room.rng.choice(["deleted", "a bit", "half", "empty"]))
    before = [f for f in folders if f != folder][-1]
    if room.rng.random() < 0.5:  # it is not the first time
        (folder.parent / f"damaged_{folder.name}").mkdir()
        (folder.parent / f"damaged_{folder.name}/state.json").touch()
    life = play(room)
    named = "" if file.name == "manifest.json" else file.name  # that may accuse another
    said = [x for x in life.text.splitlines() if named in x and folder.name in x]
    assert len(said) == 1 and before.name in said[0], f"not one line about it: {said}"
    assert life.code == 0, life.text[-3000:]
    assert f"after step {int(before.name[-6:])}" in life.text, "it went on from elsewhere"
    assert (folder.parent / f"damaged_{folder.name}").exists()


def latest(room):
    """The link `latest` is gone, or what it names: the newest whole checkpoint is taken."""
    when = ("line", room.rng.randrange(3, STEPS), room.rng.uniform(0, 0.2))
    play(room, when, lambda life: forks.kill(*forks.children(life.pid), life.pid))
    link = room.out / "checkpoints/latest"
    how = room.rng.choice(["gone", "target", "elsewhere"])
    if how == "target":
        shutil.rmtree(link.resolve())
    else:
        link.unlink()
    if how == "elsewhere":
        link.symlink_to("step_000099")
    step = newest(room.out)
    life = play(room)
    assert life.code == 0, life.text[-3000:]
    assert f"after step {step}" in life.text, f"it did not go on after step {step}, or did not say"


def wall_clock(room):
    """The wall clock jumps by hours, back and forth, and a rank is killed: nothing needs it."""
    if not clock.there():
        raise SkipTest("no gcc to build shift_clock.c with")
    room.env["SHIFT_CLOCK"] = "1"
    life = play(room, moment(room), lambda life: forks.kill(*forks.children(life.pid)[:1]))
    room.faults += not life.hit
    finish(room)


def judge_out(room):
    """The judge is away for a while: this costs time, nothing else."""
    def hit(life):
        forks.kill(room.server.pid)
        room.server.wait()
        time.sleep(2 if room.short else 120)
        open_judge(room)

    room.port = free_port()
    room.settings |= dict(judge="http", judge_url=f"http://127.0.0.1:{room.port}/v1",
                          judge_check=False)
    open_judge(room)
    try:
        life = play(room, moment(room, 1), hit, 400)
        assert life.code == 0, life.text[-3000:]
        assert (room.folder / "asked").exists(), "nobody was asked"
    finally:
        forks.kill(room.server.pid)


KINDS = {f.__name__: f for f in (
    kill_rank, kill_all, kill_torchrun, orphans, twice, sigterm, sigterm_rank, disk_full, readonly,
    damaged, latest, wall_clock, judge_out)}


def play_round(kind, name, args, start, whole):
    """One round -> its row of the table: faults, restarts, what was lost or why it was skipped."""
    room = new_room(Path(args.folder, name), start, rng=random.Random(f"{args.seed} {name}"),
                    whole=whole, trainer=args.trainer, short=args.short)
    room.twice, room.real = (1, False) if args.short else (2, name.endswith(("3", "7")))
    row, begin = SimpleNamespace(kind=kind, name=name, lost="", skipped=""), time.monotonic()
    try:
        KINDS[kind](room)
        if kind not in ("disk_full", "readonly"):  # their disk is gone
            compare(room, whole)
    except SkipTest as why:
        row.skipped = str(why)
    except Exception:
        row.lost = traceback.format_exc()
        print(f"LOST: {name}, seed {args.seed}, {room.folder}\n{row.lost}", flush=True)
    row.faults, row.restarts = room.faults, max(room.lives - 1, 0)
    row.seconds = time.monotonic() - begin
    print(f"{name}: {row.skipped or ('LOST' if row.lost else 'ok')}, {row.faults} faults, "
          f"{row.restarts} restarts, {row.seconds:.0f} s", flush=True)
    if not row.lost:
        shutil.rmtree(room.folder, ignore_errors=True)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--trainer", default="train_grpo.py", help="or train_dapo.py")
    parser.add_argument("--start", type=Path, help="what tiny.py has made; made anew if not given")
    parser.add_argument("--short", action="store_true", help="forks only, a judge away for 2 s")
    parser.add_argument("--json", type=Path, help="write the rounds here, too")
    args = parser.parse_args()
    args.folder = tempfile.mkdtemp(prefix="faults_")
    start = args.start or make_start(Path(args.folder, "start"))
    whole = unbroken(Path(args.folder, "unbroken"), start, args.trainer)
    rows = [play_round(kind, f"{kind}_{i}", args, start, whole)
            for i in range(args.rounds) for kind in args.only.split(",")]
    print(f"{'kind':14}{'rounds':>8}{'faults':>8}{'restarts':>10}{'losses':>8}{'seconds':>9}")
    for kind in args.only.split(","):
        mine = [r for r in rows if r.kind == kind]
        sums = [sum(r.faults for r in mine), sum(r.restarts for r in mine),
                sum(bool(r.lost) for r in mine), sum(r.seconds for r in mine)]
        print(f"{kind:14}{len(mine):8}{sums[0]:8}{sums[1]:10}{sums[2]:8}{sums[3]:9.0f}",
              *{f" skipped: {r.skipped}" for r in mine if r.skipped})
    if args.json:
        args.json.write_text(json.dumps([vars(r) for r in rows]))
    if lost := [r.name for r in rows if r.lost]:
        sys.exit(f"lost: {', '.join(lost)}; see {args.folder}")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
