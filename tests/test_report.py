"""report.py: the curve from synthetic metrics, the pages as Chromium shows them, on a laptop and on
a phone, and what is said about bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report_pages
from PIL import Image
from report_browser import browser, needs_chromium

import report

ROOT = Path(report.__file__).parent
BLUE, ORANGE, GREEN = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C)
WIDTHS = {"laptop": 1280, "phone": 390}


def write_run(folder, seed, steps=60, sampled=True):
    rng, rows = np.random.default_rng(seed), []
    for step in range(steps + 1):
        level = 0.9 - 0.05 * seed - 0.45 * np.exp(-step / 20)
        row = {"step": step}
        if step:  # the step 0 has its validation only
            row |= {"groups/sampled": 8 + step, "groups/kept": step % 8,
                    "reward/overall": level + rng.normal(0, 0.04),
                    "response_tokens/mean": 22 + rng.normal(0, 0.5)}
        if step % 10 == 0:
            row |= {"val/reward/overall": level, "val/reward/judge": level - 0.06,
                    "val/reward/embed": level - 0.03, "val/reward/modality": 0.98,
                    "val/reward/format": 0.995, "val/response_tokens/mean": 21.5 + seed}
            if sampled:
                row["val_sampled/reward/overall"] = level - 0.1
        rows.append(json.dumps(row))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"group_size": 4}))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def command(*args, cwd=None):
    return subprocess.run([sys.executable, ROOT / "report.py", *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, timeout=120)


def colours(picture):
    return {tuple(pixel) for pixel in picture.reshape(-1, 3)}


# --- curve ----------------------------------------------------------------------------------------


def test_curve_of_two_runs(tmp_path):
    write_run(tmp_path / "grpo", 0)
    write_run(tmp_path / "dapo", 1, sampled=False)
    done = command("curve", "grpo", "dapo/", "--out", "curve.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert picture.shape[1] >= 1500 and picture.shape[0] >= 500
    for panel in np.array_split(picture, 3, axis=1):
        assert {BLUE, ORANGE} <= colours(panel)  # both runs in every panel


def test_runs_of_a_label_share_a_colour(tmp_path):
    for i in range(4):
        write_run(tmp_path / f"lr=1e-{i}", i)
    runs = ["GRPO=lr=1e-0", "GRPO=lr=1e-1", "DAPO=lr=1e-2", "lr=1e-3"]
    for count in (3, 4):
        out = tmp_path / f"{count}.png"
        done = command("curve", *runs[:count], "--x", "generated", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = colours(np.asarray(Image.open(out).convert("RGB")))
        assert {BLUE, ORANGE} <= found and (GREEN in found) == (count == 4)


def test_a_legend_names_what_is_drawn_once_in_grey(tmp_path):
    runs = [report.read_run(write_run(tmp_path / f"run{i}", i, sampled=i > 0)) for i in range(2)]
    parts, lines = ["judge", "embed", "modality", "format"], ["greedy", "training"]
    for shown, names in ((runs, [*lines, "sampled"]), (runs[:1], lines)):
        report.curve(shown, tmp_path / "curve.png")
        legends = [ax.get_legend() for ax in report.plt.gcf().axes]
        assert [[text.get_text() for text in legend.texts] for legend in legends] == [
            names, parts, lines]
        assert {line.get_color() for legend in legends for line in legend.get_lines()} == {"0.35"}
        assert [line.get_linestyle() for line in legends[1].get_lines()] == ["-", "--", "-.", ":"]
        assert legends[0].get_lines()[0].get_marker() == "o"


def test_responses_are_counted_from_the_groups_of_all_steps_so_far(tmp_path):
    run = write_run(tmp_path / "run", 0, steps=11)
    assert report.read_run(run)[0] == run
    label, rows = report.read_run(f"GRPO={run}", "generated")
    assert label == "GRPO"
    assert [row["generated"] for row in rows[:4]] == [0, 4 * 9, 4 * (9 + 10), 4 * (9 + 10 + 11)]
    trained = [row["trained"] for row in report.read_run(run, "trained")[1]]
    assert trained[:3] == [0, 4, 12] and trained[7] == trained[8] == 4 * 28 < trained[9]


def test_one_run_and_keys_that_are_missing(tmp_path):
    run = tmp_path / "short"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "val/reward/overall": 0.5}\n')
    report.curve([report.read_run(str(run))], tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] >= 1500


@pytest.mark.parametrize("content, says", [
    (None, "metrics.jsonl': give a run's out_dir"),
    ("", "has no validation"),
    ('{"step": 1, "reward/overall": 0.5}\n', "set validate_every above 0"),
    ('{"step": 0}\n{"step": 1, "val/rew\n{"step": 2}\n', "mend or remove this line: ")])
def test_bad_input_is_one_line_that_says_what_to_do(tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = command("curve", tmp_path, "--out", tmp_path / "curve.png")
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert ("line 2 column" in done.stderr) == (says[:4] == "mend")
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("run", ["grop", "GRPO=grop", "lr=grop"])
def test_a_run_that_is_not_there_is_named(tmp_path, monkeypatch, run):
    write_run(tmp_path / "here", 0)
    monkeypatch.chdir(tmp_path / "here")  # whose own metrics.jsonl is not the one asked for
    with pytest.raises(FileNotFoundError, match=r"'grop/metrics\.jsonl'"):
        report.read_run(run)


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path):
    run = Path(write_run(tmp_path / "run", 0))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "reward/over')
    assert len(report.read_run(str(run))[1]) == 61


# --- pages: what is in them -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The page of an evaluation, as a path."""
    folder = report_pages.write_results(tmp_path_factory.mktemp("results"))
    done = command(folder)
    assert done.returncode == 0, done.stderr
    return folder / "page.html"


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The page of step 2 of a run, as a path."""
    folder = report_pages.write_rollouts(tmp_path_factory.mktemp("rollouts"))
    done = command("rollouts", folder, "--out", folder / "step 2.html")
    assert done.returncode == 0, done.stderr
    return folder / "step 2.html"


def content(page):
    """The data of a page, which nothing in them can leave."""
    text = page.read_text("utf-8")
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data and text.count("</script>") == 2
    assert "//" not in text.replace("// ", "").replace(data, "")  # no address of anything
    return json.loads(data)


def test_items_with_pictures_or_a_sample_of_those_without(results):
    items = content(results)["items"]
    rows = {task: [item["row"] for item in items if item["task"] == task]
            for task in report_pages.ANSWERS}
    assert rows["rad_vqa"] == rows["pmc_vqa"] == [*range(1, 10), 0]  # 0: an error
    assert rows["medqa"] == list(range(0, 45, 3))  # at most 20 of 45, from all over
    pictures = {item["id"]: len(item["images"]) for item in items}
    assert (pictures["rad_vqa/3"], pictures["rad_vqa/4"], pictures["medqa/3"]) == (1, 2, 0)


def test_the_last_line_of_an_item_counts(tmp_path):
    folder = report_pages.write_results(tmp_path / "results")
    first = json.loads((folder / "responses.jsonl").read_text().split("\n")[1])
    with open(folder / "responses.jsonl", "a") as file:
        file.write(json.dumps(first | {"response": "tried again"}) + "\n")
    items = report.results(folder)["items"]
    assert [x["response"] for x in items if x["id"] == first["id"]] == ["tried again"]


@pytest.mark.parametrize("name", ["responses.jsonl", "judgements.jsonl", "scores.json"])
def test_an_evaluation_without_a_file(tmp_path, name):
    folder = report_pages.write_results(tmp_path / "results")
    (folder / name).unlink()
    done = command(folder)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{name}': give" in done.stderr and "that eval.py has scored" in done.stderr


def test_groups_of_the_last_step_or_of_another(rollouts):
    groups = content(rollouts)["items"]
    assert [(g["step"], g["split"], g["row"]) for g in groups if g["split"] == "step"] == [
        (2, "step", row) for row in (3, 5, 8, 11)]
    val = [g["row"] for g in groups if g["split"] == "val"]
    assert val == list(range(0, 110, 2))  # at most 100
    folder = rollouts.parent
    assert len(report.rollouts(folder, 1)["items"]) == 1
    with pytest.raises(ValueError, match="nothing of step 7: give another --step"):
        report.rollouts(folder, 7)


def test_images_are_those_of_the_rows(rollouts):
    for group in content(rollouts)["items"][:8]:
        picture = report_pages.decode_jpeg(group["images"][0]).astype(int)
        truth = report_pages.drawn(group["split"], group["row"])["image"]
        assert picture.shape == truth.shape and abs(picture - truth).mean() < 8
        assert abs(picture - report_pages.drawn("step", 100)["image"]).mean() > 20


@pytest.mark.parametrize("change", ["rows", "fewer"])
def test_rows_that_have_changed_are_not_shown_for_those_of_the_run(tmp_path, change):
    folder = report_pages.write_rollouts(tmp_path / "run", rows=5 if change == "fewer" else 12,
                                         seed=8 if change == "rows" else 7)
    with pytest.raises(ValueError, match=r"row \d of the data has changed, put it back"):
        report.rollouts(folder, 2)


def test_rows_of_a_json_file_with_paths_or_without_images(tmp_path):
    folder = report_pages.write_rollouts(tmp_path / "run", json_rows=True)
    groups = report.rollouts(folder, None)["items"]
    images = {g["row"]: len(g["images"]) for g in groups if g["split"] == "step"}
    assert images == {3: 1, 5: 0, 8: 2, 11: 1}


# --- pages: what a browser shows ------------------------------------------------------------------

TEXTS = "[...document.querySelectorAll(%r)].map(x => x.innerText.replace(/\\s+/g, ' '))"


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as visit:
        yield visit


def choose(page, label):
    """Click the filter of a name; returns the heads of the cards that are left."""
    page("[...document.querySelectorAll('nav button')].find("
         f"x => x.firstChild.data === {label!r}).click()")
    return page(TEXTS % "article header")


def check_layout(page, width):
    assert page("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    wide = page("[...document.querySelectorAll('main *')].filter(x => x.getBoundingClientRect()"
                f".right > {width} && !x.closest('.responses')).map(x => x.outerHTML)")
    assert wide == []
    assert page("[...document.images].filter(x => x.loading = 'eager').every(x => x.src.startsWith("
                "'data:image/jpeg;base64,'))")
    assert page("Promise.all([...document.images].map(x => x.decode().then(() => x.naturalWidth)))"
                ".then(x => Math.min(...x))") > 0


@needs_chromium
@pytest.mark.parametrize("screen", WIDTHS)
def test_page_of_an_evaluation(results, visit, screen):
    page = visit(results, WIDTHS[screen])
    check_layout(page, WIDTHS[screen])
    assert page("document.title") == "MBZUAI/MediX-R1-2B"  # and not "owned"
    assert page("[document.scripts.length, document.querySelectorAll('img[onerror], b b').length]"
                ) == [2, 0]
    table = page(TEXTS % "tbody tr")
    assert [row.split()[0] for row in table] == [
        "Macro", "Micro", *report_pages.PUBLISHED, *report_pages.ANSWERS]
    assert table[5] == "rad_vqa 54.7 50.0 – 59.4 451 3 1 97 % 0"
    named = page("[...document.querySelectorAll('.task')[0].cells].slice(3).map(x => "
                 "getComputedStyle(x, '::before').content != 'none' && x.title)")
    names = ["95 %", "n", "unanswered", "judge failures", "agreement", "errors"]
    assert named == (names if screen == "phone" else [False] * 6)  # there without a head
    assert "slake_vqa skipped: not in the data folder: hf download" in page(
        "document.querySelector('.notes').innerText")
    marks = page("[...document.querySelectorAll('tbody tr')].map(x => getComputedStyle("
                 "x.firstChild, '::after').content)")
    assert marks == ["none"] * 2 + ['"published"'] * 3 + ["none"] * 3
    bars = page("[...document.querySelectorAll('.task .fill, .task .range')].map(x => {"
                "const {left, width} = x.getBoundingClientRect(), "
                "track = x.parentNode.getBoundingClientRect();"
                "return [(left - track.left) / track.width, width / track.width]})")
    np.testing.assert_allclose(bars[:2], [[0, 0.547], [0.5, 0.094]], atol=0.01)


@needs_chromium
def test_items_can_be_chosen_by_task_and_verdict_and_read(results, visit):
    page = visit(results, 1280)
    assert len(page(TEXTS % "article")) == 35
    verdicts = ["unanswered", "judge failed", "right", "wrong", "partly", "right", "wrong",
                "partly", "excluded"]
    assert choose(page, "rad_vqa") == [
        f"{verdict} rad_vqa/{row} {40 + row} tokens" + ", ended by length" * (row == 1)
        for row, verdict in enumerate(verdicts, 1)] + ["error rad_vqa/0"]
    assert page(TEXTS % "article")[5].endswith("Decided without a judge: equal")
    assert choose(page, "wrong") == ["wrong rad_vqa/4 44 tokens", "wrong rad_vqa/7 47 tokens"]
    assert page("location.hash") == "#task=rad_vqa&verdict=wrong"
    card = page(TEXTS % "article")[0]
    assert card.endswith("Is there a pleural effusion? Response <X_RAY> Reasoning Something else, "
                         "most probably. Truth Yes, on the left. Judge: 0, 0, 0")
    page("document.querySelectorAll('article details').forEach(x => x.open = true)")
    card = page(TEXTS % "article")[0]
    assert "The image shows what it shows. 4 reasons speak for it." in card
    assert card.count("VERDICT 0.0 of rad_vqa/4 some/judge") == 3
    choose(page, "judge failed")
    assert "HTTP 503 after 300 s" in page("document.querySelector('article').textContent")
    assert "Judge: 0.5, 0.5, –" in page("document.querySelector('article').textContent")
    choose(page, "all")  # of the tasks
    assert page(TEXTS % "article header") == [
        f"judge failed {task}/2 42 tokens" for task in ("rad_vqa", "pmc_vqa")]
    choose(page, "right")
    assert choose(page, "medqa")[0] == "right medqa/3 43 tokens"
    assert page("[...document.querySelector('ol').children].map(x => [x.value, x.className])"
                ) == [[1, ""], [2, ""], [4, "true"], [5, ""]]  # C is missing


@needs_chromium
def test_hostile_and_broken_text_is_shown_as_it_is(results, visit):
    page = visit(results, 1280)
    choose(page, "right")
    shown = page("[...document.querySelectorAll('article .response .text')].map("
                 "x => x.textContent)")[0]
    assert shown == report_pages.EVIL + report_pages.BROKEN
    assert page("document.title") == "MBZUAI/MediX-R1-2B"


@needs_chromium
@pytest.mark.parametrize("screen", WIDTHS)
def test_page_of_rollouts(rollouts, visit, screen):
    page = visit(rollouts, WIDTHS[screen])
    check_layout(page, WIDTHS[screen])
    assert page(TEXTS % ".kind") in (["ROLLOUTS OF STEP 2"], ["Rollouts of step 2"])
    assert choose(page, "step") == ["kept row 3", "all right row 5", "all wrong row 8",
                                    "unscored row 11"]
    first = page(TEXTS % "article:first-of-type .response")
    assert first[0] == ("1.00 advantage +0.87 1 judge 1 embed 1 modality 1 format <X_RAY> "
                        "Reasoning the answer 20 tokens, loss −0.0173")
    assert first[1] == ("0.145 advantage −1.15 0 judge 0.25 embed 1 modality 1 format <X_RAY> "
                        "Reasoning, never closed No answer 48 tokens, loss not finite, ended by "
                        "length")
    assert "– judge" in page(TEXTS % "article")[3]
    tops = page("[...document.querySelectorAll('article:first-of-type .response')].map("
                "x => x.getBoundingClientRect().top)")
    assert len(tops) == 3 and len(set(tops)) == 1  # side by side
    for tag, heads in (("kept", 1), ("all right", 1), ("all wrong", 1), ("unscored", 1)):
        found = choose(page, tag)
        assert len(found) == heads and found[0].startswith(tag)
        choose(page, "step")
