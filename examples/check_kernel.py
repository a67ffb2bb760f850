"""Checking a kernel of one's own: three ways to take a token's log-prob, held against the float64 reference.

``check`` calls a function with an op's arguments, over the cases on which such kernels break: probabilities near 1,
common offsets, the range of fp16, strides, empty batches. These three take no temperature and no mask, so cases that
give one are skipped (``ignore_options=True``). ``python examples/check_kernel.py`` prints what is wrong with the first
two, and the smallest case that shows it as code to paste:

    == log_of_softmax: fails
      float32   FAIL 6 of 37 cases fail
    == log_softmax: fails
      float32   FAIL 4 of 37 cases fail, worst 5.62e+06 times its budget
    == without_the_target: passes
      float32   ok   37 cases pass, worst 0.929 times its budget
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern.testing import check


def log_of_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """A probability that rounds to 0 has no logarithm."""
    return logits.float().softmax(-1).gather(-1, targets[..., None])[..., 0].log()


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Finite everywhere, but a log-prob near 0 is the difference of two large numbers."""
    return logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def without_the_target(logits: Tensor, targets: Tensor) -> Tensor:
    """log p = -log(1 + sum of e^(logit - the target's) over the others): nothing small comes from something large."""
    wide, at = logits.float(), targets[..., None]
    above = (wide - wide.gather(-1, at)).scatter(-1, at, -torch.inf)  # how far the others are above the target
    most = above.detach().amax(-1).clamp_min(0)  # taken out of the sum, which could overflow, and added again
    return -(most + torch.log1p((above - most[..., None]).exp().sum(-1) + torch.expm1(-most)))


def main(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)) -> dict[str, bool]:
    passed = {}
    for function in (log_of_softmax, log_softmax, without_the_target):
        results = check(function, like="token_logprobs", ignore_options=True, dtypes=dtypes)
        passed[function.__name__] = results.passed
        print(f"\n== {function.__name__}: {'passes' if results.passed else 'fails'}\n{results}")
    return passed


if __name__ == "__main__":
    main()
