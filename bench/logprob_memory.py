"""Peak memory of the log-prob step: chunked head against full logits, forward and backward.

    python bench/logprob_memory.py [--tokens 4096] [--vocabulary 151936] [--hidden 1024]

In bf16, as models are trained. Each case runs in a process of its own; what counts is its peak
resident memory above that of the same tensors and gradients without any log-prob.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import policy

GOAL = 0.25


def full_logits(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).sum()


def chunked(hidden, weight, targets):
    return policy.token_logprobs(hidden, weight, targets, 1.0, [0])[0].sum()


def nothing(hidden, weight, targets):
    return hidden.sum() + weight.sum()


CASES = {"nothing": nothing, "full logits": full_logits, "chunked": chunked}


def measure(case, args):
    """Peak resident memory of this process in MB."""
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden).bfloat16().requires_grad_()
    weight = torch.randn(args.vocabulary, args.hidden).bfloat16().requires_grad_()
    CASES[case](hidden, weight, torch.randint(args.vocabulary, (args.tokens,))).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--case")
    args = parser.parse_args()
    if args.case:
        print(measure(args.case, args))
        return
    peaks = {
        case: float(
            subprocess.run(
                [sys.executable, *sys.argv, "--case", case],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for case in CASES
    }
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, bf16")
    for case in ("full logits", "chunked"):
        print(f"{case:12s} {peaks[case] - peaks['nothing']:8.0f} MB above the tensors themselves")
    ratio = (peaks["chunked"] - peaks["nothing"]) / (peaks["full logits"] - peaks["nothing"])
    print(f"peak memory, chunked / full: {ratio:.3f} (goal at most {GOAL})")
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
