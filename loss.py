"""The mathematics of group-relative policy optimisation, on padded tensors; needs torch only.
P prompts, G responses to each, B responses, T response tokens (padded on the right)."""
import torch


def group_advantages(rewards):
    """(P, G) rewards -> (P, G) advantages (r - mean) / (std + 1e-6), std with n - 1.
    GRPO, arXiv 2402.03300 eq. 3. Exactly 0 where a group's rewards differ by less than 1e-6: the
    mean's rounding over a std of 1e-7 would push equal responses (-0.056 for five of 0.955)."""
    rewards = rewards.double()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    equal = rewards.amax(1) - rewards.amin(1) < 1e-6
    return advantages.masked_fill(equal[:, None], 0.0).float()

def policy_loss(logprobs, old_logprobs, advantages, mask, kind="grpo",
                clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_dual=3.0):
    """Per-token loss (B, T), to be minimised, and where it was clipped. logprobs, old_logprobs and
    mask: (B, T); advantages: (B, 1). `kind`:
    - "grpo": PPO's clipped ratio, arXiv 1707.06347 eq. 7, with a higher upper bound (DAPO, arXiv
      2503.14476 eq. 8) and, for negative advantages, a lower bound of the objective at
      clip_ratio_dual * A (dual clip, arXiv 1912.09729 eq. 5).
    - "gspo": the same with one ratio per response, the geometric mean of its tokens' ratios, whose
      gradient flows through each token (GSPO-token, arXiv 2507.18071 eq. 13-15).
    - "cispo": -A * logprob * stop_grad(clipped ratio): no token loses its gradient (MiniMax-M1,
      arXiv 2506.13585 eq. 4-5).
    Returns (loss, {"low", "high", "dual": (B, T) booleans: gradient, or cispo weight, clipped})."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    if kind == "gspo":
        mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.detach() + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    low, high = ratio < 1 - clip_ratio_low, ratio > 1 + clip_ratio_high
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    if kind == "cispo":
        loss = -advantages * logprobs * clipped.detach()
        return loss, {"low": low, "high": high, "dual": torch.zeros_like(low)}
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    ceiling = -advantages * clip_ratio_dual
    dual = (advantages < 0) & (loss > ceiling)
    loss = torch.where(dual, ceiling, loss)
    return loss, {"low": low & (advantages < 0), "high": high & (advantages > 0), "dual": dual}

def kl_penalty(logprobs, ref_logprobs):
    """Per-token estimate (B, T) of KL(policy || reference): exp(d) - d - 1, d = ref - policy (k3,
    arXiv 2402.03300 eq. 4): unbiased, never negative, 0 if both agree."""
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    return (difference.exp() - difference - 1).clamp(max=10)

def token_weights(mask, loss_mean, tokens, responses):
    """(B, T) weights that sum to 1 over all rows and ranks: tokens and responses are those of the
    *whole* update. "token": every token counts the same (DAPO, arXiv 2503.14476 eq. 12).
    "sequence": every response counts the same (GRPO, arXiv 2402.03300 eq. 3)."""
    if loss_mean == "token":
        return mask / max(tokens, 1)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(responses, 1)
