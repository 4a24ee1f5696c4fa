"""What the settings of policy.load promise: precision, freezing, checkpointing, decay; what
memory() counts; and that a checkpoint is whole."""

import os
from pathlib import Path

import published_models
import pytest
import tiny_models
import torch

import data
import policy

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.save("qwen3_vl", tmp_path_factory.mktemp("model"))

def gradients(model, processor):
    """{name: whole gradient or None} of the summed log-probs of the three test groups."""
    for row in policy.build_rows(model, tiny_models.groups(processor), 1000):
        pixels = data.patches(row["images"], processor)
        policy.logprobs(model, row, pixels, 1.0, tiny_models.BANNED)[0].sum().backward()
    return {
        n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()
    }

def load(path, **settings):
    return policy.load(tiny_models.settings(path, **settings), CPU)

def test_activation_checkpointing_changes_no_gradient(path, process_group):
    processor = tiny_models.processor("qwen3_vl")
    plain = gradients(load(path), processor)
    checkpointed = gradients(load(path, activation_checkpointing=True), processor)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])

def test_frozen_vision_gets_no_gradient_and_the_rest_the_same(path, process_group):
    processor = tiny_models.processor("qwen3_vl")
    plain = gradients(load(path), processor)
    model = load(path, freeze_vision=True)
    frozen = gradients(model, processor)
    for name in plain:
        if ".visual." in name:
            assert frozen[name] is None
        else:
            torch.testing.assert_close(frozen[name], plain[name])
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    optimizer = policy.adamw(model, 1e-2, 0.999, 0.1)
    policy.optimizer_step(model, optimizer, 1e-2, 1.0)
    same = {n for n, p in model.named_parameters() if torch.equal(p.full_tensor(), before[n])}
    assert same == {n for n in before if ".visual." in n}

def test_bf16_computes_in_bf16_and_keeps_weights_and_moments_in_fp32(path, process_group):
    """MediX-R1's 30B recipe keeps them in bf16, where a second moment can never decay."""
    processor = tiny_models.processor("qwen3_vl")
    exact, model = gradients(load(path), processor), load(path, dtype="bfloat16")
    rounded = gradients(model, processor)
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    error = (rounded[name] - exact[name]).norm() / exact[name].norm()
    assert 1e-5 < error < 0.1, "either not bf16 or not the same gradient"
    optimizer = policy.adamw(model, 1e-6, 0.999, 0.0)
    policy.optimizer_step(model, optimizer, 1e-6, 1.0)
    for p in model.parameters():
        assert p.dtype == torch.float32
        assert {optimizer.state[p][k].dtype for k in ("exp_avg", "exp_avg_sq")} == {torch.float32}

def test_reference_is_kept_in_its_compute_type_and_cannot_learn(path, process_group):
    model = policy.load(tiny_models.settings(path, dtype="bfloat16"), CPU, load(path))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())

def test_norms_biases_and_embeddings_are_not_decayed(path, process_group):
    model = load(path)
    optimizer = policy.adamw(model, 1e-3, 0.9, 0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == set(names.values())
    assert decay["model.language_model.layers.0.self_attn.q_proj.weight"] == 0.5
    assert decay["model.visual.patch_embed.proj.weight"] == 0.5
    for name, value in decay.items():
        if name.endswith("bias") or "norm" in name or "embed_tokens" in name or "pos_embed" in name:
            assert value == 0, name

def test_a_gradient_that_is_not_finite_changes_nothing(path, process_group):
    model = load(path)
    optimizer = policy.adamw(model, 1e-2, 0.9, 0.5)
    gradients(model, tiny_models.processor("qwen3_vl"))
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    next(model.parameters()).grad.to_local().fill_(float("nan"))
    norm = policy.optimizer_step(model, optimizer, 1e-2, 1.0)
    assert norm != norm and not optimizer.state
    assert all(torch.equal(p.full_tensor(), before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())

def test_an_unknown_architecture_is_refused(process_group, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": []}')
    with pytest.raises(ValueError, match=r"qwen3.*not one of.*qwen3_vl_moe"):
        load(str(tmp_path))

# --- memory ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_that_of_the_tensors(kind, tied, process_group, tmp_path):
    """What memory() calculates is what weights, gradients and moments really take."""
    model = load(tiny_models.save(kind, tmp_path, tied=tied))
    optimizer = policy.adamw(model, 1e-3, 0.9, 0.0)
    cfg = tiny_models.settings("", dtype="bfloat16", kl_coef=0.0)
    gradients(model, tiny_models.processor(kind))
    # By address: a tied weight has two names.
    weights = {w.to_local().data_ptr(): w.to_local().nbytes for w in model.state_dict().values()}
    grads = sum(p.grad.to_local().nbytes for p in model.parameters())
    policy.optimizer_step(model, optimizer, 1e-3, 1.0)
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    at_rest = sum(weights.values()) + sum(m.to_local().nbytes for m in moments)
    expected = at_rest / 1e9, (at_rest + grads) / 1e9
    assert published_models.memory(model, cfg, 1) == pytest.approx(expected)
    assert published_models.memory(model, cfg, 4) == pytest.approx([x / 4 for x in expected])

def test_memory_of_a_reference_model_and_of_frozen_vision(path, process_group):
    settings = tiny_models.settings(path, dtype="bfloat16", kl_coef=0.0)
    model, reference = load(path), policy.load(settings, CPU, load(path))
    alone, kl = published_models.memory(model, settings, 1), tiny_models.settings(
        path, dtype="bfloat16", kl_coef=0.01)
    more = sum(p.nbytes for p in reference.parameters()) / 1e9
    assert published_models.memory(model, kl, 1) == pytest.approx([x + more for x in alone])
    frozen = sum(p.numel() for p in model.model.visual.parameters()) / 1e9
    model.model.visual.requires_grad_(False)
    expected = alone[0] - 8 * frozen, alone[1] - 12 * frozen
    assert published_models.memory(model, settings, 1) == pytest.approx(expected)

# --- checkpoints ----------------------------------------------------------------------------------

@pytest.fixture
def trained(path, process_group):
    """Model and optimizer after two steps."""
    model = load(path)
    optimizer = policy.adamw(model, 1e-2, 0.9, 0.0)
    for _ in range(2):
        gradients(model, tiny_models.processor("qwen3_vl"))
        policy.optimizer_step(model, optimizer, 1e-2, 1.0)
    return model, optimizer

def test_a_checkpoint_is_on_disk_before_it_has_its_name(trained, tmp_path, monkeypatch):
    """Every file and the folder are flushed, then renamed, then `latest` moves, then the parent is
    flushed; nothing makes the whole machine write its disks."""
    events, fsync, rename = [], os.fsync, Path.rename

    def flushed(handle):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(path, target):
        events.append(("rename", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("os.sync() was called"))
    monkeypatch.setattr(Path, "rename", renamed)
    policy.save_checkpoint(tmp_path, 7, *trained, {"best": None}, keep=1)
    events = [e for e in events if not e[1].startswith(".")]
    done = events.index(("rename", "step_000007"))
    files = {p.name for p in (tmp_path / "step_000007").iterdir()}
    assert len(files) >= 3 and files | {"step_000007.partial"} <= {n for _, n in events[:done]}
    assert events[done - 1] == ("flush", "step_000007.partial")
    assert events[done:][-1] == ("flush", tmp_path.name)
    assert {("rename", "latest"), ("rename", "best")} == {*events[done + 1 : -1]}

def test_a_checkpoint_brings_back_weights_moments_and_steps(trained, path, tmp_path):
    model, optimizer = trained
    policy.save_checkpoint(tmp_path, 2, model, optimizer, {"best": [2, 0.5], "cursor": 3}, keep=1)
    fresh = load(path)
    other = policy.adamw(fresh, 1e-2, 0.9, 0.0)
    assert policy.load_checkpoint(tmp_path / "latest", fresh, other)["cursor"] == 3
    for (name, ours), theirs in zip(fresh.named_parameters(), model.parameters()):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor()), name
        assert other.state[ours]["step"] == optimizer.state[theirs]["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            moments = other.state[ours][key], optimizer.state[theirs][key]
            assert torch.equal(*(m.full_tensor() for m in moments)), name

@pytest.mark.parametrize("harm", ["flip a bit", "cut off", "empty", "remove"])
def test_a_harmed_checkpoint_is_set_aside_for_the_one_before(trained, tmp_path, capsys, harm):
    """Each of its files in turn; and if none is left that is whole, nothing starts again."""
    for step in (1, 2):
        policy.save_checkpoint(tmp_path, step, *trained, {"best": None}, keep=2)
    newest, last = tmp_path / "step_000002", tmp_path / "step_000001"
    files = sorted(path.name for path in newest.iterdir())
    assert {"manifest.json", "state.json"} < {*files}
    for name in files:
        file = newest / name
        content = file.read_bytes()
        changed = {"flip a bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
                   "cut off": content[:-1], "empty": b""}
        file.write_bytes(changed[harm]) if harm in changed else file.unlink()
        assert policy.find_checkpoint(tmp_path) == last
        said = capsys.readouterr().out
        assert "is damaged or missing: set aside as damaged_step_000002, going on from" in said
        # a manifest whose text was changed still reads: it then blames the file that it describes
        assert name in said or name == "manifest.json"
        aside = tmp_path / "damaged_step_000002"
        assert not newest.exists() and policy.find_checkpoint(tmp_path) == last
        assert capsys.readouterr().out == ""
        aside.rename(newest)
        file.write_bytes(content)
    assert policy.find_checkpoint(tmp_path) == newest
    for folder in (newest, last):
        (folder / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint is whole: .*step_000002/state.json is "
                           r"damaged or missing, .*step_000001/state.json"):
            policy.find_checkpoint(tmp_path)
        assert newest.exists() and last.exists()

def test_the_link_decides_where_a_run_goes_on_if_it_leads_anywhere(trained, tmp_path):
    assert policy.find_checkpoint(tmp_path) is None
    for step in (1, 2):
        policy.save_checkpoint(tmp_path, step, *trained, {"best": None}, keep=2)
    link = tmp_path / "latest"
    for target, found in {"step_000001": 1, tmp_path / "step_000001": 1, "step_000009": 2,
                          "nowhere": 2, "/tmp": 2, None: 2}.items():
        link.unlink()
        if target:
            link.symlink_to(target)
        assert policy.find_checkpoint(tmp_path) == tmp_path / f"step_{found:06d}"
        link.unlink(missing_ok=True)
        link.symlink_to("step_000001")

def test_the_best_one_may_be_gone(trained, tmp_path):
    """A run that fell back behind it must not leave a link that leads nowhere."""
    policy.save_checkpoint(tmp_path, 5, *trained, {"best": [3, 0.5]}, keep=1)
    assert os.readlink(tmp_path / "best") == "step_000005"
