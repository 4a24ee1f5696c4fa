"""merge.py: what was trained is what others load, however it was saved; and what is refused.

Real runs: tiny models of the three architectures, trained and saved under FSDP2."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import merge_runs
import pytest
import torch
from huggingface_hub import HfApi, constants
from merge_hub import hub
from merge_runs import CASES, RANKS, STEP, merge, sequences
from ranks import ROOT, forked
from safetensors.torch import load_file, save_file
from tiny_models import processor
from transformers import AutoConfig, AutoModelForImageTextToText

import data
import merge as script

script.find_spec = {"transformers": True}.get  # vLLM is asked in processes of its own


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """case -> its folder, trained, and merged in fp32 from both checkpoints."""
    root = merge_runs.train(tmp_path_factory.mktemp("runs"))
    for case in CASES:
        for run in ("run", "again"):
            merged(root / case / run)
    return lambda case: root / case


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run, to spoil."""
    shutil.copytree(runs("tied") / "model", tmp_path / "model")
    shutil.copytree(runs("tied") / "again", tmp_path / "run", symlinks=True,
                    ignore=lambda *_: ["merged"])
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["model"] = str(tmp_path / "model")
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    return tmp_path / "run"


def arguments(run, **more):
    return Namespace(**{"checkpoint": str(run / STEP), "out": None, "dtype": None, "force": False,
                        "push_to_hub": None, "public": False, "adapter": False} | more)


def merged(run, **more):
    """What is made of a run, in this process."""
    script.main(arguments(run, **more))
    return run / "merged/step_000100"


def refused(run, **more):
    """The reason."""
    with pytest.raises((ValueError, OSError)) as caught:
        script.main(arguments(run, **more))
    return str(caught.value)


def reads(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def plain_logprobs(model, kind):
    """Of each response alone after its prompt, by transformers alone."""
    found = []
    for group, ids in sequences(kind):
        x = torch.tensor([group["ids"] + ids])
        images = {"pixel_values": data.patches(group["images"], processor(kind)),
                  "image_grid_thw": torch.tensor(group["grid"])} if group["images"] else {}
        types = (x == model.config.image_token_id).int()
        logits = model(x, mm_token_type_ids=types, **images).logits[0, :-1]
        found += logits.log_softmax(-1).gather(1, x[0, 1:, None])[-len(ids):, 0].tolist()
    return sorted(found)


def trained_logprobs(run):
    """Of the trainer, in rows that pack the responses in another order."""
    return sorted(x for row in json.loads((run / "logprobs.json").read_text()) for x in row)


# --- what it makes --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_was_trained(case, runs):
    """Every tensor bit for bit, and log-probs within 1e-5 of the trainer's."""
    run, kind = runs(case) / "run", CASES[case][0]
    model, report = AutoModelForImageTextToText.from_pretrained(
        run / "merged/step_000100", output_loading_info=True)
    assert not any(report.values()), report
    trained, base = load_file(run / "weights.safetensors"), load_file(
        runs(case) / "model/model.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.state_dict().keys() == trained.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    still = [n for n in trained if n in base and torch.equal(trained[n], base[n])]
    if "adapter" in case:  # all linear layers but the head, experts and, if frozen, the tower
        changed = {n for n in trained if n in base} - {*still}
        assert changed and all(n.endswith(("_proj.weight", "qkv.weight", "attn.proj.weight",
                                           "fc1.weight", "fc2.weight")) for n in changed)
        assert any(".visual." in n for n in changed) == ("experts" not in case)
        assert not any("experts" in n or "embed" in n for n in changed)
    else:
        frozen = "frozen" in case
        assert all(".visual." in n for n in still) and bool(still) == frozen, "it was not trained"
    ours, theirs = plain_logprobs(model, kind), trained_logprobs(run)
    assert len(ours) == len(theirs) and min(ours) < -5
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_makes_identical_files(case, runs):
    run, again = runs(case) / "run", runs(case) / "again"
    assert len([*(run / STEP).glob("*.safetensors")]) == 1
    assert len([*(again / STEP).glob("*.safetensors")]) == RANKS
    ours, theirs = reads(run / "merged/step_000100"), reads(again / "merged/step_000100")
    assert ours == theirs and "model.safetensors" in ours


def test_experts_lie_as_they_are_published(runs):
    """transformers reads both layouts, where they are not square; vLLM the published one only."""
    run = runs("experts") / "run"
    files = load_file(run / "merged/step_000100/model.safetensors")
    trained = load_file(run / "weights.safetensors")
    experts = {name: x for name, x in files.items() if ".experts." in name}
    assert {tuple(x.shape) for x in experts.values()} == {(4, 64, 256), (4, 128, 64)}
    assert len(experts) == 6
    for name, x in experts.items():
        assert torch.equal(x, trained[name].transpose(1, 2)), name


@pytest.mark.parametrize("case, names", [
    ("tied", {"model.visual.pos_embed.weight", "model.language_model.norm.weight"}),
    ("untied, frozen vision", {"lm_head.weight", "model.language_model.embed_tokens.weight"}),
    ("qwen2.5", {"visual.patch_embed.proj.weight", "model.norm.weight", "lm_head.weight"})])
def test_names_are_the_published_ones(case, names, runs):
    files = load_file(runs(case) / "run/merged/step_000100/model.safetensors")
    assert names <= files.keys() and ("lm_head.weight" in files) == (case != "tied")
    assert files.keys() == load_file(runs(case) / "model/model.safetensors").keys()


def test_all_else_is_the_base_models(runs):
    base, merged = reads(runs("tied") / "model"), reads(runs("tied") / "run/merged/step_000100")
    assert base.keys() == merged.keys() >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"}
    assert [n for n in base if base[n] != merged[n]] == ["model.safetensors"]


@pytest.mark.parametrize("case", CASES)
def test_bf16(case, runs, tmp_path):
    """Every weight rounded once; the config says so, that of the language model, too."""
    merged(runs(case) / "again", dtype="bfloat16", out=tmp_path / "out")
    config = json.loads((runs(case) / "model/config.json").read_text())
    assert config["dtype"] == "float32"
    config["dtype"] = "bfloat16"
    for part in ("text_config", "vision_config"):
        assert config[part]["dtype"] == "float32"
        config[part]["dtype"] = "bfloat16"
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    whole = load_file(runs(case) / "run/merged/step_000100/model.safetensors")
    rounded = load_file(tmp_path / "out/model.safetensors")
    assert whole.keys() == rounded.keys()
    for name, x in whole.items():
        if "adapter" in case and CASES[case][2]["lora_rank"]:  # added to a model that is rounded
            torch.testing.assert_close(rounded[name], x.bfloat16(), rtol=2**-6, atol=1e-3)
        else:
            assert torch.equal(rounded[name], x.bfloat16()), name


def test_its_type_is_the_runs_by_default(run):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    files = load_file(merged(run, checkpoint=f"{run}/checkpoints/latest") / "model.safetensors")
    assert {x.dtype for x in files.values()} == {torch.bfloat16}


def test_a_config_of_older_tools(run):
    """torch_dtype, as it was called; nothing else changes in what they read."""
    config = (run.parent / "model/config.json").read_text().replace('"dtype"', '"torch_dtype"')
    (run.parent / "model/config.json").write_text(config)
    ours = (merged(run, dtype="bfloat16") / "config.json").read_text()
    assert '"torch_dtype": "bfloat16"' in config.replace("float32", "bfloat16") == ours


def test_the_base_models_index_is_not_copied(run):
    (run.parent / "model/model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    assert not (merged(run) / "model.safetensors.index.json").exists()


def test_a_base_model_of_the_hub(run, tmp_path):
    """From the cache, as a training has left it there."""
    cached = tmp_path / "hub/models--some--base"
    shutil.copytree(run.parent / "model", cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"model": "some/base"}))
    merge(run / STEP, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert (run / "merged/step_000100/chat_template.jinja").exists()


def memory_held(*command):
    """The most bytes that a process holds, mapped files apart. Left to itself, malloc keeps of
    tensors below 32 MB that were freed now none, now all: where on its heap the last ones lay."""
    env, most = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, 0
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=env)
    while process.poll() is None:
        for row in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if row.startswith("RssAnon"):
                most = max(most, int(row.split()[1]) * 1024)
        time.sleep(0.005)
    assert process.returncode == 0
    return most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_one_copy(runs, tmp_path):
    """In the type written: the copies are of the size in fp32."""
    size = (runs("large") / "model/model.safetensors").stat().st_size
    assert size > 2e8
    small, large, rounded = (
        memory_held(sys.executable, "merge.py", runs(case) / "run" / STEP, "--dtype", dtype,
                    "--out", tmp_path / (case + dtype))
        for case, dtype in (("tied", "float32"), ("large", "float32"), ("large", "bfloat16")))
    print(f"copies: {(large - small) / size:.2f}, {(rounded - small) / size:.2f}")
    assert 0.9 < (large - small) / size < 1.3 and 0.4 < (rounded - small) / size < 0.8


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flip a bit", "cut off", "empty", "remove"])
def test_a_damaged_file_is_named(run, harm):
    names = json.loads((run / STEP / "manifest.json").read_text())
    assert len(names) == RANKS + 1  # and state.json
    for name in names:
        file = run / STEP / name
        content = file.read_bytes()
        changed = {"flip a bit": content[:-1] + bytes([content[-1] ^ 1]), "cut off": content[:-1],
                   "empty": b""}
        file.write_bytes(changed[harm]) if harm in changed else file.unlink()
        assert name in refused(run)
        file.write_bytes(content)
    assert not (run / "merged").exists()


def test_a_shard_of_another_checkpoint_is_named(run):
    shard = next((run / STEP).glob("shard-00001*"))
    shutil.copy(shard, run / STEP / "shard-00004-model-00001-of-00001.safetensors")
    assert "shard-00004-model-00001-of-00001.safetensors" in refused(run)


@pytest.mark.parametrize("place", ["config.json", f"{STEP}/manifest.json"])
def test_what_is_no_checkpoint(run, place):
    (run / place).unlink()
    assert place.split("/")[-1] in refused(run)
    (run / place).write_text('{"model": ')
    assert str(run / STEP) in merge(run / STEP, fails=True)


def change(run, **text):
    """Another base model than the one that was trained."""
    path = run.parent / "model/config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= text
    path.write_text(json.dumps(config | {k: v for k, v in text.items() if k in config}))
    config = AutoConfig.from_pretrained(path.parent)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(
        path.parent)


def test_extra_weights_are_named(run):
    change(run, num_hidden_layers=2)
    said = refused(run)
    only, _, other = said.partition("only in the model")
    assert only.count("layers.2.") == 11 and "layers.2.mlp.up_proj.weight', 128, 64)" in only
    assert "layers" not in other


def test_missing_weights_are_named(run):
    change(run, num_hidden_layers=4)
    said = refused(run)
    _, _, only = said.partition("only in the model")
    assert only.count("layers.3.") == said.count("layers.") == 11
    assert "layers.3.mlp.up_proj.weight', 128, 64)" in only


def test_a_head_of_its_own_is_missing(run):
    change(run, tie_word_embeddings=False)
    assert "only in the model: [('model.lm_head.weight', 336, 64)]" in refused(run)


def test_weights_of_another_shape_are_named(run):
    change(run, intermediate_size=96)
    only, _, other = refused(run).partition("only in the model")
    assert "layers.1.mlp.up_proj.weight', 128, 64)" in only
    assert "layers.1.mlp.up_proj.weight', 96, 64)" in other
    assert only.count("layers.") == other.count("layers.") == 9


def test_a_weight_that_no_model_has_is_named(run):
    """Such as an adapter's, under whatever name."""
    shard = next((run / STEP).glob("shard-00001*"))
    save_file(load_file(shard) | {"model.adapter.a": torch.zeros(2, 3)}, shard)
    tensors = load_file(shard)
    assert "model.adapter.a" in tensors
    manifest = json.loads((run / STEP / "manifest.json").read_text())
    for other in (run / STEP).glob("shard-0000[23]*"):  # sharded tensors: one file is enough here
        manifest.pop(other.name)
        other.unlink()
    manifest[shard.name] = script.hashlib.sha256(shard.read_bytes()).hexdigest()
    (run / STEP / "manifest.json").write_text(json.dumps(manifest))
    only, _, _ = refused(run).partition("only in the model")
    assert "('model.adapter.a', 2, 3)" in only


def test_a_run_without_an_adapter_has_none_to_write(run):
    assert "lora_rank was 0" in refused(run, adapter=True)


def test_nothing_is_overwritten_without_force(run):
    out = merged(run)
    (out / "model.safetensors").write_bytes(b"mine")
    assert "--force" in refused(run)
    assert (out / "model.safetensors").read_bytes() == b"mine"
    merged(run, force=True)
    assert len((out / "model.safetensors").read_bytes()) > 1e5
    assert [p.name for p in out.parent.iterdir()] == ["step_000100"]


@pytest.mark.parametrize("place", [".", "checkpoints/step_000100", "other"])
def test_force_replaces_models_only(run, place):
    (run / "other").mkdir()
    before = {*run.rglob("*")}
    assert "exists" in refused(run, force=True, out=run / place)
    assert {*run.rglob("*")} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_written_wrong_gets_no_name(run, monkeypatch, dtype):
    write = script.write

    def spoil(model, base, folder, dtype):
        write(model, base, folder, dtype)
        files = load_file(folder / "model.safetensors")
        name = "model.language_model.layers.1.mlp.down_proj.weight"
        save_file(files | {name: files[name].flip(0)}, folder / "model.safetensors")

    monkeypatch.setattr(script, "write", spoil)
    assert re.search(r"transformers .*difference [\d.]+, limit", refused(run, dtype=dtype))
    assert not (run / "merged/step_000100").exists()


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def push(run, monkeypatch):
    """A function: merge and upload to a hub of these repositories -> what
    merged() or, if told to, refused() returns."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def push(repos, then=merged, **more):
        with hub(repos) as url:
            monkeypatch.setattr(script, "HfApi", partial(HfApi, url, token="hf_none"))
            return then(run, push_to_hub="me/model", **more)

    return push


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_is_private_unless_public(push, public):
    repos = {}
    merged = push(repos, public=public)
    assert repos["me/model"]["private"] is not public
    files = repos["me/model"]["files"]
    files.pop(".gitattributes", None)
    assert files == reads(merged)


def test_a_repository_is_not_overwritten_without_force(run, push):
    old = {"README.md": b"mine", "model-00001-of-00002.safetensors": b"old"}
    repos = {"me/model": {"private": True, "files": dict(old)}}
    assert "me/model exists" in push(repos, then=refused)
    assert repos["me/model"]["files"] == old and not (run / "merged").exists()
    merged = push(repos, force=True)
    assert repos["me/model"]["files"] == {"README.md": b"mine", **reads(merged)}


@pytest.mark.parametrize("public", [False, True])
def test_a_public_repository_stays_so_only_with_public(push, public):
    repos = {"me/model": {"private": False, "files": {}, "uploads": []}}
    push(repos, force=True, public=public)
    assert repos["me/model"]["private"] is not public
    assert repos["me/model"]["uploads"] == [not public], "it must be private before the upload"
    assert "model.safetensors" in repos["me/model"]["files"]


# --- vLLM -----------------------------------------------------------------------------------------

VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
VLLM_CASES = ["tied", "qwen2.5", "experts"]


@pytest.fixture(scope="module")
def vllm_runs(tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    root = merge_runs.train(tmp_path_factory.mktemp("runs"), VLLM_CASES, more=False)
    return lambda case: root / case


def vllm_worker(*command):
    return forked(0, "tests/merge_vllm.py", *command, env=VLLM, check=False)


@pytest.mark.vllm
@pytest.mark.parametrize("case", VLLM_CASES)
def test_vllm_loads_what_was_trained(case, vllm_runs, tmp_path):
    """By merge.py itself, on its own prompt, and on the trainer's prompts and responses."""
    run, kind = vllm_runs(case) / "run", CASES[case][0]
    said = forked(0, "merge.py", run / STEP, "--out", tmp_path / "out", env=VLLM).stdout
    gap = float(re.search(r"log-probs by vllm .* differ by (\S+), limit 0.001", said)[1])
    assert gap < 1e-5
    worker = vllm_worker("logprobs", tmp_path / "out", kind, tmp_path / "found.json")
    assert worker.returncode == 0, worker.stderr[-3000:]
    ours = sorted(json.loads((tmp_path / "found.json").read_text()))
    theirs = trained_logprobs(run)
    gaps = [abs(a - b) for a, b in zip(ours, theirs)]
    print(f"mean {sum(gaps) / len(gaps):.2g}, max {max(gaps):.2g}")
    assert len(ours) == len(theirs) and max(gaps) < 1e-4 and sum(gaps) / len(gaps) < 1e-5


@pytest.mark.vllm
@pytest.mark.parametrize("how, said", [
    ("unpublished", "vLLM .* does not start: .*size of tensor"),
    ("spoilt", "vllm reads other weights from .*difference")])
def test_vllm_is_asked_for_its_own_opinion(how, said, vllm_runs, tmp_path):
    """transformers reads both layouts of experts."""
    worker = vllm_worker(how, vllm_runs("experts") / "run" / STEP, tmp_path / "out")
    assert re.search("log-probs by transformers .* limit 1e-05", worker.stdout), worker.stderr
    assert worker.returncode and re.search(said, worker.stderr), worker.stderr[-3000:]
    assert not (tmp_path / "out").exists()
