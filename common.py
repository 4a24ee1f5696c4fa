"""Settings, process group, sums over ranks, and the files of a run. Nothing else, ever."""

import ast
import contextlib
import datetime
import difflib
import hashlib
import json
import math
import os
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

# A restarted run may change FREE settings, never FIXED ones, others with accept_changes=True.
FIXED = """model seed train_rows prompts_per_step group_size updates_per_step max_prompt_tokens
    max_response_tokens min_pixels max_pixels prompt_template freeze_vision""".split()
FREE = """out_dir steps epochs validate_every save_every keep_checkpoints log accept_changes engine
    engine_args tokens_per_micro_batch activation_checkpointing""".split()


def load_config(defaults, argv):
    """Defaults, then config files (plain assignments in Python), then --key=value, as a namespace.
    ValueError: an unknown name, or a value of another type than the default's."""
    config, given = dict(defaults), []  # given: (where it comes from, name, value)
    for arg in argv:
        if arg.startswith("--"):
            name, _, value = arg[2:].partition("=")
            if not isinstance(defaults.get(name), str):
                with contextlib.suppress(ValueError, SyntaxError):  # its type is checked below
                    value = ast.literal_eval(value)
            given.append((arg, name, value))
        else:
            try:
                given += [(arg, k, v) for k, v in runpy.run_path(arg).items() if k[0] != "_"]
            except Exception as error:  # whatever Python says of it
                raise ValueError(f"config file {arg} cannot be read: {error!r}") from error
    for where, name, value in given:
        if name not in defaults:
            nearest = difflib.get_close_matches(name, defaults, 1, 0)[0]
            raise ValueError(f"{where}: there is no setting {name!r}; did you mean {nearest!r}?")
        want = type(defaults[name])
        value = float(value) if want is float and type(value) is int else value
        if type(value) is not want:
            raise ValueError(f"{where}: {name} must be of type {want.__name__}, like "
                             f"{defaults[name]!r}, not {type(value).__name__} {value!r}")
        config[name] = value
    return SimpleNamespace(**config)


def start():
    """Join torchrun's process group, or make one of this process; returns rank, world, device.
    ValueError: more ranks than GPUs on this machine."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and ranks > gpus:
        raise ValueError(f"{ranks} ranks, {gpus} GPUs: run torchrun with --nproc_per_node {gpus}")
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                            timeout=datetime.timedelta(hours=2), **alone)  # a judge may be slow
    return dist.get_rank(), dist.get_world_size(), device


def gather(value):
    """Every rank's value, in rank order."""
    dist.all_gather_object(values := [None] * dist.get_world_size(), value)
    return values


def total(numbers):
    """A dict of numbers, with the same keys on every rank, summed over ranks."""
    sums = torch.tensor([float(v) for v in numbers.values()], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(numbers, sums.tolist()))


def means(lists):
    """A dict of lists of numbers -> their means over all ranks; an empty list has none."""
    sums, counts = (total({k: f(v) for k, v in lists.items()}) for f in (sum, len))
    return {k: sums[k] / counts[k] for k in lists if counts[k]}


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
    out, config = Path(config.out_dir), {**vars(config), "train_rows": train_rows}
    (out / "rollouts").mkdir(parents=True, exist_ok=True)
    latest, changes, step = (out / "checkpoints/latest").resolve(), [], -1
    if latest.exists():
        old, step = json.loads((out / "config.json").read_text()), int(latest.name[-6:])
        new = {k: v for k, v in config.items() if old.get(k, v) != v}
        difference = ", ".join(f"{k} was {old[k]!r} and is {v!r}" for k, v in new.items())
        fixed = any(k in FIXED for k in new)
        if fixed or not (config["accept_changes"] or all(k in FREE for k in new)):
            raise ValueError(f"{out} holds a run with other settings: {difference}. Choose another "
                             f"out_dir{'' if fixed else ', or add --accept_changes=True'}")
        print(f"continuing {out} after step {step}, changed: {difference or 'nothing'}")
        changes = old["changes"] + ([{"after_step": step, "change": difference}] if new else [])
    elif (out / "config.json").exists():
        print(f"{out} holds a run without a checkpoint: starting again from step 0")
    (out / "config.json").write_text(json.dumps({**config, "changes": changes}, indent=1))
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    # The last line of a killed run may be half written.
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    (out / "metrics.new").write_text("".join(kept))
    (out / "metrics.new").rename(metrics)
    return latest if step >= 0 else None


def write_lines(path, records, mode="w"):
    """JSON lines, flushed to disk; a number that is not finite becomes null."""
    with open(path, mode) as f:
        for record in records:
            bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
            f.write(json.dumps(record | dict.fromkeys(bad)) + "\n")
        f.flush()
        os.fsync(f.fileno())


def dashboard(config):
    """A function of (step, metrics), by config.log: "tensorboard", "wandb" (through it) or ""."""
    if not config.log:
        return lambda step, metrics: None
    if config.log == "wandb":
        import wandb
        run = f"{seed_of(os.path.abspath(config.out_dir)):x}"  # the same after a restart
        wandb.init(project="nanomedix", name=config.out_dir, id=run, resume="allow",
                   dir=config.out_dir, config=vars(config), sync_tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(config.out_dir)
    return lambda step, metrics: (  # flushed at once, for a run may be killed
        [writer.add_scalar(k, v, step) for k, v in metrics.items()], writer.flush())
