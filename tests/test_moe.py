"""Qwen3-VL-MoE: its experts in one grouped matmul, and a run of it on two ranks."""

import shutil

import pytest
import tiny_models
import torch
from ranks import forked
from test_policy import gradients, load
from test_train import arguments, metrics, small_data
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLMoeConfig


def test_the_grouped_matmul_equals_the_loop_over_experts(process_group, tmp_path):
    model = load(tiny_models.save("qwen3_vl_moe", tmp_path, tied=False))
    processor = tiny_models.processor("qwen3_vl_moe")
    called, grouped_mm = [], torch.nn.functional.grouped_mm
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "grouped_mm",
                        lambda *a, **k: called.append(1) or grouped_mm(*a, **k))
        ours = gradients(model, processor)
    assert called, "transformers' default is the loop over experts"
    model.zero_grad()
    model.set_experts_implementation("eager")
    theirs, n = gradients(model, processor), len(called)
    assert len(called) == n
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
    assert ours["model.language_model.layers.0.mlp.experts.down_proj"].norm() > 0


def test_it_trains_on_two_ranks(start, tmp_path):
    """From random weights: what counts is that engine and trainer agree about all experts while
    they change, and that both ranks end with the same model."""
    shutil.copytree(start / "model", tmp_path / "model")
    plain = AutoConfig.from_pretrained(start / "model").to_dict()
    text = plain["text_config"] | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1,
        mlp_only_layers=[], norm_topk_prob=True, model_type="qwen3_vl_moe_text")
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=plain["vision_config"] | {"model_type": "qwen3_vl_moe"},
        tie_word_embeddings=False, **{k: v for k, v in plain.items() if k.endswith("_token_id")})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(start / "model/generation_config.json", tmp_path / "model")
    # Nothing that random weights write is right, so the advantages come from soft similarities.
    rows = small_data(start, tmp_path, 8)
    forked(2, *arguments(start, tmp_path / "run", model=tmp_path / "model", train_data=rows,
                           steps=3, learning_rate=1e-3, embed_soft=True))
    lines = metrics(tmp_path / "run")
    assert all(lines[step]["grad_norm"] > 0 for step in (1, 2, 3)), "nothing was learnt"
    assert all(lines[step]["engine_gap/mean"] < 1e-4 for step in (1, 2, 3))
