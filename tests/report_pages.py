"""What the pages of report.py are tested on: a results folder as eval.py leaves it and the out_dir
of a run, both with text that a page must not obey."""

import base64
import functools
import io
import json

import numpy as np
from PIL import Image

import tiny

EVIL = ("</script><script>document.title='owned'</script>"
        "<img src=x onerror=\"document.title='owned'\">")
BROKEN = ("half a pair \ud83d, right to left \u202e, line \u2028 paragraph \u2029 <!-- <b>bold</b> "
          "&amp;")
ANSWERS = {"rad_vqa": ("Is there a pleural effusion?", None, "Yes, on the left."),
           "pmc_vqa": ("Which modality is this?", ["CT", "MRI", "Ultrasound", "X-ray"], "CT"),
           "medqa": ("A 20-day-old child is brought to the emergency department because of "
                     "lethargy and easy bruising. Which of the following is the most likely cause?",
                     ["Group B streptococcus infection", "Hepatitis B infection",
                      None, "Vitamin K deficiency", EVIL], "Vitamin K deficiency")}
RESPONSE = "<X_RAY><thinking>why</thinking><answer>the answer</answer>"
PUBLISHED = {"MediX-R1-2B": 55.4, "MediX-R1-8B": 68.8, "MediX-R1-30B": 73.6}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def share(accuracy, n, unanswered=0, judge_failures=0):
    return {"accuracy": accuracy, "low": max(0, accuracy - n**-0.5), "n": n, "errors": 0,
            "high": min(1, accuracy + n**-0.5), "unanswered": unanswered,
            "judge_failures": judge_failures, "judge_agreement": 0.97}


def write_results(folder):
    """A results folder: 45 items of each of three tasks, of which medqa has no images. By row:
    0 an error, 1 unanswered, 2 a judge that failed at last, 3 hostile text, 4 two images, 6 equal
    to the truth, 9 excluded, else in turn right, wrong, half right; pictures of rows 1 to 9."""
    responses, judgements, scores = [], [], {}
    (folder / "images").mkdir(parents=True)
    for task, (question, choices, answer) in ANSWERS.items():
        for row in range(45):
            name, right = f"{task}/{row}", (1.0, 0.0, 0.5)[row % 3]
            said = answer if right else "Something else, most probably."
            text = (f"<X_RAY><thinking>The image shows what it shows. {row} reasons speak for it."
                    f"</thinking><answer>{said}</answer>")
            text = {0: "", 1: "<X_RAY><thinking>It never ends", 3: EVIL + BROKEN}.get(row, text)
            responses.append({
                "id": name, "task": task, "row": row, "choices": choices, "answer": answer,
                "question": question + (EVIL + BROKEN if row == 3 else ""), "response": text,
                "finish_reason": "length" if row == 1 else "stop", "tokens": 40 + row,
                "error": "prompt of 9000 tokens, at most 4352 fit" if row == 0 else None})
            if row in (1, 6):  # decided without a judge
                judgements.append({
                    "id": name, "round": 0, "prompt": None, "reply": None, "error": None,
                    "judge": "unanswered" if row == 1 else "equal", "verdict": float(row == 6)})
            for k in range(3 if row > 1 and row != 6 else 0):
                reply = EVIL if row == 3 else f"VERDICT {right} of {name}"
                failed = (row, k) == (2, 2)
                judgements.append({
                    "id": name, "round": k, "prompt": "Grade", "judge": "some/judge",
                    "reply": None if failed else reply, "verdict": None if failed else right,
                    "error": "HTTP 503 after 300 s" if failed else None})
            if row != 9:
                scores[name] = right if row > 2 else 0.0  # 9 is excluded
            drawn_twice = {"_1", "_2"} if row == 4 else {""}
            for ending in drawn_twice if task != "medqa" and 0 < row < 10 else ():
                picture = tiny.phantom(7, row, ending == "_2")["image"]
                Image.fromarray(picture).resize((256, 256)).save(
                    folder / f"images/{task}_{row}{ending}.jpg")
    write_lines(folder / "responses.jsonl", responses)
    write_lines(folder / "judgements.jsonl", judgements)
    summary = {
        "tasks": {"rad_vqa": share(0.547, 451, 3, 1), "pmc_vqa": share(0.62, 2000, 12),
                  "medqa": share(0.481, 1273, 31)},
        "micro": share(0.571, 3724, 46, 1),
        "macro": {"accuracy": 0.549, "low": 0.53, "high": 0.568},
        "published": PUBLISHED, "protocol": "3 independent votes", "items": scores,
        "skipped": {"slake_vqa": "not in the data folder: hf download BoKelvin/SLAKE " + EVIL}}
    (folder / "scores.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(
        {"model": "MBZUAI/MediX-R1-2B", "votes": 3, "judge_args": {"choice": [EVIL]}}))
    return folder


@functools.cache
def drawn(split, row, seed=7):
    return tiny.phantom(seed, row, split != "step")


def decode_jpeg(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def reply(judge, embed, advantage, text=RESPONSE):
    scored, closed = judge is not None, "</thinking>" in text
    overall = 0.9 * (0.575 * judge + 0.375 * (embed == 1) + 0.05) + 0.1 if scored else None
    parts = {"judge": judge, "embed": embed, "modality": 1.0, "format": 1.0, "overall": overall}
    return {"tokens": 20 if closed else 48, "finish_reason": "stop" if closed else "length",
            "text": text, "parts": parts, "advantage": advantage,
            "loss": -0.02 * advantage if closed else None}


def write_rollouts(folder, rows=12, seed=7, json_rows=False):
    """The out_dir of a run: a group at step 1 and, at step 2, a kept group, one all right, one all
    wrong and one unscored, and 110 validation prompts. The data are drawn with the seed, the
    rollouts always with 7."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "data").mkdir()
    train = [drawn("step", i, seed) for i in range(rows)]
    tiny.write_rows(folder / "data/train.parquet", train)
    tiny.write_rows(folder / "data/val.parquet", [drawn("val", i) for i in range(110)])
    if json_rows:  # a path, none, or several
        for i, p in enumerate(train):
            Image.fromarray(p["image"]).save(folder / f"data/{i}.png")
        write_lines(folder / "data/train.jsonl", [
            {"problem": tiny.KINDS[p["asked"]][0], "solution": f"<{p['tag']}> {p[p['asked']]}",
             "image": {5: [], 8: ["0.png", "1.png"]}.get(i, [f"{i}.png"])}
            for i, p in enumerate(train)])
        (folder / "data/train.parquet").unlink()

    def group(split, step, row, *responses):
        p = drawn(split, row)
        return {"slot": row, "step": step, "row": row, "prompt": tiny.KINDS[p["asked"]][0],
                "solution": f"<{p['tag']}> {p[p['asked']]}", "responses": responses}

    write_lines(folder / "rollouts/step_000001.jsonl", [group("step", 1, 0, reply(1.0, 1.0, 0.0))])
    write_lines(folder / "rollouts/step_000002.jsonl", [
        group("step", 2, 3, reply(1.0, 1.0, 0.866),
              reply(0.0, 0.25, -1.1547, "<X_RAY><thinking>so"), reply(1.0, 1.0, 0.2887)),
        group("step", 2, 5, *[reply(1.0, 1.0, 0.0)] * 3),
        group("step", 2, 8, *[reply(0.0, 0.0, 0.0, EVIL + BROKEN)] * 3),
        group("step", 2, 11, reply(1.0, 1.0, 0.0), reply(None, 0.0, 0.0), reply(0.0, 0.0, 0.0))])
    write_lines(folder / "rollouts/val_000002.jsonl", [
        group("val", 2, i, {k: v for k, v in reply(1.0, 1.0, 0).items() if k != "advantage"})
        for i in range(110)])
    write_lines(folder / "metrics.jsonl", [{"step": step} for step in range(3)])
    (folder / "config.json").write_text(json.dumps({
        "out_dir": str(folder), "train_data": f"{folder}/data@train",
        "val_data": f"{folder}/data@val", "group_size": 3}))
    return folder
