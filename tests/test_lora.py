"""Training an adapter: what it is and costs, what it sends to the engine, what it saves."""

import json
import re

import merge_runs
import peft
import pytest
import tiny_models
import torch
from ranks import forked
from safetensors.torch import load_file
from test_train import arguments, metrics, small_data, tensors
from transformers import AutoModelForImageTextToText

import data
import policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory):
    return tiny_models.save(kind, tmp_path_factory.mktemp(kind))


def load(path, **settings):
    return policy.load(tiny_models.settings(path, **{"lora_rank": 4, **settings}), CPU)


def stir(model):
    """Another adapter than the first one, which changes nothing."""
    torch.manual_seed(1)
    for p in [p for p in model.parameters() if p.requires_grad]:
        p.data.copy_(p + 0.1 * torch.randn_like(p))


@torch.no_grad()
def logprobs(model, kind):
    processor = tiny_models.processor(kind)
    [row] = policy.build_rows(model, tiny_models.groups(processor), 1000)
    pixels = data.patches(row["images"], processor)
    return policy.logprobs(model, row, pixels, 1.0, tiny_models.BANNED)[0]


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_what_is_adapted(path, kind, freeze_vision, process_group):
    model = load(path, freeze_vision=freeze_vision)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    layers = {re.sub(r"\.lora_[AB].*", "", name) for name in trained}
    assert all(".lora_" in name for name in trained) and len(trained) == 2 * len(layers)
    linear = {n.removesuffix(".base_layer") for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and ".lora_" not in n}
    if freeze_vision:
        linear = {name for name in linear if ".visual." not in name}
    assert linear - layers == {"lm_head"}, "all linear layers but the head (and experts)"
    assert layers <= linear


def test_the_frozen_rest_is_kept_in_the_type_of_the_computation(path, process_group):
    model = load(path, dtype="bfloat16")
    types = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_engine_gets_it_merged(path, kind, process_group):
    """A plain model with the weights that named_weights() sends has the adapter's log-probs."""
    model = load(path)
    stir(model)
    plain = policy.load(tiny_models.settings(path), CPU)
    before = logprobs(plain, kind)
    sent = {name: tensor.clone() for name, tensor in policy.named_weights(model)}
    assert sent.keys() == plain.state_dict().keys()
    for name, p in plain.state_dict().items():
        p.copy_(torch.distributed.tensor.distribute_tensor(
            sent[name].detach(), p.device_mesh, p.placements))
    expected = logprobs(model, kind)
    assert (expected - before).abs().mean() > 1e-2
    torch.testing.assert_close(logprobs(plain, kind), expected, atol=2e-5, rtol=0)


def test_the_reference_is_the_model_without_it(path, kind, process_group):
    cfg = tiny_models.settings(path, lora_rank=4)
    model = policy.load(cfg, CPU)
    at_first = logprobs(model, kind)
    stir(model)
    stirred = logprobs(model, kind)
    [row] = policy.build_rows(model, tiny_models.groups(tiny_models.processor(kind)), 1000)
    pixels = data.patches(row["images"], tiny_models.processor(kind))
    with torch.no_grad():
        without, _ = policy.logprobs(policy.load(cfg, CPU, model), row, pixels, 1.0,
                                     tiny_models.BANNED)
    assert torch.equal(without, at_first) and not torch.equal(without, stirred)
    assert torch.equal(logprobs(model, kind), stirred), "it is on again"


# --- a run ----------------------------------------------------------------------------------------

SETTINGS = dict(lora_rank=4, learning_rate=2e-3, kl_coef=0.01, updates_per_step=2, steps=6,
                keep_checkpoints=9)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    source = small_data(start, folder, 10)
    run = forked(2, *arguments(start, folder / "run", train_data=source, **SETTINGS))
    return folder / "run", source, run.stdout


def test_the_engine_keeps_up_and_the_reference_stays(unbroken):
    lines = metrics(unbroken[0])
    assert max(lines[step]["engine_gap/mean"] for step in range(1, 7)) < 1e-5
    assert lines[1]["loss/kl"] < 0.1 * lines[6]["loss/kl"], "the reference stays where it was"


def test_memory_is_as_said(unbroken, start):
    """Weights in their own type; gradient and two moments in fp32 of what is trained alone."""
    model = AutoModelForImageTextToText.from_pretrained(start / "model", dtype=torch.float32)
    frozen = sum(p.nbytes for p in model.parameters())
    saved = tensors(unbroken[0], 6)
    assert {name.split(":")[1].split(".")[0] for name in saved} == {
        "model", "exp_avg", "exp_avg_sq", "step"}
    adapter = sum(x.nbytes for name, x in saved.items() if ":model." in name)
    moments = sum(x.nbytes for name, x in saved.items() if ":exp_avg" in name)
    assert moments == 2 * adapter and adapter < 0.2 * frozen
    rest, most = map(float, re.search(
        r"GB per rank: (\S+) at rest, (\S+) in updates", unbroken[2]).groups())
    assert rest == pytest.approx((frozen + 3 * adapter) / 2 / 1e9, rel=0.02)  # on two ranks
    assert most == pytest.approx((frozen + 4 * adapter) / 2 / 1e9, rel=0.02)


def test_killed_and_restarted_is_bit_for_bit_the_same(unbroken, start, tmp_path):
    whole, source, _ = unbroken
    command = arguments(start, tmp_path / "run", train_data=source, **SETTINGS)
    forked(2, *command, kill_at=tmp_path / "run/checkpoints/step_000003", check=False)
    assert not (tmp_path / "run/checkpoints/step_000006").exists(), "it was killed too late"
    forked(2, *command)
    assert metrics(tmp_path / "run") == metrics(whole)
    ours, theirs = tensors(tmp_path / "run", 6), tensors(whole, 6)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_recipe_of_a_small_gpu(start, tmp_path):
    """configs/2b_1gpu.py's memory settings, and offload with them: a bf16 model with an adapter in
    fp32 in each of FSDP's groups. It trains, goes on after a restart, the engine agrees."""
    small = SETTINGS | dict(dtype="bfloat16", freeze_vision=True, activation_checkpointing=True,
                            offload=True, validate_every=9)
    for steps in (1, 2):
        forked(2, *arguments(start, tmp_path / "run", **small | {"steps": steps}))
    lines = metrics(tmp_path / "run")
    assert all(0 < lines[step]["grad_norm"] < float("inf") for step in (1, 2))
    assert all(lines[step]["engine_gap/mean"] < 0.02 for step in (1, 2))
    assert lines[2]["loss/kl"] > lines[1]["loss/kl"] > 0


def test_another_rank_is_refused(unbroken, start):
    whole, source, _ = unbroken
    command = arguments(start, whole, train_data=source, **SETTINGS | dict(lora_rank=8))
    assert "lora_rank was 4 and is 8" in forked(1, *command, check=False).stderr


def test_an_adapter_alone(unbroken, start, tmp_path):
    """What --adapter writes is read by peft's own classes, and is the merged model."""
    checkpoint = unbroken[0] / "checkpoints/step_000006"
    merge_runs.merge(checkpoint, "--out", tmp_path / "merged")
    said = merge_runs.merge(checkpoint, "--out", tmp_path / "adapter", "--adapter")
    assert "log-probs by transformers" in said
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(name.startswith("model") for name in files)
    base = AutoModelForImageTextToText.from_pretrained(start / "model", dtype=torch.float32)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(start / "model")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged = load_file(tmp_path / "merged/model.safetensors")
    weights = dict(model.named_parameters())
    assert weights.keys() == merged.keys()
    for name, p in weights.items():
        torch.testing.assert_close(p.data, merged[name], atol=1e-6, rtol=0)
