"""Random-weight models of the three real architectures at tiny size, as Hugging Face folders."""

from types import SimpleNamespace

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

import train_grpo

IMAGE, VIDEO, VISION_START, VISION_END, EOS = 5, 6, 3, 4, 2
BANNED = [IMAGE, VIDEO, VISION_START, VISION_END]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def config(kind, tied=True, vocab=200):
    """kind: "qwen3_vl", "qwen2_5_vl" or "qwen3_vl_moe"."""
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tied,
    }
    text = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": EOS,
        "bos_token_id": 1,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.1,
        "out_hidden_size": 64,
    }
    if kind == "qwen2_5_vl":
        # Its head_dim is hidden_size / heads; vLLM's CPU build takes 32, not 16.
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        rope = ROPE | {"mrope_section": [6, 5, 5]}
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope}, vision_config=vision, **ids
        )
    rope = ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text |= {"rope_parameters": rope, "head_dim": 32}
    vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    if kind == "qwen3_vl":
        return Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    text |= {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,  # vLLM reloads no expert whose size its kernels pad
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)


def save(kind, folder, tied=True, seed=0, vocab=200):
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config(kind, tied, vocab), dtype=torch.float32)
    for p in model.parameters():  # every tensor must matter: no norms of 1, no biases of 0
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return str(folder)


def settings(path, **more):
    """A run's settings, as the modules take them."""
    plain = {"model": path, "dtype": "float32", "engine": "torch"}
    return SimpleNamespace(**{**train_grpo.defaults, **plain, **more})


def processor(kind):
    """What data.patches needs to know of a model."""
    return SimpleNamespace(
        patch=14 if kind == "qwen2_5_vl" else 16, merge=2, temporal=2, mean=[0.5] * 3, std=[0.5] * 3
    )


def groups(processor, seed=0):
    """Three groups: one image, two different images, none; responses of unequal lengths."""
    rng = np.random.default_rng(seed)
    factor = processor.patch * processor.merge
    words = lambda n: rng.integers(10, 200, n).tolist()  # noqa: E731
    made = []
    for sizes, lengths in (([(2, 3)], [17, 1, 24]), ([(2, 2), (4, 2)], [5, 9]), ([], [4, 9, 2])):
        ids, grid, images = words(5), [], []
        for height, width in sizes:  # in image tokens
            ids += [VISION_START, *[IMAGE] * (height * width), VISION_END]
            grid.append((1, 2 * height, 2 * width))
            images.append(
                rng.integers(0, 256, (height * factor, width * factor, 3), dtype=np.uint8)
            )
        made.append(
            {
                "ids": ids + words(6),
                "grid": grid,
                "images": images,
                "responses": [
                    {"ids": words(n), "logprobs": [0.0] * n, "advantage": 0.0} for n in lengths
                ],
            }
        )
    return made


def dense_mask(segments):
    """(1, 1, T, T) boolean mask of a packed row: what each token may see."""
    piece, prompt = [], []  # of each token: the piece it is in, the prompt that it may see
    for length, responses in segments:
        first = len(set(piece))
        for i, n in enumerate([length, *responses]):
            piece += [first + i] * n
            prompt += [first] * n
    piece, prompt = torch.tensor(piece), torch.tensor(prompt)
    causal = torch.ones(len(piece), len(piece), dtype=torch.bool).tril()
    return (causal & ((piece[:, None] == piece) | (prompt[:, None] == piece)))[None, None]
