"""The forms of the policy loss: what one token adds to it, by the names in :data:`trajkern.losses.kinds.FORMS`.

A form is a function and its branch in :func:`form_term`. Its numbers are those that FORMS lists, in that order; where
it clips the ratio, the ratio's own bounds in place of the distances from 1.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .primitives import KEEP_NAN, exp

LARGEST_RATIO = tl.constexpr(20.0)  # of dppo


class Means(NamedTuple):
    """Of a trajectory, 0 where the loss does not read them; the last three are gmpo's."""

    log_ratio: tl.tensor
    log_sum: tl.tensor  # of its log-ratios, clamped
    ratio: tl.tensor  # exp(mean bounded log-ratio)
    advantage: tl.tensor
    free: tl.tensor  # the share of tokens that the bounds let through


class Token(NamedTuple):
    """What a form reads beside the advantages, [BLOCK]."""

    new: tl.tensor  # log p now
    old: tl.tensor  # and when sampled
    log_ratio: tl.tensor  # clamped; at ratio level "sequence" the trajectory's mean of them
    ratio: tl.tensor  # its exponential
    chosen: tl.tensor | None  # by their covariance, where the kind selects tokens
    means: Means  # of its trajectory


class Term(NamedTuple):
    """What a form makes of it, [BLOCK]."""

    value: tl.tensor
    slope: tl.tensor  # its derivative in the log-ratio, by gmpo in the trajectory's mean
    direct: tl.tensor  # its derivative in log p where the ratio is held
    clipped: tl.tensor  # whether the ratio is clipped or the token dropped
    beyond: tl.tensor  # whether that is a bound of the ratio's


@triton.jit
def _of_log_p(weight, token, clipped):
    """weight log p, without a gradient in the weight."""
    return Term(weight * token.new, tl.zeros_like(weight), weight, clipped, clipped)


@triton.jit
def _clip(a, token, numbers):
    """-min(r A, clip(r) A), or 0 where chosen; with A < 0 at most -clip_dual A."""
    low, high, dual = numbers[0], numbers[1], numbers[2]
    bounded = tl.clamp(token.ratio, low, high, KEEP_NAN)
    value, clipped = tl.maximum(-token.ratio * a, -bounded * a, KEEP_NAN), token.ratio * a > bounded * a
    slope, beyond = tl.where(clipped, 0.0, -token.ratio * a), clipped
    if token.chosen is not None:
        value, slope = tl.where(token.chosen, 0.0, value), tl.where(token.chosen, 0.0, slope)
        clipped = clipped | token.chosen
    over = (a < 0) & (value > -dual * a)
    value, slope = tl.where(over, -dual * a, value), tl.where(over, 0.0, slope)
    return Term(value, slope, tl.zeros_like(a), clipped | over, beyond)


@triton.jit
def _cispo(a, token, numbers):
    """-clip(r) A log p."""
    bounded = tl.clamp(token.ratio, numbers[0], numbers[1], KEEP_NAN)
    return _of_log_p(-bounded * a, token, bounded != token.ratio)


@triton.jit
def _sapo(a, token, numbers):
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A."""
    tau = tl.where(a > 0, numbers[0], numbers[1])
    y = tau * (token.ratio - 1)
    e = exp(-tl.abs(y))
    sigmoid = tl.div_rn(tl.where(y >= 0, 1.0, e), 1 + e)
    value, slope = -a * tl.div_rn(4.0, tau) * sigmoid, tl.div_rn(-4 * a * token.ratio * e, (1 + e) * (1 + e))
    never = tl.zeros_like(a) != 0
    return Term(value, slope, tl.zeros_like(a), never, never)


@triton.jit
def _reinforce(a, token):
    """-A log p."""
    return _of_log_p(-a, token, tl.zeros_like(a) != 0)


@triton.jit
def _dppo(a, token, valid):
    """-A min(r, 20) log p while valid."""
    weight = tl.where(valid, -a * tl.minimum(token.ratio, LARGEST_RATIO, KEEP_NAN), 0.0)
    return _of_log_p(weight, token, ~valid)


@triton.jit
def _dppo_tv(a, token, numbers):
    """Valid: p has not moved past the threshold in the direction A pushes it."""
    p, q = exp(token.new), exp(token.old)
    valid = tl.where(a > 0, p - q <= numbers[1], p - q >= -numbers[0])
    return _dppo(a, token, valid)


@triton.jit
def _dppo_kl(a, token, numbers):
    """Valid: so is the KL divergence of the token and all others."""
    p, q = exp(token.new), exp(token.old)
    divergence = q * (token.old - token.new) + (1 - q) * tl.log(tl.div_rn(1 - q + 1e-8, 1 - p + 1e-8))
    valid = tl.where(a > 0, (divergence <= numbers[1]) | (p <= q), (divergence <= numbers[0]) | (p >= q))
    return _dppo(a, token, valid)


@triton.jit
def _kl_cov(a, token, numbers):
    """-r A + cov_coef abs(log-ratio) where chosen."""
    coef, log_ratio = numbers[0], token.log_ratio
    value = -token.ratio * a + tl.where(token.chosen, coef * tl.abs(log_ratio), 0.0)
    sign = (log_ratio > 0).to(tl.float32) - (log_ratio < 0).to(tl.float32)
    slope = -token.ratio * a + tl.where(token.chosen, coef * sign, 0.0)
    return Term(value, slope, tl.zeros_like(a), token.chosen, tl.zeros_like(a) != 0)


@triton.jit
def bound_log_ratio(log_ratio, a, low, high):
    """gmpo's log-ratio, bounded in the direction of the advantage, and where the bound lets it through."""
    bounded = tl.where(a > 0, tl.minimum(log_ratio, high, KEEP_NAN), tl.maximum(log_ratio, -low, KEEP_NAN))
    free = ((a > 0) & (log_ratio <= high)) | ((a < 0) & (log_ratio >= -low))
    return tl.where(a == 0, 0.0, bounded), free


@triton.jit
def _gmpo(a, token, numbers):
    """-mean(A) exp(mean of the bounded log-ratios), both over the trajectory."""
    low, high = numbers[0], numbers[1]
    value = tl.zeros_like(a) - token.means.advantage * token.means.ratio
    clipped = ((a > 0) & (token.log_ratio > high)) | ((a < 0) & (token.log_ratio < -low))
    return Term(value, value, tl.zeros_like(a), clipped, clipped)


@triton.jit
def _vespo(a, token, numbers):
    """-exp(lambda + k log w - lambda w) A log p, log w the trajectory's, k and lambda by the sign of A."""
    log_w, decay = token.means.log_sum, tl.where(a >= 0, numbers[1], numbers[3])
    weight = -exp(decay + tl.where(a >= 0, numbers[0], numbers[2]) * log_w - decay * exp(log_w)) * a
    return _of_log_p(weight, token, tl.zeros_like(a) != 0)


@triton.jit
def form_term(a, token, numbers, FORM: tl.constexpr):
    if FORM == "clip":
        term = _clip(a, token, numbers)
    elif FORM == "cispo":
        term = _cispo(a, token, numbers)
    elif FORM == "sapo":
        term = _sapo(a, token, numbers)
    elif FORM == "reinforce":
        term = _reinforce(a, token)
    elif FORM == "dppo_tv":
        term = _dppo_tv(a, token, numbers)
    elif FORM == "dppo_kl":
        term = _dppo_kl(a, token, numbers)
    elif FORM == "kl_cov":
        term = _kl_cov(a, token, numbers)
    elif FORM == "gmpo":
        term = _gmpo(a, token, numbers)
    elif FORM == "vespo":
        term = _vespo(a, token, numbers)
    else:
        tl.static_assert(False, f"no form {FORM}")
    return term
