"""What the settings of policy.load promise: precision, freezing, checkpointing, decay."""

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
    model = policy.load(tiny_models.settings(path, dtype="bfloat16"), CPU, trainable=False)
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
