"""Packed rows give the log-probs and gradients of one response at a time, on real architectures."""

import numpy as np
import pytest
import tiny_models
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText

import data
import policy

TEMPERATURE = 0.7
KINDS = ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"]


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory, process_group):
    """A sharded model, the same model from transformers, and groups scored by it one by one."""
    path = tiny_models.save(
        request.param, tmp_path_factory.mktemp(request.param), tied=request.param != "qwen3_vl_moe"
    )
    model = policy.load(tiny_models.settings(path), torch.device("cpu"))
    plain = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = tiny_models.processor(request.param)
    groups, expected, objective = tiny_models.groups(processor), {}, 0
    for g, group in enumerate(groups):
        for i, response in enumerate(group["responses"]):
            response["name"] = g, i
            expected[g, i] = alone(plain, processor, group, response["ids"])
            objective = objective + weigh(expected[g, i])
    objective.backward()
    return model, processor, groups, expected, {n: p.grad for n, p in plain.named_parameters()}


def alone(plain, processor, group, response):
    """Log-probs of a response by transformers' own forward: no packing, its own positions."""
    ids = torch.tensor([group["ids"] + response])
    images = {}
    if group["images"]:
        images = {
            "pixel_values": data.patches(group["images"], processor),
            "image_grid_thw": torch.tensor(group["grid"]),
            "mm_token_type_ids": (ids == tiny_models.IMAGE).int(),
        }
    logits = plain(input_ids=ids, use_cache=False, **images).logits[0].float() / TEMPERATURE
    logits[:, tiny_models.BANNED] = -torch.inf
    predicted = logits.log_softmax(-1)[len(group["ids"]) - 1 : -1]
    return predicted.gather(1, torch.tensor(response)[:, None])[:, 0]


def dense_attention(module, query, key, value, attention_mask, scaling, segments, **_):
    mask = tiny_models.dense_mask(segments)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def weigh(logprobs):
    return (logprobs * torch.linspace(1, 2, len(logprobs))).sum()  # no two tokens count the same


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "segments"])
@pytest.mark.parametrize("tokens_per_row", [1000, 48], ids=["one row", "split groups"])
def test_equals_one_response_at_a_time(case, dense, tokens_per_row, monkeypatch):
    model, processor, groups, expected, gradients = case
    rows = policy.build_rows(model, groups, tokens_per_row)
    assert max(r["input_ids"].shape[1] for r in rows) <= tokens_per_row
    if tokens_per_row == 48:
        assert sum(m["name"][0] == 0 for m in rows[0]["members"]) < 3  # the first group is split
    seen = set()
    for row in rows:
        with monkeypatch.context() as patched:
            if dense:  # the same row by one big mask
                patched.setitem(AttentionInterface._global_mapping, "packed", dense_attention)
            logprobs, _ = policy.logprobs(
                model, row, data.patches(row["images"], processor), TEMPERATURE, tiny_models.BANNED
            )
        objective = 0
        for b, response in enumerate(row["members"]):
            ours, name = logprobs[b][row["mask"][b]], response["name"]
            torch.testing.assert_close(ours, expected[name], atol=1e-5, rtol=0)
            objective = objective + weigh(ours)
            seen.add(name)
        objective.backward()
    assert seen == set(expected)
    for name, p in model.named_parameters():
        ours, theirs = p.grad.full_tensor(), gradients[name]
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
    model.zero_grad()


def test_entropy_is_that_of_the_sampling_distribution(process_group):
    hidden, head = torch.randn(5, 8), torch.randn(20, 8)
    _, entropy = policy.token_logprobs(hidden, head, torch.arange(6, 11), 0.5, [1, 2])
    logits = hidden @ head.T / 0.5
    logits[:, [1, 2]] = -torch.inf
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


def test_chunks_of_logits_change_nothing(monkeypatch):
    hidden, head = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(7) + 3
    whole, _ = policy.token_logprobs(hidden, head, targets, 0.5, [1])
    expected = torch.autograd.grad(weigh(whole), [hidden, head])
    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", 40)  # two positions at a time
    chunked, _ = policy.token_logprobs(hidden, head, targets, 0.5, [1])
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(weigh(chunked), [hidden, head]), expected)


def test_a_row_without_images_touches_every_weight(case):
    """Under FSDP a rank whose row has no image must still run the vision tower's collectives."""
    model, processor, groups, _, _ = case
    text_only = next(g for g in groups if not g["images"])
    row = policy.build_rows(model, [text_only], 1000)[0]
    logprobs, _ = policy.logprobs(
        model, row, data.patches(row["images"], processor), 1.0, tiny_models.BANNED
    )
    logprobs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    vision = model.model.visual.blocks[0].parameters()
    assert all(p.grad.full_tensor().abs().max() == 0 for p in vision)
    model.zero_grad()


def test_a_response_that_fits_no_row_is_refused(case):
    model, _, groups, _, _ = case
    with pytest.raises(ValueError, match="tokens_per_micro_batch = 20"):
        policy.build_rows(model, groups, 20)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_work(case, world):
    """Each response once, rows of about the same size, as many on each rank, images of its own."""
    model, _, groups, _, _ = case
    groups = [g | {"name": i, "responses": [r | {"name": (i, j)} for j, r in enumerate(
        g["responses"])]} for i, g in enumerate(groups * 4)]
    loaded, members, sizes, counts = [], [], [], set()
    for rank in range(world):
        mine = []
        rows = policy.build_rows(model, [g | {"images": None} for g in groups], 150, rank, world,
                                 lambda g, mine=mine: mine.append(g["name"]) or groups[g["name"]])
        members += [m["name"] for row in rows for m in row["members"] if m["ids"]]
        sizes += [row["input_ids"].numel() for row in rows if row["targets"].numel()]
        counts.add(len(rows))
        loaded.append({*mine})
    assert len(counts) == 1 and max(sizes) <= 150
    assert sorted(members) == sorted(r["name"] for g in groups for r in g["responses"])
    if world < 8:
        assert min(sizes) > 0.6 * max(sizes)
    for one in loaded:
        assert world == 1 or len(one) < len(groups)


def test_a_rank_without_work_has_a_row_that_teaches_nothing(case):
    """It runs all that the others run, forward and backward, or FSDP's collectives would hang."""
    model, processor, groups, _, _ = case
    [row] = policy.build_rows(model, groups[:1], 1000, rank=1, world=2)
    assert row["input_ids"].numel() == 1 and len(row["images"]) == 1 and not row["targets"].numel()
    got, entropy = policy.logprobs(model, row, data.patches(row["images"], processor), 1.0,
                                   tiny_models.BANNED)
    assert got.shape == entropy.shape == row["mask"].shape == row["logprobs"].shape == (1, 0)
    got.sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    for p in model.parameters():
        p.grad = None
    [row] = policy.build_rows(model, groups[:1], 1000, rank=0, world=2)
    assert row["targets"].numel()


def test_rows_are_filled_across_groups(case):
    model, _, groups, _, _ = case
    rows = policy.build_rows(model, groups * 4, 1000)
    tokens = [r["input_ids"].shape[1] for r in rows]
    assert len(rows) == 1 and tokens[0] == sum(
        len(g["ids"]) + sum(len(r["ids"]) for r in g["responses"]) for g in groups * 4
    )


def test_position_of_a_response_follows_the_prompt(case):
    """mRoPE goes on at max + 1: an image advances it by its longer side, not by its tokens."""
    model, _, groups, _, _ = case
    group = groups[0]
    row = policy.build_rows(model, [group], 1000)[0]
    first = len(group["ids"])
    mrope = row["position_ids"][1:, 0]
    assert mrope[:, first].tolist() == [int(mrope[:, :first].max()) + 1] * 3
    second = first + len(group["responses"][0]["ids"])
    assert (row["position_ids"][:, 0, second] == row["position_ids"][:, 0, first]).all()
    assert int(mrope[:, first].max()) < row["position_ids"][0, 0, first] or not group["images"]


def test_patches_of_two_images_do_not_mix(case):
    """Swapping two different images of a prompt must change its log-probs."""
    model, processor, groups, _, _ = case
    group = next(g for g in groups if len(g["images"]) == 2)
    same_size = group | {"images": [group["images"][0], np.zeros_like(group["images"][1])]}

    def score(one):
        row = policy.build_rows(model, [one], 1000)[0]
        with torch.no_grad():
            return policy.logprobs(
                model, row, data.patches(row["images"], processor), 1.0, tiny_models.BANNED
            )[0]

    assert (score(group) - score(same_size)).abs().max() > 1e-3


def varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """varlen_attn's contract, sequence by sequence: (T, heads, D) each, causal mask aligned to the
    bottom right."""
    assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k)) and q.shape[1] == k.shape[1]
    out = []
    for i in range(len(cu_q) - 1):
        one, two, three = q[cu_q[i]:cu_q[i + 1]], k[cu_k[i]:cu_k[i + 1]], v[cu_k[i]:cu_k[i + 1]]
        scores = torch.einsum("qhd,khd->hqk", one, two) * scale
        causal = torch.ones(len(one), len(two), dtype=torch.bool).tril(len(two) - len(one))
        weights = scores.masked_fill(~causal, -1e30).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, three))
    return torch.cat(out)


def test_one_call_of_flash_attention_equals_the_dense_mask(monkeypatch):
    """What a GPU computes, with the kernel's contract in PyTorch: sequences, starts, heads."""
    torch.manual_seed(0)
    segments = [(5, [3, 1, 4]), (1, []), (2, [6])]
    tensors = [torch.randn(1, heads, 22, 8, requires_grad=True) for heads in (4, 2, 2)]

    def result(attention):
        out, _ = attention(None, *tensors, None, scaling=0.3, segments=segments)
        return out, *torch.autograd.grad((out * torch.arange(8)).sum(), tensors)

    expected = result(dense_attention)
    by_sequence = result(policy.packed_attention)
    called = []
    monkeypatch.setattr(policy, "FLASH", {("cpu", torch.float32)})
    monkeypatch.setattr(policy, "varlen_attn",
                        lambda *a, **k: called.append(a) or varlen_reference(*a, **k))
    for got in (by_sequence, result(policy.packed_attention)):
        for ours, theirs in zip(got, expected):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(called) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_attention_on_a_gpu_equals_the_dense_mask():
    segments = [(50, [30, 10, 40]), (1, []), (20, [60])]
    q, k, v = (torch.randn(1, heads, 211, 64) for heads in (4, 2, 2))
    exact, _ = dense_attention(None, q, k, v, None, 0.125, segments)
    flash, _ = policy.packed_attention(None, *(x.bfloat16().cuda() for x in (q, k, v)), None,
                                       0.125, segments)
    torch.testing.assert_close(flash.float().cpu(), exact, atol=0.03, rtol=0.03)
