"""Sampling responses. Engine "torch": a plain unsharded copy of the model in PyTorch, for the CPU
and for teaching. It needs no collective while it samples, so ranks may finish at different times.

An engine is filled by sync() with the trainer's weights and asked by generate(), which yields each
group as soon as its last response is done."""

from types import SimpleNamespace

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, GenerationConfig


def load(cfg, device, patches):
    """An engine with random weights, so that a tensor which sync() forgets shows up in engine_gap.

    cfg: .model (folder or hub id), .dtype, .engine_args (max_num_seqs, responses decoded at once).
    patches: function from a list of images to their (patches, C) pixels. Returns .model, .stop_ids
    (they end a response) and .banned (never sampled: image tokens without an image)."""
    args = {"max_num_seqs": 128} | cfg.engine_args
    if len(args) > 1 or type(args["max_num_seqs"]) is not int:
        raise ValueError(f"engine_args={cfg.engine_args}: give max_num_seqs, a whole number, only")
    config = AutoConfig.from_pretrained(cfg.model)
    stop_ids = GenerationConfig.from_pretrained(cfg.model).eos_token_id  # OSError: no such file
    if stop_ids is None:
        raise ValueError(f"generation_config.json of {cfg.model} has no eos_token_id, so what ends "
                         "a response is unknown: copy it from the base model")
    banned = [getattr(config, f"{name}_token_id")
              for name in ("image", "video", "vision_start", "vision_end")]
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, cfg.dtype))
    return SimpleNamespace(
        model=model.requires_grad_(False).eval(), device=device, patches=patches, banned=banned,
        stop_ids={stop_ids} if isinstance(stop_ids, int) else set(stop_ids), **args)


@torch.no_grad()
def sync(engine, named_weights):
    """Copy every weight of the trainer; raises ValueError naming those that did not come."""
    missing = dict(engine.model.state_dict())
    for name, weight in named_weights:
        missing.pop(name).copy_(weight)
    if missing:
        raise ValueError(f"{len(missing)} weights were not sent: {', '.join(sorted(missing)[:5])}")


def generate(engine, prompts, **sampling):
    """Yield (index of the prompt, responses) when the prompt's last response is done.

    prompts: dicts with ids (prompt token ids, images expanded), images ((h, w, 3) uint8 arrays),
    grid (their (1, h, w) in patches) and seed. sampling: group_size, temperature (0: greedy),
    max_tokens, top_p. Response i draws from generator(seed + i), whatever else is in the batch.
    responses: group_size dicts of ids, logprobs (of the distribution sampled from: at this
    temperature, or 1 if greedy, banned ids excluded) and finish_reason ("stop", its stop id
    included, or "length" after max_tokens)."""
    wave = max(1, engine.max_num_seqs // sampling["group_size"])
    for first in range(0, len(prompts), wave):
        for i, responses in _decode(engine, prompts[first : first + wave], **sampling):
            yield first + i, responses


@torch.no_grad()
def _decode(engine, prompts, *, group_size, temperature, max_tokens, top_p=1.0):
    """generate() for as many prompts as are decoded together. B = live responses."""
    cache, mask, position, logits = _prefill(engine, prompts, group_size)
    generators = [torch.Generator().manual_seed(p["seed"] + i) for p in prompts
                  for i in range(group_size)]
    uniform = torch.stack([torch.rand(max_tokens, generator=g, dtype=torch.float64)
                           for g in generators])
    responses = [{"ids": [], "logprobs": [], "finish_reason": None} for _ in generators]
    unfinished = [group_size] * len(prompts)
    live = torch.arange(len(responses))  # the response in each row of the batch
    for t in range(max_tokens):
        tokens, logprobs = _sample(logits, uniform[live, t].to(logits.device), engine.banned,
                                   temperature, top_p)
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            response = responses[live[row]]
            if response["finish_reason"]:
                continue
            response["ids"].append(token)
            response["logprobs"].append(logprob)
            if token in engine.stop_ids or t == max_tokens - 1:
                response["finish_reason"] = "stop" if token in engine.stop_ids else "length"
                group = int(live[row]) // group_size
                unfinished[group] -= 1
                if not unfinished[group]:
                    yield group, responses[group * group_size : (group + 1) * group_size]
        if not any(unfinished):
            return
        going = torch.tensor([not responses[i]["finish_reason"] for i in live])
        if going.sum() <= len(live) // 2:  # drop finished rows; rarely, for it copies the cache
            keep = going.to(logits.device)
            cache = DynamicCache([(layer.keys[keep], layer.values[keep]) for layer in cache.layers])
            live, mask, position, tokens = live[going], mask[keep], position[keep], tokens[keep]
        mask = pad(mask, (0, 1), value=1)
        # Given a 2-D mask, row 0 (text positions) is not used; rows 1-3 are mRoPE.
        hidden = engine.model.model(
            input_ids=tokens[:, None], position_ids=(position + t).expand(4, -1)[..., None],
            attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
        logits = engine.model.lm_head(hidden[:, -1])


def _prefill(engine, prompts, group_size):
    """Each prompt once, alone; its keys and values are padded on the left and shared by expansion.
    Returns the cache, mask (B, longest prompt), next mRoPE positions (B,) and logits (B, V)."""
    model, layers, positions, logits = engine.model, [], [], []
    for prompt in prompts:
        ids, images = torch.tensor([prompt["ids"]], device=engine.device), {}
        if prompt["images"]:
            images = {"pixel_values": engine.patches(prompt["images"]),
                      "image_grid_thw": torch.tensor(prompt["grid"], device=engine.device)}
        mrope, _ = model.model.get_rope_index(ids, (ids == model.config.image_token_id).int(),
                                              image_grid_thw=images.get("image_grid_thw"))
        out = model.model(input_ids=ids, position_ids=mrope, use_cache=True,
                          past_key_values=DynamicCache(config=model.config), **images)
        layers.append([(layer.keys, layer.values) for layer in out.past_key_values.layers])
        positions.append(mrope.max() + 1)
        logits.append(model.lm_head(out.last_hidden_state[:, -1]))
    longest = max(len(p["ids"]) for p in prompts)
    cache = DynamicCache([tuple(  # each (1, kv heads, L, D) -> (B, kv heads, longest, D)
        torch.cat([pad(x, (0, 0, longest - x.shape[2], 0)).expand(group_size, -1, -1, -1)
                   for x in side]) for side in zip(*layer)) for layer in zip(*layers)])
    mask = [[0] * (longest - len(p["ids"])) + [1] * len(p["ids"]) for p in prompts]
    return cache, *(x.repeat_interleave(group_size, 0) for x in (
        torch.tensor(mask, device=engine.device), torch.stack(positions), torch.cat(logits)))


def _sample(logits, uniform, banned, temperature, top_p):
    """(B,) tokens and their log-probs from (B, V) logits, by one uniform number (B,) each."""
    logits = logits.float() / (temperature or 1.0)
    logits[:, banned] = -torch.inf
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p  # the most likely token always stays
        logits = logits.masked_fill(outside.gather(1, order.argsort(-1)), -torch.inf)
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    tokens = tokens if temperature else logprobs.argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
