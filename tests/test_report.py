"""report.py on synthetic metrics: the picture, and what it says about bad input."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report

ROOT = Path(report.__file__).parent


def write_run(folder, seed, steps=60, sampled=True):
    rng, rows = np.random.default_rng(seed), []
    for step in range(steps + 1):
        level = 0.9 - 0.05 * seed - 0.45 * np.exp(-step / 20)
        row = {"step": step}
        if step:  # the step 0 has its validation only
            row |= {"reward/overall": level + rng.normal(0, 0.04),
                    "response_tokens/mean": 22 + rng.normal(0, 0.5)}
        if step % 10 == 0:
            row |= {"val/reward/overall": level, "val/reward/judge": level - 0.06,
                    "val/reward/embed": level - 0.03, "val/reward/modality": 0.98,
                    "val/reward/format": 0.995, "val/response_tokens/mean": 21.5 + seed}
            if sampled:
                row["val_sampled/reward/overall"] = level - 0.1
        rows.append(json.dumps(row))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def command(*args, cwd=None):
    return subprocess.run([sys.executable, ROOT / "report.py", *args], cwd=cwd, text=True,
                          capture_output=True)


def test_curve_of_two_runs(tmp_path):
    write_run(tmp_path / "grpo", 0)
    write_run(tmp_path / "dapo", 1, sampled=False)
    done = command("curve", "grpo", "dapo/", "--out", "curve.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert picture.shape[1] >= 1500 and picture.shape[0] >= 500
    for panel in np.array_split(picture, 3, axis=1):
        colours = {tuple(pixel) for pixel in panel.reshape(-1, 3)}
        assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours  # both runs in every panel


def test_one_run_and_keys_that_are_missing(tmp_path):
    run = tmp_path / "short"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "val/reward/overall": 0.5}\n')
    report.curve({"short": report.read_metrics(run)}, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] >= 1500


@pytest.mark.parametrize("content, says", [
    (None, "give the out_dir of a run"),
    ("", "has no validation"),
    ('{"step": 1, "reward/overall": 0.5}\n', "set validate_every above 0"),
    ('{"step": 0, "val/rew\n{"step": 1}\n', "line 1 is not JSON")])
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = command("curve", str(tmp_path), "--out", str(tmp_path / "curve.png"))
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "curve.png").exists()


def test_half_written_last_line_is_noted_and_left_out(tmp_path, capsys):
    run = Path(write_run(tmp_path / "run", 0))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "reward/over')
    assert len(report.read_metrics(run)) == 61
    assert "half-written" in capsys.readouterr().out
