"""The reference policy loss against the written formulas, evaluated one token after another in plain Python."""

from __future__ import annotations

import itertools
import math
import random
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trajkern import PolicyLoss, policy_loss_kinds, reference

AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean")
RANKING = ("kl_cov", "clip_cov")
OWN = {  # kind -> (ratio level, aggregation)
    "grpo": ("token", "seq_mean_token_mean"),
    "dapo": ("token", "token_mean"),
    "bnpo": ("token", "token_mean"),
    "dr_grpo": ("token", "seq_mean_token_sum_norm"),
    "gspo": ("sequence", "seq_mean_token_mean"),
    "gmpo": ("token", "seq_mean_token_mean"),
    "cispo": ("token", "token_mean"),
    "sapo": ("token", "seq_mean_token_mean"),
    "luspo": ("sequence", "seq_mean_token_sum"),
    "vespo": ("token", "token_mean"),
    "gpg": ("token", "token_mean"),
    "reinforce": ("token", "token_mean"),
    "dppo_tv": ("token", "token_mean"),
    "dppo_kl": ("token", "token_mean"),
    "kl_cov": ("token", "token_mean"),
    "clip_cov": ("token", "token_mean"),
}


OWN_CLIP = dict.fromkeys(("dapo", "bnpo", "dr_grpo", "gspo", "luspo", "clip_cov"), "grpo")  # that have grpo's clip


def random_batch(per_token: bool, seed: int = 0, lengths: tuple[int, ...] = (3, 0, 5, 1, 6, 2)) -> SimpleNamespace:
    """Random tokens: one trajectory is empty, the one of a single token is masked, others are masked in part."""
    rng, total = random.Random(seed), sum(lengths)
    b = SimpleNamespace(cu=[0, *itertools.accumulate(lengths)], per_token=per_token)
    b.old = [-4 * rng.random() - 0.05 for _ in range(total)]
    b.new = [min(x + rng.gauss(0, 0.4), -0.01) for x in b.old]
    b.ref, b.sampler = ([x + rng.gauss(0, 0.3) for x in b.old] for _ in range(2))
    b.entropy = [rng.random() for _ in range(total)]
    b.mask = [rng.random() < 0.75 for _ in range(total)]
    for n, (start, end) in enumerate(pairwise(b.cu)):
        if end - start == 1:
            b.mask[start] = False
        elif end > start:
            b.mask[start : start + 2] = [True, n % 2 == 0]
    b.advantages = [rng.gauss(0, 1) for _ in range(total if per_token else len(lengths))]
    lengths_of = [end - start for start, end in pairwise(b.cu)]
    b.a = b.advantages if per_token else [a for a, k in zip(b.advantages, lengths_of, strict=True) for _ in range(k)]
    return b


def arguments(b: SimpleNamespace, dtype: torch.dtype = torch.float64) -> dict:
    floats = {
        "logprobs": b.new,
        "old_logprobs": b.old,
        "advantages": b.advantages,
        "ref_logprobs": b.ref,
        "sampler_logprobs": b.sampler,
        "entropy": b.entropy,
    }
    floats = {k: torch.tensor(v, dtype=dtype) for k, v in floats.items()}
    return floats | {"cu_seqlens": torch.tensor(b.cu), "mask": torch.tensor(b.mask)}


def full(kind: str, **options) -> PolicyLoss:
    """Every term switched on, and no number that float32 holds exactly."""
    defaults = dict(max_length=9, clip_low=0.15, clip_high=0.28, clip_dual=1.55, kl_coef=0.05, entropy_coef=0.01)
    defaults |= dict(sapo_tau_pos=0.9, sapo_tau_neg=1.1, cov_fraction=0.3, cov_low=-1.1, cov_high=0.7, cov_coef=0.9)
    defaults |= dict(vespo_k_pos=1.7, vespo_lambda_pos=2.3, vespo_k_neg=2.6, vespo_lambda_neg=2.1)
    return PolicyLoss(kind, **defaults | options)


def bound(x: float, limit: float = 20.0) -> float:
    return min(max(x, -limit), limit)


def ranked(b: SimpleNamespace, c: PolicyLoss, scored: list[int]) -> list[int]:
    if c.kind not in RANKING or not scored:
        return []
    mean_a, mean_p = (fmean(x[t] for t in scored) for x in (b.a, b.new))
    covariance = {t: (b.a[t] - mean_a) * (b.new[t] - mean_p) for t in scored}
    if c.kind == "clip_cov":
        inside = [t for t in scored if not clipped(c, math.exp(bound(b.new[t] - b.old[t])), b.a[t])]
        covariance = {t: covariance[t] for t in inside if c.cov_low < covariance[t] < c.cov_high}
    order = sorted(covariance, key=lambda t: (-covariance[t], t))
    return order[: max(1, int(c.cov_fraction * len(scored)))]


def clipped(c: PolicyLoss, r: float, a: float) -> bool:
    return (a > 0 and r > 1 + c.clip_high) or (a < 0 and r < 1 - c.clip_low)


def beyond(c: PolicyLoss, flag: bool, r: float, a: float, is_chosen: bool) -> bool:
    """Whether a token that is clipped or dropped is so by a bound of the ratio's."""
    if OWN_CLIP.get(c.kind, c.kind) == "grpo":
        return flag and clipped(c, r, a) and not is_chosen
    return flag and not is_chosen


def clip_term(c: PolicyLoss, r: float, a: float) -> tuple[float, bool]:
    """min(r A, clip(r) A) is A min(r, 1 + high) for A > 0 and A max(r, 1 - low) for A < 0."""
    if a >= 0:
        return -a * min(r, 1 + c.clip_high), clipped(c, r, a)
    limit = math.inf if c.clip_dual is None else c.clip_dual
    return -a * min(max(r, 1 - c.clip_low), limit), clipped(c, r, a) or r > limit


def valid(c: PolicyLoss, new: float, old: float, a: float) -> bool:
    p, q = math.exp(new), math.exp(old)
    if c.kind == "dppo_tv":
        return p - q <= c.clip_high if a > 0 else q - p <= c.clip_low
    moved = q * (old - new) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return (moved <= c.clip_high or p <= q) if a > 0 else (moved <= c.clip_low or p >= q)


def weight_of_log_p(c: PolicyLoss, r: float, new: float, old: float, a: float, log_w: float) -> float:
    """What multiplies -A log p in the kinds that stop the gradient of the ratio."""
    if c.kind == "cispo":
        return min(max(r, 1 - c.clip_low), 1 + c.clip_high)
    if c.kind == "vespo":
        k, decay = (c.vespo_k_pos, c.vespo_lambda_pos) if a >= 0 else (c.vespo_k_neg, c.vespo_lambda_neg)
        return math.exp(decay + k * bound(log_w) - decay * math.exp(bound(log_w)))
    if c.kind.startswith("dppo"):
        return min(r, 20) * valid(c, new, old, a)
    return 1.0


def policy_terms(b: SimpleNamespace, c: PolicyLoss, tokens: list[int], chosen: list[int]) -> list[tuple[float, bool]]:
    """(loss, whether clipped or dropped) of each scored token of one trajectory, before any correction."""
    logs = ratios_of(b, c, tokens)
    log_w = sum(bound(b.new[t] - b.old[t]) for t in tokens)
    terms = []
    for t, log_r in zip(tokens, logs, strict=True):
        a, new, r = b.a[t], b.new[t], math.exp(log_r)
        if c.kind in ("cispo", "vespo", "gpg", "reinforce", "dppo_tv", "dppo_kl"):
            weight = weight_of_log_p(c, r, new, b.old[t], a, log_w)
            outside = c.kind.startswith("dppo") and not valid(c, new, b.old[t], a) or c.kind == "cispo" and weight != r
            terms.append((-weight * a * new, outside))
        elif c.kind == "sapo":
            tau = c.sapo_tau_pos if a > 0 else c.sapo_tau_neg
            terms.append((-a * 4 / tau / (1 + math.exp(-tau * (r - 1))), False))
        elif c.kind == "kl_cov":
            terms.append((-r * a + (c.cov_coef * abs(log_r) if t in chosen else 0), t in chosen))
        elif c.kind == "gmpo":
            terms.append((0.0, (a > 0 and log_r > c.clip_high) or (a < 0 and log_r < -c.clip_low)))
        else:
            terms.append((0.0, True) if t in chosen else clip_term(c, r, a))
    if c.kind == "gmpo":
        inside = [min(x, c.clip_high) if b.a[t] > 0 else max(x, -c.clip_low) for t, x in zip(tokens, logs, strict=True)]
        loss = -fmean(b.a[t] for t in tokens) * math.exp(fmean(inside))
        terms = [(loss, flag) for _, flag in terms]
    return terms


def ratios_of(b: SimpleNamespace, c: PolicyLoss, tokens: list[int]) -> list[float]:
    """Log-ratios of a trajectory's scored tokens."""
    logs = [bound(b.new[t] - b.old[t]) for t in tokens]
    level = c.ratio_level or OWN[c.kind][0]
    return [fmean(logs)] * len(logs) if level == "sequence" else logs


def kl_term(c: PolicyLoss, d: float, r: float) -> float:
    k3 = math.exp(bound(-d)) + bound(d) - 1
    return {"k1": d, "k2": d * d / 2, "k3": k3, "k3_corrected": r * k3}[c.kl]


def factor(c: PolicyLoss, old: float, sampler: float) -> float:
    w = math.exp(bound(old - sampler))
    if c.sampler_correction == "tis":
        return min(w, c.sampler_high)
    return w * (c.sampler_low <= w <= c.sampler_high) if c.sampler_correction == "icepop" else 1.0


def definition(b: SimpleNamespace, c: PolicyLoss, normalizer: float | None = None) -> dict[str, float]:
    trajectories = [[t for t in range(*edges) if b.mask[t]] for edges in pairwise(b.cu)]
    trajectories = [tokens for tokens in trajectories if tokens]
    if c.sampler_correction == "sequence_mask":
        weight = [math.exp(fmean(bound(b.old[t] - b.sampler[t]) for t in tokens)) for tokens in trajectories]
        inside = [c.sampler_low <= w <= c.sampler_high for w in weight]
        trajectories = list(itertools.compress(trajectories, inside))
    scored = [t for tokens in trajectories for t in tokens]
    chosen, losses, flags, ratios, kls, bounded = ranked(b, c, scored), [], [], [], [], []
    for tokens in trajectories:
        logs = ratios_of(b, c, tokens)
        kl = [kl_term(c, b.new[t] - b.ref[t], math.exp(x)) for t, x in zip(tokens, logs, strict=True)]
        terms = policy_terms(b, c, tokens, chosen)
        losses.append(
            [
                x * factor(c, b.old[t], b.sampler[t]) + c.kl_coef * k - c.entropy_coef * b.entropy[t]
                for t, (x, _), k in zip(tokens, terms, kl, strict=True)
            ]
        )
        flags += [flag for _, flag in terms]
        bounded += [
            beyond(c, flag, math.exp(x), b.a[t], t in chosen)
            for t, (_, flag), x in zip(tokens, terms, logs, strict=True)
        ]
        ratios, kls = ratios + [math.exp(x) for x in logs], kls + kl
    count = max(1, len(scored))
    logs = [bound(b.old[t] - b.sampler[t]) for t in scored]
    weights = [math.exp(x) for x in logs]
    return {
        "loss": aggregated(losses, c.aggregate or OWN[c.kind][1], normalizer, c.max_length),
        "clip_fraction": sum(flags) / count,
        "clip_low": sum(flag for flag, r in zip(bounded, ratios, strict=True) if r < 1) / count,
        "clip_high": sum(flag for flag, r in zip(bounded, ratios, strict=True) if r > 1) / count,
        "approx_kl": sum(bound(b.old[t] - b.new[t]) for t in scored) / count,
        "ratio_mean": sum(ratios) / count,
        "ratio_max": max(ratios, default=0.0),
        "entropy": sum(b.entropy[t] for t in scored) / count,
        "kl": sum(kls) / count if c.kl_coef else math.nan,
        "sampler_kl": sum(w - 1 - x for w, x in zip(weights, logs, strict=True)) / count,
        "sampler_outside": sum(not 0.5 <= w <= 2 for w in weights) / count,
        "effective_sample_size": sum(weights) ** 2 / (count * sum(w * w for w in weights)) if weights else 0.0,
        "num_tokens": len(scored),
    }


def aggregated(losses: list[list[float]], how: str, normalizer: float | None, max_length: int | None) -> float:
    total = sum(map(sum, losses))
    if how == "token_sum":
        return total
    if how == "token_mean":
        return total / (normalizer or max(1, sum(map(len, losses))))
    per_trajectory = [fmean(x) if how == "seq_mean_token_mean" else sum(x) for x in losses]
    if how == "seq_mean_token_sum_norm":
        per_trajectory = [x / max_length for x in per_trajectory]
    return sum(per_trajectory) / (normalizer or max(1, len(losses)))


def check(c: PolicyLoss, per_token: bool = False, seed: int = 0, normalizer=None) -> dict[str, float]:
    b = random_batch(per_token, seed)
    loss, metrics = reference.policy_loss(**arguments(b), config=c, normalizer=normalizer)
    expected = definition(b, c, None if normalizer is None else float(normalizer))
    assert metrics.keys() | {"loss"} == expected.keys()
    for name, actual in ({"loss": loss} | metrics).items():
        assert actual.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-14, nan_ok=True), name
        assert actual.dtype == torch.float64 and actual.shape == ()
    return expected


LEVELS = [
    pytest.param(kind, level, id=f"{kind}-{level or 'own_level'}")
    for kind, level in itertools.product(policy_loss_kinds, (None, "token", "sequence"))
    if not (kind in RANKING and level == "sequence")
]


def test_the_table_names_every_kind() -> None:
    assert set(OWN) == set(policy_loss_kinds)


@pytest.mark.parametrize(("kind", "level"), LEVELS)
@pytest.mark.parametrize("per_token", [False, True], ids=["advantage_per_trajectory", "advantage_per_token"])
def test_kind(kind: str, level: str | None, per_token: bool) -> None:
    for seed in range(3):
        check(full(kind, ratio_level=level), per_token, seed)


@pytest.mark.parametrize("kind", policy_loss_kinds)
def test_kind_alone(kind: str) -> None:
    """No KL, no entropy bonus, no dual clip; the default clip and covariance settings."""
    check(PolicyLoss(kind, max_length=5))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("normalizer", [None, 7.5, torch.tensor(3.0)], ids=["counted", "number", "tensor"])
@pytest.mark.parametrize("kind", ["grpo", "gmpo", "luspo"])
def test_aggregate(kind: str, aggregate: str, normalizer: float | Tensor | None) -> None:
    check(full(kind, aggregate=aggregate), normalizer=normalizer)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3_corrected"])
@pytest.mark.parametrize("kind", ["dapo", "gspo", "reinforce"])
def test_kl(kind: str, kl: str) -> None:
    assert check(full(kind, kl=kl, kl_coef=0.7))["kl"] != 0


@pytest.mark.parametrize("correction", ["tis", "icepop", "sequence_mask"])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "gmpo", "cispo", "vespo", "dapo"])
@pytest.mark.parametrize("band", [(0.9, 1.1), (0.5, 2.0), (5.0, 9.0)], ids=["narrow", "wide", "nothing_inside"])
def test_sampler_correction(correction: str, kind: str, band: tuple[float, float]) -> None:
    check(full(kind, sampler_correction=correction, sampler_low=band[0], sampler_high=band[1]), per_token=True)


def test_a_metric_that_was_not_computed_is_nan() -> None:
    inputs = arguments(random_batch(False)) | dict.fromkeys(("ref_logprobs", "sampler_logprobs", "entropy"))
    _, metrics = reference.policy_loss(**inputs, config=PolicyLoss())
    missing = {name for name, x in metrics.items() if x.isnan()}
    assert missing == {"entropy", "kl", "sampler_kl", "sampler_outside", "effective_sample_size"}


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_covariance_fraction(kind: str, fraction: float) -> None:
    assert check(full(kind, cov_fraction=fraction), per_token=True)["clip_fraction"] > 0


@pytest.mark.parametrize("kind", policy_loss_kinds)
def test_log_ratios_beyond_twenty_are_clamped(kind: str) -> None:
    b = random_batch(per_token=True)
    b.new[::2], b.old[1::2] = [-61.0] * len(b.new[::2]), [-58.0] * len(b.old[1::2])
    c = full(kind, kl="k3")
    new = torch.tensor(b.new, dtype=torch.float64, requires_grad=True)
    loss, _ = reference.policy_loss(**arguments(b) | {"logprobs": new}, config=c)
    assert loss.item() == pytest.approx(definition(b, c)["loss"], rel=1e-11)
    loss.backward()
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["grpo", "gspo", "gmpo"])
def test_a_ratio_on_its_bound_has_its_whole_gradient(kind: str) -> None:
    """Of two trajectories of two tokens each, -A / 4; ``torch.clamp`` has none at its ends since 2.14."""
    new = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    advantages, bounds = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0, 2, 4])
    config = PolicyLoss(kind, clip_low=0, clip_high=0)
    reference.policy_loss(new, new.detach(), advantages, bounds, config=config)[0].backward()
    assert new.grad.tolist() == [-0.25, -0.25, 0.25, 0.25]
