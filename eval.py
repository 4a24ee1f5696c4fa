"""Measure a model on the 17 benchmarks of MediX-R1, or on data of your own. A restart goes on.
    python eval.py configs/eval.py --model=MBZUAI/MediX-R1-2B --tasks=llm,own=data/own.jsonl
    python eval.py compare RESULTS RESULTS      # or: overlap --train=SOURCE, what was trained on"""
import importlib.metadata
import itertools
import json
import os
import re
import runpy
import sys
from concurrent.futures import as_completed
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import transformers

import common
import data
import reward
import rollout

# What results depend on: settings of training, for which configs/eval.py has values, and own ones.
DECISIVE = {name: common.defaults[name] for name in """model prompt_template max_prompt_tokens seed
    max_response_tokens min_pixels max_pixels dtype engine engine_args tensor_parallel judge
    judge_model judge_args""".split()} | dict(
    prompt="train", temperature=0.0, top_p=1.0, rating_prompt="", again_prompt="",  # or "plain"
    votes="3", vote_temperature=0.7)  # "original": three rounds of one conversation, greedy
defaults = DECISIVE | {name: common.defaults[name] for name in """judge_url judge_api_key_env
    judge_check judge_concurrency judge_timeout_s judge_patience_s gpu_memory_utilization
    """.split()} | dict(
    tasks="all", benchmarks={}, layouts={}, published={}, published_protocol={}, out_dir="out/eval",
    data_dir="data/eval",  # a task is read from here if a file has its name
    stages="generate,judge,score,submit", page_items=20, submit_as="",  # the model's name there
    exclude="")  # items that scores leave out: the overlap.json of `eval.py overlap`
ASKED = ("id", "task", "row", "question", "choices", "answer")  # of an item, in responses.jsonl

def find_tasks(cfg):
    """all, llm, vlm, names, NAME=PATH[@SPLIT]; commas between -> {name: entry in the config}."""
    known, found = dict(cfg.benchmarks), {}
    for file in sorted(Path(cfg.data_dir).glob("*.*")):
        if file.suffix in (".parquet", ".json", ".jsonl"):
            known[file.stem] = known.get(file.stem, {}) | {"source": f"{file}", "fetch": None}
    for word in cfg.tasks.split(","):
        name, given, source = word.partition("=")
        chosen = {name: {"source": source}} if given else {
            k: task for k, task in known.items() if name in (k, *task.get("groups", []))}
        if not chosen or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"no task {word!r}: give NAME=PATH, all, llm, vlm, {', '.join(known)}")
        found |= chosen
    return found

def read_task(cfg, name, task):
    """-> the task with its items, its rows (mapped from the disk) and the folder of images."""
    rows, folder = data.read_rows(task["source"], (), task.get("subset", [None]))
    task = {"where": bool, "image": [], "rating": False, "fetch": None} | task
    task |= next((x for column, x in cfg.layouts.items() if column in rows.column_names), {})
    texts = rows.select_columns([c for c in rows.column_names if c not in task["image"]])
    items = [{"at": at, "choices": None, "index": None} | task["item"](row)
             for at, row in enumerate(texts) if task["where"](row)]
    for row, item in enumerate(items):
        choices = [f"\n{chr(65 + i)}. {c}" for i, c in enumerate(item["choices"] or []) if c]
        item |= {"id": f"{name}/{row}", "task": name, "row": row, "answer": item["answer"].strip(),
                 "asked": "".join([item["question"], "\n\nChoices:" * bool(choices), *choices])}
    task |= {"rows": rows, "folder": folder, "items": items}
    image_files(task, items[0])  # is there access to them?
    return task

def read_tasks(cfg):
    """-> {name: task} of those that can be read, {name: why not and what to do} of the others."""
    tasks, skipped = {}, {}
    for name, task in find_tasks(cfg).items():
        try:
            tasks[name] = read_task(cfg, name, task)
        except (ValueError, OSError, LookupError) as error:
            skipped[name] = (f"{' '.join(repr(error).split())[:300]}. Try --data_dir, or `hf "
                             f"download --repo-type dataset {task['source'].split('@')[0]}`")
    if not tasks:
        raise ValueError(f"no task could be read: {skipped}")
    return tasks, skipped

def image_files(task, item):
    """An item's images as data.read_row takes them: dicts of bytes, or paths."""
    row, fetch = task["rows"][item["at"]], task["fetch"]
    images = [row.get(column) for column in task["image"]]
    images = [x for image in images for x in (image if isinstance(image, list) else [image]) if x]
    return [{"bytes": fetch(x)} for x in images] if fetch else images

def read(run, item):
    """-> a prompt for rollout.generate, and its pictures as they are. ValueError, OSError: why."""
    task, at, patch = run.tasks[item["task"]], item["row"], run.processor.patch
    row = {"problem": item["asked"], "solution": "<OTHER> -", "images": image_files(task, item)}
    row, _ = data.read_row(SimpleNamespace(rows={at: row}, folder=task["folder"], cfg=run.cfg,
                                           processor=run.processor, tags=["OTHER"]), at)
    if len(row["ids"]) > (most := run.cfg.max_prompt_tokens):
        raise ValueError(f"{len(row['ids'])} tokens: raise max_prompt_tokens={most}")
    images = [np.array(picture.resize((w * patch, h * patch)))  # bicubic, as in training
              for picture, (_, h, w) in zip(row["images"], row["grid"])]
    return row | {"row": item["id"], "item": item, "pictures": row["images"], "images": images,
                  "seed": common.seed_of(run.cfg.seed, item["id"])}

def tidy(run):
    """Sort what ranks have added into responses.jsonl and judgements.jsonl, and read these as
    run.responses, run.judgements {id: [record]}. A kill costs the line that it cuts short."""
    for name in ("responses", "judgements"):
        common.gather(None)  # all have written
        whole, parts = run.folder / f"{name}.jsonl", sorted(run.folder.glob(f"{name}.part*"))
        if run.rank == 0:
            whole.touch()
            lines = [x for file in (whole, *parts) for x in file.read_bytes().split(b"\n")[:-1]]
            records = {(r["id"].rpartition("/")[0], len(r["id"]), r["id"], r.get("round")): r
                       for r in map(json.loads, lines)}  # of the same twice the later one
            common.write_lines(run.folder / "new", [records[k] for k in sorted(records)])
            (run.folder / "new").replace(whole)
            for part in parts:
                part.unlink()
        common.gather(None)  # nobody reads before
        records = map(json.loads, whole.read_bytes().splitlines())
        groups = itertools.groupby(records, key=lambda r: r["id"])
        vars(run)[name] = {i: [*records] for i, records in groups}

def add(run, name, records):
    """Write records of this rank; a kill does not undo it. Not synced: the engine would wait."""
    with open(run.folder / f"{name}.part{run.rank}", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)

def generate(run):
    """Ask what has no response. What cannot be asked is an error, until a next start."""
    cfg, done = run.cfg, {i for i, [r] in run.responses.items() if not r["error"]}
    size = 1 if cfg.engine == "vllm" else 32  # fixed chunks, so that a restart computes the same
    chunks = [run.items[i:i + size] for i in range(0, len(run.items), size)]
    chunks = [chunk for chunk in chunks if any(item["id"] not in done for item in chunk)]
    if not chunks:
        return

    def record(item, response="", finish_reason=None, tokens=0, error=None):
        said = dict(response=response, finish_reason=finish_reason, tokens=tokens, error=error)
        if item["id"] not in done:
            add(run, "responses", [{k: item[k] for k in ASKED} | said])

    def prompts(chunk):
        for item in chunk:
            try:
                yield read(run, item)
            except (ValueError, OSError) as error:
                record(item, error=f"{error}")

    cfg.engine_args = {"load_format": "auto"} | cfg.engine_args  # vLLM needs no sync of weights
    engine = rollout.load(cfg, run.device, lambda x: data.patches(x, run.processor, run.device))
    mine = chunks[run.rank // cfg.tensor_parallel::run.world // cfg.tensor_parallel]
    if engine.llm:
        mine = [sum(mine, [])]  # one pool, which refills itself
    else:
        rollout.sync(engine, transformers.AutoModelForImageTextToText.from_pretrained(
            cfg.model, dtype=cfg.dtype, use_safetensors=True).state_dict().items())
    decode = run.processor.tokenizer.decode
    for chunk in mine:
        for prompt, [r] in rollout.generate(engine, prompts(chunk), group_size=1, top_p=cfg.top_p,
                                            max_tokens=cfg.max_response_tokens,
                                            temperature=cfg.temperature):
            opened = decode(prompt["ids"][-3:]).rstrip().endswith("<think>")  # by the template
            text = "<think>" * opened + decode([t for t in r["ids"] if t not in engine.stop_ids])
            record(prompt["item"], text, r["finish_reason"], len(r["ids"]))

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
    cfg, records, more, index = run.cfg, [], {}, item["index"]
    truth = ("" if index is None else f"{chr(65 + index)}. ") + item["answer"]
    if run.tasks[item["task"]]["rating"]:
        more = {k: {"choice": [*"012345"]} for k in cfg.judge_args if k == "structured_outputs"}
        more |= {"prompt": cfg.rating_prompt, "words": tuple("012345")}
    for i in range(run.rounds):
        if cfg.votes != "original" and run.rounds > 1:  # independent samples
            more |= {"seed": cfg.seed + i, "temperature": cfg.vote_temperature}
        verdict, prompt, said = reward.ask(run.judge, 0, item["asked"], truth, answer, **more)
        talk = more.get("messages", [{"role": "user", "content": prompt}])
        reply, error = (None, said) if verdict is None else (said, None)
        records.append(dict(id=item["id"], round=i, prompt=talk[-1]["content"], reply=reply,
                            verdict=verdict, judge=cfg.judge_model, error=error))
        if cfg.votes == "original":
            more["messages"] = [*talk, {"role": "assistant", "content": said},
                                {"role": "user", "content": cfg.again_prompt}]
    return records

def judge(run):
    """Judge all responses, in rounds. What a judge failed at is an error, until a next start."""
    jobs, done = [], {i for i, rounds in run.judgements.items() if not any(
        r["error"] for r in rounds) and (rounds[0]["prompt"] is None or len(rounds) == run.rounds)}
    said = {i: r["response"] for i, [r] in run.responses.items() if not r["error"]}
    todo = [item for item in run.items if item["id"] in said.keys() - done]
    for item in todo[run.rank::run.world]:
        answer, verdict, rule = decide(run, item, said[item["id"]])
        if verdict is None:
            run.judge = run.judge or reward.open_judge(run.cfg, run.world)
            jobs.append(run.judge.pool.submit(vote, run, item, answer))
        else:
            add(run, "judgements", [dict(id=item["id"], round=0, prompt=None, reply=None,
                                         verdict=verdict, judge=rule, error=None)])
    for job in as_completed(jobs):
        add(run, "judgements", job.result())

def estimate(groups):
    """Groups of scores -> the mean of the groups' means, with a 95 % bootstrap interval."""
    rng, means = np.random.default_rng(0), [float(np.mean(group)) for group in groups]
    draws = np.mean([[rng.choice(g, len(g)).mean() for _ in range(2000)] for g in groups], 0)
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return dict(accuracy=sum(means) / len(means), low=low, high=high, n=sum(map(len, groups)))

def score(run):
    """scores.json, scores.md, images/: what each task's items got; errors count as wrong."""
    cfg, table, scores, items = run.cfg, {}, {}, {}
    excluded = json.loads(Path(cfg.exclude).read_text())["exclude"] if cfg.exclude else []
    failed = {i for i, [r] in run.responses.items() if r["error"]}
    for name, task in run.tasks.items():
        ids = [item["id"] for item in task["items"] if item["id"] not in excluded]
        if missing := {*ids} - run.judgements.keys() - failed:
            raise ValueError(f"{name} lacks {len(missing)} judgements: run generate and judge")
        rounds = [run.judgements.get(i, []) for i in ids]
        verdicts = [[r["verdict"] for r in some] for some in rounds]
        means = [sum(v) / len(v) if v and None not in v else 0.0 for v in verdicts]
        scores[name] = [x / 5 if task["rating"] else float(x > 0.5) for x in means]
        items |= zip(ids, scores[name])
        agreed = [len({*v}) == 1 for v in verdicts if len(v) > 1]
        table[name] = estimate([scores[name]]) | {
            "unanswered": sum(r["judge"] == "unanswered" for some in rounds for r in some),
            "judge_failures": sum(None in v for v in verdicts), "errors": len(failed & {*ids}),
            "judge_agreement": sum(agreed) / len(agreed) if agreed else None}
    averages = {"micro": estimate([[*items.values()]]), "macro": estimate([*scores.values()])}
    protocol = {k: getattr(cfg, k) for k in cfg.published_protocol}
    protocol = f"{'not ' * (protocol != cfg.published_protocol)}as published: {protocol}"
    frame = pandas.DataFrame(table | averages).T.convert_dtypes().round(4).to_string(na_rep="")
    text = "\n\n".join([
        f"# {cfg.model}", f"Protocol {protocol}", f"```\n{frame}\n```",
        f"Published averages, %: {cfg.published}. Excluded: {len(excluded)} items.",
        *(f"Skipped {name}: {why}" for name, why in run.skipped.items())])
    print(f"{text}\n\n{run.folder}")
    (run.folder / "scores.md").write_text(f"{text}\n")
    (run.folder / "scores.json").write_text(json.dumps({"tasks": table} | averages | {
        "published": cfg.published, "skipped": run.skipped, "protocol": protocol, "items": items}))
    for task in run.tasks.values():
        some = sorted(task["items"], key=lambda item: common.seed_of(item["id"]))[:cfg.page_items]
        for item in [item for item in some if item["id"] not in failed]:
            pictures = read(run, item)["pictures"]
            for i, picture in enumerate(pictures, 1):
                picture.thumbnail((384, 384))
                name = f"{item['task']}_{item['row']}" + f"_{i}" * (len(pictures) > 1)
                picture.save(run.folder / f"images/{name}.jpg")

RESULTS = f"{Path(__file__).parent}/bench/results.py"  # compare, overlap and submit
STAGES = dict(generate=generate, judge=judge, score=score,
              submit=lambda run: runpy.run_path(RESULTS)["submit"](run))

def set_up(cfg):
    """Settings -> all that the stages need. ValueError, OSError: what to change."""
    for name, choices in {"prompt": ("train", "plain"), "judge": ("http", "exact"), "engine": (
            "vllm", "torch"), "votes": ("original", *"123456789"), "stages": STAGES}.items():
        if wrong := {*getattr(cfg, name).split(",")} - {*choices}:
            raise ValueError(f"{name}: there is no {wrong}, but {', '.join(choices)}")
    run = SimpleNamespace(cfg=cfg, judge=None,
                          rounds=3 if cfg.votes == "original" else int(cfg.votes))
    cfg.prompt_template = "{question}" if cfg.prompt == "plain" else data.read_template(
        cfg.prompt_template)
    run.rank, run.world, run.device = common.start()
    run.processor = data.load_processor(cfg.model)
    run.tasks, run.skipped = read_tasks(cfg)
    run.items = [item for task in run.tasks.values() for item in task["items"]]
    config = {name: getattr(cfg, name) for name in DECISIVE} | {
        "commit": getattr(transformers.AutoConfig.from_pretrained(cfg.model), "_commit_hash", None),
        "weights": [(f.name, f.stat().st_size, f.stat().st_mtime_ns)
                    for f in sorted(Path(cfg.model).glob("*.safetensors"))]}
    safe = re.sub(r"[^\w.-]+", "_", cfg.model).strip("_.")[-100:]
    run.folder = Path(cfg.out_dir, f"{safe}-{common.seed_of(config):012x}")
    (run.folder / "images").mkdir(parents=True, exist_ok=True)
    config |= {k: v for k, v in vars(cfg).items() if k not in ("benchmarks", "layouts")}
    config["versions"] = {x.name: x.version for x in importlib.metadata.distributions()}
    (run.folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    tidy(run)
    for item in [item for item in run.items if item["id"] in run.responses]:
        if any(item[k] != run.responses[item["id"]][0][k] for k in ASKED):
            raise ValueError(f"{item['id']} has changed since {run.folder}: take another out_dir")
    return run

def main():
    if sys.argv[1:2] in (["compare"], ["overlap"]):
        return runpy.run_path(RESULTS, run_name="__main__")
    try:
        run = set_up(common.load_config(defaults, sys.argv[1:]))
        for stage in run.cfg.stages.split(","):
            if stage in ("generate", "judge") or run.rank == 0:
                STAGES[stage](run)
            tidy(run)
        records = itertools.chain(*run.responses.values(), *run.judgements.values())
        if failed := [f"{r['id']}: {r['error']}" for r in records if r["error"]]:
            raise ValueError(f"{len(failed)} failed, such as {failed[0]}. See to it and start "
                             "again: only these are made anew")
    except (ValueError, OSError, ImportError) as error:
        common.stop(error)

if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that still frees a tensor would abort a Python that ends
