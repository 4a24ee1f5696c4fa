"""A training checkpoint -> a Hugging Face folder, which gets its name once it is verified.
    python merge.py out/tiny/checkpoints/step_000100    # makes out/tiny/merged/step_000100
After training with lora_rank, --adapter writes the adapter alone, as peft and transformers read it.
Run it where the training was started, on a CPU. It holds the model once, in the type written."""
import argparse
import functools
import hashlib
import json
import re
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText

import common
import data
import policy
import rollout


def read(folder, model):
    """Fill what was trained with what any number of ranks saved. ValueError, OSError: damage."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in sorted({*manifest} | {path.name for path in folder.glob("*.safetensors")}):
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.get(name):
                raise ValueError(f"{name} is damaged or foreign: merge another checkpoint")
    reader = dcp.HuggingFaceStorageReader(folder)
    weights = {name: p for name, p in model.named_parameters("model") if p.requires_grad}
    found = {(name, *x.size) for name, x in reader.read_metadata().state_dict_metadata.items()
             if name.startswith("model.")}  # the others are AdamW's
    if found != (ours := {(name, *x.shape) for name, x in weights.items()}):
        raise ValueError(f"another base model? Only in the checkpoint: {sorted(found - ours)}; "
                         f"only in the model: {sorted(ours - found)}")
    with warnings.catch_warnings(action="ignore"):  # of being one process
        dcp.load(weights, storage_reader=reader)

def write(model, base, folder, dtype):
    """The weights, with an adapter's in them; all else as base has it."""
    for name, layer in [(n, x) for n, x in model.named_modules() if hasattr(x, "lora_A")]:
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    if hasattr(model, "peft_config"):
        model.delete_adapter("default")  # its record: no layer has it any more
    weights = dict(model.named_parameters())
    # Experts, (E, out, in) in transformers 5, are published, and read by vLLM, as (E, in, out).
    experts = {n: p.transpose(1, 2) for n, p in weights.items() if ".experts." in n}
    model.save_pretrained(folder, state_dict=weights | experts, save_original_format=not experts)
    for path in Path(base).iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'(dtype": )"\w+"', rf'\1"{dtype}"', config))

def logprobs(engine, processor):
    """Of the likeliest token after 4 prompts. A tie may change the token, but not its log-prob."""
    side, grid = processor.patch * processor.merge, [(1, processor.merge, processor.merge)]
    image = torch.arange(3 * side**2).byte().view(side, side, 3).numpy()
    ids = data.prompt_ids(processor, "{question}", "What is this, and what makes you say so?", grid)
    prompts = [{"row": n, "seed": 0, "ids": ids[:n], "images": [image], "grid": grid}
               for n in range(len(ids) - 3, len(ids) + 1)]
    done = rollout.generate(engine, prompts, group_size=1, temperature=0.0, max_tokens=1)
    return torch.tensor([r["logprobs"] for _, [r] in sorted(done, key=lambda x: x[0]["row"])])

def make(checkpoint, base, folder, run, dtype, adapter):
    """Write the folder. ValueError: transformers, or vLLM where installed, reads other weights."""
    processor, loose = data.load_processor(base), {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    rounded = run["lora_rank"] and not adapter and dtype == "bfloat16"  # an adapter's sum, again
    limits = {"transformers": loose if rounded else 1e-5, "vllm": loose}  # mean |log-prob - ours|
    cfg = argparse.Namespace(**run | dict(
        model=base, dtype=dtype, engine="torch", max_prompt_tokens=256, max_response_tokens=1,
        gpu_memory_utilization=0.1, tensor_parallel=1, engine_args=dict(
            load_format="auto", enforce_eager=True, kv_cache_memory_bytes=2**30)))
    arguments = cfg, torch.device("cpu"), lambda images: data.patches(images, processor)
    engine = rollout.load(*arguments)
    engine.model = None  # before the next one comes
    load = functools.partial(AutoModelForImageTextToText.from_pretrained, use_safetensors=True)
    engine.model = load(base, dtype=dtype)
    policy.choose_trained(engine.model, cfg)
    read(checkpoint, engine.model)
    expected = logprobs(engine, processor)
    if adapter:
        engine.model.peft_config["default"].base_model_name_or_path = run["model"]
        engine.model.save_pretrained(folder)
    else:
        write(engine.model, base, folder, dtype)
    for name in list(filter(find_spec, limits))[:1 if adapter else None]:
        engine.model = None
        if name == "vllm":
            cfg.model, cfg.engine = str(folder), "vllm"
            engine = rollout.load(*arguments)
        else:
            engine.model = load(folder, dtype=dtype)
        gap, limit = (logprobs(engine, processor) - expected).abs().mean(), limits[name]
        print(f"log-probs by {name} and of the checkpoint differ by {gap:.2g}, limit {limit}")
        if not gap <= limit:
            raise ValueError(f"{name} reads other weights from {folder}: difference {gap:.2g}, "
                             f"limit {limit}. Compare the versions with requirements.txt")

def main(args):
    checkpoint, hub, repo = Path(args.checkpoint).resolve(), HfApi(), args.push_to_hub
    run = common.defaults | json.loads((checkpoint.parents[1] / "config.json").read_text())
    base, dtype = run["model"], args.dtype or run["dtype"]
    out = Path(args.out or checkpoint.parents[1] / "merged" / checkpoint.name)
    if args.adapter and not run["lora_rank"]:
        raise ValueError("--adapter: the run has none, lora_rank was 0")
    if out.exists() and not (args.force and any(out.glob("[am]*.safetensors"))):  # not shard-*
        raise ValueError(f"{out} exists: choose another --out; --force replaces a model's folder")
    if repo and hub.repo_exists(repo) and not args.force:
        raise ValueError(f"{repo} exists: choose another name; --force overwrites it")
    if not data.is_local(base):
        base = hub.snapshot_download(base)
    shutil.rmtree(aside := out.with_name(f"{out.name}.partial"), ignore_errors=True)
    make(checkpoint, base, aside, run, dtype, args.adapter)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    print(f"{out} is the model of {checkpoint.name} in {dtype}")
    if repo:
        hub.create_repo(repo, private=not args.public, exist_ok=True)
        hub.update_repo_settings(repo, private=not args.public)  # of one that was there, too
        hub.upload_folder(repo_id=repo, folder_path=out, delete_patterns="*.safetensors*")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("checkpoint", "--out", "--push-to-hub"):
        parser.add_argument(flag)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    for flag in ("--adapter", "--public", "--force"):
        parser.add_argument(flag, action="store_true")
    try:
        main(args := parser.parse_args())
    except (ValueError, OSError) as error:
        common.stop(f"{args.checkpoint}: {error}")
