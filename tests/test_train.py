"""train_grpo.py as a user runs it: torchrun, real files, a tiny real Qwen3-VL."""

import json
import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from judge_server import judge
from ranks import ROOT, forked, torchrun
from safetensors.torch import load_file

REAL = ROOT.parent / "shared/data"


def arguments(start, out, **settings):
    settings = {
        "model": start / "model",
        "train_data": start / "data",
        "val_data": start / "few.parquet",
        "out_dir": out,
        "steps": 6,
        "prompts_per_step": 4,
        "group_size": 4,
        "val_prompts": 6,
        "max_response_tokens": 24,
        "val_temperature": 0.0,
        "validate_every": 3,
        "save_every": 1,
        **settings,
    }
    return ["train_grpo.py", "configs/tiny.py", *(f"--{k}={v}" for k, v in settings.items())]


def small_data(start, folder, rows):
    """A parquet of the first rows, so that a few steps cross the border of an epoch."""
    pq.write_table(
        pq.read_table(start / "data/train.parquet").slice(0, rows), folder / "small.parquet"
    )
    return folder / "small.parquet"


def metrics(out):
    """{step: what must be the same in every run}."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {
        line["step"]: {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
        for line in lines
    }


def tensors(out, step):
    folder = Path(out) / f"checkpoints/step_{step:06d}"
    return {
        f"{file.name}:{k}": v
        for file in sorted(folder.glob("*.safetensors"))
        for k, v in load_file(file).items()
    }


def rollouts(out, name="step_000001"):
    return [
        json.loads(line) for line in (Path(out) / f"rollouts/{name}.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """Six steps on two ranks over ten rows: epochs end within steps 3 and 5."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = small_data(start, folder, 10)
    run = forked(2, *arguments(start, folder / "run", train_data=data, keep_checkpoints=9))
    return folder / "run", data, run


def test_run_says_its_arithmetic_first(unbroken):
    out = unbroken[2].stdout
    assert "4 prompts x 4 responses = 16 responses on 2 ranks" in out
    assert "6 steps = 24 prompts = 6 updates = 2.40 epochs" in out


def test_every_metric_is_there(unbroken):
    line = json.loads((unbroken[0] / "metrics.jsonl").read_text().splitlines()[3])
    names = {
        *(f"reward/{k}" for k in ("overall", "judge", "embed", "modality", "format", "unscored")),
        *(f"response_tokens/{k}" for k in ("mean", "max", "truncated")),
        "prompt_tokens/mean",
        *(f"groups/{k}" for k in ("sampled", "kept", "zero_std", "all_right", "all_wrong")),
        "loss/policy",
        "loss/kl",
        *(f"clip_frac/{k}" for k in ("low", "high", "dual")),
        "entropy",
        "grad_norm",
        "lr",
        "engine_gap/mean",
        "engine_gap/max",
        "val/reward/overall",
        *(f"time/{k}" for k in ("step", "sync", "rollout", "reward_wait", "update", "save")),
        *(f"perf/{k}" for k in ("tokens_per_s_per_gpu", "packing_saving", "mfu", "peak_mem_gb")),
    }
    assert names <= set(line)
    assert 0 < line["perf/mfu"] < 1
    assert line["groups/sampled"] == 4
    assert line["groups/kept"] + line["groups/zero_std"] == 4
    assert line["engine_gap/mean"] < 1e-5
    assert line["lr"] == pytest.approx(2e-4 * 3 / 5)  # third of five warm-up updates


def test_rollouts_say_what_the_metrics_average(unbroken):
    groups = rollouts(unbroken[0], "step_000002")
    assert [g["slot"] for g in groups] == [0, 1, 2, 3] and {g["step"] for g in groups} == {2}
    responses = [r for g in groups for r in g["responses"]]
    assert len(responses) == 16
    line = metrics(unbroken[0])[2]
    for part in ("overall", "judge", "embed", "modality", "format"):
        assert line[f"reward/{part}"] == pytest.approx(
            sum(r["parts"][part] for r in responses) / 16
        )
    assert line["response_tokens/mean"] == pytest.approx(sum(r["tokens"] for r in responses) / 16)
    for group in groups:
        advantages = [r["advantage"] for r in group["responses"]]
        rewards = torch.tensor([r["parts"]["overall"] for r in group["responses"]])
        expected = (
            (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            if rewards.std() > 1e-6
            else 0 * rewards
        )
        assert advantages == pytest.approx(expected.tolist(), abs=1e-4)


def test_killed_and_restarted_is_bit_for_bit_the_same(unbroken, start, tmp_path):
    """SIGKILL of every process after step 3 has been saved, then the same command again."""
    whole, data, _ = unbroken
    command = arguments(start, tmp_path / "run", train_data=data, keep_checkpoints=9)
    forked(2, *command, kill_at=tmp_path / "run/checkpoints/step_000003", check=False)
    assert not (tmp_path / "run/checkpoints/step_000006").exists(), "it was killed too late"
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "rew')  # what a kill within a write leaves
    run = torchrun(2, *command)
    assert "continuing" in run.stdout
    assert metrics(tmp_path / "run") == metrics(whole)
    ours, theirs = tensors(tmp_path / "run", 6), tensors(whole, 6)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any("exp_avg_sq" in k for k in ours)
    for step in range(1, 7):
        assert rollouts(tmp_path / "run", f"step_{step:06d}") == rollouts(whole, f"step_{step:06d}")


def test_checkpoint_of_two_ranks_continues_on_one(unbroken, start, tmp_path):
    """Resharded: the step after it has the same weights, so it samples the same responses."""
    whole, data, _ = unbroken
    subprocess.run(["cp", "-a", whole, tmp_path / "run"], check=True)
    for link in ("latest", "best"):
        (tmp_path / f"run/checkpoints/{link}").unlink()
        (tmp_path / f"run/checkpoints/{link}").symlink_to("step_000005")
    forked(1, *arguments(start, tmp_path / "run", train_data=data, keep_checkpoints=9))
    assert texts(tmp_path / "run", "step_000006") == texts(whole, "step_000006")


def texts(out, name="step_000001"):
    return [[r["text"] for r in g["responses"]] for g in rollouts(out, name)]


def test_same_responses_on_one_rank_and_two(unbroken, start, tmp_path):
    forked(1, *arguments(start, tmp_path / "run", train_data=unbroken[1], steps=1))
    assert texts(tmp_path / "run") == texts(unbroken[0])
    one, two = metrics(tmp_path / "run")[1], metrics(unbroken[0])[1]
    for name in ("reward/overall", "loss/policy", "grad_norm", "entropy"):
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name


def test_kl_grows_and_resumes(unbroken, start, tmp_path):
    """Two updates a step, so the old policy's own pass is in it as well."""
    common = dict(
        train_data=unbroken[1],
        kl_coef=0.01,
        updates_per_step=2,
        learning_rate=1e-3,
        warmup_updates=1,
        validate_every=9,
    )
    forked(2, *arguments(start, tmp_path / "whole", steps=3, **common))
    kl = [metrics(tmp_path / "whole")[step]["loss/kl"] for step in (1, 2, 3)]
    groups = rollouts(tmp_path / "whole")
    assert all(
        any(r["advantage"] for g in groups[2 * u : 2 * u + 2] for r in g["responses"])
        for u in (0, 1)
    ), "an update without a trained group: choose another seed"
    assert 0 < kl[0] < kl[2]  # of two updates each; before any, test_gradient.py has 0
    forked(2, *arguments(start, tmp_path / "parts", steps=2, **common))
    forked(2, *arguments(start, tmp_path / "parts", steps=3, **common))
    whole = metrics(tmp_path / "whole")
    parts = metrics(tmp_path / "parts")
    assert parts[3] | {k: v for k, v in whole[3].items() if k.startswith("val/")} == whole[3]


def test_changed_settings_on_restart(unbroken, start, tmp_path):
    whole, data, _ = unbroken
    subprocess.run(["cp", "-a", whole, tmp_path / "run"], check=True)
    command = dict(train_data=data, keep_checkpoints=9)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    run = forked(
        1, *arguments(start, tmp_path / "run", **command | {"learning_rate": 1e-3}), check=False
    )
    assert run.returncode and "learning_rate was 0.0002 and is 0.001" in run.stderr
    assert "--accept_changes=True" in run.stderr
    assert (tmp_path / "run/metrics.jsonl").read_text() == before, "a refused start changed the run"
    other = small_data(start, tmp_path, 9)
    run = forked(
        1, *arguments(start, tmp_path / "run", **command | {"train_data": other}), check=False
    )
    assert run.returncode and "train_rows was" in run.stderr
    forked(
        1,
        *arguments(
            start, tmp_path / "run", steps=7, learning_rate=1e-3, accept_changes=True, **command
        ),
    )
    assert metrics(tmp_path / "run")[7]["lr"] == 1e-3
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["learning_rate"] == 1e-3
    assert "learning_rate was 0.0002 and is 0.001" in record["changes"][0]["change"]
    assert record["changes"][0]["after_step"] == 6
    run = forked(
        1,
        *arguments(
            start, tmp_path / "run", steps=7, learning_rate=1e-3, accept_changes=True, **command
        ),
    )
    assert len(metrics(tmp_path / "run")) == 8, "a finished run has nothing left to do"


def test_best_and_newest_checkpoints_are_kept(start, tmp_path):
    forked(1, *arguments(start, tmp_path / "run", keep_checkpoints=2, validate_every=1, steps=5))
    values = {s: m["val/reward/overall"] for s, m in metrics(tmp_path / "run").items() if s}
    best = max(values, key=lambda s: (values[s], -s))
    folders = {p.name for p in (tmp_path / "run/checkpoints").glob("step_*")}
    assert folders == {f"step_{s:06d}" for s in (4, 5, best)}
    assert os.readlink(tmp_path / "run/checkpoints/best") == f"step_{best:06d}"
    assert os.readlink(tmp_path / "run/checkpoints/latest") == "step_000005"


def test_it_ends_well_though_its_process_group_is_busy(start, tmp_path):
    """Python aborts (exit code -6) if a thread of gloo frees a tensor while it ends."""
    settings = dict(steps=1, val_prompts=2, max_response_tokens=4)
    forked(2, "tests/late.py", *arguments(start, tmp_path / "run", **settings)[1:])
    assert [*metrics(tmp_path / "run")] == [0, 1]


def test_rows_whose_pixels_fail_are_named_and_left_out(start, tmp_path):
    """A truncated PNG has a good header. The steps are the same on one rank and on two."""
    table = pq.read_table(start / "data/train.parquet").slice(0, 12)
    rows = table.to_pylist()
    for row in (0, 3):
        png = rows[row]["image"][0]["bytes"]
        rows[row]["image"][0]["bytes"] = png[: len(png) // 2]
    pq.write_table(type(table).from_pylist(rows, table.schema), tmp_path / "bad.parquet")
    settings = dict(
        train_data=tmp_path / "bad.parquet", steps=2, prompts_per_step=5, max_bad_rows=0.2
    )
    run = forked(1, *arguments(start, tmp_path / "one", **settings))
    forked(2, *arguments(start, tmp_path / "two", **settings))
    assert "skipped row 0, image" in run.stdout and "skipped row 3, image" in run.stdout
    used = [g["row"] for s in (1, 2) for g in rollouts(tmp_path / "one", f"step_{s:06d}")]
    assert sorted(used) == [1, 2, *range(4, 12)]
    assert texts(tmp_path / "one") == texts(tmp_path / "two")
    run = forked(
        1, *arguments(start, tmp_path / "stop", **settings | {"max_bad_rows": 0.1}), check=False
    )
    assert run.returncode and "2 of 12 rows are bad, max_bad_rows=0.1" in run.stderr


def test_a_judge_that_dies_stops_the_run_saved_and_it_goes_on(start, tmp_path):
    """The judge answers NO until step 2 is logged, then fails: step 3 is dropped, step 2 saved, and
    with a judge again the run ends as one whose judge is the exact match, which says NO as well."""
    settings = dict(train_data=small_data(start, tmp_path, 10), steps=4, save_every=9)
    settings |= dict(validate_every=9, judge_check=False, max_unscored=0.05)
    forked(1, *arguments(start, tmp_path / "whole", **settings))

    def fails_after_step_2(_):
        file = tmp_path / "run/metrics.jsonl"
        return "500" if file.exists() and '"step": 2' in file.read_text() else "ok"

    with judge(rule=lambda *_: "NO") as server:
        settings |= dict(judge="http", judge_url=server.url, judge_patience_s=0.5)
        server.script = fails_after_step_2
        run = forked(1, *arguments(start, tmp_path / "run", **settings), check=False)
        assert run.returncode
        [line] = [x for x in run.stderr.splitlines() if x.startswith("error: ")]
        assert "of the responses have no verdict, above max_unscored" in line
        assert "HTTP 500" in line and server.url in line
        assert [*metrics(tmp_path / "run")] == [0, 1, 2]
        assert os.readlink(tmp_path / "run/checkpoints/latest") == "step_000002"
        server.script = lambda _: "ok"
        run = forked(1, *arguments(start, tmp_path / "run", **settings))
        assert "after step 2" in run.stdout
        assert server.requests, "nobody was asked"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    ours, theirs = tensors(tmp_path / "run", 4), tensors(tmp_path / "whole", 4)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data, real medical images")
def test_an_epoch_of_real_images(start, tmp_path):
    """376 questions on 331 real images of all 16 modalities, two ranks, no bad row."""
    run = forked(
        2,
        *arguments(
            start,
            tmp_path / "run",
            train_data=REAL / "medix_real_train.parquet",
            group_size=2,
            epochs=1,
            val_data=REAL / "medix_real_test.parquet",
            prompts_per_step=47,
            steps=0,
            save_every=8,
            validate_every=8,
        ),
    )
    assert "train: 376 rows, 376 used, 0 bad, 0 longer" in run.stdout
    lines = metrics(tmp_path / "run")
    assert set(lines) == set(range(9))
    used = [g["row"] for s in range(1, 9) for g in rollouts(tmp_path / "run", f"step_{s:06d}")]
    assert sorted(used) == list(range(376))
