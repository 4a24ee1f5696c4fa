"""Updates on given responses, for bench/: a small Qwen3-VL in the 2B's proportions, a run of
train_grpo.py on it, and workers: processes that do one thing each time they are asked.

The model has a quarter of the width of Qwen3-VL-2B, four layers of 28, four of 24 in the vision
tower, and as much less vocabulary: the head costs 0.22 of the decoder, as there. Random weights.
A group is one drawn image with a question, L tokens, and G responses of R random tokens each.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import data  # noqa: E402
import tiny  # noqa: E402
import train_grpo  # noqa: E402

TEXT = dict(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128, vocab_size=5426, initializer_range=0.02,
    rope_parameters={"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                     "rope_theta": 5e6, "rope_type": "default"})
VISION = dict(
    hidden_size=256, intermediate_size=1024, depth=4, num_heads=4, out_hidden_size=512,
    deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=2304, initializer_range=0.02)
FIRST = 1000  # a response is of ids from here on: no special one among them
LIBC = ctypes.CDLL(None)
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()


def make_start(folder, prompts, prompt_tokens, side):
    """Write folder/model and folder/data/train.parquet: `prompts` questions, each as long as fits
    into prompt_tokens, its image of side x side image tokens included. Returns L, the tokens."""
    folder = Path(folder)
    (folder / "data").mkdir()
    tiny.build(folder / "model", [question for question, _ in tiny.KINDS.values()])
    config = AutoConfig.from_pretrained(folder / "model")
    for part, sizes in (config.text_config, TEXT), (config.vision_config, VISION):
        for name, value in sizes.items():
            setattr(part, name, value)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    processor = data.load_processor(folder / "model")

    def length(words):
        grid = [(1, 2 * side, 2 * side)]
        return len(data.prompt_ids(processor, "{question}", " ".join(words), grid))

    words = " ".join(question for question, _ in tiny.KINDS.values()).split()
    words *= prompt_tokens // len(words) + 1
    n = max(n for n in range(1, len(words)) if length(words[:n]) <= prompt_tokens)
    datasets.Dataset.from_list([
        {"problem": " ".join(words[:n]), "solution": "<X_RAY> yes",
         "image": [Image.fromarray(tiny.phantom(0, i)["image"])]} for i in range(prompts)
    ]).to_parquet(folder / "data/train.parquet")
    return length(words[:n])


def set_up(folder, side, **settings):
    """A run of train_grpo.py on make_start()'s model and data, with settings of its own."""
    plain = {"prompt_template": "{question}", "kl_coef": 0.0, "updates_per_step": 1,
             "dtype": "float32", "engine": "torch", "judge": "exact", "judge_check": False,
             "embedder": "ngram", "learning_rate": 1e-6, "steps": 1,
             "max_engine_gap": 1e9,  # the responses are no engine's
             "min_pixels": (32 * side) ** 2, "max_pixels": (32 * side) ** 2,
             "model": f"{folder}/model", "out_dir": f"{folder}/out_{os.getpid()}",
             "train_data": f"{folder}/data", "val_data": f"{folder}/data", **settings}
    with contextlib.redirect_stdout(sys.stderr):
        return train_grpo.set_up(common.load_config(
            train_grpo.defaults, [f"--{name}={value}" for name, value in plain.items()]))


def conversations(folder, side):
    """The same questions and resized images as set_up()'s, as TRL takes them."""
    cfg = SimpleNamespace(prompt_template="{question}", max_prompt_tokens=10**6, max_bad_rows=0,
                          min_pixels=(32 * side) ** 2, max_pixels=(32 * side) ** 2)
    rows = data.load(f"{folder}/data", data.load_processor(f"{folder}/model"), cfg, ["X_RAY"])
    prompts = [data.prompt(rows, i) for i in rows.keep]
    return datasets.Dataset.from_list([
        {"prompt": [{"role": "user", "content": p["problem"]}],
         "image": Image.fromarray(p["images"][0])} for p in prompts])


def given(prompts, group_size, response_tokens):
    """{"ids": (prompts, G, R), "advantages": (prompts, G)} as lists; each group's sum to 0."""
    generator = torch.Generator().manual_seed(0)
    shape = prompts, group_size, response_tokens
    advantages = torch.randn(prompts, group_size, generator=generator, dtype=torch.float64)
    advantages -= advantages.mean(1, keepdim=True)
    ids = torch.randint(FIRST, TEXT["vocab_size"], shape, generator=generator)
    return {"ids": ids.tolist(), "advantages": advantages.tolist()}


def make_groups(run, responses):
    """What sample() and add_advantages() return for given responses, one group for each row."""
    groups = []
    for row, texts in enumerate(responses["ids"]):
        groups.append(data.prompt(run.train, row) | {
            "slot": row, "images": None, "scored": True, "kept": True, "responses": [
                {"ids": ids, "logprobs": [0.0] * len(ids), "advantage": advantage}
                for ids, advantage in zip(texts, responses["advantages"][row])]})
    return groups


def resident():
    """MB of this process in memory, once what it has freed is given back; its peak starts anew."""
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name):
    """A line of /proc/self/status, in MB: VmRSS now, VmHWM at most since resident()."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def work(workers):
    """Run the worker that sys.argv names: workers[name](settings, commands). What libraries print
    goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    workers[sys.argv[2]](json.loads(sys.argv[3]), commands(out))


def commands(out):
    """Yield (command, reply) for each line of the parent; reply(**numbers) answers."""

    def reply(**numbers):
        print(json.dumps(numbers), file=out, flush=True)

    reply()  # ready
    for line in sys.stdin:
        yield line.strip(), reply


def start(script, name, settings, **environment):
    """A worker: `script --worker name settings`, one thread. Its first reply says it is ready."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the worker runs)
    worker = subprocess.Popen(
        [sys.executable, script, "--worker", name, json.dumps(settings)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})
    worker.log = log
    return worker


def ask(workers, command):
    """Send a command to workers, all at once; returns their replies."""
    for worker in workers:
        worker.stdin.write(command + "\n")
        worker.stdin.flush()
    return [listen(worker) for worker in workers]


def listen(worker):
    """A worker's next reply."""
    if line := worker.stdout.readline():
        return json.loads(line)
    worker.log.seek(0)
    raise RuntimeError(f"a worker ended: {worker.args}\n{worker.log.read()[-3000:]}")


def end(workers):
    """Let workers end, which they do when no command can come any more."""
    for worker in workers:
        worker.stdin.close()
        worker.wait()


def print_machine(*packages):
    """What the numbers depend on."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *packages)]
    print(f"{os.cpu_count()} cores, one thread a process, load {os.getloadavg()[0]:.1f} at the "
          f"start, {', '.join(versions)}")
