"""The policy loss of one token: what it reads, its value, its derivatives and its metrics.

Forms, KL estimators and sampler corrections are compile-time strings: the names in :mod:`trajkern.losses.kinds`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trajkern.losses import kinds

from .primitives import KEEP_NAN, exp, exp_excess, expm1

LOG_RATIO_BOUND = tl.constexpr(kinds.LOG_RATIO_BOUND)


@triton.jit
def clamp_log_ratio(d):
    return tl.clamp(d, -LOG_RATIO_BOUND, LOG_RATIO_BOUND, KEEP_NAN)


@triton.jit
def load_log_ratio(x, y, at, keep):
    return clamp_log_ratio(tl.load(x + at, mask=keep, other=0.0) - tl.load(y + at, mask=keep, other=0.0))


@triton.jit
def load_advantage(advantages, at, n, keep, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        a = tl.load(advantages + at, mask=keep, other=0.0)
    else:
        a = tl.load(advantages + n, mask=keep, other=0.0)
    return a


@triton.jit
def bound_log_ratio(log_ratio, a, low, high):
    """gmpo's log-ratio, bounded in the direction of the advantage, and where the bound lets it through."""
    bounded = tl.where(a > 0, tl.minimum(log_ratio, high, KEEP_NAN), tl.maximum(log_ratio, -low, KEEP_NAN))
    free = ((a > 0) & (log_ratio <= high)) | ((a < 0) & (log_ratio >= -low))
    return tl.where(a == 0, 0.0, bounded), free


@triton.jit
def load_mask(mask, at, inside):
    keep = inside
    if mask is not None:
        keep = tl.load(mask + at, mask=inside, other=0) != 0
    return keep


@triton.jit
def _clip_term(a, r, chosen, low, high, dual):
    bounded = tl.clamp(r, low, high, KEEP_NAN)
    value, clipped = tl.maximum(-r * a, -bounded * a, KEEP_NAN), r * a > bounded * a
    slope = tl.where(clipped, 0.0, -r * a)
    if chosen is not None:
        value, slope, clipped = tl.where(chosen, 0.0, value), tl.where(chosen, 0.0, slope), clipped | chosen
    over = (a < 0) & (value > -dual * a)
    return tl.where(over, -dual * a, value), tl.where(over, 0.0, slope), clipped | over


@triton.jit
def _sapo_term(a, r, tau):
    y = tau * (r - 1)
    e = exp(-tl.abs(y))
    sigmoid = tl.where(y >= 0, 1.0, e) / (1 + e)
    return -a * (4 / tau) * sigmoid, -4 * a * r * e / ((1 + e) * (1 + e))


@triton.jit
def _dppo_valid(a, new, old, low, high, FORM: tl.constexpr):
    """Whether the token's probability p has not yet moved past the threshold in the direction A pushes it."""
    p, q = exp(new), exp(old)
    if FORM == "dppo_tv":
        valid = tl.where(a > 0, p - q <= high, p - q >= -low)
    else:
        divergence = q * (old - new) + (1 - q) * tl.log(tl.div_rn(1 - q + 1e-8, 1 - p + 1e-8))
        valid = tl.where(a > 0, (divergence <= high) | (p <= q), (divergence <= low) | (p >= q))
    return valid


@triton.jit
def _policy_term(a, new, old, log_ratio, r, chosen, means, c0, c1, c2, c3, FORM: tl.constexpr):
    """A loss; its derivative in the log-ratio (gmpo: in the trajectory's mean) and in log p; whether it is clipped."""
    value, slope, direct, clipped = a, tl.zeros_like(a), tl.zeros_like(a), tl.zeros_like(a) != 0
    if FORM == "clip":
        value, slope, clipped = _clip_term(a, r, chosen, c0, c1, c2)
    elif FORM == "kl_cov":
        value = -r * a + tl.where(chosen, c0 * tl.abs(log_ratio), 0.0)
        sign = (log_ratio > 0).to(tl.float32) - (log_ratio < 0).to(tl.float32)
        slope, clipped = -r * a + tl.where(chosen, c0 * sign, 0.0), chosen
    elif FORM == "sapo":
        value, slope = _sapo_term(a, r, tl.where(a > 0, c0, c1))
    elif FORM == "gmpo":
        value = -tl.load(means + 2) * tl.load(means + 1)
        slope = value
        clipped = ((a > 0) & (log_ratio > c1)) | ((a < 0) & (log_ratio < -c0))
    else:
        if FORM == "reinforce":
            direct = -a
        elif FORM == "cispo":
            bounded = tl.clamp(r, c0, c1, KEEP_NAN)
            direct, clipped = -bounded * a, bounded != r
        elif FORM == "vespo":
            log_w, decay = tl.load(means + 1), tl.where(a >= 0, c1, c3)
            direct = -exp(decay + tl.where(a >= 0, c0, c2) * log_w - decay * exp(log_w)) * a
        elif FORM == "dppo_tv" or FORM == "dppo_kl":
            valid = _dppo_valid(a, new, old, c0, c1, FORM)
            direct, clipped = tl.where(valid, -a * tl.minimum(r, 20.0, KEEP_NAN), 0.0), ~valid
        else:
            tl.static_assert(False, f"no form {FORM}")
        value = direct * new
    return value, slope, direct, clipped


@triton.jit
def _kl_term(d, r, KL: tl.constexpr):
    """An estimate of the KL divergence; its derivative in the log-ratio and in log p."""
    value, slope, direct = d, tl.zeros_like(d), tl.full(d.shape, 1.0, tl.float32)
    if KL == "k2":
        value, direct = 0.5 * d * d, d
    elif KL == "k3" or KL == "k3_corrected":
        bounded = clamp_log_ratio(d)
        value = exp_excess(-bounded)
        direct = tl.where(tl.abs(d) <= LOG_RATIO_BOUND, -expm1(-bounded), 0.0)
        if KL == "k3_corrected":
            value, slope, direct = r * value, r * value, r * direct
    else:
        tl.static_assert(KL == "k1", f"no KL estimator {KL}")
    return value, slope, direct


@triton.jit
def load_rollouts(branch, stride, at, n, keep, PER_TOKEN: tl.constexpr):
    """How many of the rollouts that share a token have a positive, a negative and a zero advantage."""
    up = load_advantage(branch + 3 * stride, at, n, keep, PER_TOKEN)
    down = load_advantage(branch + 4 * stride, at, n, keep, PER_TOKEN)
    return up, down, load_advantage(branch + 5 * stride, at, n, keep, PER_TOKEN)


@triton.jit
def token_loss(
    at, n, keep,  # [BLOCK]
    logprobs, old_logprobs, advantages, ref_logprobs, sampler_logprobs, entropy, selected,  # [T]
    means,  # [BLOCK] pointers to the trajectory's means
    stride, kl_coef, entropy_coef, sampler_low, sampler_high, c0, c1, c2, c3,
    FORM: tl.constexpr, SEQUENCE: tl.constexpr, KL: tl.constexpr, CORRECTION: tl.constexpr, PER_TOKEN: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """A token's loss; its derivatives in its own log p and in the trajectory's mean, and whether that mean moves with
    the token's log p; its metrics, the first the number of rollouts whose ratio is clipped."""
    a = load_advantage(advantages, at, n, keep, PER_TOKEN)
    new, old = tl.load(logprobs + at, mask=keep, other=0.0), tl.load(old_logprobs + at, mask=keep, other=0.0)
    own, within = clamp_log_ratio(new - old), tl.abs(new - old) <= LOG_RATIO_BOUND
    log_ratio = tl.where(keep, tl.load(means), 0.0) if SEQUENCE else own
    r = exp(log_ratio)
    chosen = None
    if selected is not None:
        chosen = tl.load(selected + at, mask=keep, other=0) != 0
    value, slope, direct, clips = _policy_term(a, new, old, log_ratio, r, chosen, means, c0, c1, c2, c3, FORM)
    clipped = tl.where(clips, 1.0, 0.0)
    if BRANCH:  # linear in A > 0, and in A < 0: summed over the leaves, those of the sums of either
        up, down, level = load_rollouts(advantages, stride, at, n, keep, PER_TOKEN)
        b = load_advantage(advantages + stride, at, n, keep, PER_TOKEN)
        value_b, slope_b, direct_b, clips_b = _policy_term(
            b, new, old, log_ratio, r, chosen, means, c0, c1, c2, c3, FORM
        )
        if FORM != "clip":  # A = 0 is clipped as A < 0 is; by clip never
            down += level
        value, slope, direct = value + value_b, slope + slope_b, direct + direct_b
        clipped = up * clipped + tl.where(clips_b, down, 0.0)
    if CORRECTION == "tis" or CORRECTION == "icepop":
        w = exp(clamp_log_ratio(old - tl.load(sampler_logprobs + at, mask=keep, other=0.0)))
        if CORRECTION == "tis":
            w = tl.minimum(w, sampler_high, KEEP_NAN)
        else:
            w = tl.where((w >= sampler_low) & (w <= sampler_high), w, 0.0)
        value, slope, direct = value * w, slope * w, direct * w
    else:
        tl.static_assert(CORRECTION == "none" or CORRECTION == "sequence_mask", f"no sampler correction {CORRECTION}")
    mean_slope, share = tl.zeros_like(a), within
    if FORM == "gmpo":
        mean_slope, slope = slope, tl.zeros_like(a)
        if SEQUENCE:
            mean_slope *= tl.load(means + 3)
        else:
            share = within & (a != 0) & ~clips
    kl, h, leaves = tl.zeros_like(a), tl.zeros_like(a), tl.full(a.shape, 1.0, tl.float32)
    if BRANCH:
        leaves = load_advantage(advantages + 2 * stride, at, n, keep, PER_TOKEN)
    if KL != "none":
        d = new - tl.load(ref_logprobs + at, mask=keep, other=0.0)
        kl, kl_slope, kl_direct = _kl_term(d, r, KL)
        c = kl_coef * leaves
        value, slope, direct = value + c * kl, slope + c * kl_slope, direct + c * kl_direct
    if entropy is not None:
        h = tl.load(entropy + at, mask=keep, other=0.0)
        value -= entropy_coef * leaves * h
    if SEQUENCE:
        mean_slope, slope = mean_slope + slope, tl.zeros_like(a)
    slope = tl.where(within, slope, 0.0) + direct
    return value, slope, mean_slope, share, clipped, own, r, h, kl, leaves
