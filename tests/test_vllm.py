"""The real vLLM (its CPU build) as the engine: it samples from the very weights that are trained.

Run by make test-vllm, in an environment of its own."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from data_fixtures import write_processor
from ranks import forked, forked_nodes
from test_train import arguments, metrics, rollouts, small_data, tensors, texts

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.vllm
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
VLLM = dict(engine="vllm", engine_args="{'enforce_eager':True}", gpu_memory_utilization=0.2)


@pytest.fixture(autouse=True)
def shared_memory():
    """A killed run of the CPU build leaves its tensor-parallel memory under a name for all."""
    for file in Path("/dev/shm").glob("*cpushm*"):
        file.unlink()


def model_folder(folder, kind, tied):
    """A random model with all that vLLM reads beside the weights."""
    patch, name = (14, "Qwen2_5_VL") if kind == "qwen2_5_vl" else (16, "Qwen3VL")
    write_processor(folder, patch)
    images = json.loads((folder / "preprocessor_config.json").read_text()) | {
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": f"{name}Processor",
        "image_processor_type": "Qwen2VLImageProcessorFast", "video_processor_type":
        "Qwen2VLVideoProcessor" if patch == 14 else "Qwen3VLVideoProcessor"}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / file).write_text(json.dumps(images))
    return tiny_models.save(kind, folder, tied, vocab=336)


def side_by_side(folder, kind, tied, ranks, *checks, **engine_args):
    """What tests/vllm_worker.py finds."""
    path = model_folder(folder, kind, tied)
    forked(ranks, "tests/vllm_worker.py", path, kind, ranks, json.dumps(engine_args),
             folder / "found.json", *checks, env=ENV)
    return json.loads((folder / "found.json").read_text())


CASES = {  # kind, tied embeddings, tensor parallel
    "tied": ("qwen3_vl", True, 1), "untied": ("qwen3_vl", False, 2),
    "qwen2.5": ("qwen2_5_vl", False, 1), "experts": ("qwen3_vl_moe", False, 2)}


@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_the_trainers_after_updates(case, tmp_path):
    """fp32, two large steps on all weights, images of many sizes, each asked again."""
    kind, tied, ranks = CASES[case]
    found = side_by_side(tmp_path, kind, tied, ranks, "gap")
    assert found["before"] < 1e-4 and found["after"] < 1e-4
    assert found["not sent"] > 1e-1, "this would pass without a sync"
    assert found["head not sent"] > 1e-2, "this would pass with a stale head"
    assert found["logprob"] < -100, "a policy that is sure of every token shows no gap"
    assert found["repeats"] and found["alone"] and found["seeds"]
    assert found["reasons"] == ["length", "stop"] and found["ends"]


def test_log_probs_are_the_trainers_with_an_adapter(tmp_path):
    """What vLLM gets is one plain model: it knows nothing of the adapter that is trained."""
    found = side_by_side(tmp_path, "qwen3_vl", True, 1, "gap", lora_rank=4)
    assert found["before"] < 1e-4 and found["after"] < 1e-4
    assert found["not sent"] > 1e-1, "this would pass without a sync"


def test_each_trap_is_real(tmp_path):
    """Where a cure of rollout.py is left out, it shows: else these cures would be untested."""
    found = side_by_side(tmp_path, "qwen3_vl", True, 1, "gap", "traps")
    assert found["banned"] == 0 < found["not banned"], "tokens of images were sampled"
    assert "row 0: vLLM made" in found["resized"], "an image was resized once more, unnoticed"
    assert "cache" in str(found["old caches"]) or found["old caches"] > 1e-2


def test_normalising_on_the_device_would_be_wrong(tmp_path):
    """vLLM's dummy weights overwrite its mean and deviation of pixels, and no sync mends that."""
    found = side_by_side(tmp_path, "qwen3_vl", True, 1, "gap", mm_device_do_normalize=True)
    assert found["after"] > 1e-2


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rows = small_data(start, folder, 10)
    settings = dict(train_data=rows, steps=4, keep_checkpoints=9, **VLLM)
    forked(2, *arguments(start, folder / "run", **settings), env=ENV)
    return folder / "run", settings


def test_killed_and_restarted_is_bit_for_bit_the_same(whole, start, tmp_path):
    run, settings = whole
    command = arguments(start, tmp_path / "run", **settings)
    forked(2, *command, kill_at=tmp_path / "run/checkpoints/step_000002", check=False, env=ENV)
    assert not (tmp_path / "run/checkpoints/step_000004").exists(), "it was killed too late"
    forked(2, *command, env=ENV)
    assert metrics(tmp_path / "run") == metrics(run)
    assert metrics(run)[4]["engine_gap/mean"] < 1e-5
    ours, theirs = tensors(tmp_path / "run", 4), tensors(run, 4)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for step in range(1, 5):
        assert rollouts(tmp_path / "run", f"step_{step:06d}") == rollouts(run, f"step_{step:06d}")


def test_two_ranks_of_one_engine_train_the_same_responses(whole, start, tmp_path):
    run, settings = whole
    settings = settings | {"tensor_parallel": 2, "steps": 1}
    forked(2, *arguments(start, tmp_path / "run", **settings), env=ENV)
    assert texts(tmp_path / "run") == texts(run)
    ours, theirs = metrics(tmp_path / "run")[1], metrics(run)[1]
    for name in ("reward/overall", "loss/policy", "grad_norm", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_engines_stay_within_their_node(whole, start, tmp_path):
    """Two agents of two ranks each: an engine for both ranks of a node, one training over all."""
    run, settings = whole
    command = arguments(start, tmp_path / "run", **settings | {"tensor_parallel": 2, "steps": 1})
    forked_nodes(command, command, ranks=2, env=ENV)
    assert texts(tmp_path / "run") == texts(run)
    ours, theirs = metrics(tmp_path / "run")[1], metrics(run)[1]
    for name in ("reward/overall", "loss/policy", "grad_norm", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_a_wrong_engine_stops_the_run_before_its_first_update(start, tmp_path):
    """Pixels normalised with dummies: nothing crashes, only the engine's policy is another one."""
    args = "{'enforce_eager':True,'mm_device_do_normalize':True}"
    run = forked(1, *arguments(start, tmp_path / "run", **VLLM | {"engine_args": args}),
                   env=ENV, check=False)
    assert run.returncode
    assert "error: engine and trainer differ by" in run.stderr and "max_engine_gap is" in run.stderr
    assert [*metrics(tmp_path / "run")] == [0]
    assert not [*(tmp_path / "run").glob("checkpoints/step_*")]


@pytest.mark.parametrize("settings, said", [
    (dict(engine_args="{'no_such':1}"), "no_such"),
    (dict(engine_args="{'num_gpu_blocks_override':1}"), "gpu_memory_utilization=0.2")])
def test_an_engine_that_does_not_start_is_one_line(start, tmp_path, settings, said):
    run = forked(1, *arguments(start, tmp_path / "run", **VLLM | settings), env=ENV, check=False)
    [line] = [x for x in run.stderr.splitlines() if x.startswith("error: ")]
    assert run.returncode and "vLLM" in line and "does not start" in line and said in line
