"""The commands compare and overlap of eval.py, and its stage submit.

    python eval.py compare RESULTS_A RESULTS_B    # paired, on the items that both have
    python eval.py overlap --train=SOURCE [--tasks=...]    # which items were trained on?
    python eval.py configs/eval.py --model=... --stages=submit [--submit_as=NAME]    # a zip

overlap takes the settings of eval.py, by default those of configs/eval.py.
"""

import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import data
import eval as evaluation
import reward

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG, TINY_MODEL = f"{CONFIGS}/eval.py", f"{CONFIGS}/tiny_model"


def compare(a, b):
    """Print how much better B is than A on the items of both, by task and over all of them."""
    a, b = (pandas.Series(json.loads(Path(x, "scores.json").read_text())["items"]) for x in (a, b))
    better = (b - a).dropna()  # paired: one difference an item
    rows = [*better.groupby(lambda i: i.rpartition("/")[0]), ("all", better)]
    print(f"{len(better)} items in both, {len(a)} in A, {len(b)} in B. Accuracy here is B - A:",
          pandas.DataFrame({k: evaluation.estimate([x]) for k, x in rows}).T.round(4), sep="\n")


def overlap(cfg):
    """overlap.json: items with an image (the same pixels) or question of cfg.train, and why."""
    if not cfg.train:
        raise ValueError("--train=SOURCE: name the data that was trained on")
    tasks, skipped = evaluation.read_tasks(cfg)
    train = evaluation.read_task(cfg, "train", {"source": cfg.train})
    # No model is asked: any tokenizer will do, and no prompt is too long.
    cfg.prompt_template, cfg.max_prompt_tokens = "{question}", float("inf")
    run = SimpleNamespace(cfg=cfg, tasks=tasks | {"train": train},
                          processor=data.load_processor(cfg.model or TINY_MODEL))
    items, images, unread = [x for task in tasks.values() for x in task["items"]], {}, []
    for item in [*items, *train["items"]]:
        try:
            pictures = evaluation.read(run, item)["pictures"]
        except (ValueError, OSError) as error:
            pictures = []
            unread.append(f"{item['id']}: {error}")
        images[item["id"]] = {common.seed_of(picture.tobytes()) for picture in pictures}
    known = set().union(*(images[item["id"]] for item in train["items"]))
    found, questions = {}, {reward.normalise(item["question"]) for item in train["items"]}
    for item in items:
        seen = bool(images[item["id"]] & known)
        if (asked := reward.normalise(item["question"]) in questions) or seen:
            found[item["id"]] = "image" * seen + " question" * asked
    # A question with another image is no leak.
    exclude = [i for i, why in found.items() if "image" in why or not images[i]]
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    file = Path(cfg.out_dir, "overlap.json")
    file.write_text(json.dumps({"items": found, "exclude": exclude, "skipped": skipped,
                                "unread": unread}, indent=1))
    print(f"{len(found)} of {len(items)} items: --exclude={file} leaves {len(exclude)} out",
          *(f"not compared: {name}: {why}" for name, why in skipped.items()), sep="\n")
    if unread:
        print(f"images not read, hence not compared: {len(unread)}, such as {unread[0]}")


def submit(run):
    """CODE_M_submission.zip for MediX-R1's leaderboard: its three files, names and fields, without
    tasks that bring files of their own, and those."""
    name, records = run.cfg.submit_as or run.cfg.model, []
    scores, own = json.loads((run.folder / "scores.json").read_text()), {}
    for item in [item for item in run.items if item["id"] in scores["items"]]:
        task, mark = run.tasks[item["task"]], scores["items"][item["id"]]
        [said] = run.responses[item["id"]]
        if "submit" in task:
            answer, _, _ = evaluation.decide(run, item, said["response"])
            chosen = evaluation.stated_option(answer, item["choices"])
            own.setdefault(item["task"], []).append(item | {
                "said": answer or said["response"], "right": mark == 1,
                "chosen": item["index"] if mark == 1 else chosen})
        else:
            records.append({
                "id": f"{item['task']}_{item['row']}", "question": item["asked"],
                "answer": item["answer"], "response": said["response"], "answer_idx": None,
                "evaluation": {"score": 5 * mark if task["rating"] else int(mark)}})
    plain, judged = ("".join(json.dumps({k: record[k] for k in record if k != but},
                                        ensure_ascii=False) + "\n" for record in records)
                     for but in ("evaluation", None))
    shares = {k: v["accuracy"] for k, v in scores["tasks"].items() if k not in own}
    rows = [(k, share, f"{share:.2%}") for k, share in shares.items()]
    mean = sum(shares.values()) / max(len(shares), 1)
    rows += [("Overall", 100 * mean, f"{mean:.2%}")] * (len(rows) > 1)  # times 100, as there
    table = pandas.DataFrame(rows, columns=["Task", "Accuracy", "Accuracy (%)"]).to_string()
    model = name.rstrip("/").split("/")[-1]
    short = re.sub(r"[^a-zA-Z0-9]", "_", model)
    files = {f"{short}/{short}.jsonl": plain, f"{short}/{short}_eval.jsonl": judged,
             f"{short}/{short}_score.txt": f"Model: {name}\n\n{table}"}
    for task, items in own.items():
        files |= run.tasks[task]["submit"](model, items)
    code = hashlib.md5(f"{short}_submission".encode()).hexdigest()[:8]
    with zipfile.ZipFile(run.folder / f"{code}_{short}_submission.zip", "w") as file:
        for path, text in files.items():
            file.writestr(zipfile.ZipInfo(path), text, zipfile.ZIP_DEFLATED)


def main():
    command, *args = sys.argv[1:]
    if command == "compare":
        if len(args) != 2:
            sys.exit("error: compare two folders of results: eval.py compare RESULTS_A RESULTS_B")
        return compare(*args)
    config = [] if any(not arg.startswith("--") for arg in args) else [CONFIG]
    try:
        overlap(common.load_config(evaluation.defaults | {"train": ""}, [*config, *args]))
    except (ValueError, OSError) as error:
        common.stop(error)


if __name__ == "__main__":
    main()
