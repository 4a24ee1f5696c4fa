"""Numbers that are not finite, wherever they come from: the update is skipped, counted, and the
responses that it was of can be read; and groups of equal rewards move nothing."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from ranks import forked
from test_train import arguments, metrics, rollouts, tensors

import data
import policy
import train_grpo

POISON = {2: "engine", 4: "trainer", 6: "gradient", 8: "engine inf", 9: "trainer inf",
          10: "gradient"}


@pytest.fixture(scope="module")
def poisoned(start, tmp_path_factory):
    """Ten steps on two ranks of which rank 1 is poisoned in six; the last three are in a row."""
    out = tmp_path_factory.mktemp("poisoned") / "run"
    command = arguments(start, out, steps=12, prompts_per_step=2, group_size=3, keep_checkpoints=99,
                        validate_every=99, kl_coef=0.01)
    run = forked(2, "tests/poisoned.py", *command[1:], check=False,
                   env={"POISON": json.dumps(POISON)})
    return out, command, run


def test_the_update_is_skipped_and_counted(poisoned):
    out, _, run = poisoned
    assert [*metrics(out)] == list(range(11))
    for step, line in metrics(out).items():
        if step:
            assert line["updates_skipped"] == (step in POISON), step
            assert (line["grad_norm"] is None) == (step in POISON), step
            assert (line["loss/policy"] is None) == (POISON.get(step, "").startswith("trainer"))
    for step in POISON:
        assert f"warning: step {step}: an update was skipped, its gradient was " in run.stdout


def test_no_weight_and_no_moment_moves(poisoned):
    out = poisoned[0]
    for step in range(2, 11):
        before, after = tensors(out, step - 1), tensors(out, step)
        assert len(before) > 100 and before.keys() == after.keys()
        same = all(torch.equal(before[k], after[k]) for k in before)
        assert same == (step in POISON), step
        assert all(x.isfinite().all() for x in after.values())


def test_the_responses_are_on_file(poisoned):
    """The loss of exactly the poisoned response is null; a poisoned gradient is everybody's."""
    for step in range(1, 11):
        losses = [r["loss"] for g in rollouts(poisoned[0], f"step_{step:06d}")
                  for r in g["responses"]]
        where = POISON.get(step, "gradient")
        assert len(losses) == 6 and losses.count(None) == (where != "gradient"), (step, losses)
        text = (poisoned[0] / f"rollouts/step_{step:06d}.jsonl").read_text()
        assert "NaN" not in text and "Infinity" not in text, "no JSON"


def test_the_log_says_which_group_adds_most_to_the_loss(poisoned):
    for step, line in metrics(poisoned[0]).items():
        groups = rollouts(poisoned[0], f"step_{step:06d}") if step else []
        parts = {g["row"]: [r["loss"] for r in g["responses"]] for g in groups}
        hit = [row for row, losses in parts.items() if None in losses]
        if hit:
            assert line["loss/largest_row"] == hit[0] and line["loss/largest_share"] is None
        elif groups:
            sums = {row: abs(sum(losses)) for row, losses in parts.items()}
            assert line["loss/largest_row"] == max(sums, key=sums.get)
            share = max(sums.values()) / sum(sums.values())
            assert line["loss/largest_share"] == pytest.approx(share)


def test_after_three_in_a_row_the_run_stops_saved_and_can_go_on(poisoned):
    out, command, run = poisoned
    [said] = [x for x in run.stderr.splitlines() if x.startswith("error: ")]
    assert run.returncode and "3 updates in a row were not finite: lower learning_rate" in said
    assert os.readlink(out / "checkpoints/latest") == "step_000010"
    forked(1, *command)
    assert [*metrics(out)] == list(range(13))
    assert not any(metrics(out)[step]["updates_skipped"] for step in (11, 12))


def test_equal_rewards_move_no_weight(tmp_path, process_group, monkeypatch):
    """Nor does weight decay, nor the optimizer's memory of earlier steps, without a KL term."""
    path = tiny_models.save("qwen3_vl", tmp_path)
    cfg = tiny_models.settings(path, kl_coef=0.0, updates_per_step=1, tokens_per_micro_batch=4096,
                               learning_rate=1.0, weight_decay=0.5, max_response_tokens=24)
    processor = tiny_models.processor("qwen3_vl")
    run = SimpleNamespace(
        cfg=cfg, rank=0, world=1, times={}, gaps_over=0, threads=ThreadPoolExecutor(1), signals=[],
        peak=1e9, state={"step": 0, "updates": 0, "not_finite": 0}, train=None, reference=None,
        model=policy.load(cfg, torch.device("cpu")))
    cfg.max_engine_gap = 100.0
    run.logprobs = lambda model, row: policy.logprobs(
        model, row, data.patches(row["images"], processor), 1.0, tiny_models.BANNED)
    run.optimizer = policy.adamw(run.model, 1.0, 0.9, 0.5)

    def step(rewards):
        groups = tiny_models.groups(processor)
        for slot, group in enumerate(groups):
            group |= {"slot": slot, "row": slot, "problem": "", "solution": ""}
            for r, x in zip(group["responses"], rewards):
                r["parts"] = {"overall": x}
        train_grpo.add_advantages(groups)
        before = {n: p.full_tensor().clone() for n, p in run.model.named_parameters()}
        found = train_grpo.train(run, groups)
        moved = [n for n, p in run.model.named_parameters() if not torch.equal(
            p.full_tensor(), before[n])]
        return found, moved

    monkeypatch.setattr(data, "prompt", lambda split, row: {})  # the groups have their images
    assert step([0.1, 0.2, 0.3])[1], "this would pass with an optimizer that does nothing"
    for _ in range(2):
        found, moved = step([0.955, 0.955, 0.955])
        assert found == {"updates_skipped": 1} and not moved
    assert run.state["updates"] == 1
