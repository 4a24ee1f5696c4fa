"""train_dapo.py: what it keeps, how it samples for it, and that it resumes like train_grpo.py."""

import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from judge_server import judge
from ranks import ROOT, forked
from scoring import score
from test_train import arguments, metrics, rollouts, small_data, tensors

import common
import data
import reward
import train_dapo

TINY = ["configs/tiny.py", "configs/tiny_dapo.py"]


def settings(**changes):
    return SimpleNamespace(**{**vars(common.load_config(train_dapo.defaults, TINY)), **changes})


def right(tag="X_RAY"):
    return f"<{tag}><thinking>I see.</thinking><answer>left lung</answer>"


def wrong(tag="X_RAY"):
    return f"<{tag}><thinking>I see.</thinking><answer>spleen</answer>"


MIXED = [right(), wrong(), right(), wrong()]
TABLE = {  # name -> (responses, kept by "correctness", by "reward", by "medix")
    "all wrong but well-formed": ([wrong()] * 4, False, False, True),
    "all wrong, one of them ill-formed": ([wrong()] * 3 + ["spleen"], False, True, True),
    "all right": ([right()] * 4, False, False, False),
    "all right with the wrong tag": ([right("CT_SCAN")] * 4, False, False, True),
    "all right, one with the wrong tag": ([right()] * 5 + [right("CT_SCAN")], False, True, False),
    "right and wrong": (MIXED, True, True, True),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_each_filter_keeps(name):
    texts, *kept = TABLE[name]
    for keep, expected in zip(("correctness", "reward", "medix"), kept):
        cfg = settings(keep=keep)
        group = scored(cfg, texts)
        train_dapo.add_advantages(cfg, [group])
        assert (group["scored"], group["kept"]) == (True, expected), keep


def scored(cfg, texts, tokens=5):
    parts = score(reward.load(cfg), "Where?", "<X_RAY> left lung", texts)
    return {"ids": [1], "responses": [
        {"ids": [7] * tokens, "parts": p, "finish_reason": "stop", "answer": ""} for p in parts]}


@pytest.mark.parametrize("soft", [False, True])
def test_without_a_judge_the_embedder_says_what_is_right(soft):
    """A soft cosine differs between any two answers: the threshold decides."""
    cfg = settings(weight_judge=0.0, weight_embed=0.95, embed_soft=soft)
    near = right().replace("left lung", "left lungs")
    for texts, kept in (([right(), near] * 2, False), (MIXED, True)):
        group = scored(cfg, texts)
        train_dapo.add_advantages(cfg, [group])
        assert group["kept"] is kept


def test_an_unscored_group_is_dropped_and_counted():
    cfg = settings()
    groups = [scored(cfg, MIXED), scored(cfg, MIXED)]
    groups[0]["responses"][3]["parts"] |= {"judge": None, "overall": None}
    train_dapo.add_advantages(cfg, groups)
    assert [g["kept"] for g in groups] == [False, True]
    assert not any(r["advantage"] for r in groups[0]["responses"])
    counts = common.group_metrics(groups)
    assert counts["groups/unscored"] == counts["groups/kept"] == 1


def test_overlong_responses_are_charged_within_the_buffer():
    """DAPO eq. 13: nothing up to max - buffer, then linear, all of it at max."""
    cfg = settings(max_response_tokens=100, overlong_buffer_tokens=40, overlong_penalty=0.5)
    group = scored(cfg, [right()] * 5)
    for response, length in zip(group["responses"], (10, 60, 70, 100, 61)):
        response["ids"] = [7] * length
    train_dapo.add_advantages(cfg, [group])
    charged = [r["parts"]["overlong"] for r in group["responses"]]
    assert charged == pytest.approx([0, 0, 0.125, 0.5, 0.0125])
    assert [r["parts"]["overall"] for r in group["responses"]] == pytest.approx(
        [1 - c for c in charged])
    assert group["responses"][3]["advantage"] < -1 and group["responses"][0]["advantage"] > 0
    assert not group["kept"], "all are right: their length alone is no reason to train on them"
    off = scored(cfg, [right()] * 2, tokens=100)
    train_dapo.add_advantages(settings(max_response_tokens=100, overlong_buffer_tokens=0), [off])
    assert all(r["parts"]["overall"] == 1.0 for r in off["responses"])


def test_masked_truncated_responses_count_in_the_mean_but_not_in_the_loss(monkeypatch):
    cfg = settings(mask_truncated=True, overlong_penalty=0.0)
    group = scored(cfg, [right(), wrong(), wrong()]) | {"row": 0}
    group["responses"][2] |= {"finish_reason": "length", "ids": [7] * 48}
    cut_off = scored(cfg, [right(), wrong()]) | {"row": 0}
    for response in cut_off["responses"]:
        response["finish_reason"] = "length"
    train_dapo.add_advantages(cfg, [group, cut_off])
    with_its_reward = group["responses"][0]["advantage"]
    assert with_its_reward == pytest.approx(1.1547, abs=1e-3)  # of (1, 0, 0), not of (1, 0)
    packed = []
    monkeypatch.setattr(train_dapo.policy, "build_rows", lambda _, gs, *__: packed.extend(gs))
    monkeypatch.setattr(train_dapo.data, "prompt", lambda *_: {"images": []})
    run = SimpleNamespace(cfg=cfg, rank=0, world=1, model=None, train=None,
                          threads=ThreadPoolExecutor(1))
    update = train_dapo.plan_update(run, [group, cut_off])
    assert [len(g["responses"]) for g in packed] == [2], "and a group of none is no group"
    assert (update.tokens, update.responses) == (10, 2)
    cfg.mask_truncated = False
    assert train_dapo.plan_update(run, [group, cut_off]).responses == 5


# --- dynamic sampling, with an engine that is simulated: its groups end as their lengths say ------

@pytest.fixture
def run(start, process_group, monkeypatch):
    """A run without a model. run.right(prompt, i): whether response i is right."""
    cfg = settings(prompts_per_step=8, group_size=4, train_data=f"{start}/data", seed=3)
    processor = data.load_processor(f"{start}/model")
    run = SimpleNamespace(
        cfg=cfg, rank=0, world=1, times={}, processor=processor, scorer=reward.load(cfg),
        train=data.load(cfg.train_data, processor, cfg, reward.TAGS),
        threads=ThreadPoolExecutor(2), engine=SimpleNamespace(version=0, stop_ids={2}), saved=0,
        state={"step": 0, "updates": 0, "cursor": 0, "not_finite": 0, "kept": []}, asked=[],
        signals=[], model=None, reference=None,
        right=lambda prompt, i: prompt["row"] % 2 and i % 2)

    def generate(_, prompts, *, group_size, **__):
        done = []
        for prompt in prompts:
            run.asked.append(prompt["row"])
            rng, answers = random.Random(prompt["seed"]), []
            for i in range(group_size):
                tag, _, truth = prompt["solution"].partition(" ")
                answer = truth if run.right(prompt, i) else "nothing"
                thinking = "x " * int(rng.lognormvariate(2, 0.8))
                text = f"{tag}<thinking>{thinking}</thinking><answer>{answer}</answer>"
                ids = [*processor.tokenizer.encode(text), 2]
                answers.append({"ids": ids, "logprobs": [0.0] * len(ids), "finish_reason": "stop"})
            done.append((prompt, answers))
        yield from sorted(done, key=lambda item: max(len(r["ids"]) for r in item[1]))

    monkeypatch.setattr(train_dapo.rollout, "generate", generate)
    return run


def mean_length(groups):
    lengths = [len(r["ids"]) for g in groups for r in g["responses"]]
    return sum(lengths) / len(lengths)


def varied(groups):
    return [g for g in groups if len({r["parts"]["judge"] for r in g["responses"]}) > 1]


def test_nothing_that_is_finished_is_left_out(run):
    """Long groups end last. All whose correctness varies are kept, so no length is favoured."""
    run.state["kept"] = [[8, 16]] * 3
    groups = train_dapo.collect(run, 1)
    assert len(groups) == 16 and [g["slot"] for g in groups] == list(range(16))
    kept = [g for g in groups if g["kept"]]
    assert 4 <= len(kept) != 8, "as many as asked for would prove nothing: choose another seed"
    assert kept == varied(groups) and mean_length(kept) == mean_length(varied(groups))
    first = sorted(kept, key=lambda g: max(len(r["ids"]) for r in g["responses"]))[:4]
    assert mean_length(first) < 0.9 * mean_length(kept), "this is what the first to end would be"


def test_as_many_prompts_are_drawn_as_should_be_kept(run):
    order = data.order(run.train.keep, 3, 0, 64)
    assert len(train_dapo.collect(run, 1)) == 8, "nothing is known yet: prompts_per_step"
    run.state["kept"] = [[2, 4], [4, 4]]
    assert len(train_dapo.collect(run, 1)) == 11  # 8 / 0.75
    run.state["kept"] = [[0, 99]] * 10
    assert len(train_dapo.collect(run, 1)) == 32, "the floor of the rate is 1/4"
    assert run.asked == order[:8] + order[:11] + order[:32]


def test_another_round_while_fewer_than_half_are_kept(run):
    order = data.order(run.train.keep, 3, 40, 64)
    teaches = set(order[8:40:3])
    run.state["cursor"], run.right = 40, lambda p, i: p["row"] in teaches and i == 0
    groups = train_dapo.collect(run, 5)
    kept = [g for g in groups if g["kept"]]
    assert [g["row"] for g in groups] == run.asked == order[:len(groups)], "one after the other"
    assert [g["slot"] for g in groups] == list(range(len(groups)))
    assert len(groups) > 8 and len(kept) >= 4
    assert run.asked.count(run.asked[0]) == 1


@pytest.mark.parametrize("is_right", [0, 1])
def test_nothing_kept_goes_on_and_after_ten_steps_stops(run, capsys, is_right):
    run.right = lambda *_: is_right
    groups = train_dapo.collect(run, 1)
    assert len(groups) == run.cfg.max_rounds * 8 and not any(g["kept"] for g in groups)
    said = capsys.readouterr().out
    assert "0 of 32 groups kept in 4 rounds" in said and "larger group_size" in said
    assert train_dapo.train(run, groups) == {
        "updates_skipped": 1}
    run.state["kept"] = [[0, 32]] * 10
    with pytest.raises(common.Stop, match=r"no group was kept in 10 steps.*neither too easy"):
        train_dapo.collect(run, 11)


def test_a_judge_that_is_gone_is_no_reason_to_draw_more(run, monkeypatch):
    """Its groups are not kept, but another round would only wait for judge_patience_s once more."""
    finish = reward.finish

    def unscored(scorer, jobs):
        return [[p | {"judge": None, "overall": None} for p in g] for g in finish(scorer, jobs)]

    monkeypatch.setattr(train_dapo.reward, "finish", unscored)
    run.scorer = SimpleNamespace(**{**vars(run.scorer), "judge": SimpleNamespace(
        last_failure="HTTP 500", verdicts={}, asked=0, known=[], cfg=run.cfg,
        pool=ThreadPoolExecutor(1))})
    monkeypatch.setattr(train_dapo.reward, "ask", lambda *_: (None, "", "HTTP 500"))
    with pytest.raises(common.Stop, match=r"100.0% of the responses have no verdict.* HTTP 500"):
        train_dapo.collect(run, 1)
    assert len(run.asked) == 8, "a round of prompts_per_step, and no other"


def test_an_epoch_counts_prompts_drawn(run):
    run.cfg.steps, run.cfg.epochs, run.last_step = 0, 2, 16
    run.state |= {"step": 5, "cursor": 2 * len(run.train.keep) - 1}
    assert not train_dapo.is_over(run)
    run.state["cursor"] += 1
    assert train_dapo.is_over(run)
    run.cfg.steps = 7
    run.last_step = 7
    assert not train_dapo.is_over(run), "steps are steps"
    run.state["step"] = 7
    assert train_dapo.is_over(run)


# --- whole runs ----------------------------------------------------------------------------------

def dapo(start, out, **changes):
    _, tiny, *rest = arguments(start, out, **{"overlong_buffer_tokens": 8, **changes})
    return ["train_dapo.py", tiny, *rest]


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """Six steps of two updates on two ranks; about half of the groups are kept."""
    folder = tmp_path_factory.mktemp("dapo")
    changes = dict(train_data=small_data(start, folder, 24), updates_per_step=2, keep_checkpoints=9,
                   mask_truncated=True, prompts_per_step=6, keep="reward")  # it is never right yet
    run = forked(2, *dapo(start, folder / "run", **changes))
    return folder / "run", changes, run


def test_steps_train_what_was_kept(unbroken):
    out, _, run = unbroken
    assert "dynamic sampling" in run.stdout
    lines = metrics(out)
    steps = [lines[step] for step in range(1, 7)]
    assert any(line["groups/sampled"] > 6 for line in steps), "no step drew more than 6"
    assert 0 < sum(x["groups/kept"] for x in steps) < sum(x["groups/sampled"] for x in steps)
    assert all("reward/overlong" in line and "loss/policy" in line for line in steps)
    assert lines[3]["val/reward/overall"] > 0 and "val/reward/overlong" not in lines[3]
    state = json.loads((out / "checkpoints/latest/state.json").read_text())
    assert state["kept"] == [[x["groups/kept"], x["groups/sampled"]] for x in steps]
    assert state["cursor"] == sum(x["groups/sampled"] for x in steps)
    for step in range(1, 7):
        groups = rollouts(out, f"step_{step:06d}")
        assert len(groups) == lines[step]["groups/sampled"], "what was not kept can be seen, too"


def test_killed_and_restarted_is_bit_for_bit_the_same(unbroken, start, tmp_path):
    whole, changes, _ = unbroken
    command = dapo(start, tmp_path / "run", **changes)
    forked(2, *command, kill_at=tmp_path / "run/checkpoints/step_000003", check=False)
    assert not (tmp_path / "run/checkpoints/step_000006").exists(), "it was killed too late"
    assert "continuing" in forked(2, *command).stdout
    assert metrics(tmp_path / "run") == metrics(whole)
    ours, theirs = tensors(tmp_path / "run", 6), tensors(whole, 6)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ours, theirs = (out / "checkpoints/step_000006/state.json" for out in (tmp_path / "run", whole))
    assert ours.read_text() == theirs.read_text(), "what decides how many prompts are drawn"


def test_results_do_not_depend_on_how_fast_the_judge_is(start, tmp_path):
    """And it is asked once for each (question, answer, truth)."""
    sleeps = random.Random(0)
    for name, delay in (("fast", 0.0), ("slow", lambda _: sleeps.random() / 2)):
        with judge(rule=lambda q, t, a: ("YES", "NO")[len(a) % 2], delay=delay) as server:
            changes = dict(judge="http", judge_url=server.url, judge_check=False, steps=3)
            forked(1, *dapo(start, tmp_path / name, prompts_per_step=6, **changes))
            asked = [(r.question, r.answer, r.truth) for r in server.requests]
            assert len(asked) == len(set(asked)) > 30
    fast, slow = (metrics(tmp_path / name) for name in ("fast", "slow"))
    assert fast == slow and fast[3]["groups/kept"] > 0
    for step in (1, 2, 3):
        name = f"step_{step:06d}"
        assert rollouts(tmp_path / "fast", name) == rollouts(tmp_path / "slow", name)


def test_a_run_goes_on_with_the_other_algorithm_only_if_told(unbroken, start, tmp_path):
    """GRPO until the form is learnt, then DAPO: said, recorded, never by accident."""
    folder, settings = tmp_path / "run", dict(train_data=unbroken[1]["train_data"])
    settings |= dict(prompts_per_step=6, updates_per_step=2)
    forked(1, *arguments(start, folder, steps=1, **settings))
    refused = forked(1, *dapo(start, folder, steps=2, **settings), check=False)
    assert refused.returncode and "script was 'train_grpo.py' and is 'train_dapo.py'" in (
        refused.stderr)
    forked(1, *dapo(start, folder, steps=2, accept_changes=True, **settings))
    assert [*metrics(folder)] == [0, 1, 2] and "reward/overlong" in metrics(folder)[2]
    assert "script was" in json.loads((folder / "config.json").read_text())["changes"][0]["change"]


def test_it_advises_to_learn_the_form_first(start, tmp_path):
    out = forked(1, *dapo(start, tmp_path / "run", steps=1, max_response_tokens=9,
                            max_rounds=1)).stdout
    assert metrics(tmp_path / "run")[0]["val/reward/format"] < 0.2
    assert 'keep="reward"' in out and "train_grpo.py" in out


def test_the_trainers_differ_by_the_algorithm_only():
    diff = subprocess.run(["diff", "train_grpo.py", "train_dapo.py"], cwd=ROOT,
                          capture_output=True, text=True).stdout
    changed = [line for line in diff.splitlines() if line[0] in "<>"]
    assert 40 < len(changed) <= 100, f"{len(changed)} lines differ"
