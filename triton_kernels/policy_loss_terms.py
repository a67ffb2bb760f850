"""The policy loss of one token: what it reads, its value, its derivatives and its metrics.

Forms, KL estimators and sampler corrections are compile-time strings: the names in :mod:`trajkern.losses.kinds`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from trajkern.losses import kinds

from .policy_loss_forms import Term, Token, form_term
from .primitives import KEEP_NAN, exp, exp_excess, expm1

LOG_RATIO_BOUND = tl.constexpr(kinds.LOG_RATIO_BOUND)


class Pack(NamedTuple):
    """Pointers to what the loss reads, [T]; an optional one may be None."""

    logprobs: tl.tensor
    old_logprobs: tl.tensor
    advantages: tl.tensor  # [N] or [T], or a branch's six rows of them
    stride: tl.tensor  # of those rows
    mask: tl.tensor | None
    ref_logprobs: tl.tensor | None
    sampler_logprobs: tl.tensor | None
    entropy: tl.tensor | None
    selected: tl.tensor | None


class Place(NamedTuple):
    """A program's tokens, [BLOCK]."""

    at: tl.tensor
    n: tl.tensor  # their trajectories
    keep: tl.tensor  # which take part


class Coefficients(NamedTuple):
    kl: tl.tensor
    entropy: tl.tensor
    sampler_low: tl.tensor
    sampler_high: tl.tensor


class TokenLoss(NamedTuple):
    """A token's loss, its derivatives, its metrics, [BLOCK]."""

    value: tl.tensor
    slope: tl.tensor  # in its own log p
    mean_slope: tl.tensor  # in the trajectory's mean
    share: tl.tensor  # whether that mean moves with its log p
    clipped: tl.tensor  # the rollouts whose ratio is clipped
    below: tl.tensor  # of them those at a bound of the ratio's below 1
    above: tl.tensor  # and above
    log_ratio: tl.tensor  # its own, clamped
    ratio: tl.tensor
    entropy: tl.tensor
    kl: tl.tensor
    leaves: tl.tensor  # what weighs its KL and entropy
    log_w: tl.tensor  # of the old policy's ratio to the sampler


@triton.jit
def clamp_log_ratio(d):
    return tl.clamp(d, -LOG_RATIO_BOUND, LOG_RATIO_BOUND, KEEP_NAN)


@triton.jit
def load_log_ratio(x, y, at, keep):
    return clamp_log_ratio(tl.load(x + at, mask=keep, other=0.0) - tl.load(y + at, mask=keep, other=0.0))


@triton.jit
def load_advantage(advantages, place, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        a = tl.load(advantages + place.at, mask=place.keep, other=0.0)
    else:
        a = tl.load(advantages + place.n, mask=place.keep, other=0.0)
    return a


@triton.jit
def load_mask(mask, at, inside):
    keep = inside
    if mask is not None:
        keep = tl.load(mask + at, mask=inside, other=0) != 0
    return keep


@triton.jit
def load_rollouts(branch, stride, place, PER_TOKEN: tl.constexpr):
    """How many of the rollouts that share a token have a positive, a negative and a zero advantage."""
    up = load_advantage(branch + 3 * stride, place, PER_TOKEN)
    down = load_advantage(branch + 4 * stride, place, PER_TOKEN)
    return up, down, load_advantage(branch + 5 * stride, place, PER_TOKEN)


@triton.jit
def kl_term(d, ratio, KL: tl.constexpr):
    """An estimate of the KL divergence; its derivative in the log-ratio and in log p."""
    value, slope, direct = d, tl.zeros_like(d), tl.full(d.shape, 1.0, tl.float32)
    if KL == "k2":
        value, direct = 0.5 * d * d, d
    elif KL == "k3" or KL == "k3_corrected":
        bounded = clamp_log_ratio(d)
        value = exp_excess(-bounded)
        direct = tl.where(tl.abs(d) <= LOG_RATIO_BOUND, -expm1(-bounded), 0.0)
        if KL == "k3_corrected":
            value, slope, direct = ratio * value, ratio * value, ratio * direct
    else:
        tl.static_assert(KL == "k1", f"no KL estimator {KL}")
    return value, slope, direct


@triton.jit
def _corrected(term, log_w, coefficients, CORRECTION: tl.constexpr):
    """The term times the sampler correction; "sequence_mask" has taken its tokens away before."""
    value, slope, direct = term.value, term.slope, term.direct
    if CORRECTION == "tis" or CORRECTION == "icepop":
        w = exp(log_w)
        if CORRECTION == "tis":
            w = tl.minimum(w, coefficients.sampler_high, KEEP_NAN)
        else:
            w = tl.where((w >= coefficients.sampler_low) & (w <= coefficients.sampler_high), w, 0.0)
        value, slope, direct = value * w, slope * w, direct * w
    else:
        tl.static_assert(CORRECTION == "none" or CORRECTION == "sequence_mask", f"no sampler correction {CORRECTION}")
    return Term(value, slope, direct, term.clipped, term.beyond)


@triton.jit
def _branch_term(term, token, numbers, pack, place, FORM: tl.constexpr, PER_TOKEN: tl.constexpr):
    """The term of the positive advantages and that of the negative ones, summed, its flags as numbers of rollouts.

    The forms are linear in A > 0, and in A < 0: summed over the leaves, those of the sums of either.
    """
    up, down, level = load_rollouts(pack.advantages, pack.stride, place, PER_TOKEN)
    below = form_term(load_advantage(pack.advantages + pack.stride, place, PER_TOKEN), token, numbers, FORM)
    if FORM != "clip":  # A = 0 is clipped as A < 0 is; by clip never
        down += level
    value, slope, direct = term.value + below.value, term.slope + below.slope, term.direct + below.direct
    clipped = tl.where(term.clipped, up, 0.0) + tl.where(below.clipped, down, 0.0)
    beyond = tl.where(term.beyond, up, 0.0) + tl.where(below.beyond, down, 0.0)
    return Term(value, slope, direct, clipped, beyond)


@triton.jit
def token_loss(
    pack,
    place,
    means,
    coefficients,
    numbers,
    FORM: tl.constexpr,
    SEQUENCE: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """``means``: the trajectory's; ``numbers``: the form's."""
    at, keep = place.at, place.keep
    a = load_advantage(pack.advantages, place, PER_TOKEN)
    new, old = tl.load(pack.logprobs + at, mask=keep, other=0.0), tl.load(pack.old_logprobs + at, mask=keep, other=0.0)
    own_log_ratio, within = clamp_log_ratio(new - old), tl.abs(new - old) <= LOG_RATIO_BOUND
    log_ratio = tl.where(keep, means.log_ratio, 0.0) if SEQUENCE else own_log_ratio
    ratio = exp(log_ratio)
    chosen = None
    if pack.selected is not None:
        chosen = tl.load(pack.selected + at, mask=keep, other=0) != 0
    token = Token(new, old, log_ratio, ratio, chosen, means)
    term = form_term(a, token, numbers, FORM)
    free = ~term.clipped
    if BRANCH:
        term = _branch_term(term, token, numbers, pack, place, FORM, PER_TOKEN)
        clipped, beyond = term.clipped, term.beyond
    else:
        clipped, beyond = tl.where(term.clipped, 1.0, 0.0), tl.where(term.beyond, 1.0, 0.0)
    below, above = tl.where(log_ratio < 0, beyond, 0.0), tl.where(log_ratio > 0, beyond, 0.0)
    log_w = tl.zeros_like(a)
    if pack.sampler_logprobs is not None:
        log_w = clamp_log_ratio(old - tl.load(pack.sampler_logprobs + at, mask=keep, other=0.0))
    term = _corrected(term, log_w, coefficients, CORRECTION)
    value, slope, direct = term.value, term.slope, term.direct
    mean_slope, share = tl.zeros_like(a), within
    if FORM == "gmpo":
        mean_slope, slope = slope, tl.zeros_like(a)
        if SEQUENCE:
            mean_slope *= means.free
        else:
            share = within & (a != 0) & free
    kl, entropy, leaves = tl.zeros_like(a), tl.zeros_like(a), tl.full(a.shape, 1.0, tl.float32)
    if BRANCH:
        leaves = load_advantage(pack.advantages + 2 * pack.stride, place, PER_TOKEN)
    if KL != "none":
        d = new - tl.load(pack.ref_logprobs + at, mask=keep, other=0.0)
        kl, kl_slope, kl_direct = kl_term(d, ratio, KL)
        c = coefficients.kl * leaves
        value, slope, direct = value + c * kl, slope + c * kl_slope, direct + c * kl_direct
    if pack.entropy is not None:
        entropy = tl.load(pack.entropy + at, mask=keep, other=0.0)
        value -= coefficients.entropy * leaves * entropy
    if SEQUENCE:
        mean_slope, slope = mean_slope + slope, tl.zeros_like(a)
    slope = tl.where(within, slope, 0.0) + direct
    return TokenLoss(
        value, slope, mean_slope, share, clipped, below, above, own_log_ratio, ratio, entropy, kl, leaves, log_w
    )
