"""A run but for its algorithm: settings, process group, checks, what is logged, its files."""
import ast
import contextlib
import datetime
import difflib
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.distributed as dist

defaults = runpy.run_path(f"{Path(__file__).parent}/configs/defaults.py")
RULES, FIXED, FREE = (defaults[name] for name in ("_rules", "_fixed", "_free"))
defaults = {k: v for k, v in defaults.items() if k[0] != "_"}

class Stop(Exception):
    """The run must end, all ranks at once and before an update: save the last finished step."""

def load_config(defaults, argv):
    """Defaults, config files and --key=value, of which the last wins -> settings. ValueError."""
    config = dict(defaults)
    for arg in argv:
        if arg.startswith("--"):
            name, _, value = arg[2:].partition("=")
            if not isinstance(defaults.get(name), str):
                with contextlib.suppress(ValueError, SyntaxError):  # its type is checked below
                    value = ast.literal_eval(value)
            given = {name: value}
        else:
            given = {k: v for k, v in runpy.run_path(arg).items() if k[0] != "_"}
        for name, value in given.items():
            if name not in defaults:
                nearest = difflib.get_close_matches(name, defaults, 1, 0)[0]
                raise ValueError(f"{arg}: there is no setting {name!r}; did you mean {nearest!r}?")
            want = type(defaults[name])
            config[name] = float(value) if want is float and type(value) is int else value
            if type(config[name]) is not want:
                raise ValueError(f"{arg}: {name} must be of type {want.__name__}, like "
                                 f"{defaults[name]!r}, not {type(value).__name__} {value!r}")
    if "@" in config.get("judge_url", "") or "-" in config.get("judge_api_key_env", ""):
        raise ValueError("judge_url, judge_api_key_env are recorded: name a variable with the key")
    return SimpleNamespace(**config)

def check(cfg, ranks):
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    for name, value in (settings := {**vars(cfg), "ranks": ranks, "node_ranks": node}).items():
        if type(value) in (int, float) and value < 0:
            raise ValueError(f"{name}={value} must not be below 0")
    for rule in RULES:  # some are about settings of train_dapo.py only
        if rule.split()[0] in settings and not eval(rule, {}, settings):  # our text, no user's
            given = [f"{k}={settings[k]!r}" for k in re.findall(r"[a-z_]+", rule) if k in settings]
            raise ValueError(f"{', '.join(given)}: it must be that {rule}")

def stop(error):
    """End the process with the error on one line; rank 0 first, and torchrun ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which it does
    time.sleep((2 if type(error) is Stop else 10) * (os.environ.get("RANK", "0") != "0"))
    advice = ": install it, or change the setting that needs it" * isinstance(error, ImportError)
    advice += ": what is saved is whole; mend this and start again" * isinstance(error, OSError)
    raise SystemExit(f"error: {' '.join(str(error).split())}{advice}")

def start(signals=None):
    """Join torchrun's process group, or make one of this process; returns rank, world, device."""
    if signals is not None:  # SIGTERM ends nothing: check_goes_on() takes notice of it
        signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
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
          f"{run.world} ranks; {updates} updates of {responses // updates} responses\n"
          f"the run: {run.last_step} steps = {prompts} prompts = {run.last_step * updates} updates "
          f"= {prompts / len(run.train.keep):.2f} epochs")
    models = [run.model] + [run.reference] * bool(cfg.kl_coef and not cfg.lora_rank)
    mine = [(p.to_local(), p.requires_grad) for model in models for p in model.parameters()]
    held, trained = sum(x.nbytes for x, _ in mine), sum(x.numel() for x, on in mine if on)
    rest, most = ((held + b * trained) / 1e9 for b in (8, 12))  # AdamW's moments; gradients
    size = 12e-9 * sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    n, free = cfg.keep_checkpoints + 2, shutil.disk_usage(cfg.out_dir).free / 1e9  # best, next
    print(f"GB per rank: {rest:.3g} at rest, {most:.3g} in updates\nGB on disk: {size:.3g} a checkp"
          f"oint, up to {n} at once, {free:.3g} free{'' if n * size < free else ': TOO LITTLE'}")

def gather(value):
    """Every rank's value, in rank order."""
    dist.all_gather_object(values := [None] * dist.get_world_size(), value)
    return values

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

def open_run(config, train_rows, checkpoint):
    """For rank 0: make out_dir, or go on there after checkpoint, to which metrics.jsonl is cut."""
    out, script = Path(config.out_dir), Path(sys.argv[0]).name
    config = {**vars(config), "script": script, "train_rows": train_rows, "changes": []}
    (out / "rollouts").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # of a disk that knows no locks; held until the process ends
        try:
            flock(os.open(out / "lock", os.O_CREAT | os.O_RDWR), LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"a run in {out} has not ended: end it first") from None
    step = int(checkpoint.name[-6:]) if checkpoint else -1
    if checkpoint:
        old = json.loads((out / "config.json").read_text())
        new = {k for k in {*old} - {"changes"} if config.get(k, old[k]) != old[k]}
        change = ", ".join(f"{k} was {old[k]!r} and is {config[k]!r}" for k in sorted(new))
        if new & FIXED or not (config["accept_changes"] or new <= FREE):
            raise ValueError(f"{out} holds a run with other settings: {change}. Choose another out_"
                             f"dir{'' if new & FIXED else ', or add --accept_changes=True'}")
        print(f"continuing {out} after step {step}, changed: {change or 'nothing'}")
        config["changes"] = old["changes"] + [{"after_step": step, "change": change}] * bool(new)
    (out / "config.new").write_text(json.dumps(config, indent=1))  # a full disk costs no old one
    (out / "config.new").rename(out / "config.json")
    with open(out / "metrics.jsonl", "a+b") as f:  # which ends in what no checkpoint holds
        f.seek(0)
        f.truncate(sum(len(x) for x in f if x[-2:] == b"}\n" and json.loads(x)["step"] <= step))
    if config["log"]:
        import wandb
        wandb.init(project="nanomedix", name=str(out), dir=out, config=config, resume="allow",
                   id=f"{seed_of(os.path.abspath(out)):x}")

def write_lines(path, records, mode="w"):
    """Records -> JSON lines; a number that is not finite becomes null."""
    with open(path, mode) as f:
        for text in map(json.dumps, records):
            f.write(json.dumps(json.loads(text, parse_constant=lambda _: None)) + "\n")
        f.flush()
        os.fsync(f.fileno())

def check_goes_on(run, unscored):
    """Between two phases: stop all ranks for one of these reasons, the last step being saved."""
    if unscored > run.cfg.max_unscored:
        raise Stop(f"{unscored:.1%} of the responses have no verdict, above max_unscored: see to "
                   f"the judge, then start again to go on. {run.scorer.judge.last_failure}")
    if run.state["not_finite"] >= 3:
        raise Stop("3 updates in a row were not finite: lower learning_rate, then start again")
    if any(gather(bool(run.signals))):
        raise Stop("SIGTERM: the last finished step is saved; start again to go on")

def check_gap(run, updates):
    """engine_gap/*: |engine - trainer| log-prob of this step's tokens, before any update."""
    gaps = [x for u in updates for row in u.rows if "old_logprobs" in row
            for x in (row["logprobs"] - row["old_logprobs"].cpu()).abs()[row["mask"]].tolist()]
    totals, tokens, largest = zip(*gather((sum(gaps), len(gaps), max(gaps, default=0.0))))
    mean = sum(totals) / sum(tokens)
    limit = run.cfg.max_engine_gap or {"float32": 1e-3, "bfloat16": 0.1}[run.cfg.dtype]
    run.gaps_over = 0 if mean <= limit else run.gaps_over + 1
    said = (f"engine and trainer differ by {mean:.3g} in a token's log-prob, max_engine_gap is "
            f"{limit:g}: look at engine_args, dtype and the version of vLLM")
    if run.gaps_over == 3:  # at once in a run's first step, later three times in a row
        raise Stop(said)
    if not mean <= limit / 3 and run.rank == 0:
        print(f"warning: {said}", flush=True)
    return {"engine_gap/mean": mean, "engine_gap/max": max(largest)}

def finish_step(run, metrics, validate, save, last=False):
    """Validate, log, save, each where due; in this order, so that a crash loses no step's line."""
    cfg, state, step, times = run.cfg, run.state, run.state["step"], dict(run.times)
    due = step > 0 and (step % cfg.save_every == 0 or last)
    if step:
        metrics["perf/tokens_per_s_per_gpu"] = metrics.pop("tokens") / times["step"] / run.world
    if step % cfg.validate_every == 0 or last:
        with timed(times, "validate"):  # which adds to run.times, too
            metrics |= validate(run)
        value = metrics.get("val/reward/overall", -1.0)  # none if no response was scored
        if due and value > (state["best"] or [0, -1.0])[1]:
            state["best"] = [step, value]
    metrics["perf/peak_mem_gb"] = torch.cuda.max_memory_allocated() / 1e9
    metrics |= {f"time/{name}": seconds for name, seconds in times.items()}
    run.times.clear()
    if run.rank == 0:
        write_lines(f"{cfg.out_dir}/metrics.jsonl", [{"step": step, **metrics}], "a")
        if cfg.log:
            sys.modules["wandb"].log(metrics, step=step)
            if last:
                sys.modules["wandb"].finish()
        print(f"step {step:4d}/{run.last_step}", *(f" {k} {v:.3g}" for k, v in metrics.items()
              if k.endswith("reward/overall") or k == "time/step"), flush=True)
    if due:
        save(run)
    check_goes_on(run, metrics.get("val/reward/unscored", 0.0))

def update_metrics(run, groups, done, norms):
    """What backward() returned -> means over tokens, of losses over updates. Shares r["loss"]."""
    done, responses = sum(gather(done), []), [r for g in groups for r in g["responses"]]
    for r, parts in zip(responses, zip(*gather([r.get("loss", 0.0) for r in responses]))):
        r["loss"] = sum(parts)
    for norm in norms:
        run.state["not_finite"] = 0 if norm < float("inf") else run.state["not_finite"] + 1
        if run.state["not_finite"] and run.rank == 0:
            print(f"warning: step {run.state['step'] + 1}: an update was skipped, its gradient was "
                  f"{norm}. In rollouts/ the loss of what was not finite is null", flush=True)
    parts = [(abs(sum(r["loss"] for r in g["responses"])), g["row"]) for g in groups]
    largest, row = max(parts, key=lambda part: (not part[0] < float("inf"), part))
    sums = {k: sum(row[k] for row in done) for k in done[0]}
    saving, tokens = sums.pop("alone") / sums.pop("packed"), sums.pop("tokens")
    mfu = sums.pop("flops") / run.times["update"] / run.world / run.peak
    return {"perf/packing_saving": saving, "perf/mfu": mfu, "grad_norm": fmean(norms),
            "loss/largest_row": row, "loss/largest_share": largest / (sum(x for x, _ in parts) or 1)
            } | {k: v / (len(norms) if k.startswith("loss/") else tokens) for k, v in sums.items()}

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
    scored = [p | {"agreement": 1 - abs(p["judge"] - p["embed"])} for p in
              (r["parts"] for r in responses) if p["overall"] is not None]
    lengths = [len(r["ids"]) for r in responses]
    return {f"reward/{k}": fmean(p[k] for p in scored) for k in (scored[0] if scored else ())} | {
        "reward/unscored": 1 - len(scored) / len(responses),
        "answers/chars": fmean(len(r["answer"] or "") for r in responses),
        "response_tokens/mean": fmean(lengths), "response_tokens/max": max(lengths),
        "response_tokens/truncated": fmean(r["finish_reason"] == "length" for r in responses),
        "prompt_tokens/mean": fmean(len(g["ids"]) for g in groups)}

def group_metrics(groups):
    """groups/*: how many, and of those that every response was scored in, what they can teach."""
    scored = [g for g in groups if g["scored"]]
    judged = [[r["parts"]["judge"] for r in g["responses"]] for g in scored]
    answers = [[r["answer"] or "" for r in g["responses"]] for g in groups]
    return {"groups/sampled": len(groups), "groups/unscored": len(groups) - len(scored),
            "groups/kept": sum(g["kept"] for g in groups),
            "groups/zero_std": sum(not any(r["advantage"] for r in g["responses"]) for g in scored),
            "groups/all_right": sum(min(j) == 1 for j in judged),
            "groups/all_wrong": sum(max(j) == 0 for j in judged),
            "tokens": sum(len(g["ids"]) + len(r["ids"]) for g in groups for r in g["responses"]),
            "answers/distinct": fmean(len({*a}) / len(a) for a in answers),
            "answers/longest": fmean(max(map(len, a)) / max(1, len("".join(a))) for a in answers)}
