"""A run but for its algorithm: settings, process group, checks, what is logged, its files."""

import ast
import contextlib
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import resource
import runpy
import sys
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.distributed as dist

defaults = dict(
    model="",  # folder or hub id of a Qwen2.5-VL, Qwen3-VL or Qwen3-VL-MoE
    train_data="", val_data="",  # hub id, folder, parquet, json or jsonl; @split after any of them
    prompt_template="configs/prompt.txt",  # a file, or the text itself, with {question} in it
    seed=1, steps=0, epochs=2,  # steps = 0: as many as the epochs need
    prompts_per_step=512, group_size=5, updates_per_step=4, val_prompts=0,  # 0: all of val_data
    max_prompt_tokens=4352, max_response_tokens=4096, tokens_per_micro_batch=16384,
    min_pixels=262_144, max_pixels=3_932_160,  # the images of a row share max_pixels
    temperature=1.0, val_temperature=0.0, val_top_p=1.0,  # above 0: val_sampled/*, beside val/*
    learning_rate=1e-6, beta2=0.999, weight_decay=0.01, warmup_updates=0, max_grad_norm=1.0,
    dtype="bfloat16", freeze_vision=False, activation_checkpointing=False,
    engine="vllm", tensor_parallel=1, gpu_memory_utilization=0.5, engine_args={},  # of vllm.LLM
    max_engine_gap=0.0,  # mean |engine - trainer| log-prob; 0: 1e-3 in float32, 0.1 in bfloat16
    engine_is_cap=0.0,  # tokens weigh min(exp(trainer - engine), cap); 0: off
    judge="http", judge_url="http://localhost:8085/v1",  # "exact": equal after normalisation
    judge_model="Qwen/Qwen3-4B-Instruct-2507", judge_api_key_env="",  # the name of a variable
    judge_args={"structured_outputs": {"choice": ["YES", "NO"]}},  # of the request; {}: not vLLM
    judge_check=True, judge_concurrency=64, judge_timeout_s=30.0, judge_patience_s=300.0,
    max_bad_rows=0.01, max_unscored=0.05,  # shares, of the rows, of responses; more stops the run
    embedder="abhinand/MedEmbed-large-v0.1", embed_threshold=0.8, embed_soft=False,  # or "ngram"
    weight_judge=0.575, weight_embed=0.375, weight_modality=0.05, weight_format=0.1,
    validate_every=5, save_every=5, keep_checkpoints=3, accept_changes=False, log="")  # "wandb"
# A restart may change FREE settings, never FIXED ones, others with accept_changes=True.
FIXED = set("""model seed train_rows prompts_per_step group_size updates_per_step max_prompt_tokens
    max_response_tokens min_pixels max_pixels prompt_template freeze_vision""".split())
FREE = set("""out_dir steps epochs validate_every save_every keep_checkpoints log accept_changes
    judge_url judge_api_key_env judge_timeout_s judge_patience_s judge_concurrency max_unscored
    engine engine_args tensor_parallel gpu_memory_utilization max_engine_gap tokens_per_micro_batch
    activation_checkpointing""".split())
RULES = """updates_per_step > 0; tensor_parallel > 0; overlong_buffer_tokens <= max_response_tokens
    tokens_per_micro_batch >= max_prompt_tokens + max_response_tokens; ranks % tensor_parallel == 0
    engine == 'vllm' or tensor_parallel == 1 and not engine_args; loss_mean in ('token', 'sequence')
    keep in ('correctness', 'reward', 'medix'); prompts_per_step % updates_per_step == 0
    loss in ('grpo', 'gspo', 'cispo'); model and train_data and val_data; prompts_per_step >= ranks
    dtype in ('bfloat16', 'float32'); engine in ('vllm', 'torch'); max_response_tokens > 0
    log in ('', 'wandb'); keep_checkpoints > 0; judge_timeout_s > 0; steps + epochs > 0
    validate_every > 0; learning_rate > 0; max_grad_norm > 0; temperature > 0; group_size > 1
    save_every > 0; max_rounds > 0"""

class Stop(Exception):
    """The run must end, all ranks at once and before an update: save the last finished step."""

def load_config(defaults, argv):
    """Defaults, config files (plain assignments in Python) and --key=value; the last one wins."""
    config = dict(defaults)
    for arg in argv:
        if arg.startswith("--"):
            name, _, value = arg[2:].partition("=")
            if not isinstance(defaults.get(name), str):
                with contextlib.suppress(ValueError, SyntaxError):  # its type is checked below
                    value = ast.literal_eval(value)
            given = {name: value}
        else:
            try:
                given = {k: v for k, v in runpy.run_path(arg).items() if k[0] != "_"}
            except Exception as error:  # whatever Python says of it
                raise ValueError(f"config file {arg} cannot be read: {error!r}") from error
        for name, value in given.items():
            if name not in defaults:
                nearest = difflib.get_close_matches(name, defaults, 1, 0)[0]
                raise ValueError(f"{arg}: there is no setting {name!r}; did you mean {nearest!r}?")
            want = type(defaults[name])
            config[name] = float(value) if want is float and type(value) is int else value
            if type(config[name]) is not want:
                raise ValueError(f"{arg}: {name} must be of type {want.__name__}, like "
                                 f"{defaults[name]!r}, not {type(value).__name__} {value!r}")
    return SimpleNamespace(**config)

def check(cfg, ranks):
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    settings = {**vars(cfg), "ranks": ranks}
    for name, value in settings.items():
        if type(value) in (int, float) and value < 0:
            raise ValueError(f"{name}={value} must not be below 0")
    for rule in re.split(r"[;\n] *", RULES):  # some are about settings of train_dapo.py only
        if rule.split()[0] in settings and not eval(rule, {}, settings):  # our text, no user's
            given = [f"{k}={settings[k]!r}" for k in re.findall(r"[a-z_]+", rule) if k in settings]
            raise ValueError(f"{', '.join(given)}: it must be that {rule}")

def stop(error):
    """End the process with the error on one line; rank 0 first, and torchrun ends the others."""
    time.sleep(10 if int(os.environ.get("RANK", 0)) else 0)
    raise SystemExit(f"error: {' '.join(str(error).split())}")

def start():
    """Join torchrun's process group, or make one of this process; returns rank, world, device."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and ranks > gpus:
        raise ValueError(f"{ranks} ranks, {gpus} GPUs: run torchrun with --nproc_per_node {gpus}")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                            timeout=datetime.timedelta(hours=2), **alone)  # a judge may be slow
    return dist.get_rank(), dist.get_world_size(), device

def print_arithmetic(run):
    """Say in numbers what the settings mean."""
    cfg, size, updates = run.cfg, run.cfg.group_size, run.cfg.updates_per_step
    for name, rows in (("train", run.train), ("val", run.val)):
        print(f"{name}: {len(rows.rows)} rows, {len(rows.keep)} used, {len(rows.bad)} bad, "
              f"{len(rows.too_long)} longer than {cfg.max_prompt_tokens} tokens",
              *(f"\n  skipped {bad}" for bad in rows.bad[:10]))
    if leaked := len(set(run.train.hashes) & set(run.val.hashes)):
        print(f"warning: {leaked} of the val questions, images included, are in train, too")
    responses, prompts = cfg.prompts_per_step * size, run.last_step * cfg.prompts_per_step
    print(f"a step: {cfg.prompts_per_step} prompts x {size} responses = {responses} responses on "
          f"{run.world} ranks; {updates} updates of {responses // updates} responses")
    print(f"the run: {run.last_step} steps = {prompts} prompts = {run.last_step * updates} updates "
          f"= {prompts / len(run.train.keep):.2f} epochs")
    n, rest = sum(p.numel() for p in run.model.parameters()), 12 + 2 * bool(cfg.kl_coef)
    rest, most = (b * n / run.world / 1e9 for b in (rest, rest + 4))  # fp32 weights and moments, a
    print(f"GB per GPU: {rest:.3g} at rest, {most:.3g} in updates", flush=True)  # bf16 reference

def gather(value):
    """Every rank's value, in rank order."""
    dist.all_gather_object(values := [None] * dist.get_world_size(), value)
    return values

def total(numbers):
    """A dict of numbers, with the same keys on every rank, summed over ranks."""
    everyone = gather(numbers)
    return {k: float(sum(rank[k] for rank in everyone)) for k in numbers}

def seed_of(*parts):
    """A 48-bit seed that depends on the parts only: randomness has no state to save."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest())

@contextlib.contextmanager
def timed(times, name):
    """Add the seconds of the block, GPU work included, to times[name]."""
    begin = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[name] = times.get(name, 0.0) + time.perf_counter() - begin

def open_run(config, train_rows):
    """For rank 0: make out_dir or, if it holds a run, continue it with metrics.jsonl cut to its
    `latest` checkpoint, which is returned (or None). ValueError: settings changed that may not."""
    out, script = Path(config.out_dir), Path(sys.argv[0]).name
    config = {**vars(config), "script": script, "train_rows": train_rows, "changes": []}
    latest, step = (out / "checkpoints/latest").resolve(), -1
    (out / "rollouts").mkdir(parents=True, exist_ok=True)
    if latest.exists():
        old, step = json.loads((out / "config.json").read_text()), int(latest.name[-6:])
        new = {k for k in {*old} - {"changes"} if config.get(k, old[k]) != old[k]}
        change = ", ".join(f"{k} was {old[k]!r} and is {config[k]!r}" for k in sorted(new))
        if new & FIXED or not (config["accept_changes"] or new <= FREE):
            raise ValueError(f"{out} holds a run with other settings: {change}. Choose another out_"
                             f"dir{'' if new & FIXED else ', or add --accept_changes=True'}")
        print(f"continuing {out} after step {step}, changed: {change or 'nothing'}")
        config["changes"] = old["changes"] + [{"after_step": step, "change": change}] * bool(new)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    with open(out / "metrics.jsonl", "a+b") as f:  # which ends in what no checkpoint holds
        f.seek(0)
        f.truncate(sum(len(x) for x in f if x[-2:] == b"}\n" and json.loads(x)["step"] <= step))
    return latest if step >= 0 else None

def write_lines(path, records, mode="w"):
    """Records -> JSON lines; a number that is not finite becomes null."""
    with open(path, mode) as f:
        for record in records:
            bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
            f.write(json.dumps(record | dict.fromkeys(bad)) + "\n")
        f.flush()
        os.fsync(f.fileno())

def check_unscored(run, share):
    """Stop the run where the judge left too many responses without a verdict."""
    if share > run.cfg.max_unscored:
        raise Stop(f"{share:.1%} of the responses have no verdict, above max_unscored: see to the "
                   f"judge, then start again to go on. {run.scorer.judge.last_failure}")

def check_gap(run, updates):
    """engine_gap/*: |engine - trainer| log-prob of this step's tokens, before any update."""
    gaps = [gap for update in updates for row in update.rows if row["weight"] for gap in
            (row["logprobs"] - row["old_logprobs"].cpu()).abs()[row["mask"]].tolist()]
    sums = total({"gap": sum(gaps), "tokens": len(gaps)})
    mean, largest = sums["gap"] / sums["tokens"], max(gather(max(gaps, default=0.0)))
    limit = run.cfg.max_engine_gap or {"float32": 1e-3, "bfloat16": 0.1}[run.cfg.dtype]
    run.gaps_over = 0 if mean <= limit else run.gaps_over + 1
    said = (f"engine and trainer differ by {mean:.3g} in a token's log-prob, max_engine_gap is "
            f"{limit:g}: look at engine_args, dtype and the version of vLLM")
    if run.gaps_over == 3:  # at once in a run's first step, later three times in a row
        raise Stop(said)
    if mean > limit / 3 and run.rank == 0:
        print(f"warning: {said}", flush=True)
    return {"engine_gap/mean": mean, "engine_gap/max": largest}

def finish_step(run, metrics, validate, save, last=False):
    """Validate, log, save, each where due; in this order, so that a crash loses no step's line."""
    cfg, state, step, times = run.cfg, run.state, run.state["step"], dict(run.times)
    due = step > 0 and (step % cfg.save_every == 0 or last)
    if step:
        tokens = metrics["response_tokens/mean"] + metrics["prompt_tokens/mean"]  # of a response
        responses = metrics["groups/sampled"] * cfg.group_size
        metrics["perf/tokens_per_s_per_gpu"] = tokens * responses / times["step"] / run.world
    if step % cfg.validate_every == 0 or last:
        with timed(times, "validate"):  # which adds to run.times, too
            metrics |= validate(run)
        value = metrics.get("val/reward/overall", -1.0)  # none if no response was scored
        if due and value > (state["best"] or [0, -1.0])[1]:
            state["best"] = [step, value]
    metrics["perf/peak_mem_gb"] = (torch.cuda.max_memory_allocated() / 1e9  # no GPU: the process
                                   or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    metrics |= {f"time/{name}": seconds for name, seconds in times.items()}
    run.times.clear()
    if run.rank == 0:
        write_lines(f"{cfg.out_dir}/metrics.jsonl", [{"step": step, **metrics}], "a")
        run.dashboard(metrics, step=step)
        print(f"step {step:4d}/{run.last_step}", *(
            f" {k} {v:.3g}" for k, v in metrics.items()
            if k.endswith("reward/overall") or k == "time/step"), flush=True)
    if due:
        save(run)
    check_unscored(run, metrics.get("val/reward/unscored", 0.0))

def update_metrics(done, updates):
    """What backward() returned for each row -> means over tokens, of losses over the updates."""
    sums = total({k: sum(s[k] for s in done) for k in done[0]})
    saving, tokens = sums.pop("alone") / sums.pop("packed"), sums.pop("tokens")
    return {"perf/packing_saving": saving} | {
        k: v / (updates if k.startswith("loss/") else tokens) for k, v in sums.items()}

def write_groups(out_dir, name, step, groups):
    """For rank 0: groups -> out_dir/rollouts/NAME_STEP.jsonl, without what only tensors need."""
    records = [{"slot": g["slot"], "step": step, "row": g["row"], "prompt": g["problem"],
                "solution": g["solution"], "responses": [
                    {"tokens": len(r["ids"])} | {k: r[k] for k in r if k not in ("ids", "logprobs")}
                    for r in g["responses"]]} for g in groups]
    if dist.get_rank() == 0:
        write_lines(f"{out_dir}/rollouts/{name}_{step:06d}.jsonl", records)

def response_metrics(groups):
    """reward/*, response_tokens/* and prompt_tokens/mean: means over the responses."""
    responses = [r for g in groups for r in g["responses"]]
    scored = [r["parts"] for r in responses if r["parts"]["overall"] is not None]
    lengths = [len(r["ids"]) for r in responses]
    return {f"reward/{k}": fmean(p[k] for p in scored) for k in (scored[0] if scored else ())} | {
        "reward/unscored": 1 - len(scored) / len(responses),
        "response_tokens/mean": fmean(lengths), "response_tokens/max": max(lengths),
        "response_tokens/truncated": fmean(r["finish_reason"] == "length" for r in responses),
        "prompt_tokens/mean": fmean(len(g["ids"]) for g in groups)}

def group_metrics(groups):
    """groups/*: how many, and of those that every response was scored in, what they can teach."""
    scored = [g for g in groups if g["scored"]]
    judged = [[r["parts"]["judge"] for r in g["responses"]] for g in scored]
    return {
        "groups/sampled": len(groups), "groups/kept": sum(g["kept"] for g in groups),
        "groups/unscored": len(groups) - len(scored),
        "groups/zero_std": sum(not any(r["advantage"] for r in g["responses"]) for g in scored),
        "groups/all_right": sum(min(j) == 1 for j in judged),
        "groups/all_wrong": sum(max(j) == 0 for j in judged)}

def dashboard(config):
    """A function of (metrics, step=): wandb's, if config.log says so; a restart continues there."""
    if not config.log:
        return lambda metrics, step: None
    import wandb
    name = f"{seed_of(os.path.abspath(config.out_dir)):x}"
    return wandb.init(project="nanomedix", name=config.out_dir, dir=config.out_dir, id=name,
                      resume="allow", config=vars(config)).log
