"""loss.py against hand-computed numbers and plain scalar code."""

import itertools
import math

import pytest
import torch

import loss


@pytest.mark.parametrize("size", [5, 8])
def test_equal_rewards_give_exactly_zero(size):
    """All 16 values that the four-part reward can take; float32 rounding once gave -0.056."""
    values = [
        0.9 * (0.575 * j + 0.375 * e + 0.05 * m) + 0.1 * f
        for j, e, m, f in itertools.product((0, 1), repeat=4)
    ]
    rewards = torch.tensor(values)[:, None].expand(-1, size)
    assert (loss.group_advantages(rewards) == 0).all()


def test_advantages_by_hand():
    got = loss.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))[0]
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # n - 1
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (std + 1e-6)
    torch.testing.assert_close(got, expected)


def test_groups_do_not_mix():
    rewards = torch.tensor([[1.0, 0.0], [10.0, 20.0]])
    both = loss.group_advantages(rewards)
    assert torch.equal(both, torch.cat([loss.group_advantages(r[None]) for r in rewards]))


def scalar_loss(kind, logprobs, old, advantage, low=0.2, high=0.3, dual=3.0):
    """One response, token by token, as the papers write it. Value only."""
    ratios = [math.exp(a - b) for a, b in zip(logprobs, old)]
    if kind == "gspo":
        ratios = [math.exp(sum(a - b for a, b in zip(logprobs, old)) / len(old))] * len(old)
    losses = []
    for ratio, logprob in zip(ratios, logprobs):
        clipped = min(max(ratio, 1 - low), 1 + high)
        if kind == "cispo":
            losses.append(-clipped * advantage * logprob)
            continue
        gain = min(ratio * advantage, clipped * advantage)
        losses.append(-(max(gain, dual * advantage) if advantage < 0 else gain))
    return losses


@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("advantage", [0.7, -1.3])
def test_loss_equals_scalar_code(kind, advantage):
    torch.manual_seed(0)
    logprobs, old = -torch.rand(2, 6) * 4, -torch.rand(2, 6) * 4
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    got, _ = loss.policy_loss(logprobs, old, torch.full((2, 1), advantage), mask, kind)
    for b, length in enumerate((6, 3)):
        expected = scalar_loss(
            kind, logprobs[b, :length].tolist(), old[b, :length].tolist(), advantage
        )
        torch.testing.assert_close(got[b, :length], torch.tensor(expected))


def gradient(kind, log_ratio, advantage):
    old = torch.tensor([[-1.0]])
    logprobs = (old + log_ratio).requires_grad_()
    got, clipped = loss.policy_loss(
        logprobs, old, torch.tensor([[advantage]]), torch.ones(1, 1), kind
    )
    (grad,) = torch.autograd.grad(got.sum(), logprobs)
    return grad.item(), {k for k, v in clipped.items() if v.item()}


def test_where_the_gradient_is_cut():
    assert gradient("grpo", math.log(1.25), 1.0) == (pytest.approx(-1.25), set())
    assert gradient("grpo", math.log(1.4), 1.0) == (0, {"high"})
    assert gradient("grpo", math.log(0.7), -1.0) == (0, {"low"})
    assert gradient("grpo", math.log(0.7), 1.0) == (pytest.approx(-0.7), set())
    assert gradient("grpo", math.log(2.5), -1.0) == (pytest.approx(2.5), set())
    assert gradient("grpo", math.log(3.5), -1.0) == (0, {"dual"})
    # CISPO clips the weight, never the gradient.
    assert gradient("cispo", math.log(1.4), 1.0) == (pytest.approx(-1.3), {"high"})


def test_gspo_gradient_flows_through_each_token():
    """Every token gets ratio * advantage / length of the sequence objective's gradient."""
    old = -torch.ones(1, 4)
    logprobs = (old + torch.tensor([[0.1, -0.05, 0.02, 0.03]])).requires_grad_()
    got, _ = loss.policy_loss(logprobs, old, torch.tensor([[2.0]]), torch.ones(1, 4), "gspo")
    (grad,) = torch.autograd.grad(got.sum(), logprobs)
    ratio = math.exp(0.1 / 4)
    torch.testing.assert_close(grad, torch.full((1, 4), -2.0 * ratio))


def test_padding_does_not_reach_the_gspo_ratio():
    mask = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    old = torch.zeros(1, 3)
    a, _ = loss.policy_loss(torch.tensor([[0.1, 0.1, 5.0]]), old, torch.ones(1, 1), mask, "gspo")
    b, _ = loss.policy_loss(torch.tensor([[0.1, 0.1, 0.0]]), old, torch.ones(1, 1), mask, "gspo")
    torch.testing.assert_close(a[:, :2], b[:, :2])


def test_kl_is_k3():
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -1.5]])
    expected = torch.tensor([[0.0, math.exp(0.5) - 0.5 - 1]])
    torch.testing.assert_close(loss.kl_penalty(logprobs, ref), expected)


@pytest.mark.parametrize(
    "loss_mean, expected",
    [
        ("token", [[0.2, 0.2, 0.2, 0.2], [0.2, 0, 0, 0]]),
        ("sequence", [[0.125] * 4, [0.5, 0, 0, 0]]),
    ],
)
def test_weights_sum_to_one_over_the_update(loss_mean, expected):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    weights = loss.token_weights(mask, loss_mean, tokens=5, responses=2)
    torch.testing.assert_close(weights, torch.tensor(expected))
