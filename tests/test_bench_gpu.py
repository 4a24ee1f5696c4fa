"""bench/gpu.py: it runs from end to end, counts FLOPs as PyTorch does, sees wrong attention, and
goes on when memory is too small."""

import json
import math
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from ranks import ROOT
from torch.utils.flop_counter import FlopCounterMode

import policy

sys.path.append(str(ROOT / "bench"))
import gpu
import measure


def make_run(tmp_path):
    return SimpleNamespace(
        size=gpu.SIZES["tiny"], device=torch.device("cpu"), cuda=False, dtype=torch.float32,
        folder=str(tmp_path), loaded=(None, None), random=np.random.default_rng(1), results={},
        matmul=1e11, copy=1e10)


def test_every_part_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--size", "tiny", "--device", "cpu",
         "--out", tmp_path / "numbers.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "numbers.json").read_text())
    for part in ("matmul", "copy", *gpu.PARTS):
        assert part == "ceilings" or any(name.startswith(part) for name in written["numbers"]), part
    for name, result in written["numbers"].items():
        assert f"\n{name}: " in done.stdout
        assert ("(goal" in done.stdout.split(f"\n{name}: ")[1].split("\n")[0]) == bool(
            result["goal"])
        values = result["value"]
        for key, value in (values if isinstance(values, dict) else {name: values}).items():
            if "peak GB" in key:  # of a CPU it is not known
                assert value is None
            else:
                assert math.isfinite(value), (name, key)
    assert "not judged on a CPU" in done.stdout and "MISSED" not in done.stdout
    assert max(v["value"] for k, v in written["numbers"].items() if "error" in k) < 1e-5


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "updates"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no part is called updates; there are ceilings, attention" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "sync"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "there is no GPU; --size tiny --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
def test_flops_are_those_that_pytorch_counts(kind, tmp_path, process_group):
    run = make_run(tmp_path)
    run.size = SimpleNamespace(**vars(run.size) | {"config": tiny_models.config(kind)})
    model, config = gpu.load(run), run.size.config
    if kind == "qwen3_vl_moe":
        model.set_experts_implementation("eager")  # the counter knows no grouped_mm
    [row] = policy.build_rows(model, gpu.make_groups(run, 2, 60, 20), 1000)
    with (torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):
        loss = gpu.objective(run, model, row)
        forward = counter.get_total_flops()
        loss.backward()
    images = row["grid"].prod(1).tolist()
    expected = measure.forward_flops(config, row["segments"], images)
    text, vision = config.text_config, config.vision_config
    # PyTorch also computes the half of causal attention that is masked.
    masked = 2 * (60**2 / 2 + 5 * 20**2 / 2)
    masked *= 4 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    assert forward == pytest.approx(expected + masked, rel=1e-3)
    # The pixels need no gradient. The head's logits are computed twice: within the 1 %.
    total = 3 * (expected + masked)
    total -= 2 * sum(images) * measure.channels(vision) * vision.hidden_size
    assert counter.get_total_flops() == pytest.approx(total, rel=1e-2)
    assert measure.row_flops(config, [row]) == 3 * expected
    left_out = 3 * tower_attention(vision, images)
    assert policy.work(model, row)["flops"] == pytest.approx(3 * expected - left_out, rel=0.01)


def tower_attention(vision, images):
    """FLOPs of a forward pass that perf/mfu leaves out. images: patches of each."""
    return 4 * vision.depth * vision.hidden_size * sum(n * n for n in images)


@pytest.mark.parametrize("settings, text_passes, tower_passes", [
    ({}, 3, 3), ({"freeze_vision": True}, 3, 1), ({"lora_rank": 1}, 2, 2),
    ({"lora_rank": 1, "freeze_vision": True}, 2, 1)])
def test_mfu_counts_the_passes_that_are_made(settings, text_passes, tower_passes, tmp_path,
                                             process_group):
    """Forward, the gradient of what goes in, that of weights: a frozen tower needs the first alone,
    a frozen weight beside an adapter two of them."""
    path = tiny_models.save("qwen3_vl", tmp_path)
    model = policy.load(tiny_models.settings(path, **settings), torch.device("cpu"))
    groups = tiny_models.groups(tiny_models.processor("qwen3_vl"))
    [row] = policy.build_rows(model, groups, 1000)
    images, config = row["grid"].prod(1).tolist(), model.config
    attention = 4 * 3 * 4 * 32 * measure.seen(row["segments"])
    text = measure.forward_flops(config, row["segments"]) - attention
    tower = measure.forward_flops(config, [], images) - tower_attention(
        config.vision_config, images)
    expected = text_passes * text + 3 * attention + tower_passes * tower
    adapters = 6 * sum(p.numel() * (sum(images) if "visual" in n else row["input_ids"].numel())
                       for n, p in model.named_parameters() if "lora_" in n)
    assert policy.work(model, row)["flops"] == pytest.approx(expected + adapters, rel=0.02)


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen2_5_vl"])
def test_mfu_is_counted_for_every_architecture(kind, tmp_path, process_group):
    """Weights that each token passes: all in the layers, of a mixture two of four experts."""
    path = tiny_models.save(kind, tmp_path)
    model = policy.load(tiny_models.settings(path), torch.device("cpu"))
    groups = tiny_models.groups(tiny_models.processor(kind))
    long, short = (policy.work(model, policy.build_rows(model, [g], 1000)[0])["flops"] for g in (
        groups[2], groups[2] | {"responses": groups[2]["responses"][:1]}))
    tokens = sum(len(r["ids"]) for r in groups[2]["responses"][1:])
    weights = sum(p.numel() * (0.5 if ".experts." in n else 1)
                  for n, p in model.model.language_model.layers.named_parameters())
    weights += model.lm_head.weight.numel()
    pairs = sum(n * len(groups[2]["ids"]) + n * n / 2
                for n in (len(r["ids"]) for r in groups[2]["responses"][1:]))
    layers = model.model.language_model.layers
    attention = 12 * len(layers) * layers[0].self_attn.q_proj.out_features * pairs
    assert long - short == pytest.approx(6 * tokens * weights + attention, rel=1e-3)


def test_matmul_rate_is_that_of_the_device():
    rate = policy.matmul_rate(torch.device("cpu"), "float32")
    x = torch.randn(512, 512)
    start = time.perf_counter()
    for _ in range(20):
        x @ x
    assert 0.1 < rate / (20 * 2 * 512**3 / (time.perf_counter() - start)) < 10


def test_published_flops_per_token():
    """GFLOP per token of the 2B and the 30B without attention, head and images, as published sizes
    give them: twice the parameters that a token passes."""
    for size, billions in (("config", 1.41), ("moe", 2.73)):
        config = getattr(gpu.SIZES["2b"], size)
        assert measure.forward_flops(config, [(1, [])]) / 2e9 == pytest.approx(billions, abs=0.03)


def top_left(module, query, key, value, mask, scaling, segments):
    """Packed attention with the causal mask of responses aligned to the top left: wrong."""
    sizes = [n for prompt, lengths in segments for n in (prompt, *lengths)]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    pieces = iter(zip(*(x.split(sizes, 2) for x in (query, key, value))))
    outputs = []
    for _, lengths in segments:
        prompt = next(pieces)
        outputs.append(F.scaled_dot_product_attention(*prompt, is_causal=True))
        for q, *own in (next(pieces) for _ in lengths):
            k, v = (torch.cat(pair, 2) for pair in zip(prompt[1:], own))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(outputs, 2).transpose(1, 2), None


def one_kv_head(module, query, key, value, mask, scaling, segments):
    """Packed attention whose query heads all take the first head of keys and values: wrong."""
    key, value = (x[:, :1].expand_as(x) for x in (key, value))
    return RIGHT(module, query, key, value, mask, scaling=scaling, segments=segments)


RIGHT = policy.packed_attention


@pytest.mark.parametrize("wrong", [top_left, one_kv_head])
def test_wrong_attention_misses_its_goals(wrong, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    gpu.attention(run)
    errors = [name for name in run.results if "error" in name]
    assert len(errors) == 5 and not any(measure.missed(run.results[name]) for name in errors)
    monkeypatch.setattr(policy, "packed_attention", wrong)
    gpu.attention(run)
    wrong_ones = {name for name in errors if measure.missed(run.results[name])}
    seen = "attention, error of what is seen"
    assert wrong_ones == {*errors} - ({seen} if wrong is one_kv_head else set())


def test_a_case_without_memory_is_recorded_and_the_others_go_on(
        tmp_path, process_group, monkeypatch):
    """PyTorch's error, raised where a long row's backward pass would have begun: on a CPU memory
    does not end this way."""
    run, real, models = make_run(tmp_path), policy.logprobs, []

    def logprobs(model, row, *args):
        models.append(weakref.ref(model))
        result = real(model, row, *args)
        if row["input_ids"].shape[1] == 64:
            raise torch.OutOfMemoryError("no memory")
        return result

    monkeypatch.setattr(policy, "logprobs", logprobs)
    gpu.update(run)
    assert models[0]() is None, "the model of the case that failed takes memory still"
    short, long = (run.results[f"update, {n} tokens, with checkpointing"] for n in (64, 128))
    assert measure.line("short", short, judged=True) == "short: OOM"
    assert long["value"]["ms"] > 0 and not measure.missed(long)
    run.size = SimpleNamespace(**vars(run.size) | {"judged": 64})
    gpu.update(run)
    judged = run.results["update, 64 tokens, share of the matmul rate"]
    assert measure.missed(judged)
    assert measure.line("judged", judged, judged=True) == "judged: nan (goal >= 0.4, MISSED)"


def test_a_part_without_memory_is_recorded(tmp_path, process_group, monkeypatch):
    def named_weights(model):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(policy, "named_weights", named_weights)
    args = SimpleNamespace(device="cpu", size="tiny", parts=["sync", "adamw"], out=None)
    results = gpu.run_parts(args, str(tmp_path)).results
    assert measure.missed(results["sync, memory is enough"])
    assert results["adamw, share of the copy rate"]["value"] > 0
    assert not [name for name in results if name.startswith(("attention", "head", "update"))]


@pytest.mark.parametrize("value, goal, verdict", [
    (0.4, ">= 0.4", "met"), (0.39, ">= 0.4", "MISSED"), (10.1, "<= 10", "MISSED"),
    (10, "<= 10", "met"), (math.nan, "<= 10", "MISSED")])
def test_goals(value, goal, verdict):
    result = {"value": value, "goal": goal}
    assert measure.missed(result) == (verdict == "MISSED")
    assert measure.line("x", result, judged=True) == f"x: {value:.4g} (goal {goal}, {verdict})"
