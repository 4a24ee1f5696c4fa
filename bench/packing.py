"""What packed rows gain, and how little they waste.

    python bench/packing.py

Gain. Forward and backward of a group as one packed row against one row for each response, by the
same code; prompts are text, L tokens, G responses have 96. L + G R tokens stand in place of
G (L + R). The prediction is their ratio, and the goal is a share of it, for the head sees each
response token, and each response token its prompt, in both. Part of the gain is the fixed cost of a
row; "copies" is without it: one row for the group, in which each response has a prompt of its own.
Seconds are the processor's. Model: bench/updates.py.

Waste. Rows for 8 ranks as an update makes them, of the prompts in ../shared/data (real images, the
published grid rule, configs/prompt.txt) with 5 responses each, lognormal lengths (sigma 0.6),
12,288 tokens a row. Useful: a prompt once and its responses. Processed: all tokens of all rows,
prompts repeated in further rows and rows of weight 0 included. Attention also processes padding.
"Operations" counts that, in multiplications of Qwen3-VL-2B's decoder: what the useful tokens need
over what the rows cost by the shapes that policy.packed_attention really hands to the kernel. (The
half of a response's own square that its mask hides counts as needed: most kernels compute it.)
Imbalance: the tokens of the rank with the most / their mean.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import updates
from transformers import AutoConfig, AutoModelForImageTextToText

import data
import policy
import reward
import tiny
import train_grpo

R, RATIOS, SIZES = 96, (0.5, 2, 8), (2, 5, 8)
GOAL_GAIN, GOAL_USEFUL, GOAL_BALANCE, GOAL_GRADIENT = 0.85, 0.95, 1.02, 1e-4
DATA = Path(updates.ROOT, "../shared/data/medix_real_train.parquet")
RANKS, GROUP_SIZE, SIGMA, ROW = 8, 5, 0.6, 12_288
CASES = (300, 4), (300, 16), (300, 64), (1500, 64)  # median response, groups a rank
# Multiplications of the 2B's decoder, 28 layers: of a token, of a pair (its score, its value).
COST = 28 * np.array([2048 * (4096 + 2048) + 3 * 2048 * 6144, 2 * 16 * 128])


def make_group(length, group_size, generator):
    """A group without images: ids (L,), responses of (R,) random ids."""
    def ids(n):
        return torch.randint(updates.FIRST, 5000, (n,), generator=generator).tolist()

    return {"ids": ids(length), "images": [], "grid": [], "responses": [
        {"ids": ids(R), "logprobs": [0.0] * R, "advantage": float(i % 2) - 0.5}
        for i in range(group_size)]}


def train(run, groups, tokens_per_row):
    """Seconds of making rows, forward and backward; the gradient stays in place."""
    run.model.zero_grad()
    begin = time.process_time()
    responses = sum(len(g["responses"]) for g in groups)
    update = SimpleNamespace(tokens=responses * R, responses=responses)
    for row in policy.build_rows(run.model, groups, tokens_per_row):
        train_grpo.backward(run, update, row)
    return time.process_time() - begin


def gradient(run):
    return torch.cat([p.grad.full_tensor().flatten() for p in run.model.parameters()])


def gain(run, repeats=3):
    """Print the table of gains and its goals; returns whether they were met."""
    print("L/R |  G | packed, s | one row each, s | copies, s | predicted | gain | share | "
          "share of copies'")
    found, largest = [], 0.0
    for ratio, size in itertools.product(RATIOS, SIZES):
        length = round(ratio * R)
        group = make_group(length, size, torch.Generator().manual_seed(size))
        alone = [group | {"responses": [r]} for r in group["responses"]]
        cases = ([group], length + size * R), (alone, length + R), (alone, size * (length + R))
        train(run, *cases[1])  # warms up
        expected = gradient(run)
        train(run, *cases[0])
        largest = max(largest, ((gradient(run) - expected).norm() / expected.norm()).item())
        times = [[train(run, *case) for case in cases] for _ in range(repeats)]
        packed, single, copies = map(statistics.median, zip(*times))
        predicted = size * (length + R) / (length + size * R)
        found.append((single / packed / predicted, copies / packed / predicted))
        print(f"{ratio:3} | {size:2d} | {packed:9.2f} | {single:15.2f} | {copies:9.2f} | "
              f"{predicted:9.2f} | {single / packed:4.2f} | {found[-1][0]:5.2f} | "
              f"{found[-1][1]:.2f}", flush=True)
    share, of_copies = map(min, zip(*found))
    print(f"gradients, largest relative difference: {largest:.1e} (goal <= {GOAL_GRADIENT})")
    print(f"gain of packed rows, least share of the predicted: {share:.2f} (goal >= {GOAL_GAIN})")
    print(f"the same without the fixed cost of rows: {of_copies:.2f} (no goal)")
    return share >= GOAL_GAIN and largest <= GOAL_GRADIENT


def real_prompts(folder):
    """[ids and grid of each question], with a tokenizer trained on the questions and the prompt."""
    template = data.read_template(updates.ROOT / "configs/prompt.txt")
    tiny.build(folder, [*data.read_rows(DATA)[0]["problem"], template])
    cfg = SimpleNamespace(prompt_template=template, max_prompt_tokens=4352, max_bad_rows=0.01,
                          min_pixels=262_144, max_pixels=3_932_160)
    loaded = data.load(DATA, data.load_processor(str(folder)), cfg, reward.TAGS)
    return [data.read_row(loaded, i)[0] | {"images": []} for i in loaded.keep]


def needed(group):
    """What the tokens of a group have to see: (tokens, pairs of a query and a key)."""
    length, lengths = len(group["ids"]), [len(r["ids"]) for r in group["responses"]]
    return np.array([length + sum(lengths),
                     length**2 / 2 + sum(n * (length + n) for n in lengths)])


def processed(row):
    """The same of a row, by the shapes of its calls of the attention kernel."""
    calls, length = [], row["input_ids"].numel()

    def kernel(query, key, value, causal_mask, **_):
        pairs = query.shape[2] * key.shape[2]
        calls.append(pairs / 2 if query.shape[2] == key.shape[2] else pairs)  # is_causal: half
        return torch.empty_like(query)

    x = torch.empty(1, 1, length, 1, device="meta")
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", kernel):
        policy.packed_attention(None, x, x, x, None, None, row["segments"])
    return np.array([length, sum(calls)])


def shares(prompts, model, median, groups_per_rank):
    """Print a row of the table; returns useful share of tokens, of operations, and imbalance."""
    rng, groups = np.random.default_rng(0), []
    for i in rng.integers(len(prompts), size=RANKS * groups_per_rank):
        sizes = np.clip(median * rng.lognormal(0, SIGMA, GROUP_SIZE), 1, 4096).astype(int)
        groups.append(prompts[i] | {"responses": [
            {"ids": [0] * n, "logprobs": [0.0] * n, "advantage": 1.0} for n in sizes]})
    ranks = [policy.build_rows(model, groups, ROW, rank, RANKS) for rank in range(RANKS)]
    most = len(ranks[0])  # on each rank, those of weight 0 included
    useful, real = sum(map(needed, groups)), sum(processed(r) for rows in ranks for r in rows)
    work = [sum(row["input_ids"].numel() for row in rows) for rows in ranks]
    tokens, operations = useful[0] / real[0], (useful @ COST) / (real @ COST)
    balance = max(work) / np.mean(work)
    print(f"{median:15d} | {groups_per_rank:13d} | {most:11d} | {tokens:14.3f} | "
          f"{operations:18.3f} | {balance:.3f}")
    return tokens, operations, balance


def waste(folder):
    """Print the table of useful shares and the goals; returns whether they were met."""
    prompts = real_prompts(folder)
    with torch.device("meta"):  # its position ids are wanted, not its weights
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    lengths = [len(p["ids"]) for p in prompts]
    print(f"\n{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, mean "
          f"{np.mean(lengths):.0f}; {RANKS} ranks, {ROW} tokens a row")
    print("response tokens | groups a rank | rows a rank | useful, tokens | useful, operations | "
          "imbalance")
    found = [shares(prompts, model, *case) for case in CASES]
    tokens, operations, balance = zip(*(x for x, (_, n) in zip(found, CASES) if n == 64))
    print(f"useful share of processed tokens: {min(tokens):.3f} (goal >= {GOAL_USEFUL})")
    print(f"useful share of operations: {min(operations):.3f} (goal >= {GOAL_USEFUL})")
    print(f"rank imbalance, 64 groups a rank: {max(balance):.3f} (goal <= {GOAL_BALANCE})")
    return min(*tokens, *operations) >= GOAL_USEFUL and max(balance) <= GOAL_BALANCE


def main():
    torch.set_num_threads(1)
    updates.print_machine("transformers")
    with tempfile.TemporaryDirectory() as folder:
        updates.make_start(folder, 1, 100, 4)
        run = updates.set_up(folder, 4, prompts_per_step=1, max_prompt_tokens=1000,
                             max_response_tokens=R, tokens_per_micro_batch=2000)
        met = gain(run)
        if DATA.exists():
            met &= waste(Path(folder) / "tokenizer")
        else:
            print("useful share, rank imbalance: not run, ../shared/data is not there")
    sys.exit(not met)


if __name__ == "__main__":
    main()
