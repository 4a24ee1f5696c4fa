"""What to do with the results of eval.py.

    python bench/results.py compare RESULTS_A RESULTS_B    # paired, on the items that both have
    python bench/results.py overlap configs/eval.py --model=... --train=SOURCE    # was it seen?
    python bench/results.py submit configs/eval.py --model=... [--submit_as=NAME]    # a zip

overlap and submit take the settings of eval.py, and those with which it was run.
"""

import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import pandas

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import eval as evaluation
import reward


def compare(a, b):
    """Print how much better B is than A on the items of both, by task and over all of them."""
    a, b = (pandas.Series(json.loads(Path(x, "scores.json").read_text())["items"]) for x in (a, b))
    better = (b - a).dropna()  # paired: one difference an item
    rows = [*better.groupby(lambda i: i.rpartition("/")[0]), ("all", better)]
    print(f"{len(better)} items in both, {len(a)} in A, {len(b)} in B. Accuracy here is B - A:",
          pandas.DataFrame({k: evaluation.estimate([x]) for k, x in rows}).T.round(4), sep="\n")


def overlap(run):
    """overlap.json: items with an image (the same pixels) or question of cfg.train, and why."""
    run.tasks["train"] = train = evaluation.read_task(run.cfg, "train", {"source": run.cfg.train})
    images = {item["id"]: {common.seed_of(x.tobytes())
                           for x in evaluation.read(run, item)["pictures"]}
              for item in [*run.items, *train["items"]]}
    known = set().union(*(images[item["id"]] for item in train["items"]))
    questions = {reward.normalise(item["question"]) for item in train["items"]}
    found, file = {}, Path(run.cfg.out_dir, "overlap.json")
    for item in run.items:
        seen = bool(images[item["id"]] & known)
        if (asked := reward.normalise(item["question"]) in questions) or seen:
            found[item["id"]] = "image" * seen + " question" * asked
    # A question with another image is no leak.
    exclude = [i for i, why in found.items() if "image" in why or not images[i]]
    file.write_text(json.dumps({"items": found, "exclude": exclude}, indent=1))
    print(f"{len(found)} of {len(run.items)} items: --exclude={file} leaves {len(exclude)} out")


def submit(run):
    """CODE_M_submission.zip for MediX-R1's leaderboard: its three files and, beside them, those
    about MMMU, with their names and fields."""
    name = run.cfg.submit_as or run.cfg.model
    marks, tasks = (json.loads((run.folder / "scores.json").read_text())[k]
                    for k in ("items", "tasks"))
    model = name.rstrip("/").split("/")[-1]
    short = re.sub(r"[^a-zA-Z0-9]", "_", model)
    code = hashlib.md5(f"{short}_submission".encode()).hexdigest()[:8]
    shares = {k: task["accuracy"] for k, task in tasks.items() if k != "mmmu_medical"}
    mean = sum(shares.values()) / max(len(shares), 1)
    rows = [(k, share, f"{share:.2%}") for k, share in shares.items()]
    rows += [("Overall", 100 * mean, f"{mean:.2%}")] * (len(rows) > 1)  # times 100, as there
    table = pandas.DataFrame(rows, columns=["Task", "Accuracy", "Accuracy (%)"]).to_string()
    files = {".jsonl": "", "_eval.jsonl": "", "_score.txt": f"Model: {name}\n\n{table}"}
    for item in [x for x in run.items if x["task"] in shares and x["id"] in marks]:
        [response], mark = run.responses[item["id"]], marks[item["id"]]
        mark = {"score": 5 * mark if run.tasks[item["task"]]["rating"] else int(mark)}
        record = {"id": f"{item['task']}_{item['row']}", "question": item["asked"], "answer":
                  item["answer"], "response": response["response"], "answer_idx": None}
        for ending, more in ((".jsonl", {}), ("_eval.jsonl", {"evaluation": mark})):
            files[ending] += json.dumps(record | more, ensure_ascii=False) + "\n"
    files = {f"{short}/{short}{ending}": text for ending, text in files.items()}
    if "mmmu_medical" in tasks:
        files |= {f"{model}-MMMU-Medical-val/{path}": json.dumps(content, indent=4)
                  for path, content in mmmu_files(run, marks).items()}
    with zipfile.ZipFile(run.folder / f"{code}_{short}_submission.zip", "w") as file:
        for path, text in files.items():
            file.writestr(zipfile.ZipInfo(path), text, zipfile.ZIP_DEFLATED)


def mmmu_files(run, marks):
    """{path: content}, as MedEvalKit writes them, by which MediX-R1 measures MMMU's subjects."""
    subjects, letters = {}, "ABCDEFGHIJ"
    for item in [x for x in run.items if x["task"] == "mmmu_medical" and x["id"] in marks]:
        name = run.tasks["mmmu_medical"]["rows"].column("id")[item["at"]].as_py()
        said, right = run.responses[item["id"]][0]["response"], marks[item["id"]] == 1
        answer, choices = evaluation.decide(run, item, said)[0], item["choices"]
        chosen = item["index"] if right else evaluation.stated_option(answer, choices)
        subject = name.partition("_")[2].rpartition("_")[0]  # of validation_Public_Health_7
        subjects.setdefault(subject, []).append({
            "id": name, "question_type": "multiple-choice", "answer": letters[item["index"]],
            "all_choices": [*letters[:len(choices)]], "index2ans": dict(zip(letters, choices)),
            "response": answer or said, "parsed_pred": "" if chosen is None else letters[chosen],
            "judge": "Correct" if right else "Wrong"})

    def measured(records):
        right = sum(record["judge"] == "Correct" for record in records)
        return {"acc": right / len(records), "right": right, "total": len(records)}

    results = {k: measured(v) | {"num_example": len(v)} for k, v in subjects.items()}
    results = {"total": measured(sum(subjects.values(), []))} | results
    files = {"result.json": results}
    for subject, records in subjects.items():
        raw = [{k: v for k, v in record.items() if k != "judge"} for record in records]
        files |= {f"{subject}/output_sample.json": raw, f"{subject}/parsed_output.json": records,
                  f"{subject}/result.json": results[subject]}
    return {"total_results.json": {"MMMU-Medical-val": results}} | {
        f"MMMU-Medical-val/{path}": content for path, content in files.items()}


def main():
    command, *args = sys.argv[1:] or ["none"]
    stages = dict(overlap=overlap, submit=submit)
    if command == "compare" and len(args) == 2:
        return compare(*args)
    if command not in stages:
        sys.exit(__doc__)
    evaluation.STAGES[command] = stages[command]
    evaluation.defaults |= dict(train="", submit_as="")
    sys.argv[1:] = [*args, f"--stages={command}"]
    evaluation.main()


if __name__ == "__main__":
    main()
