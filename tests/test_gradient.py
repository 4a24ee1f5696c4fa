"""The gradient for the same responses depends neither on ranks nor on rows, and nothing hangs."""

import json

import pytest
import tiny_models
import torch
from ranks import torchrun

LOSSES = [
    ("grpo", "token", 0.01),
    ("grpo", "sequence", 0.0),
    ("gspo", "token", 0.0),
    ("gspo", "sequence", 0.0),
]
SMALL_ROWS = {"tokens_per_micro_batch": 60}
CASES = {
    f"{loss} {mean} {rows}": {
        "loss": loss,
        "loss_mean": mean,
        "kl_coef": kl,
        "old": "noise",
        **(SMALL_ROWS if rows == "small" else {}),
    }
    for loss, mean, kl in LOSSES
    for rows in ("large", "small")
}
CASES |= {
    "plain": {},
    "uneven": SMALL_ROWS,
    "not capped": {"old": "noise"},
    "capped": {"old": "noise", "engine_is_cap": 0.5},
    "no image on rank 1": {"one_image": True},
    "first update": {"old": "pass", "clip_ratio_low": 0.0, "clip_ratio_high": 0.0, "kl_coef": 0.01},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{ranks: {case: result}} from one torchrun with 1 and one with 2 processes."""
    folder = tmp_path_factory.mktemp("gradient")
    model = tiny_models.save("qwen3_vl", folder / "model")
    got = {}
    for ranks in (1, 2):
        torchrun(
            ranks,
            "tests/gradient_worker.py",
            model,
            folder / "out.pt",
            json.dumps(list(CASES.values())),
        )
        got[ranks] = dict(zip(CASES, torch.load(folder / "out.pt")))
    return got


def assert_same(a, b):
    for name, ours in a["gradient"].items():
        theirs = b["gradient"][name]
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12, name
    for name in a["sums"].keys() - {"packed", "alone"}:  # these count the rows
        ours = a["sums"][name]
        assert ours == pytest.approx(b["sums"][name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("loss, mean, kl", LOSSES)
def test_same_gradient_for_any_number_of_ranks_and_rows(results, loss, mean, kl):
    one = results[1][f"{loss} {mean} large"]
    assert one["rows"] == 1 and results[1][f"{loss} {mean} small"]["rows"] >= 4
    assert max(g.norm() for g in one["gradient"].values()) > 0.1
    assert_same(results[1][f"{loss} {mean} small"], one)
    assert_same(results[2][f"{loss} {mean} large"], one)
    assert_same(results[2][f"{loss} {mean} small"], one)


def test_token_and_sequence_mean_differ(results):
    """The comparison above would pass for a loss_mean that is ignored; this one would not."""
    token, sequence = (
        results[1][f"gspo {mean} large"]["gradient"] for mean in ("token", "sequence")
    )
    assert any((token[n] - sequence[n]).norm() > 0.05 * token[n].norm() for n in token)


@pytest.mark.parametrize("ranks", [1, 2])
def test_first_ratio_is_exactly_one(results, ranks):
    """With clip bounds of 0 a ratio that differs in its last bit would count as clipped."""
    sums = results[ranks]["first update"]["sums"]
    assert sums["clip_frac/low"] == sums["clip_frac/high"] == 0
    assert sums["loss/kl"] == 0  # and the reference is the same model


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_is_cap_weighs_tokens(results, ranks):
    """There the old log-probs are the engine's: the ratio is 1, and every token weighs the cap."""
    capped, whole = results[ranks]["capped"], results[ranks]["not capped"]
    for name, gradient in whole["gradient"].items():
        torch.testing.assert_close(capped["gradient"][name], 0.5 * gradient)
    assert capped["sums"]["clip_frac/engine_is"] == capped["sums"]["tokens"] > 0
    assert capped["sums"]["loss/policy"] == pytest.approx(0.5 * whole["sums"]["loss/policy"])
    assert "clip_frac/engine_is" not in whole["sums"]


def test_uneven_work_does_not_hang(results):
    assert_same(results[2]["uneven"], results[1]["plain"])


def test_a_rank_without_images_does_not_hang(results):
    gradients = results[2]["no image on rank 1"]["gradient"]
    assert all(g.isfinite().all() for g in gradients.values())
    assert gradients["model.visual.blocks.0.mlp.linear_fc1.weight"].norm() > 0  # rank 0 has images
