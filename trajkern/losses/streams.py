"""Terms of the policy loss that have weights and a normaliser of their own: cross-entropy and KL of chosen tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from trajkern.losses.kinds import KL_ESTIMATORS, LOG_RATIO_BOUND

_ROW = 1024  # numbers that one thread adds up, so that no sum depends on how many there are


class Streams(NamedTuple):
    """What the terms read beside the policy's log-probs; without their weights they are not there."""

    supervised_weights: Tensor | None = None  # [T]
    supervised_normalizer: Tensor | None = None  # []
    kl_weights: Tensor | None = None  # [T]
    kl_normalizer: Tensor | None = None  # []
    ref_logprobs: Tensor | None = None  # [T], of the KL
    kl: int = 0  # its estimator, of KL_ESTIMATORS
    kl_coef: float = 0.0

    @property
    def given(self) -> bool:
        return self.supervised_weights is not None or self.kl_weights is not None

    def joined(self, mask: Tensor | None) -> Tensor | None:
        """The tokens of ``mask`` and of the terms, ``[T]``; None: all."""
        if mask is not None:
            for weights in (self.supervised_weights, self.kl_weights):
                mask = mask if weights is None else mask | (weights != 0)
        return mask


class StreamTerms(NamedTuple):
    loss: Tensor  # []
    grad_logprobs: Tensor  # [T]
    values: Tensor  # [2], as STREAM_METRICS; NaN where there is no such term


STREAM_METRICS = ("kl", "supervised_loss")


def stream_terms(streams: Streams, logprobs: Tensor) -> StreamTerms:
    """The terms' sum, and its gradient in the log-probs; no other token's log-prob is read."""
    loss, grad = logprobs.new_zeros(()), torch.zeros_like(logprobs)
    values = [logprobs.new_full((), torch.nan)] * len(STREAM_METRICS)
    if streams.kl_weights is not None:
        assert streams.ref_logprobs is not None and streams.kl_normalizer is not None
        weights, unit = _units(streams.kl_weights, streams.kl_normalizer)
        apart = torch.where(weights != 0, logprobs - streams.ref_logprobs, 0)
        kl, slope = _kl(KL_ESTIMATORS[streams.kl], apart)
        values[0] = _sum(weights * kl) * unit
        loss, grad = loss + streams.kl_coef * values[0], grad + streams.kl_coef * unit * weights * slope
    if streams.supervised_weights is not None:
        assert streams.supervised_normalizer is not None
        weights, unit = _units(streams.supervised_weights, streams.supervised_normalizer)
        values[1] = -_sum(weights * torch.where(weights != 0, logprobs, 0)) * unit
        loss, grad = loss + values[1], grad - unit * weights
    return StreamTerms(loss, grad, torch.stack(values))


def with_streams(streams: Streams, logprobs: Tensor, results: list[Tensor]) -> list[Tensor]:
    """[loss, metrics, the gradients asked for] of a policy loss with the terms added, theirs behind the metrics."""
    loss, metrics, *grads = results
    found = stream_terms(streams, logprobs)
    if grads:
        grads[0] += found.grad_logprobs
    return [loss + found.loss, torch.cat((metrics, found.values)), *grads]


def _units(weights: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, and 1 / the normaliser; where it is not positive NaN, but 0 where no token has a weight."""
    bad = torch.where((weights != 0).any(), torch.nan, 0.0).to(weights.dtype)
    return weights, torch.where(normalizer > 0, 1 / normalizer, bad)


def _kl(estimator: str, d: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate of KL(policy || reference) from the log-ratio, and its derivative in it."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return 0.5 * d * d, d
    if estimator == "k3":
        bounded = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        excess = torch.expm1(-bounded)
        return excess + bounded, torch.where(d.abs() <= LOG_RATIO_BOUND, -excess, 0)
    raise AssertionError(f"no estimator of a stream: {estimator!r}")


def _sum(x: Tensor) -> Tensor:
    """The same bits for any number of threads."""
    return pad(x, (0, -x.shape[0] % _ROW)).view(-1, _ROW).sum(1).sum()
