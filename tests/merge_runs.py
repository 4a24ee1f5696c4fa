"""Small trained runs to merge, and what a model says of the responses in them."""

import json
import subprocess
import sys

import tiny_models
import torch
from data_fixtures import write_processor
from ranks import ROOT, forked
from transformers import AutoModelForImageTextToText

CASES = {  # kind, tied embeddings, settings of the run
    "tied": ("qwen3_vl", True, {}),
    "untied, frozen vision": ("qwen3_vl", False, {"freeze_vision": True}),
    "qwen2.5": ("qwen2_5_vl", False, {}),
    "experts": ("qwen3_vl_moe", False, {}),
    "adapter": ("qwen3_vl", True, {"lora_rank": 4}),
    "adapter, experts": ("qwen3_vl_moe", False, {"lora_rank": 4, "freeze_vision": True}),
}
RANKS = 3  # that save everything once more; of 4 experts, the last one of them holds none
STEP = "checkpoints/step_000100"


def model_folder(folder, kind, tied, **text):
    """A random model with all that is published beside the weights. text: settings of its
    language model."""
    patch, name = (14, "Qwen2_5_VL") if kind == "qwen2_5_vl" else (16, "Qwen3VL")
    folder.mkdir(parents=True, exist_ok=True)
    write_processor(folder, patch)
    images = json.loads((folder / "preprocessor_config.json").read_text()) | {
        "processor_class": f"{name}Processor", "image_processor_type": "Qwen2VLImageProcessorFast",
        "video_processor_type": f"{name.replace('2_5_', '2')}VideoProcessor",
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / file).write_text(json.dumps(images))
    config = tiny_models.config(kind, tied, vocab=336)
    if kind == "qwen3_vl_moe":  # square experts would not show how they are laid out
        text = {"moe_intermediate_size": 128} | text
    config.text_config.update(text)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for p in model.parameters():  # every tensor must matter: no norms of 1, no biases of 0
        p.data += 0.1 * torch.randn_like(p) * (p.ndim == 1)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [2, 0], "do_sample": True, "temperature": 0.7, "top_k": 20}))
    return folder


def train(root, cases=CASES, more=True):
    """root/CASE/model, root/CASE/run (trained and saved by one rank) and, with more of it,
    root/CASE/again (the same weights, saved by RANKS); root/large: as "tied", of 200 MB."""
    first, again = [], []
    for case in cases:
        kind, tied, settings = CASES[case]
        model, run = model_folder(root / case / "model", kind, tied), root / case / "run"
        first.append([model, kind, run, settings, ""])
        again.append([model, kind, root / case / "again", settings, run / STEP])
    if more:
        large = model_folder(root / "large/model", "qwen3_vl", True, intermediate_size=10_000,
                             num_hidden_layers=30)
        first.append([large, "qwen3_vl", root / "large/run", {}, ""])
    for ranks, jobs in ((1, first), (RANKS, again))[:1 + more]:
        forked(ranks, "tests/merge_worker.py", json.dumps(jobs, default=str))
    return root


def merge(checkpoint, *arguments, env=None, fails=False):
    """merge.py, with an env as a user runs it -> what it prints or, if it fails, its one line."""
    command = ["merge.py", checkpoint, *arguments]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True,
                         text=True, timeout=500) if env else forked(0, *command, check=False)
    assert (run.returncode != 0) == fails, run.stdout + run.stderr
    if not fails:
        return run.stdout
    [line] = [x for x in run.stderr.splitlines() if x.startswith("error: ")]
    assert "Traceback" not in run.stderr, run.stderr
    return line


def sequences(kind):
    """(group, a response's ids) in the order of logprobs.json."""
    return [(group, response["ids"]) for group in tiny_models.groups(tiny_models.processor(kind))
            for response in group["responses"]]
