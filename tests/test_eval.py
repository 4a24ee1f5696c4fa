"""eval.py: the whole pipeline on the tiny model, killed and restarted, with judges over HTTP."""
import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from judge_server import always, free_port, judge
from PIL import Image
from ranks import ROOT, forked

import common
import eval as evaluation

SHARED = ROOT.parent / "shared" / "data"
FILES = ("responses.jsonl", "judgements.jsonl", "scores.json", "scores.md")
TINY = {"prompt_template": "{question}", "max_prompt_tokens": 2000, "max_response_tokens": 24,
        "min_pixels": 4096, "max_pixels": 4096, "dtype": "float32", "engine": "torch",
        "judge": "exact", "judge_check": False, "judge_patience_s": 0.5, "judge_timeout_s": 5.0}
PHANTOMS = 150
MORE = [{"id": f"q{i}", "question": f"Which is number {i}?", "choices": ["one", "two", "", "four"],
         "answer_index": 1, "answer": "two"} for i in range(40)]


def png(size=(40, 30), seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(image).save(file := io.BytesIO(), "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def phantoms(start, tmp_path_factory):
    """The first PHANTOMS of the validation data."""
    rows = datasets.Dataset.from_parquet(f"{start}/data/val.parquet").select(range(PHANTOMS))
    rows.to_parquet(file := tmp_path_factory.mktemp("phantoms") / "phantom.parquet")
    return file


@pytest.fixture
def sources(start, phantoms, tmp_path):
    """data_dir with questions of text, and phantoms."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MORE))
    return [f"--data_dir={tmp_path}/data", f"--tasks=phantom={phantoms},text",
            f"--model={start}/model", f"--out_dir={tmp_path}/out"]


def arguments(sources, **more):
    return ["configs/eval.py", *(f"--{k}={v}" for k, v in (TINY | more).items()), *sources]


@pytest.fixture
def run(process_group, monkeypatch, tmp_path):
    """Evaluate in this process -> the results' folder, and the exit's message or None."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        monkeypatch.setattr(common, "start", lambda: (0, 1, torch.device("cpu")))
        monkeypatch.chdir(ROOT)
        before, said = {*tmp_path.glob("out/*/")}, None
        try:
            evaluation.main()
        except SystemExit as error:
            said = str(error)
        folders = sorted(tmp_path.glob("out/*/"), key=lambda f: (f not in before,
                                                                 f.stat().st_mtime))
        return folders[-1] if folders else None, said
    return call


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


# --- the whole ------------------------------------------------------------------------------------


def test_accuracy_is_the_trainers(start, phantoms, run, sources, tmp_path):
    forked(2, "train_grpo.py", "configs/tiny.py", f"--model={start}/model", "--steps=1",
           f"--train_data={start}/data@train", f"--val_data={phantoms}", "--val_temperature=0.0",
           f"--out_dir={tmp_path}/run")
    groups = lines(tmp_path / "run/rollouts", "val_000000")
    own = {g["row"]: g["responses"][0] for g in groups}
    folder, said = run(*arguments([*sources, f"--tasks=phantom={phantoms}"],
                                  max_response_tokens=48, max_prompt_tokens=1024))
    assert said is None
    assert {r["row"]: r["response"] for r in lines(folder, "responses")} == {
        row: response["text"] for row, response in own.items()}
    right = [response["parts"]["judge"] for response in own.values()]
    assert 0 < sum(right) < len(right) == PHANTOMS
    assert scores(folder)["tasks"]["phantom"]["accuracy"] == sum(right) / len(right)


def test_files_and_fields(run, sources):
    folder, said = run(*arguments(sources, page_items=3))
    assert said is None and folder.name.startswith("tmp_")
    responses, judged = lines(folder, "responses"), lines(folder, "judgements")
    ids = [r["id"] for r in responses]
    assert ids == [r["id"] for r in judged] and len({*ids}) == len(ids) == PHANTOMS + 40
    assert ids[:2] == ["phantom/0", "phantom/1"] and ids[-1] == "text/39"  # by number, not by text
    assert [*responses[0]] == ["id", "task", "row", "question", "choices", "answer", "response",
                               "finish_reason", "tokens", "error"]
    assert {*judged[0]} == {"id", "round", "prompt", "reply", "verdict", "judge", "error"}
    assert responses[-1]["question"] == "Which is number 39?"
    assert responses[-1]["choices"] == ["one", "two", "", "four"]
    result = scores(folder)
    assert [*result] == ["tasks", "micro", "macro", "published", "skipped", "protocol", "items"]
    tasks, rows = result["tasks"], [*result["items"].values()]
    assert {*tasks["text"]} == {"accuracy", "low", "high", "n", "unanswered", "judge_failures",
                                "judge_agreement", "errors"}
    assert [tasks[k]["n"] for k in ("phantom", "text")] == [PHANTOMS, 40]
    assert result["micro"]["accuracy"] == pytest.approx(sum(rows) / len(rows))
    assert len(rows) == PHANTOMS + 40
    assert result["macro"]["accuracy"] == pytest.approx(
        (tasks["phantom"]["accuracy"] + tasks["text"]["accuracy"]) / 2)
    assert all(t["low"] <= t["accuracy"] <= t["high"] for t in tasks.values())
    assert result["published"] == {"MediX-R1-2B": 55.4, "MediX-R1-8B": 68.8, "MediX-R1-30B": 73.6}
    assert result["protocol"].startswith("not as published")
    pictures = [*(folder / "images").iterdir()]
    assert len(pictures) == 3 and all(p.name.startswith("phantom_") for p in pictures)
    [packed] = folder.glob("*_model_submission.zip")
    assert {*folder.iterdir()} - {packed} == {
        folder / n for n in (*FILES, "config.json", "images")}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch" in config["versions"]


def test_other_settings_or_weights_have_another_folder(run, sources):
    args = arguments([*sources, "--stages=score"])
    folders = {run(*args, *more)[0] for more in (
        (), ("--seed=2",), ("--votes=1",), ("--prompt=plain",), ("--judge_model=b",))}
    assert len(folders) == 5
    assert run(*args, "--judge_concurrency=3", "--page_items=1")[0] in folders  # change no result


# --- kills ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def killer():
    """Runs eval.py with args, and kills it with SIGKILL before the at-th line that one of its
    functions runs -> "killed", or how many there are if at is 0."""
    with subprocess.Popen([sys.executable, "tests/eval_killed.py"], cwd=ROOT, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        def call(function, args, at=0, count="all"):
            job = {"function": function, "at": at, "count": count, "arguments": [*map(str, args)]}
            print(json.dumps(job), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        yield call


def on_file(out, name, rounds=1):
    """The ids of which responses or judgements, in ranks' own files, too, hold the last round."""
    records = [json.loads(line) for file in out.glob(f"*/{name}.*")
               for line in file.read_bytes().split(b"\n")[:-1]]
    return {r["id"] for r in records if r.get("round", 0) == rounds - 1}


def kills(killer, stage, args, out, items, seeds, count="all", rounds=1):
    """Kill a stage before a random line, for each seed, of those it has left to run (in all as many
    as args, with an out_dir of its own, takes unbroken), then let it end. What was on file must
    stay there; yields the ids that then are."""
    name, kept = "responses" if stage == "generate" else "judgements", set()
    work = killer(stage, [*args, f"--stages={stage}"], count=count)
    whole = next(Path(args[-1].partition("=")[2]).glob(f"*/{name}.jsonl"))
    there = [*args, f"--stages={stage}", f"--out_dir={out}"]
    for seed in seeds:
        left = 1.0 if stage == "score" else 1 - len(kept) / items
        at = 1 + int(0.95 * left * work * random.Random(seed).random())
        assert killer(stage, there, at, count) == "killed"
        assert kept <= on_file(out, name, rounds)
        kept = on_file(out, name, rounds)
        yield kept
        more = [line for line in whole.read_bytes().splitlines(True)
                if json.loads(line)["id"] not in kept]
        with open(next(out.glob("*")) / f"{name}.part0", "ab") as file:  # as a full disk leaves it
            file.write(b"".join(more[:1]) + b"".join(more[1:2])[:-9])
    assert isinstance(killer(stage, there), int)


def test_killed_five_times_in_each_stage(killer, phantoms, sources, tmp_path):
    args = [*arguments(sources), f"--tasks=text,phantom={phantoms}", f"--out_dir={tmp_path}/whole"]
    for stage in ("generate", "judge", "score"):
        done, most = [], 20 if stage == "score" else PHANTOMS + 40
        for kept in kills(killer, stage, args, tmp_path / "killed", PHANTOMS + 40,
                          seeds=(25, 19, 9, 6, 17),
                          count="own" if stage == "score" else "all"):  # most of all are draws
            images = len([*tmp_path.glob("killed/*/images/*")])
            done.append(images if stage == "score" else len(kept))
        assert done[0] < done[-1] < most, f"the kills do not hit its midst: {done}"
    files, again = ({f.relative_to(out): f.read_bytes() for f in out.rglob("*.*")
                     if f.name != "config.json"} for out in (
        next(tmp_path.glob("whole/*")), next(tmp_path.glob("killed/*"))))
    assert len(files) == 4 + 20 and again == files


def test_killed_five_times_while_a_judge_is_asked(killer, answers, tmp_path):
    with judge(rule=lambda question, truth, answer: "NO" if answer == "wrong" else "YES") as server:
        folder, args = answers("so it is", "wrong", judge_url=server.url)
        out = tmp_path / "killed"
        shutil.copytree(folder, out / folder.name)
        seen = [(kept, len(server.requests)) for kept in kills(
            killer, "judge", [*args, f"--out_dir={folder.parent}"], out, 40,
            seeds=(9, 2, 1, 20, 15), rounds=3)]
        assert 0 < len(seen[-1][0]) < 40, "no kill while verdicts come in"
        whole, again = lines(folder, "judgements"), lines(out / folder.name, "judgements")
        assert len(whole) == 120
    assert [(r["id"], r["round"]) for r in again] == [(r["id"], r["round"]) for r in whole]
    assert [r["verdict"] for r in again] == [r["verdict"] for r in whole]
    for kept, before in seen:  # what is on file is not asked again
        questions = {r.question for r in server.requests[before:]}
        assert not [i for i in kept if any(f"number {i[5:]}?" in q for q in questions)]


def test_killed_before_any_line_of_tidy(killer, run, sources, tmp_path):
    args = [*arguments([*sources, "--tasks=text"], max_response_tokens=1), "--stages=generate"]
    folder, _ = run(*args)
    whole = (folder / "responses.jsonl").read_bytes()
    rows, at, said = whole.splitlines(True), 0, None
    while said in (None, "killed"):
        (folder / "responses.jsonl").write_bytes(b"".join(rows[:10]))
        (folder / "responses.part0").write_bytes(b"".join(rows[30:]))
        (folder / "responses.part1").write_bytes(b"".join(rows[10:30]) + rows[0][:20])
        at += 1
        said = killer("tidy", args, at, count="new")
        assert len(on_file(folder.parent, "responses")) == 40, f"lost by a kill at line {at}"
        evaluation.tidy(SimpleNamespace(folder=folder, rank=0))
        assert (folder / "responses.jsonl").read_bytes() == whole, at
        assert not [*folder.glob("*.part*"), *folder.glob("new")], at
    assert at == said + 1 > 20


@pytest.mark.parametrize("name", ["responses", "judgements"])
def test_cut_at_any_byte(run, sources, name):
    args = arguments(sources)
    folder, _ = run(*args)
    whole, text = contents(folder), (folder / f"{name}.jsonl").read_bytes()
    for cut in (0, 1, len(text) // 3, len(text) - 2):
        (folder / f"{name}.jsonl").write_bytes(b"")
        (folder / f"{name}.part0").write_bytes(text[:cut])
        (folder / f"{name}.part1").write_bytes(text[:cut // 2])  # the same again, of another rank
        run(*args)
        assert contents(folder) == whole, cut


def test_two_ranks_do_the_same(sources, run, tmp_path):
    whole = contents(run(*arguments(sources))[0])
    forked(2, "eval.py", *arguments(sources), f"--out_dir={tmp_path}/two")
    folder, = tmp_path.glob("two/*/")
    assert contents(folder) == whole


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer,index", [
    ("B", 1), ("b.", 1), ("(B)", 1), ("B)", 1), ("Option B", 1), ("The answer is B.", 1),
    ("The correct answer is: (b)", 1), ("B. Left lung", 1), ("**B. Left lung**", 1),
    ("Left lung", 1),
    ("left  LUNG.", 1), ("B: left lung", 1), ("D", None), ("E", None), ("B. Heart", None),
    ("B or C", None), ("A heart", None), ("a left lung", None), ("", None), ("A, B", None),
    ("lung", None), ("C. none of these", 2), ("b. left lung is right", None)])
def test_stated_option(answer, index):
    choices = ["Heart", "Left lung", "None of these.", "", "none of these"][:4]
    assert evaluation.stated_option(answer, choices) == index


def test_an_option_that_is_a_letter():
    assert evaluation.stated_option("B", ["AB", "A", "B", "0"]) is None  # blood group, or letter?
    assert evaluation.stated_option("AB", ["AB", "A", "B", "0"]) == 0


def decide(response, judge="http", rating=False, **item):
    item = {"task": "t", "index": None, "choices": None, "answer": "left lung"} | item
    run = SimpleNamespace(tasks={"t": {"rating": rating}}, cfg=SimpleNamespace(judge=judge))
    return evaluation.decide(run, item, response)


def test_decide():
    choices = {"choices": ["heart", "left lung"], "index": 1}
    assert decide("<thinking>it is B, left lung")[1:] == (0.0, "unanswered")
    assert decide("<think>it is left lung")[1:] == (0.0, "unanswered")
    assert decide("")[1:] == (0.0, "unanswered")
    assert decide("<think>heart</think>left lung")[1:] == (1.0, "equal")
    assert decide("Left lung.")[1:] == (1.0, "equal")
    assert decide("Left lung.", rating=True)[1:] == (5.0, "equal")
    assert decide("<X_RAY><thinking>a</thinking><answer>the lung</answer>") == (
        "the lung", None, "exact")
    assert decide("the lung", judge="exact")[1:] == (0.0, "exact")
    assert decide("<thinking>a</thinking><answer>B</answer>", **choices)[1:] == (1.0, "option")
    assert decide("A", **choices)[1:] == (0.0, "option")
    assert decide("It may be the left lung", **choices)[1] is None
    assert decide("x" * 5000)[1] is None  # the limit of training is no limit here


# --- judges ---------------------------------------------------------------------------------------


@pytest.fixture
def answers(run, sources):
    """Results whose responses are made up; tell() sets the texts."""
    def tell(*texts, **more):
        args = arguments([*sources, "--tasks=text"], judge="http", **more)
        folder, _ = run(*args, "--stages=generate")
        records = lines(folder, "responses")
        for record in records:
            record["response"] = texts[record["row"] % len(texts)]
        common.write_lines(folder / "responses.jsonl", records)
        return folder, args
    return tell


def test_votes(answers, run):
    turns = {}

    def rule(question, truth, answer):
        turns[question] = turns.get(question, 0) + 1
        return "NO" if answer == "contested" and turns[question] == 2 else (
            "NO" if answer == "wrong" else "YES")

    with judge(rule=rule) as server:
        folder, args = answers("contested", "wrong", "B", "two", judge_url=server.url)
        assert run(*args)[1] is None
        judged = [r for r in lines(folder, "judgements") if r["prompt"]]
        assert len(judged) == 60 == len(server.requests) - 1
        assert [r["round"] for r in judged[:4]] == [0, 1, 2, 0]
        assert judged[0]["judge"] == "Qwen/Qwen3-14B" and "contested" in judged[0]["prompt"]
        assert server.requests[1].truth == "B. two"
        assert "A. one\nB. two\nD. four" in server.requests[1].question
        seeds = {(r.body["seed"], r.body["temperature"]) for r in server.requests[1:]}
        assert seeds == {(1, 0.7), (2, 0.7), (3, 0.7)}
        row = scores(folder)["tasks"]["text"]
        assert row["accuracy"] == 0.75
        assert row["judge_agreement"] == 0.5  # 10 of the 20 that were voted on
        before = len(server.requests)
        run(*args)
        assert len(server.requests) == before, "a judgement was asked for twice"


def test_a_judge_that_fails(answers, run):
    with judge() as server:
        folder, args = answers("nobody knows", "B", judge_url=server.url, votes="1")
        server.script = iter(["ok", *["say:perhaps"] * 500])
        _, said = run(*args)
        row = scores(folder)["tasks"]["text"]
        assert "20 failed" in said and row["judge_failures"] == 20 and row["accuracy"] == 0.5
        failed = [r for r in lines(folder, "judgements") if r["error"]]
        assert len(failed) == 20 and failed[0]["verdict"] is None
        assert "perhaps" in failed[0]["error"]
        server.script = always("say:yes")
        assert run(*args)[1] is None, "what has failed is asked again"
        assert scores(folder)["tasks"]["text"]["accuracy"] == 1.0
        assert len(lines(folder, "judgements")) == 40


@pytest.fixture
def talking_judge():
    port = free_port()
    process = subprocess.Popen([sys.executable, "tests/eval_judge.py", str(port), "0"], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()


def test_the_original_conversation(answers, run, talking_judge):
    folder, args = answers("changes its mind", "wrong", judge_url=talking_judge, votes="original")
    assert run(*args)[1] is None
    judged = lines(folder, "judgements")
    assert [r["verdict"] for r in judged[:6]] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert [r["prompt"] == judged[1]["prompt"] for r in judged[:3]] == [False, True, True]
    assert scores(folder)["micro"]["accuracy"] == 0.0


def test_reports_are_rated(run, sources, talking_judge, tmp_path, start):
    data_dir = tmp_path / "data"
    (data_dir / "mimic_cxr_report_summarization.jsonl").write_text("".join(
        json.dumps({"report": f"{i} is seen", "summary": f"{i}"}) + "\n" for i in range(4)))
    args = arguments([*sources, "--tasks=mimic_cxr_report_summarization"], judge="http",
                     judge_url=talking_judge)
    folder, said = run(*args)
    run(*args, "--stages=submit", "--submit_as=org/My-Model.1")
    assert said is None
    judged = [r for r in lines(folder, "judgements") if r["prompt"]]
    assert {r["verdict"] for r in judged} <= {4.0} and "0 to 5" in judged[0]["prompt"]
    items = scores(folder)["items"]
    assert {items[r["id"]] for r in judged} == {0.8}
    with zipfile.ZipFile(next(folder.glob("*_My_Model_1_*.zip"))) as file:
        marks = [json.loads(x)["evaluation"]["score"]
                 for x in file.read("My_Model_1/My_Model_1_eval.jsonl").splitlines()]
    assert marks == [5 * x for x in items.values()]


# --- errors ---------------------------------------------------------------------------------------


def test_items_that_cannot_be_asked(run, sources, tmp_path):
    rows = [{"id": str(i), "question": "What?" if i != 2 else "What? " * 3000, "answer": "a heart",
             "choices": None, "answer_index": None, "image": f"{i}.png"} for i in range(4)]
    (tmp_path / "data/own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in (0, 2, 3):
        (tmp_path / f"data/{i}.png").write_bytes(png() if i < 3 else b"no image")
    folder, said = run(*arguments([*sources, "--tasks=own"]))
    assert "2 failed" in said or "3 failed" in said
    errors = {r["id"]: r["error"] for r in lines(folder, "responses")}
    assert errors["own/0"] is None and "max_prompt_tokens=2000" in errors["own/2"]
    assert "1.png" in errors["own/1"] and "row 3, image: UnidentifiedImageError" in errors["own/3"]
    assert scores(folder)["tasks"]["own"] == scores(folder)["tasks"]["own"] | {
        "errors": 3, "n": 4, "accuracy": 0.0}
    (tmp_path / "data/1.png").write_bytes(png())
    (tmp_path / "data/3.png").write_bytes(png())
    assert "1 failed" in run(*arguments([*sources, "--tasks=own"]))[1]
    assert scores(folder)["tasks"]["own"]["errors"] == 1


def test_a_question_that_has_changed(run, sources, tmp_path):
    args = arguments([*sources, "--tasks=text"])
    run(*args)
    text = tmp_path / "data/text.jsonl"
    text.write_text(text.read_text().replace("number 7?", "digit 7?"))
    assert "text/7 has changed" in run(*args)[1]
    assert run(*args, f"--out_dir={tmp_path}/other")[1] is None


def test_a_data_set_that_is_missing(run, sources, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder, said = run(*arguments([*sources, "--tasks=text,rad_vqa"]))
    assert said is None and [*scores(folder)["tasks"]] == ["text"]
    assert "hf download --repo-type dataset flaviagiammarino/vqa-rad" in (
        scores(folder)["skipped"]["rad_vqa"])


@pytest.mark.parametrize("change,words", [
    ("--tasks=medqua", ["medqua", "medqa"]), ("--votes=0", ["votes", "original"]),
    ("--prompt=trian", ["prompt", "plain"]), ("--stages=score", ["generate and judge"]),
    ("--stages=jugde", ["jugde", "judge"])])
def test_mistakes(run, sources, change, words):
    _, said = run(*arguments([*sources, change]))
    assert said.startswith("error: ") and all(word in said for word in words), said


def test_physionet_needs_an_account_and_no_other_site_gets_it(monkeypatch):
    cfg = common.load_config(evaluation.defaults, ["configs/eval.py"])
    fetch = cfg.benchmarks["mimic_cxr_report_generation"]["fetch"]
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.delenv("PHYSIONET_UNAME", raising=False)
    with pytest.raises(ValueError, match="PHYSIONET_UNAME"):
        fetch("https://physionet.org/files/a.jpg")
    with pytest.raises(ValueError, match="no password"):
        fetch("https://physionet.org.example.com/a.jpg")


# --- tasks ----------------------------------------------------------------------------------------


def test_the_17_tasks():
    cfg = common.load_config(evaluation.defaults, ["configs/eval.py"])
    count = {}
    for group in ("llm", "vlm", "all", "mmmu_medical"):
        cfg.tasks = group
        count[group] = len(evaluation.find_tasks(cfg))
    assert count == {"llm": 11, "vlm": 6, "all": 17, "mmmu_medical": 1}


def test_rows_of_the_original_data_sets():
    tasks = common.load_config(evaluation.defaults, ["configs/eval.py"]).benchmarks
    item = tasks["pubmedqa"]["item"]({
        "CONTEXTS": ["one", "two"], "QUESTION": "So?", "final_decision": "no", "LONG_ANSWER": "As"})
    assert item == {"question": "Contexts:\none\ntwo\n\nQuestion:\nSo?", "index": 1,
                    "choices": ["yes", "no", "maybe"], "answer": "no\nAs"}
    item = tasks["mmmu_medical"]["item"]({
        "id": "validation_Pharmacy_1", "question": "<image 1> or <image 2>?",
        "options": "['a', \"b's\"]", "answer": "B"})
    assert item == {"question": "<image 1> or <image 2>?", "choices": ["a", "b's"], "index": 1,
                    "answer": "b's", "name": "validation_Pharmacy_1"}
    item = tasks["usmle_sa"]["item"]({"question": "?", "answer": "y", "options": {
        "A": "x", "B": None, "C": "y"}})
    assert item == {"question": "?", "choices": ["x", None, "y"], "index": 2, "answer": "y\n"}
    assert tasks["slake_vqa"]["where"]({"q_lang": "zh"}) is False


def test_several_images_of_a_row(run, sources, tmp_path):
    rows = [{"id": "a", "question": "Same?", "image_1": {"bytes": png()}, "image_2": {
        "bytes": png(seed=1)}, "image_3": None, "options": "['yes', 'no']", "answer": "A",
        "question_type": "multiple-choice"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/mmmu_medical.parquet")
    folder, said = run(*arguments([*sources, "--tasks=mmmu_medical"]))
    assert said is None and lines(folder, "responses")[0]["answer"] == "yes"
    assert sorted(p.name for p in (folder / "images").iterdir()) == [
        "mmmu_medical_0_1.jpg", "mmmu_medical_0_2.jpg"]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_all_shared_files_are_read():
    cfg = common.load_config(evaluation.defaults, ["configs/eval.py", f"--data_dir={SHARED}/eval"])
    cfg.tasks = ",".join(f.stem for f in sorted((SHARED / "eval").glob("*.jsonl")))
    for name, task in evaluation.find_tasks(cfg).items():
        items = evaluation.read_task(cfg, name, task)["items"]
        raw = [json.loads(x) for x in (SHARED / f"eval/{name}.jsonl").read_text().splitlines()]
        assert len(items) == len(raw)
        for item, row in zip(items, raw):
            assert item["choices"][item["index"]] == row["answer"]
            assert all(text in item["question"] for text in row.get("contexts", []))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_real_images(run, sources, tmp_path):
    table = pq.read_table(SHARED / "medix_real_test.parquet")
    rows = [row for row in table.to_pylist() if row["source"] == "vqa_rad"]
    file = tmp_path / "data/vqa.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)
    folder, said = run(*arguments([*sources, "--tasks=vqa"], max_response_tokens=4))
    assert said is None and scores(folder)["micro"]["n"] == len(rows) > 50
    assert len([*(folder / "images").iterdir()]) == 20


# --- submission, comparison, contamination --------------------------------------------------------


def test_submission(run, sources):
    folder, _ = run(*arguments(sources))
    run(*arguments(sources, stages="submit", submit_as="MBZUAI/MediX-R1.5-2B"))
    with zipfile.ZipFile(folder / "03ff1f76_MediX_R1_5_2B_submission.zip") as file:
        name = "MediX_R1_5_2B"
        assert file.namelist() == [f"{name}/{name}{end}" for end in (
            ".jsonl", "_eval.jsonl", "_score.txt")]
        plain, judged, table = (file.read(n).decode() for n in file.namelist())
    plain, judged = ([json.loads(x) for x in text.splitlines()] for text in (plain, judged))
    assert [*plain[0]] == ["id", "question", "answer", "response", "answer_idx"]
    assert [p | {"evaluation": j["evaluation"]} for p, j in zip(plain, judged)] == judged
    assert {json.dumps(j["evaluation"]) for j in judged} == {'{"score": 0}', '{"score": 1}'}
    assert plain[-1]["id"] == "text_39" and plain[-1]["question"] == (
        "Which is number 39?\n\nChoices:\nA. one\nB. two\nD. four")
    rows = table.split("\n")
    assert rows[:2] == ["Model: MBZUAI/MediX-R1.5-2B", ""]
    assert rows[2].split() == ["Task", "Accuracy", "Accuracy", "(%)"]
    accuracy = scores(folder)["tasks"]["phantom"]["accuracy"]
    index, task, share, percent = rows[3].split()
    assert [index, task, percent] == ["0", "phantom", f"{100 * accuracy:.2f}%"]
    assert float(share) == pytest.approx(accuracy, abs=1e-6)
    overall = 100 * scores(folder)["macro"]["accuracy"]
    index, task, share, percent = rows[5].split()
    assert [index, task, percent] == ["2", "Overall", f"{overall:.2f}%"]
    assert float(share) == pytest.approx(overall, abs=1e-6)


SUBJECTS = ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
            "Pharmacy", "Public_Health")


@pytest.fixture
def mmmu(tmp_path, sources):
    """Five questions in each of MMMU's medical subjects, in its columns; one is open."""
    rows = [{"id": f"validation_{subject}_{i}", "question": f"<image 1> Which is {i}?",
             "options": "['nought', 'one', 'two', 'three']", "answer": "ABCD"[i],
             "question_type": "multiple-choice", "image_1": {"bytes": png()},
             **{f"image_{k}": {"bytes": png(seed=k)} if k <= i else None for k in range(2, 8)}}
            for subject in SUBJECTS for i in range(4)]
    rows.append(rows[0] | {"id": "validation_Pharmacy_9", "options": "[]", "answer": "nine",
                           "question_type": "open"})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/mmmu_medical.parquet")
    return [*sources, "--tasks=text,mmmu_medical"]


def test_submission_of_mmmu(mmmu, run):
    """Beside the three files, which it is not in, lies what MedEvalKit would have written."""
    texts = ("<thinking>?</thinking><answer>A</answer>", "two", "It may be two.", "<thinking>D")
    with judge(rule=lambda question, truth, answer: "YES") as server:
        args = arguments(mmmu, max_response_tokens=2, judge="http", judge_url=server.url)
        folder, _ = run(*args, "--stages=generate")
        records = lines(folder, "responses")
        common.write_lines(folder / "responses.jsonl", [
            r | {"response": "B" if r["task"] == "text" else texts[r["row"] % 4]} for r in records])
        assert run(*args)[1] is None
    run(*args, "--stages=submit", "--submit_as=MBZUAI/MediX-R1.5-2B")
    with zipfile.ZipFile(folder / "03ff1f76_MediX_R1_5_2B_submission.zip") as file:
        files = {name: file.read(name).decode() for name in file.namelist()}
    ours, theirs = "MediX_R1_5_2B/MediX_R1_5_2B", "MediX-R1.5-2B-MMMU-Medical-val"
    kit = f"{theirs}/MMMU-Medical-val"
    assert {*files} == {f"{ours}.jsonl", f"{ours}_eval.jsonl", f"{ours}_score.txt",
                        f"{theirs}/total_results.json", f"{kit}/result.json",
                        *(f"{kit}/{subject}/{name}.json" for subject in SUBJECTS
                          for name in ("output_sample", "parsed_output", "result"))}
    assert "Overall" not in files[f"{ours}_score.txt"] and "mmmu" not in files[f"{ours}_score.txt"]
    assert len(files[f"{ours}.jsonl"].splitlines()) == 40 and "mmmu" not in files[f"{ours}.jsonl"]

    result = {"acc": 0.5, "right": 2, "total": 4, "num_example": 4}
    total = {"total": {"acc": 0.5, "right": 10, "total": 20}} | dict.fromkeys(SUBJECTS, result)
    assert json.loads(files[f"{kit}/result.json"]) == total
    assert json.loads(files[f"{theirs}/total_results.json"]) == {"MMMU-Medical-val": total}
    for subject in SUBJECTS:
        raw, parsed, score = (json.loads(files[f"{kit}/{subject}/{name}.json"]) for name in (
            "output_sample", "parsed_output", "result"))
        assert score == result
        assert [r.pop("judge") for r in parsed] == ["Correct", "Wrong", "Correct", "Wrong"]
        assert raw == parsed == [
            {"id": f"validation_{subject}_{i}", "question_type": "multiple-choice",
             "answer": "ABCD"[i], "all_choices": [*"ABCD"],
             "index2ans": {"A": "nought", "B": "one", "C": "two", "D": "three"},
             "response": response, "parsed_pred": letter}
            for i, (response, letter) in enumerate((
                ("A", "A"), ("two", "C"), ("It may be two.", "C"), ("<thinking>D", "")))]


def test_compare(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    old = {f"{task}/{i}": float(rng.random() < 0.5) for task in "xy" for i in range(200)}
    new = {k: 1.0 if k[0] == "x" else v for k, v in old.items()} | {"z/0": 1.0}
    for name, items in (("a", old), ("b", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps({"items": items}))
    run("compare", tmp_path / "a", tmp_path / "b")
    first, _, *rows = capsys.readouterr().out.strip().split("\n")
    assert "400 items in both, 400 in A, 401 in B" in first
    table = {row.split()[0]: list(map(float, row.split()[1:])) for row in rows}
    wrong = 1 - np.mean([v for k, v in old.items() if k[0] == "x"])
    assert table["x"][0] == pytest.approx(wrong, abs=1e-4) and table["x"][1] > 0.4
    assert table["y"] == [0, 0, 0, 200] and table["all"][0] == pytest.approx(wrong / 2, abs=1e-4)


def test_overlap(run, sources, tmp_path, start, capsys):
    val = datasets.Dataset.from_parquet(f"{start}/data/val.parquet").to_list()[:30]
    train = [{k: row[k] for k in ("problem", "solution", "image")} for row in val[:10]]
    train.append({"problem": "which is NUMBER 3?", "solution": "<OTHER> x", "image": []})
    datasets.Dataset.from_list(train).to_parquet(tmp_path / "train.parquet")
    args = arguments(sources)
    train[5]["image"][0]["bytes"] = b"no image"
    train[6]["image"][0] |= {"bytes": None, "path": "/dev/zero"}  # which has no end
    datasets.Dataset.from_list(train).to_parquet(tmp_path / "harmed.parquet")
    run("overlap", *sources[:2], sources[3], f"--train={tmp_path}/harmed.parquet")  # no model
    said = capsys.readouterr().out
    assert "images not read, hence not compared: 2, such as train/5: row 5, image: Unid" in said
    harmed = json.loads((tmp_path / "out/overlap.json").read_text())
    assert "train/6: row 6, image: ValueError: /dev/zero is no file" in harmed["unread"]
    run("overlap", *args, f"--train={tmp_path}/train.parquet")
    assert "not compared" not in capsys.readouterr().out
    found = json.loads((tmp_path / "out/overlap.json").read_text())
    assert found["items"]["text/3"].split() == ["question"] and "text/4" not in found["items"]
    assert all("image" in found["items"][f"phantom/{i}"] for i in range(10))
    assert {*found["exclude"]} - {*harmed["exclude"]} == {"phantom/5", "phantom/6"}
    same = [i for i, why in found["items"].items() if why.split() == ["question"]]
    assert len(same) > 20 and {*same} & {*found["exclude"]} == {"text/3"}  # phantoms: another image
    folder, _ = run(*args, f"--exclude={tmp_path}/out/overlap.json")
    assert not {*found["exclude"]} & {*scores(folder)["items"]}
    assert scores(folder)["micro"]["n"] == PHANTOMS + 40 - len(found["exclude"])


@pytest.mark.vllm
def test_vllm_says_the_same(sources, start, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    said = {}
    for engine, more in (("torch", {}), ("vllm", {
            "engine_args": "{'enforce_eager': True}", "gpu_memory_utilization": 0.2})):
        args = arguments(sources, engine=engine, **more)
        forked(0, "eval.py", *args, f"--out_dir={tmp_path}/{engine}",
               env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"})
        folder, = tmp_path.glob(f"{engine}/*/")
        said[engine] = {r["id"]: r["response"] for r in lines(folder, "responses")}
    same = sum(text == said["torch"][i] for i, text in said["vllm"].items())
    assert len(said["vllm"]) == PHANTOMS + 40
    assert same >= PHANTOMS + 38  # a tie may be broken otherwise
