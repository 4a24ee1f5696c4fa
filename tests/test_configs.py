"""The recipes for the published models: what their headers say of memory is what the code says,
every phase fits the GPU, and the largest image fits the prompt."""

import re
from types import SimpleNamespace

import published_models
import pytest
from ranks import ROOT

import common
import data
import policy
import train_grpo

NAMES = ["2b", "7b", "8b", "30b"]
# MB of activations per token of a micro-batch, estimated (2b does without checkpointing); and GB of
# each GPU for CUDA's and NCCL's own needs and the embedder.
ACTIVATIONS = {"2b": 3.6, "7b": 1.1, "8b": 1.1, "30b": 1.2}
OTHER = 4


def header_of(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    return "".join(row for row in text.splitlines(True) if row.startswith("#"))


def number(pattern, header):
    found = re.search(pattern, header)
    assert found, f"the header lacks {pattern}"
    return float(found[1])


@pytest.fixture(params=NAMES)
def recipe(request, monkeypatch):
    """A config: name, settings, header, what the header says of GPUs and judge; and the model."""
    monkeypatch.chdir(ROOT)
    name, header = request.param, header_of(request.param)
    cfg = common.load_config(train_grpo.defaults, [f"configs/{name}.py"])
    model = published_models.build(cfg.model)
    policy.choose_trained(model, cfg)
    gpu = number(r"^# 8 GPUs of (\d+) GB\.", header)
    return SimpleNamespace(
        cfg=cfg, header=header, model=model, gpu=gpu,
        judge=gpu * number(r"--gpu-memory-utilization ([\d.]+)", header),
        engine=gpu * cfg.gpu_memory_utilization,
        activations=ACTIVATIONS[name] * cfg.tokens_per_micro_batch / 1e3)


def arithmetic(recipe):
    """The lines that the header must have."""
    cfg, judge = recipe.cfg, recipe.judge
    rest, update = published_models.memory(recipe.model, cfg, 8)
    cfg_alone = SimpleNamespace(**{**vars(cfg), "kl_coef": 0.0})
    numbers = published_models.memory(recipe.model, cfg_alone, 8)
    alone = "({:.1f} and {:.1f} if kl_coef=0)".format(*numbers)
    alone = f" {alone}" if cfg.kl_coef else ", without a reference model"
    return (
        f"# GB per GPU, calculated: at rest {rest:.1f}, in an update {update:.1f}{alone}.\n"
        f"# GPU 0 with its judge (~: an estimate; ~{OTHER}: CUDA, NCCL and the embedder):\n"
        f"#   sampling: {rest:.1f} + {recipe.engine:.1f} engine + {judge:.1f} judge + ~{OTHER}"
        f" = ~{rest + recipe.engine + judge + OTHER:.0f}\n"
        f"#   update: {update:.1f} + ~{recipe.activations:.0f} activations of "
        f"{cfg.tokens_per_micro_batch} tokens + {judge:.1f} judge + ~{OTHER}"
        f" = ~{update + recipe.activations + judge + OTHER:.0f}\n")


def test_header_says_what_the_code_says(recipe):
    """Every number of the memory arithmetic, to the printed digit."""
    assert arithmetic(recipe) in recipe.header


def test_every_phase_fits_the_gpu(recipe):
    """GPU 0 with the judge; and, where the judge has a GPU to itself, the fewer GPUs of the run."""
    cfg, gpu = recipe.cfg, recipe.gpu
    assert recipe.judge > 13, "8 GB of weights, and what vLLM needs beside them"
    fewer = int(number(r"GPU 7 to itself, .* --nproc_per_node (\d)", recipe.header))
    for ranks, judge in ((8, recipe.judge), (fewer, 0)):
        assert ranks % cfg.tensor_parallel == 0
        common.check(cfg, ranks)
        rest, update = published_models.memory(recipe.model, cfg, ranks)
        assert rest + recipe.engine + judge + OTHER < 0.95 * gpu
        assert update + recipe.activations + judge + OTHER < 0.95 * gpu
    weights = 2e-9 * sum(p.numel() for p in recipe.model.parameters()) / cfg.tensor_parallel
    assert weights < 0.6 * recipe.engine, "no room for the engine's cache"


def test_one_gpu_of_24_gb(monkeypatch):
    """The adapter's recipe says its arithmetic, too, and both phases fit."""
    monkeypatch.chdir(ROOT)
    header = header_of("2b_1gpu")
    cfg = common.load_config(train_grpo.defaults, ["configs/2b_1gpu.py"])
    model = published_models.build(cfg.model).bfloat16()
    policy.choose_trained(model, cfg)
    rest, update = published_models.memory(model, cfg, 1)
    engine, other = 24 * cfg.gpu_memory_utilization, 3
    activations = 0.5 * cfg.tokens_per_micro_batch / 1e3  # MB a token, with checkpointing
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    whole = published_models.memory(published_models.build(cfg.model), SimpleNamespace(
        dtype="bfloat16", kl_coef=cfg.kl_coef, lora_rank=0), 1)[1]
    assert (
        f"# {millions:.0f} million weights are trained. GB, calculated: at rest {rest:.1f}, in an "
        f"update {update:.1f}\n"
        f"# (~: an estimate; ~{other}: CUDA and the embedder):\n"
        f"#   sampling: {rest:.1f} + {engine:.1f} engine + ~{other} "
        f"= ~{rest + engine + other:.0f}\n"
        f"#   update: {update:.1f} + ~{activations:.0f} activations of "
        f"{cfg.tokens_per_micro_batch} tokens + ~{other} = ~{update + activations + other:.0f}\n"
        f"# To train all weights instead, {whole:.0f} GB of them, gradients and moments on the CPU:"
        f"\n# --lora_rank=0 --freeze_vision=False --offload=True --learning_rate=1e-6\n") in header
    assert max(rest + engine, update + activations) + other < 0.95 * 24
    assert 2e-9 * sum(p.numel() for p in model.parameters()) < 0.6 * engine
    common.check(cfg, 1)
    # The largest image with template and question, as for the others.
    assert cfg.max_pixels / 32**2 + 300 + 100 < cfg.max_prompt_tokens


@pytest.mark.parametrize("name", published_models.MODELS)
def test_sizes_of_the_published_models(name):
    billions, _ = published_models.MODELS[name]
    parameters = sum(p.numel() for p in published_models.build(name).parameters())
    assert f"{parameters / 1e9:.2f}" == f"{billions:.2f}"


def test_memory_of_the_design():
    """12 and 16 bytes a parameter on 8 GPUs; and why 30b does not fit 8 GPUs of 80 GB."""
    plain = SimpleNamespace(dtype="bfloat16", kl_coef=0.0, lora_rank=0)
    for name, at_rest, update in (("2B", 3.2, 4.3), ("8B", 13.2, 17.5), ("30B-A3B", 46.6, 62.1)):
        model = published_models.build(f"Qwen/Qwen3-VL-{name}-Instruct")
        assert [round(x, 1) for x in published_models.memory(model, plain, 8)] == [at_rest, update]
    activations = ACTIVATIONS["30b"] * train_grpo.defaults["tokens_per_micro_batch"] / 1e3
    update = published_models.memory(model, plain, 8)[1] + activations
    reference = 2e-9 * sum(p.numel() for p in model.parameters()) / 8
    said = f"an update takes ~{update + reference:.0f} (~{update:.0f} if kl_coef=0)"
    assert update > 80 and said in header_of("30b")


def test_the_largest_image_fits_the_prompt(recipe):
    """An image of max_pixels, whatever its shape, the template and a question of 100 tokens; and
    max_pixels is no smaller than it must be."""
    cfg, vision = recipe.cfg, recipe.model.config.vision_config
    merge = vision.spatial_merge_size
    processor = SimpleNamespace(patch=vision.patch_size, merge=merge)
    most = 0
    for ratio in (1, 1.1, 4 / 3, 1.5, 16 / 9, 2, 3, 5, 10, 40, 150):
        for pixels in (cfg.max_pixels, 1.01 * cfg.max_pixels, 30 * cfg.max_pixels):
            width, height = int((pixels * ratio) ** 0.5), int((pixels / ratio) ** 0.5)
            grids = data.grids_of([(width, height)], processor, cfg.min_pixels, cfg.max_pixels)
            most = max(most, sum(h * w // merge**2 for _, h, w in grids))
    # Qwen's tokens have over 4 characters in English and fewer in tags: 3, to be on the safe side.
    template = len(data.read_template(cfg.prompt_template)) / 3 + 20  # 20: the chat's own marks
    assert most + template + 100 <= cfg.max_prompt_tokens
    assert most > 0.85 * cfg.max_prompt_tokens


def test_7b_is_gspo_as_published(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = common.load_config(train_grpo.defaults, ["configs/7b.py"])
    assert (cfg.loss, cfg.loss_mean, cfg.kl_coef) == ("gspo", "sequence", 0.0)
    assert (cfg.clip_ratio_low, cfg.clip_ratio_high) == (3e-4, 4e-4)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_judge_runs(name, monkeypatch):
    """The header starts the judge that the run will ask."""
    monkeypatch.chdir(ROOT)
    cfg = common.load_config(train_grpo.defaults, [f"configs/{name}.py"])
    port = int(number(r"--port (\d+)", header_of(name)))
    assert f"CUDA_VISIBLE_DEVICES=0 vllm serve {cfg.judge_model} --port" in header_of(name)
    assert (cfg.judge, cfg.judge_url) == ("http", f"http://localhost:{port}/v1")
