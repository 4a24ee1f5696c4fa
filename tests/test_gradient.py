"""The gradient for the same responses depends neither on ranks nor on rows, and nothing hangs."""

import json

import pytest
import tiny_models
import torch
from ranks import forked

LOSSES = [
    ("grpo", "token", 0.01),
    ("grpo", "sequence", 0.0),
    ("gspo", "token", 0.0),
    ("gspo", "sequence", 0.0),
]
NEVER_CLIPPED = {"clip_ratio_low": 1.0, "clip_ratio_high": 1e9, "clip_ratio_dual": 1e9}
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
    # Clipping off, so that the loss is the ratio times the advantage.
    "engine's": {"old_logprobs": "engine", **NEVER_CLIPPED},
    "engine's, capped": {"old_logprobs": "engine", "engine_is_cap": 0.7, **NEVER_CLIPPED},
    "not in the loss, capped": {"engine_is_cap": 0.7, **NEVER_CLIPPED},
    "no image on rank 1": {"one_image": True},
    "first update": {"old": "pass", "clip_ratio_low": 0.0, "clip_ratio_high": 0.0, "kl_coef": 0.01},
}


SOME = ["plain", "uneven", "grpo token small", "no image on rank 1", "first update"]
LAYOUTS = {  # name: ranks, settings of policy.load
    1: (1, {}),
    2: (2, {}),
    "2 x 2": (4, {"shard_ranks": 2}),
    "offload": (2, {"offload": True}),
    "adapter on 1": (1, {"lora_rank": 4}),
    "adapter on 2": (2, {"lora_rank": 4}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """layout -> {case: result}, made when asked for."""
    folder, got = tmp_path_factory.mktemp("gradient"), {}
    model = tiny_models.save("qwen3_vl", folder / "model")

    def result(layout):
        if layout not in got:
            ranks, settings = LAYOUTS[layout]
            names = SOME if settings else list(CASES)
            forked(
                ranks,
                "tests/gradient_worker.py",
                model,
                folder / "out.pt",
                json.dumps([CASES[name] for name in names]),
                json.dumps(settings),
            )
            got[layout] = dict(zip(names, torch.load(folder / "out.pt")))
        return got[layout]

    return result


def assert_same(a, b):
    for name, ours in a["gradient"].items():
        theirs = b["gradient"][name]
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12, name
    for name in a["sums"].keys() - {"packed", "alone", "flops"}:  # these count the rows
        ours = a["sums"][name]
        assert ours == pytest.approx(b["sums"][name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("loss, mean, kl", LOSSES)
def test_same_gradient_for_any_number_of_ranks_and_rows(results, loss, mean, kl):
    one = results(1)[f"{loss} {mean} large"]
    assert one["rows"] == 1 and results(1)[f"{loss} {mean} small"]["rows"] >= 4
    assert max(g.norm() for g in one["gradient"].values()) > 0.1
    assert_same(results(1)[f"{loss} {mean} small"], one)
    assert_same(results(2)[f"{loss} {mean} large"], one)
    assert_same(results(2)[f"{loss} {mean} small"], one)


def test_token_and_sequence_mean_differ(results):
    """The comparison above would pass for a loss_mean that is ignored; this one would not."""
    token, sequence = (
        results(1)[f"gspo {mean} large"]["gradient"] for mean in ("token", "sequence")
    )
    assert any((token[n] - sequence[n]).norm() > 0.05 * token[n].norm() for n in token)


@pytest.mark.parametrize("ranks", [1, 2])
def test_first_ratio_is_exactly_one(results, ranks):
    """With clip bounds of 0 a ratio that differs in its last bit would count as clipped."""
    sums = results(ranks)["first update"]["sums"]
    assert sums["clip_frac/low"] == sums["clip_frac/high"] == 0
    assert sums["loss/kl"] == 0  # and the reference is the same model


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_is_cap_weighs_tokens(results, ranks):
    """There the old log-probs are the engine's: the ratio is 1, and every token weighs the cap."""
    capped, whole = results(ranks)["capped"], results(ranks)["not capped"]
    for name, gradient in whole["gradient"].items():
        torch.testing.assert_close(capped["gradient"][name], 0.5 * gradient)
    assert capped["sums"]["clip_frac/engine_is"] == capped["sums"]["tokens"] > 0
    assert capped["sums"]["loss/policy"] == pytest.approx(0.5 * whole["sums"]["loss/policy"])
    assert "clip_frac/engine_is" not in whole["sums"]


@pytest.mark.parametrize("layout", ["2 x 2", "offload"])
def test_layouts_change_no_gradient(results, layout):
    """Shards within groups of ranks that are replicas of each other; weights on the CPU."""
    for case in SOME:
        assert_same(results(layout)[case], results({"offload": 2}.get(layout, 1))[case])


def test_an_adapters_gradient_depends_on_no_layout(results):
    one, two = results("adapter on 1"), results("adapter on 2")
    assert all(".lora_" in name for name in one["plain"]["gradient"])
    for case in SOME:
        assert_same(two[case], one[case])
    # It starts as 0: the model, and hence the gradient of B, is that of the whole model.
    name = "model.language_model.layers.1.mlp.down_proj"
    whole = results(1)["plain"]["gradient"][f"{name}.weight"]
    assert one["plain"]["sums"]["loss/policy"] == pytest.approx(
        results(1)["plain"]["sums"]["loss/policy"], abs=1e-6)
    assert one["plain"]["gradient"][f"{name}.lora_B.default.weight"].norm() > 0
    assert one["plain"]["gradient"][f"{name}.lora_A.default.weight"].norm() == 0 < whole.norm()


def test_the_engines_log_probs_as_the_old_ones(results):
    """What is capped is the same ratio, whether the loss has it in it or not: the trainer's over
    the engine's log-probs. In this case they are far apart."""
    engine, capped = results(1)["engine's"], results(1)["engine's, capped"]
    expected = results(1)["not in the loss, capped"]
    assert 0 < capped["sums"]["clip_frac/engine_is"] < capped["sums"]["tokens"]
    assert_same({"gradient": capped["gradient"], "sums": {}}, expected)
    names = engine["gradient"]
    assert any((names[n] - capped["gradient"][n]).norm() > 0.1 * names[n].norm() for n in names)


def test_uneven_work_does_not_hang(results):
    assert_same(results(2)["uneven"], results(1)["plain"])


def test_a_rank_without_images_does_not_hang(results):
    gradients = results(2)["no image on rank 1"]["gradient"]
    assert all(g.isfinite().all() for g in gradients.values())
    assert gradients["model.visual.blocks.0.mlp.linear_fc1.weight"].norm() > 0  # rank 0 has images
