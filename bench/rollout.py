"""Sampling and scoring at once: what a slow judge costs, and what one pool of requests saves.

    python bench/rollout.py            # a tiny Qwen3-VL, the torch engine, a real HTTP judge

The lengths of the responses are lognormal (sigma 0.8, median 20 tokens, at most 300), as in
training, where a few responses are far longer than the rest: the head's logits are changed so that
each response stops where it should. All the rest is what a run does: train_grpo.sample().

- overlap: wall time of a round / max(time to sample it, requests * delay / judge_concurrency),
  for judges that take 5, 50 and 500 ms to reply. 1 means that the judge costs no time of its own.
- one pool: decoding steps of the engine for four synchronous mini-rollouts, each of which ends
  when its longest response does (as MediX-R1's dynamic sampling works), / those for one pool.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import data  # noqa: E402
import policy  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
import train_grpo  # noqa: E402

SIGMA, MEDIAN, LONGEST = 0.8, 20, 300
GOAL_OVERLAP, GOAL_POOL = 1.1, 2.5
SERVER = """
import sys, time
sys.path.insert(0, "tests")
from judge_server import judge
with judge(rule=lambda *_: "NO", delay=float(sys.argv[1])) as server:
    print(server.url, flush=True)
    while sys.stdin.readline():  # how many has it answered?
        print(len(server.requests), flush=True)
"""


@contextlib.contextmanager
def slow_judge(delay):
    """A judge in a process of its own; yields its url and a function that counts its requests."""
    with subprocess.Popen([sys.executable, "-c", SERVER, str(delay)], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        url = process.stdout.readline().strip()

        def count():
            process.stdin.write("?\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield url, count
        process.stdin.close()


def make_run(start, prompts, group_size):
    """A run of train_grpo.py as far as sampling goes."""
    cfg = common.load_config(train_grpo.defaults, [
        str(ROOT / "configs/tiny.py"), f"--model={start}/model", f"--train_data={start}/data",
        f"--group_size={group_size}", f"--max_response_tokens={LONGEST}", "--judge_check=False"])
    processor = data.load_processor(cfg.model)
    run = SimpleNamespace(
        cfg=cfg, rank=0, world=1, times={}, processor=processor, scorer=reward.load(cfg),
        train=data.load(cfg.train_data, processor, cfg, reward.TAGS), state={"updates": 0},
        threads=ThreadPoolExecutor(4))
    run.rows = run.train.keep[:prompts]
    run.engine = rollout.load(cfg, torch.device("cpu"), partial(data.patches, processor=processor))
    rollout.sync(run.engine, policy.named_weights(policy.load(cfg, torch.device("cpu"))))
    run.engine.version = 0
    return run


def force_lengths(engine, lengths):
    """Make response i of the next generate() lengths[i] tokens long; returns its steps' counter."""
    stop, steps = min(engine.stop_ids), SimpleNamespace(count=0)
    engine.lengths = torch.as_tensor(lengths)

    def change(head, _, logits):  # (B, 1, V)
        logits = logits.index_fill(2, torch.tensor([stop]), -1e30)
        if len(logits) == len(engine.lengths):  # not the prompts, of which there are fewer
            steps.count += 1
            logits[engine.lengths <= steps.count + 1, 0, stop] = 1e30
        return logits

    return engine.model.lm_head.register_forward_hook(change), steps


def sample(run, rows, lengths):
    """Seconds and decoding steps of one round."""
    hook, steps = force_lengths(run.engine, lengths)
    began = time.perf_counter()
    groups = train_grpo.sample(run, run.train, rows, 1, group_size=run.cfg.group_size,
                               temperature=run.cfg.temperature)
    seconds = time.perf_counter() - began
    hook.remove()
    got = [len(r["ids"]) for g in groups for r in g["responses"]]
    assert got == [*lengths], "the responses are not as long as they should be"
    return seconds, steps.count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.start()
    with tempfile.TemporaryDirectory() as start:  # a model that knows nothing: no answer is right
        subprocess.run([sys.executable, "tiny.py", "--out", start, "--rows", "256", "--iterations",
                        "1"], cwd=ROOT, check=True, capture_output=True)
        run = make_run(start, args.prompts, args.group_size)
    n = args.prompts * args.group_size
    rng = np.random.default_rng(1)
    lengths = np.clip(MEDIAN * rng.lognormal(0, SIGMA, n), 3, LONGEST).astype(int)
    ok = overlap(run, lengths, args.repeats)
    pooled, quarter = sample(run, run.rows, lengths)[1], args.prompts // 4
    minis = [sample(run, run.rows[i * quarter : (i + 1) * quarter],
                    lengths[i * quarter * args.group_size : (i + 1) * quarter * args.group_size])[1]
             for i in range(4)]
    print(f"decoding steps: {pooled} in one pool, {' + '.join(map(str, minis))} in four rounds")
    saved = sum(minis) / pooled
    print(f"one pool, times fewer engine steps: {saved:.2f} (goal >= {GOAL_POOL})")
    dist.destroy_process_group()
    sys.exit(not (ok and saved >= GOAL_POOL))


def overlap(run, lengths, repeats):
    """Print the table and the line of the goal; returns whether it was met."""
    cfg, exact = run.cfg, run.scorer
    print(f"{len(lengths)} responses of {lengths.mean():.0f} tokens, {cfg.judge_concurrency} "
          "requests at a time; seconds, medians")
    print("judge, ms | requests | sampling | requests * delay / concurrency | wall | overlap")
    worst = 0
    for delay in (0.005, 0.05, 0.5):
        with slow_judge(delay) as (url, count):
            cfg.judge, cfg.judge_url, alone, walls = "http", url, [], []
            for _ in range(repeats):  # alternating: this machine may be busy with something else
                run.scorer = exact
                alone.append(sample(run, run.rows, lengths)[0])
                run.scorer = reward.load(cfg)
                before = count()
                walls.append(sample(run, run.rows, lengths)[0])
                asked = count() - before
        judging = asked * delay / cfg.judge_concurrency
        ratio = median(wall / max(a, judging) for wall, a in zip(walls, alone))  # of neighbours
        worst = max(worst, ratio if delay <= 0.05 else 0)
        print(f"{1e3 * delay:9.0f} | {asked:8d} | {median(alone):8.2f} | {judging:30.2f} | "
              f"{median(walls):4.2f} | {ratio:.2f}")
    print(f"overlap, judges of 5 and 50 ms: {worst:.2f} (goal <= {GOAL_OVERLAP})")
    return worst <= GOAL_OVERLAP


if __name__ == "__main__":
    main()
