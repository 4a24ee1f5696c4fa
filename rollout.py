"""Sampling responses: by vLLM in this process or by "torch", a plain unsharded copy of the model
for CPUs and for teaching. sync() fills an engine with the trainer's weights; generate() asks it."""
import itertools
import os
from types import SimpleNamespace

import torch
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, GenerationConfig

BANNED = "image_token_id video_token_id vision_start_token_id vision_end_token_id".split()

def load(cfg, device, patches):
    """An engine with random weights, so that a tensor which sync() forgets shows up in engine_gap.
    cfg: what is read below; .engine_args are any of vllm.LLM. patches: images -> (patches, C).
    Returns .stop_ids, .banned (never sampled), .version (the caller's own mark)."""
    config = AutoConfig.from_pretrained(cfg.model)
    stop_ids = GenerationConfig.from_pretrained(cfg.model).eos_token_id  # OSError: no such file
    if stop_ids is None:
        raise ValueError(f"generation_config.json of {cfg.model} has no eos_token_id, which ends a "
                         "response: copy it from the base model")
    engine = SimpleNamespace(
        llm=None, version=None, device=device, patches=patches, image_id=config.image_token_id,
        stop_ids={stop_ids} if isinstance(stop_ids, int) else set(stop_ids),
        banned=[getattr(config, name) for name in BANNED])
    if cfg.engine == "vllm":
        engine.llm = _start_vllm(cfg, device)
        return engine
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, cfg.dtype))
    engine.model = model.requires_grad_(False).eval()
    return engine

def _start_vllm(cfg, device):
    """vLLM in this process, one engine for each tensor_parallel consecutive ranks of torchrun."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
    import vllm
    length = cfg.max_prompt_tokens + cfg.max_response_tokens
    args = dict(
        model=cfg.model, dtype=cfg.dtype, load_format="dummy", max_model_len=length, seed=0,
        tensor_parallel_size=cfg.tensor_parallel, gpu_memory_utilization=cfg.gpu_memory_utilization,
        distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
        enable_sleep_mode=device.type == "cuda", logprobs_mode="processed_logprobs",
        max_num_batched_tokens=max(8192, length), mm_processor_cache_gb=0,
        # Images come in their final size. The limits must admit it, or they are resized once more.
        mm_processor_kwargs={"min_pixels": 1, "max_pixels": cfg.max_pixels},
        limit_mm_per_prompt={"image": cfg.max_prompt_tokens // 3, "video": 0})  # as many as fit
    # Mean and deviation of the pixels would be dummies, too, and no sync would ever send them.
    if "mm_device_do_normalize" in vllm.EngineArgs.__dataclass_fields__:
        args["mm_device_do_normalize"] = False
    if device.type == "cpu":
        args["enable_chunked_prefill"] = False  # seeded sampling crashes on chunks there
    try:
        return vllm.LLM(**args | cfg.engine_args)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"vLLM {vllm.__version__} does not start: {error}. Change engine_args="
                         f"{cfg.engine_args}, gpu_memory_utilization={cfg.gpu_memory_utilization}, "
                         f"tensor_parallel or the token limits (now {length})") from error

@torch.no_grad()
def sync(engine, named_weights):
    """Copy every weight of the trainer: (Hugging Face name, whole tensor), tied ones under each
    name. Wakes an engine that sleeps. RuntimeError: weights did not come; vLLM accepts that."""
    if not engine.llm:
        return engine.model.load_state_dict(dict(named_weights))
    llm, sleeps = engine.llm, engine.llm.llm_engine.is_sleeping()
    # vLLM reads experts in the published layout (E, in, out); transformers holds (E, out, in).
    weights = ((name, w.transpose(1, 2) if ".experts." in name and w.ndim == 3 else w)
               for name, w in named_weights)
    if sleeps:  # weights before the cache: both do not fit beside what a reload needs
        torch.cuda.empty_cache()  # what the update has left
        llm.wake_up(["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})  # more than once
    if sleeps:
        llm.wake_up(["kv_cache"])
    # Each of them would answer a known prompt or image with the old weights, or crash.
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()

def sleep(engine):
    """Give the engine's GPU memory to the trainer; its weights are gone until the next sync()."""
    if engine.llm and engine.device.type == "cuda":
        engine.llm.sleep(level=2)
        engine.version = None

def generate(engine, prompts, **sampling):
    """Yield (prompt, its responses) as soon as the last of these is done.
    prompts: iterable, read while the engine works: dicts of row, ids (images expanded), images
    ((h, w, 3) uint8), grid, seed. sampling: group_size, temperature (0: greedy), max_tokens, top_p.
    Response i draws from generator(seed + i), whatever else is in the batch. responses: dicts of
    ids, logprobs (as sampled; if greedy at temperature 1), finish_reason ("stop" or "length")."""
    yield from (_generate_vllm if engine.llm else _decode)(engine, prompts, **sampling)

def _generate_vllm(engine, prompts, *, group_size, temperature, max_tokens, top_p=1.0):
    """One pool, which refills itself as responses end. A few prompts join before each engine step,
    always at the same one: what is computed together depends on no clock."""
    from vllm import SamplingParams
    prompts, asked, vllm = iter(prompts), {}, engine.llm.llm_engine
    while True:
        for prompt in itertools.islice(prompts, 8):
            # vLLM expands an image's first pad itself: the others are left out
            ids = [t for last, t in zip([None, *prompt["ids"]], prompt["ids"])
                   if not t == last == engine.image_id]
            images = [Image.fromarray(image) for image in prompt["images"]]
            params = SamplingParams(
                n=group_size, seed=prompt["seed"], temperature=temperature, top_p=top_p,
                max_tokens=max_tokens, ignore_eos=True, stop_token_ids=sorted(engine.stop_ids),
                logit_bias=dict.fromkeys(engine.banned, -100.0), logprobs=0, detokenize=False)
            request = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
            name, = engine.llm.enqueue([request], [params], use_tqdm=False)
            asked[name.split("-")[0]] = prompt
        if not vllm.has_unfinished_requests():
            return
        for out in vllm.step():
            prompt = asked.pop(out.request_id)
            if out.prompt_token_ids != prompt["ids"]:
                raise RuntimeError(f"row {prompt['row']}: vLLM made {len(out.prompt_token_ids)} "
                                   f"tokens of its prompt, the trainer {len(prompt['ids'])}: "
                                   "engine_args or preprocessor_config.json resize images")
            yield prompt, [{"ids": list(c.token_ids), "finish_reason": c.finish_reason, "logprobs":
                            [step[t].logprob for t, step in zip(c.token_ids, c.logprobs)]}
                           for c in out.outputs]

@torch.no_grad()
def _decode(engine, prompts, *, group_size, temperature, max_tokens, top_p=1.0):
    """All prompts at once, until the last of the B responses is done."""
    if not (prompts := list(prompts)):
        return
    cache, mask, position, logits = _prefill(engine, prompts, group_size)
    generators = [torch.Generator().manual_seed(p["seed"] + i) for p in prompts
                  for i in range(group_size)]
    uniform = torch.stack([torch.rand(max_tokens, generator=g, dtype=torch.float64)
                           for g in generators]).to(logits.device)  # (B, max_tokens)
    responses = [{"ids": [], "logprobs": [], "finish_reason": None} for _ in generators]
    waiting = {i: responses[i * group_size : (i + 1) * group_size] for i in range(len(prompts))}
    for t in range(max_tokens):
        tokens, logprobs = _sample(logits, uniform[:, t], engine.banned, temperature, top_p)
        end = "length" if t == max_tokens - 1 else None
        for r, token, logprob in zip(responses, tokens.tolist(), logprobs.tolist()):
            if not r["finish_reason"]:
                r["ids"].append(token)
                r["logprobs"].append(logprob)
                r["finish_reason"] = "stop" if token in engine.stop_ids else end
        for i in [i for i, group in waiting.items() if all(r["finish_reason"] for r in group)]:
            yield prompts[i], waiting.pop(i)
        if not waiting:
            return
        mask = pad(mask, (0, 1), value=1)
        logits = engine.model(
            input_ids=tokens[:, None], position_ids=(position + t).expand(3, -1)[..., None],
            attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]

def _prefill(engine, prompts, group_size):
    """All prompts at once, padded on the left, each for the group_size responses to it. Returns the
    cache, mask (B, longest prompt), next mRoPE positions (B,) and logits (B, V)."""
    model, rows = engine.model, [torch.tensor(p["ids"]) for p in prompts]
    ids, mask = (pad_sequence(x, True, 0, "left").to(engine.device)
                 for x in (rows, [torch.ones_like(row) for row in rows]))
    images, grid = (sum((p[k] for p in prompts), []) for k in ("images", "grid"))
    pixels = {"pixel_values": engine.patches(images), "image_grid_thw": torch.tensor(
        grid, device=engine.device)} if images else {}
    mrope, _ = model.model.get_rope_index(  # (3, P, L)
        ids, (ids == engine.image_id).int(), pixels.get("image_grid_thw"), attention_mask=mask)
    out = model(input_ids=ids, attention_mask=mask, position_ids=mrope, use_cache=True,
                past_key_values=DynamicCache(config=model.config), logits_to_keep=1, **pixels)
    out.past_key_values.batch_repeat_interleave(group_size)
    return out.past_key_values, *(x.repeat_interleave(group_size, 0) for x in (
        mask, mrope.amax((0, 2)) + 1, out.logits[:, -1]))

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
