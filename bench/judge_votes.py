"""The judge stage of eval.py against MediX-R1's scheme: one request at a time, a new connection for
each, three votes on both sides, a judge that takes 50 ms.

    python bench/judge_votes.py [--items 400] [--workers 128]

MediX-R1 with a pool of --workers is measured, too, as threads: its processes would share these
cores with the judge. The judge is a process of its own, the responses are made up."""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import requests
import torch.distributed as dist

sys.path.extend([str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")])
from judge_server import free_port

import common
import eval as evaluation
import reward

ROOT, GOAL = Path(__file__).parent.parent, 20


def one_by_one(url, items):
    """Three votes on each item, in one conversation, as MediX-R1 has it."""
    for item in items:
        prompt = reward.PROMPT % '{"question": "?", "truth": "%s", "answer": "%s"}' % (
            item["answer"], item["said"])
        messages = [{"role": "user", "content": prompt}]
        for _ in range(3):
            reply = requests.post(f"{url}/chat/completions", timeout=30, json={
                "model": "a", "temperature": 0, "max_tokens": 512, "messages": messages}).json()
            messages += [reply["choices"][0]["message"], {"role": "user", "content": "Again."}]


def judge_stage(url, items, folder):
    """eval.py's stage on the same answers; asserts that it asked for each vote."""
    cfg = common.load_config(evaluation.defaults, [
        str(ROOT / "configs/eval.py"), f"--judge_url={url}", "--judge_check=False"])
    run = SimpleNamespace(cfg=cfg, rank=0, world=1, folder=folder, rounds=3, judge=None,
                          items=items, tasks={"made_up": {"rating": False}})
    common.write_lines(folder / "responses.jsonl", [
        {"id": item["id"], "response": item["said"], "error": None} for item in items])
    evaluation.tidy(run)
    start = perf_counter()
    evaluation.judge(run)
    seconds = perf_counter() - start
    evaluation.tidy(run)
    lines = sum(run.judgements.values(), [])
    assert len(lines) == 3 * len(items) and not any(line["error"] for line in lines)
    return seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--workers", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.05)
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    items = [{"id": f"made_up/{i}", "task": "made_up", "asked": f"What is {i}?", "index": None,
              "answer": f"finding {i}", "said": f"something {i}"}
             for i in range(args.items)]
    port = free_port()
    url, few = f"http://127.0.0.1:{port}/v1", items[:max(1, args.items // 20)]
    server = subprocess.Popen([sys.executable, ROOT / "tests/eval_judge.py", str(port),
                               str(args.seconds)], stdout=subprocess.PIPE, text=True)
    try:
        server.stdout.readline()
        start = perf_counter()
        one_by_one(url, few)
        serial = (perf_counter() - start) / len(few)
        start = perf_counter()
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda item: one_by_one(url, [item]), items))
        workers = (perf_counter() - start) / len(items)
        with tempfile.TemporaryDirectory() as folder:
            ours = judge_stage(url, items, Path(folder)) / len(items)
    finally:
        server.kill()
    print(f"{args.items} items, 3 votes, a judge that takes {1000 * args.seconds:.0f} ms")
    for name, seconds in (("MediX-R1, one request at a time", serial),
                          (f"MediX-R1, {args.workers} workers", workers), ("eval.py", ours)):
        print(f"{name:32s} {1000 * seconds:8.2f} ms an item")
    print(f"{args.workers} workers / eval.py: {workers / ours:.2f}")
    print(f"judge stage, times faster: {serial / ours:.1f} (goal at least {GOAL})")
    sys.exit(serial / ours < GOAL)


if __name__ == "__main__":
    main()
