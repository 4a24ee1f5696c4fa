"""A training checkpoint -> a Hugging Face folder, which gets its name once it is verified.
    python merge.py out/tiny/checkpoints/step_000100    # makes out/tiny/merged/step_000100
Run it on a CPU, where the training was started. It holds the model once, in fp32."""

import argparse
import hashlib
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoConfig, initialization
from transformers import AutoModelForImageTextToText as AutoModel

import common
import data

LIMITS = {  # mean |log-prob - the fp32 checkpoint's|; vLLM's kernels add up in another order
    "transformers": {"float32": 1e-5, "bfloat16": 0.1}, "vLLM": {"float32": 1e-3, "bfloat16": 0.1}}

def read_checkpoint(folder, base):
    """Model `base` in fp32 with the weights of any number of ranks. ValueError, OSError: damage."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in sorted({folder / name for name in manifest} | {*folder.glob("*.safetensors")}):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.get(path.name):
                raise ValueError(f"{path.name} is damaged or foreign: merge another checkpoint")
    with initialization.no_init_weights():
        model = AutoModel.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32).eval()
    model.tie_weights()
    weights = {f"model.{name}": p.data for name, p in model.named_parameters()}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    found = {f"{name} {[*x.size]}" for name, x in reader.read_metadata().state_dict_metadata.items()
             if name.split(".")[0] not in ("exp_avg", "exp_avg_sq", "step")}  # AdamW's: never read
    if found != (ours := {f"{name} {[*x.shape]}" for name, x in weights.items()}):
        raise ValueError(f"it does not fit {base}. Only in the checkpoint: {sorted(found - ours)}; "
                         f"only in the model: {sorted(ours - found)}")
    dcp.load(weights, storage_reader=reader)
    return model

def write(model, base, folder, dtype):
    """The weights in dtype; all else as base has it."""
    weights = dict(model.to(getattr(torch, dtype)).named_parameters())
    # Experts, (E, out, in) in transformers 5, are published, and read by vLLM, as (E, in, out).
    experts = {n: p.transpose(1, 2) for n, p in weights.items() if ".experts." in n}
    model.save_pretrained(folder, state_dict=weights | experts, max_shard_size="5GB",
                          save_original_format=not experts)
    for path in Path(base).iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'(dtype": )"\w+"', rf'\1"{dtype}"', config))

@torch.no_grad()
def logprobs(folder, model, dtype=None):
    """(T - 1,) log-probs of an image and a question, by model or (False) by vLLM from folder."""
    processor = data.load_processor(str(folder))
    side, grid = processor.patch * processor.merge, [(1, processor.merge, processor.merge)]
    image = np.linspace(0, 255, side * side * 3).astype(np.uint8).reshape(side, side, 3)
    ids = data.prompt_ids(processor, "{question}", "What is this, and what makes you say so?", grid)
    if model:
        x, pixels = torch.tensor([ids]), data.patches([image], processor)
        logits = model(x, pixel_values=pixels, image_grid_thw=torch.tensor(grid),
                       mm_token_type_ids=(x == processor.image_token_id).int()).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, x[0, 1:, None])[:, 0]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
    from vllm import LLM, SamplingParams
    try:
        llm = LLM(str(folder), dtype=dtype, max_model_len=512, enforce_eager=True,
                  gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**30,
                  mm_processor_kwargs={"min_pixels": 1})
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"vLLM cannot load it, --skip-vllm goes without: {error}") from error
    out, = llm.generate({"prompt_token_ids": ids, "multi_modal_data": {"image": [image]}},
                        SamplingParams(max_tokens=1, prompt_logprobs=0))
    return torch.tensor([x[t].logprob for t, x in zip(ids[1:], out.prompt_logprobs[1:])])

def main(args):
    folder, hub, repo = Path(args.checkpoint).resolve(), HfApi(), args.push_to_hub
    run = json.loads((folder.parents[1] / "config.json").read_text())
    base, dtype = run["model"], args.dtype or run["dtype"]
    out = Path(args.out or folder.parents[1] / "merged" / folder.name)
    if out.exists() and not (args.force and any(out.glob("model*.safetensors"))):
        raise ValueError(f"{out} exists: choose another --out; --force replaces a model's folder")
    if repo and hub.repo_exists(repo) and not (
            args.force and (args.public or hub.repo_info(repo).private)):
        raise ValueError(f"{repo} exists: --force overwrites it; a public one needs --public, too")
    if not data.is_local(base):
        base = snapshot_download(base, ignore_patterns=["*.safetensors", "*.bin"])
    shutil.rmtree(aside := out.with_name(f"{out.name}.partial"), ignore_errors=True)
    model = read_checkpoint(folder, base)
    expected = logprobs(base, model)
    write(model, base, aside, dtype)
    del model  # before the next one comes
    for name in LIMITS if find_spec("vllm") and not args.skip_vllm else ["transformers"]:
        merged = name != "vLLM" and AutoModel.from_pretrained(aside, dtype=torch.float32)
        gap, limit = (logprobs(aside, merged, dtype) - expected).abs().mean(), LIMITS[name][dtype]
        print(f"log-probs of {name} and of the checkpoint differ by {gap:.2g}, limit {limit:g}")
        if not gap <= limit:
            raise ValueError(f"{name} reads other weights from {aside}: difference {gap:.3g}, limit"
                             f" {limit:g}. Do not use it; compare the versions with requirements")
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    print(f"{out} is the model of step {folder.name[-6:]} in {dtype}")
    if repo:
        hub.create_repo(repo, private=not args.public, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=out, delete_patterns="*.safetensors*")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("checkpoint", "--out", "--push-to-hub"):
        parser.add_argument(flag)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    for flag in ("--public", "--force", "--skip-vllm"):
        parser.add_argument(flag, action="store_true")
    try:
        main(args := parser.parse_args())
    except (ValueError, OSError) as error:
        common.stop(f"{args.checkpoint}: {error}")
