"""Pieces of a step in train_grpo.py that no whole run shows: unscored, repeated, leaked rows."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp as fsdp

import common
import data
import reward
import train_dapo
import train_grpo


def group(rewards, judge=1.0, tokens=3):
    """A group whose responses have these overall rewards; None: the judge could not score it."""
    parts = [
        {"overall": r, "judge": judge, "embed": 0.0, "modality": 1.0, "format": 1.0}
        for r in rewards
    ]
    return {
        "row": tokens,
        "ids": [1] * 5,
        "responses": [
            {"ids": [7] * tokens, "parts": p, "finish_reason": "stop", "answer": answer}
            for p, answer in zip(parts, ("left", "left", None))
        ],
    }


def test_a_group_with_an_unscored_response_is_dropped_not_paid_zero(process_group):
    groups = [group([1.0, 0.0, None]), group([1.0, 0.0, 0.5]), group([0.5, 0.5, 0.5], judge=0.0)]
    train_grpo.add_advantages(groups)
    assert [g["scored"] for g in groups] == [False, True, True]
    assert [g["kept"] for g in groups] == [False, True, False]
    assert [r["advantage"] for r in groups[0]["responses"]] == [0.0, 0.0, 0.0]
    torch.testing.assert_close(
        torch.tensor([r["advantage"] for r in groups[1]["responses"]]),
        torch.tensor([1.0, -1.0, 0.0]),
    )
    counts = common.group_metrics(groups)
    assert counts == {
        "groups/sampled": 3,
        "groups/kept": 1,
        "groups/unscored": 1,
        "groups/zero_std": 1,
        "groups/all_right": 1,
        "groups/all_wrong": 1,
        "answers/distinct": pytest.approx(2 / 3),  # "left" twice, and none
        "answers/longest": 0.5,
        "tokens": 9 * (5 + 3),
    }
    means = common.response_metrics(groups)
    assert means["reward/unscored"] == pytest.approx(1 / 9)
    assert means["reward/overall"] == pytest.approx((1 + 0 + 1 + 0 + 0.5 + 1.5) / 8)
    assert means["reward/agreement"] == pytest.approx(3 / 8)  # the embedder says 0 to all
    assert means["answers/chars"] == pytest.approx(6 * 4 / 9)


def test_unscored_groups_leave_the_normaliser_and_equal_ones_stay(process_group, monkeypatch):
    groups = [group([1.0, None]), group([1.0, 0.0], tokens=4), group([0.5, 0.5], tokens=6)]
    train_grpo.add_advantages(groups)
    packed = []
    monkeypatch.setattr(
        train_grpo.policy,
        "build_rows",
        lambda model, gs, tokens, rank, world, load, map: packed.extend(map(load, gs)),
    )
    cfg = SimpleNamespace(
        **{**train_grpo.defaults, "prompts_per_step": 3, "updates_per_step": 1, "kl_coef": 0.0}
    )
    monkeypatch.setattr(train_grpo.data, "prompt", lambda split, row: {"images": [row]})
    run = SimpleNamespace(
        cfg=cfg, model=None, rank=0, world=1, train=None, threads=ThreadPoolExecutor(1)
    )
    update = train_grpo.plan_update(run, groups)
    assert (update.tokens, update.responses) == (2 * 4 + 2 * 6, 4)
    assert [len(g["responses"][0]["ids"]) for g in packed] == [4]
    assert packed[0]["images"] == [4], "those of its row"
    packed.clear()
    cfg.kl_coef = 0.01  # the KL term concerns groups of equal rewards, too
    train_grpo.plan_update(run, groups)
    assert [len(g["responses"][0]["ids"]) for g in packed] == [4, 6]


@pytest.fixture
def run(start, process_group):
    """What prompts are made from, over three rows."""
    cfg = common.load_config(train_grpo.defaults, ["configs/tiny.py"])
    processor = data.load_processor(f"{start}/model")
    train = data.load(f"{start}/data@train", processor, cfg, reward.TAGS)
    train.keep = train.keep[:3]
    return SimpleNamespace(
        cfg=cfg,
        rank=0,
        world=1,
        train=train,
        val=train,
        processor=processor,
        state={"cursor": 0},
        last_step=1,
        model=fsdp.fully_shard(torch.nn.Linear(10, 10, bias=False)),
    )


def test_a_row_that_comes_twice_in_a_step_is_drawn_twice(run, monkeypatch):
    run.engine, run.threads, run.times = SimpleNamespace(version=0), ThreadPoolExecutor(1), {}
    run.state, seen = {"updates": 0}, []

    def generate(engine, prompts, **_):  # an engine that takes the prompts and answers none
        seen.extend(prompts)
        return iter(())

    monkeypatch.setattr(train_grpo.rollout, "generate", generate)
    run.scorer = SimpleNamespace(encode=None, cfg=run.cfg, judge=None)

    def prompts(step, first=0):
        rows = data.order(run.train.keep, run.cfg.seed, 0, 7)
        seen.clear()
        train_grpo.sample(run, run.train, rows, step, first)
        return [{k: p[k] for k in ("slot", "row", "seed", "ids")} for p in seen]

    first = prompts(1)
    rows = [p["row"] for p in first]
    assert sorted(rows[:3]) == sorted(rows[3:6]) == run.train.keep
    assert len({p["seed"] for p in first}) == 7
    assert [p["seed"] for p in prompts(1)] == [p["seed"] for p in first]
    assert not {p["seed"] for p in prompts(2)} & {p["seed"] for p in first}
    assert prompts(1, first=4) == first[4:], "another round of a step goes on where it ended"


def test_validation_rows_that_are_trained_on_are_said(run, capsys, tmp_path, monkeypatch):
    run.reference = fsdp.fully_shard(torch.nn.Linear(10, 10, bias=False, dtype=torch.bfloat16))
    run.cfg.out_dir, disk = str(tmp_path), SimpleNamespace(free=4.7e-6)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: disk)
    common.print_arithmetic(run)
    out = capsys.readouterr().out
    assert "of the val questions, images included, are in train, too" in out
    assert "GB per rank: 1.2e-06 at rest, 1.6e-06 in updates" in out  # 12 and 16 bytes a weight
    assert "1.2e-06 a checkpoint, up to 4 at once, 4.7e-15 free: TOO LITTLE" in out
    disk.free = 4900.0
    run.val = SimpleNamespace(**{**vars(run.val), "hashes": ["another"]})
    run.cfg.kl_coef = 0.01
    run.reference.requires_grad_(False)
    common.print_arithmetic(run)
    out = capsys.readouterr().out
    assert "warning" not in out and "4.9e-06 free\n" in out


def gap_run(**settings):
    cfg = SimpleNamespace(**{**train_grpo.defaults, "dtype": "float32", **settings})
    return SimpleNamespace(cfg=cfg, rank=0, gaps_over=0)


def update_with(gap):
    mask = torch.tensor([[True, True], [True, False]])
    row = {"logprobs": torch.zeros(2, 2), "old_logprobs": torch.full((2, 2), gap), "mask": mask}
    idle = {k: torch.zeros(1, 0, dtype=x.dtype) for k, x in row.items()}
    return [SimpleNamespace(rows=[row, idle])]


def test_a_gap_over_the_limit_stops_in_the_third_step_in_a_row(capsys, process_group):
    run = gap_run()
    assert common.check_gap(run, update_with(1e-4)) == pytest.approx(
        {"engine_gap/mean": 1e-4, "engine_gap/max": 1e-4})
    assert not capsys.readouterr().out
    common.check_gap(run, update_with(-5e-4))
    assert "warning: engine and trainer differ by 0.0005" in capsys.readouterr().out
    for _ in range(2):
        common.check_gap(run, update_with(2e-3))
    common.check_gap(run, update_with(1e-4))  # healthy again: counted anew
    for _ in range(2):
        common.check_gap(run, update_with(float("nan")))
    with pytest.raises(common.Stop, match=r"engine and trainer differ by 0.002"):
        common.check_gap(run, update_with(2e-3))


def test_a_run_s_first_gap_decides_at_once(process_group):
    run = gap_run(max_engine_gap=0.5)
    run.gaps_over = 2  # as set_up() has it
    common.check_gap(run, update_with(0.4))
    run.gaps_over = 2
    with pytest.raises(common.Stop, match=r"max_engine_gap is 0.5"):
        common.check_gap(run, update_with(0.6))


@pytest.mark.parametrize("saved, expected", [(3, [5]), (5, [])])
@pytest.mark.parametrize("trainer", [train_grpo, train_dapo])
def test_a_run_that_must_stop_saves_its_last_step_once(monkeypatch, trainer, saved, expected):
    def set_up(_):
        return SimpleNamespace(cfg=None, state={"step": 5, "cursor": 0}, saved=saved, times={},
                               last_step=9)

    def collect(run, step):
        raise common.Stop(f"step {step} cannot be")

    saves = []
    monkeypatch.setattr(trainer, "set_up", set_up)
    monkeypatch.setattr(common, "load_config", lambda *_: None)
    monkeypatch.setattr(trainer, "is_over", lambda run: False, raising=False)
    monkeypatch.setattr(trainer, "collect", collect)
    monkeypatch.setattr(trainer, "save", lambda run: saves.append(run.state["step"]))
    with pytest.raises(SystemExit, match="error: step 6 cannot be"):
        trainer.main()
    assert saves == expected
