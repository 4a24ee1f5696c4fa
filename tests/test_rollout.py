"""The torch engine against the trainer's own log-probs, and the promises of generate()."""

import json
import math
from functools import partial

import pytest
import tiny_models
import torch

import data
import policy
import rollout

CPU = torch.device("cpu")


def make_engine(kind, folder):
    path = tiny_models.save(kind, folder, tied=kind != "qwen3_vl_moe")
    model = policy.load(tiny_models.settings(path), CPU)
    pixels = partial(data.patches, processor=tiny_models.processor(kind))
    engine = rollout.load(tiny_models.settings(path), CPU, pixels)
    rollout.sync(engine, policy.named_weights(model))
    prompts = [
        g | {"seed": 1000 * i}
        for i, g in enumerate(tiny_models.groups(tiny_models.processor(kind)))
    ]
    return model, engine, prompts


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, process_group):
    return make_engine("qwen3_vl", tmp_path_factory.mktemp("qwen3"))


def run(engine, prompts, **settings):
    settings = {"group_size": 3, "temperature": 0.9, "max_tokens": 20, **settings}
    got = {p["seed"]: responses for p, responses in rollout.generate(engine, prompts, **settings)}
    return [got[p["seed"]] for p in prompts]


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_logprobs_are_the_trainers(kind, tmp_path, process_group):
    model, engine, prompts = make_engine(kind, tmp_path)
    # Two updates with a large learning rate and a sync: a weight that is not sent would show.
    optimizer = policy.adamw(model, 1e-2, 0.999, 0.0)
    for _ in range(2):
        for row in policy.build_rows(model, prompts, 1000):
            policy.logprobs(model, row, engine.patches(row["images"]), 1.0, engine.banned)[
                0
            ].sum().backward()
        policy.optimizer_step(model, optimizer, 1e-2, 1.0)
    stale = run(engine, prompts)
    rollout.sync(engine, policy.named_weights(model))
    fresh = run(engine, prompts)

    def gap(groups):
        scored = [
            p | {"responses": [r | {"advantage": 0.0} for r in g]} for p, g in zip(prompts, groups)
        ]
        worst = []
        for row in policy.build_rows(model, scored, 1000):
            with torch.no_grad():
                ours, _ = policy.logprobs(
                    model, row, engine.patches(row["images"]), 0.9, engine.banned
                )
            worst.append(((ours - row["logprobs"]).abs() * row["mask"]).sum() / row["mask"].sum())
        return max(worst)

    assert gap(fresh) < 1e-4
    assert gap(stale) > 1e-2, "the check above would pass without a sync"


def test_a_prompt_gets_the_same_responses_alone_and_in_a_batch(qwen3):
    """Left padding and what else is decoded must not show."""
    _, engine, prompts = qwen3
    together = run(engine, prompts * 2)
    for i, prompt in enumerate(prompts):
        alone = run(engine, [prompt])[0]
        for a, b, c in zip(alone, together[i], together[i + len(prompts)]):
            assert a["ids"] == b["ids"] == c["ids"]
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-5)


def test_seeds(qwen3):
    _, engine, prompts = qwen3
    first = run(engine, prompts[:1])[0]
    assert len({tuple(r["ids"]) for r in first}) == 3, "responses of a group must differ"
    shifted = run(engine, [prompts[0] | {"seed": prompts[0]["seed"] + 1}])[0]
    assert [r["ids"] for r in shifted[:2]] == [r["ids"] for r in first[1:]]  # seed + i


def test_first_group_comes_before_the_last_response_ends(qwen3):
    _, engine, prompts = qwen3
    steps = []
    hook = engine.model.model.register_forward_hook(lambda *_: steps.append(1))
    stop_ids, engine.stop_ids = engine.stop_ids, set(range(0, 200, 7))
    stream = rollout.generate(engine, prompts * 3, group_size=2, temperature=1.0, max_tokens=60)
    next(stream)
    at_first = len(steps)
    rest = list(stream)
    hook.remove()
    engine.stop_ids = stop_ids
    assert len(rest) == 8 and at_first < len(steps) - 3


def test_stop_ids_end_a_response_and_are_part_of_it(qwen3):
    _, engine, prompts = qwen3
    stop_ids, engine.stop_ids = engine.stop_ids, set(range(0, 200, 9))
    responses = [r for g in run(engine, prompts, max_tokens=12, group_size=8) for r in g]
    stops, engine.stop_ids = engine.stop_ids, stop_ids
    assert {r["finish_reason"] for r in responses} == {"stop", "length"}
    for r in responses:
        assert len(r["ids"]) == len(r["logprobs"]) <= 12
        assert not stops & set(r["ids"][:-1])
        assert (r["ids"][-1] in stops) == (r["finish_reason"] == "stop")
        assert len(r["ids"]) == 12 or r["finish_reason"] == "stop"


def test_banned_ids_are_never_sampled(qwen3):
    _, engine, prompts = qwen3
    banned, engine.banned = engine.banned, list(range(100))
    responses = run(engine, prompts, max_tokens=30)
    engine.banned = banned
    assert min(t for g in responses for r in g for t in r["ids"]) >= 100
    assert set(engine.banned) == set(tiny_models.BANNED)


def test_greedy_and_top_p(qwen3):
    _, engine, prompts = qwen3
    greedy = run(engine, prompts, temperature=0.0)
    for group in greedy:
        assert len({tuple(r["ids"]) for r in group}) == 1
    narrow = run(engine, prompts, temperature=1.0, top_p=1e-6)  # only the most likely token is left
    assert [[r["ids"] for r in g] for g in narrow] == [[r["ids"] for r in g] for g in greedy]


def draw(probs, temperature=1.0, top_p=1.0, banned=(), n=20000):
    """Shares of each token among n draws, and the log-probs that came with them."""
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor(probs).log().repeat(n, 1)
    tokens, logprobs = rollout._sample(logits, uniform, list(banned), temperature, top_p)
    return tokens.bincount(minlength=len(probs)) / n, dict(zip(tokens.tolist(), logprobs.tolist()))


def test_sampling_follows_the_distribution():
    share, logprobs = draw([0.5, 0.0, 0.3, 0.2])
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.02, rtol=0)
    assert logprobs[2] == pytest.approx(math.log(0.3))


def test_log_probs_are_those_of_the_distribution_sampled_from():
    share, logprobs = draw([0.5, 0.3, 0.2], temperature=0.5, banned=[0])
    expected = torch.tensor([0.0, 0.09, 0.04]) / 0.13
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0)
    assert logprobs[1] == pytest.approx(math.log(0.09 / 0.13), abs=1e-5)


def test_top_p_keeps_the_smallest_set():
    for top_p, kept in ((0.4, 1), (0.7, 2), (0.9, 3), (0.99, 4)):
        share, logprobs = draw([0.3, 0.5, 0.05, 0.15], top_p=top_p)
        assert (share > 0).sum() == kept
        assert sum(math.exp(x) for x in logprobs.values()) == pytest.approx(1)


def test_a_weight_that_is_not_sent_is_named(qwen3):
    model, engine, _ = qwen3
    weights = [w for w in policy.named_weights(model) if w[0] != "lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head.weight"):
        rollout.sync(engine, weights)


def test_model_that_names_no_stop_ids_is_refused(tmp_path):
    path = tiny_models.save("qwen3_vl", tmp_path)
    file = tmp_path / "generation_config.json"
    content = json.loads(file.read_text())
    del content["eos_token_id"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config.json .* has no eos_token_id"):
        rollout.load(tiny_models.settings(path), CPU, None)
    file.unlink()
    with pytest.raises(OSError, match=r"generation_config.json"):
        rollout.load(tiny_models.settings(path), CPU, None)
