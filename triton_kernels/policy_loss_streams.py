"""The terms of the policy loss whose tokens have weights of their own: a cross-entropy, and a KL in the mask's place.

Their sums are formed with a piece's; their gradients with the second launch, which knows what they are divided by.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .policy_loss_terms import kl_term


class Streams(NamedTuple):
    """Pointers to what the terms read, [T]: of a term that is not there the weights are None."""

    logprobs: tl.tensor | None
    ref_logprobs: tl.tensor | None
    supervised_weights: tl.tensor | None
    kl_weights: tl.tensor | None


class Units(NamedTuple):
    """What each term's sum is multiplied with, and the KL in the loss."""

    supervised: tl.tensor
    kl: tl.tensor
    kl_coef: tl.tensor


@triton.jit
def supervised_terms(streams, at, inside):
    """How many tokens have a weight, and the weighted log-probs."""
    weight = tl.load(streams.supervised_weights + at, mask=inside, other=0.0)
    taken = weight != 0
    return tl.sum(taken.to(tl.int32), 0), weight * tl.load(streams.logprobs + at, mask=taken, other=0.0)


@triton.jit
def _weighted_kl(streams, at, inside, KL: tl.constexpr):
    """Which tokens have a weight; the weighted estimates, and their derivatives in log p: 0 for the others."""
    tl.static_assert(KL != "k3_corrected", "only tokens of the mask have a ratio")
    weight = tl.load(streams.kl_weights + at, mask=inside, other=0.0)
    taken = weight != 0
    d = tl.load(streams.logprobs + at, mask=taken, other=0.0)
    d -= tl.load(streams.ref_logprobs + at, mask=taken, other=0.0)
    value, _, slope = kl_term(d, d, KL)
    return taken, weight * value, weight * slope


@triton.jit
def kl_terms(streams, at, inside, KL: tl.constexpr):
    """How many tokens have a weight, and the weighted estimates."""
    taken, value, _ = _weighted_kl(streams, at, inside, KL)
    return tl.sum(taken.to(tl.int32), 0), value


@triton.jit
def stream_slopes(streams, units, at, inside, KL: tl.constexpr, BLOCK: tl.constexpr):
    """The terms' derivatives in log p; a token without a weight has none, whatever the unit."""
    slope = tl.zeros([BLOCK], tl.float32)
    if streams.kl_weights is not None:
        taken, _, each = _weighted_kl(streams, at, inside, KL)
        slope += tl.where(taken, units.kl_coef * units.kl * each, 0.0)
    if streams.supervised_weights is not None:
        weight = tl.load(streams.supervised_weights + at, mask=inside, other=0.0)
        slope -= tl.where(weight != 0, units.supervised * weight, 0.0)
    return slope
