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
    """CODE_M_submission.zip for MediX-R1's leaderboard: its three files, names and fields."""
    name = run.cfg.submit_as or run.cfg.model
    scores = json.loads((run.folder / "scores.json").read_text())
    short = re.sub(r"[^a-zA-Z0-9]", "_", name.rstrip("/").split("/")[-1])
    code = hashlib.md5(f"{short}_submission".encode()).hexdigest()[:8]
    rows = [(k, v["accuracy"], f"{v['accuracy']:.2%}") for k, v in scores["tasks"].items()]
    mean = scores["macro"]["accuracy"]
    rows += [("Overall", 100 * mean, f"{mean:.2%}")] * (len(rows) > 1)  # times 100, as there
    table = pandas.DataFrame(rows, columns=["Task", "Accuracy", "Accuracy (%)"]).to_string()
    files = {".jsonl": "", "_eval.jsonl": "", "_score.txt": f"Model: {name}\n\n{table}"}
    for item in [item for item in run.items if item["id"] in scores["items"]]:
        [response], mark = run.responses[item["id"]], scores["items"][item["id"]]
        mark = {"score": 5 * mark if run.tasks[item["task"]]["rating"] else int(mark)}
        record = {"id": f"{item['task']}_{item['row']}", "question": item["asked"], "answer":
                  item["answer"], "response": response["response"], "answer_idx": None}
        for ending, more in ((".jsonl", {}), ("_eval.jsonl", {"evaluation": mark})):
            files[ending] += json.dumps(record | more, ensure_ascii=False) + "\n"
    with zipfile.ZipFile(run.folder / f"{code}_{short}_submission.zip", "w") as file:
        for ending, text in files.items():
            file.writestr(zipfile.ZipInfo(f"{short}/{short}{ending}"), text)


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
