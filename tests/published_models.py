"""The four published models that the configs train: their architectures without their weights.

Facts of the config.json files of Qwen/Qwen3-VL-2B-Instruct, Qwen3-VL-8B-Instruct,
Qwen3-VL-30B-A3B-Instruct and Qwen2.5-VL-7B-Instruct; what is not given is transformers' default."""

import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

VISION = dict(patch_size=16, spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
              num_position_embeddings=2304, num_heads=16)
SMALL_VISION = VISION | dict(depth=24, hidden_size=1024, intermediate_size=4096,
                             deepstack_visual_indexes=[5, 11, 17])
LARGE_VISION = VISION | dict(depth=27, hidden_size=1152, intermediate_size=4304,
                             deepstack_visual_indexes=[8, 16, 24])
QWEN3 = dict(vocab_size=151_936, head_dim=128)
IDS = dict(image_token_id=151_655, video_token_id=151_656, vision_start_token_id=151_652,
           vision_end_token_id=151_653)


def _config(kind, tied, text, vision):
    vision = vision | {"out_hidden_size": text["hidden_size"]}
    return kind(text_config=text | {"tie_word_embeddings": tied}, vision_config=vision,
                tie_word_embeddings=tied, **IDS)


# hub id: (billions of parameters, tied ones once; config)
MODELS = {
    "Qwen/Qwen3-VL-2B-Instruct": (2.13, _config(Qwen3VLConfig, True, QWEN3 | dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8), SMALL_VISION)),
    "Qwen/Qwen3-VL-8B-Instruct": (8.77, _config(Qwen3VLConfig, False, QWEN3 | dict(
        hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8), LARGE_VISION)),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (31.07, _config(Qwen3VLMoeConfig, False, QWEN3 | dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True), LARGE_VISION)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8.29, _config(Qwen2_5_VLConfig, False, dict(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4), dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31]))),
}


def build(name):
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(MODELS[name][1], dtype=torch.float32)


def memory(model, cfg, world):
    """GB on each of `world` GPUs (at rest, in an update), without activations: weights, AdamW's two
    moments of what is trained and, with cfg.kl_coef, the reference (an adapter's is the model
    itself); an update adds gradients."""
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    copied = cfg.kl_coef and not cfg.lora_rank
    reference = getattr(torch, cfg.dtype).itemsize if copied else 0
    rest = 2 * gradients + sum(p.nbytes + reference * p.numel() for p in model.parameters())
    return rest / world / 1e9, (rest + gradients) / world / 1e9
