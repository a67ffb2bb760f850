"""Timing a kernel of one's own: beside trajkern's op, eager torch and a bare pass over the same numbers.

``compare`` first holds each function against the reference, since a wrong one has no time; then the calls take turns in
one process, so that a busy machine meets all of them alike. ``python examples/time_kernel.py`` times two ways to take a
token's log-prob, forward and backward, in half a minute. On one core of an AMD EPYC, of the second shape:

      trajkern              198 ms ± 17%   1.00 ×   peak 31.3 MiB
      log_softmax           518 ms ±  4%   2.62 ×   peak 93.7 MiB
      target - logsumexp    783 ms ±  7%   3.95 ×   peak 125 MiB
      wrong               not timed: logprobs is off by 1.9e+05 of its error budget, ...
      eager                 476 ms ±  4%   2.40 ×   peak 93.8 MiB
      bare pass             160 ms ±  8%   0.81 ×
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import bench


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def target_less_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    """Keeps one number a row instead of a matrix of log-probs."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """Quick, but not asked for: the log-prob of the likeliest token."""
    return logits.amax(-1) - logits.logsumexp(-1)


def main(shapes: tuple[tuple[int, int], ...] = ((64, 32_000), (256, 32_000)), seconds: float = 2.0) -> bench.Comparison:
    functions = {"log_softmax": log_softmax, "target - logsumexp": target_less_logsumexp, "wrong": wrong}
    found = bench.compare(functions, like="token_logprobs", shapes=shapes, dtype=torch.float32, seconds=seconds)
    print(found)
    return found


if __name__ == "__main__":
    main()
