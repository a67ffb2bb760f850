"""What AReaL's rejection sampling, M2PO's mask and its stand-in for proximal log-probs are, on packed tokens.

Formulas of AReaL 1.0.4 (commit 4aef98d); nothing of AReaL is imported, and no device value is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_number, check_tensor, describe
from trajkern.integrations._arguments import NUMBERS, choosing

LEGAL = {
    "level": ("token", "sequence"),
    "action": ("mask", "clamp"),
    "metric": ("ratio", "kl_k1", "kl_k2", "kl_k3"),
    "agg": ("sum", "mean", "max"),
}


class Pack(NamedTuple):
    """Tokens of AReaL's, packed or padded, as a pack of N sequences."""

    shape: torch.Size
    mask: Tensor  # bool [T]
    cu_seqlens: Tensor  # [N+1], from 0 to T
    whole: Tensor | None  # bool, whether the sequences given end where the tokens do; None: known to

    def flat(self, name: str, x: Any) -> Tensor:
        """``x`` as ``[T]`` without a gradient; an error names it as ``name``."""
        check_tensor(name, x, dtypes=NUMBERS, device=self.mask.device)
        if x.shape != self.shape:
            raise ValueError(f"{name} must have the log-probs' shape {list(self.shape)}, got {list(x.shape)}")
        return x.detach().reshape(-1)

    def owner(self) -> Tensor:
        """Each token's sequence, ``[T]``."""
        token = torch.arange(self.mask.shape[0], device=self.mask.device)
        return torch.searchsorted(self.cu_seqlens, token, right=True) - 1

    def sums(self, x: Tensor) -> Tensor:
        """The sum of each sequence's tokens that take part, ``[N]``."""
        return self._reduced(torch.where(self.mask, _wide(x), 0), "sum", 0)

    def means(self, x: Tensor) -> Tensor:
        """Their mean, 0 where none takes part, ``[N]``."""
        return self.sums(x) / self.counts().clamp_min(1)

    def largest(self, x: Tensor) -> Tensor:
        """Their largest, 0 where none takes part, ``[N]``."""
        most = self._reduced(torch.where(self.mask, _wide(x), -torch.inf), "max", -torch.inf)
        return torch.where(self.counts() > 0, most, 0)

    def counts(self) -> Tensor:
        """How many take part, ``[N]``."""
        return self.sums(self.mask.float())

    def guard(self) -> Tensor | float:
        """1, or NaN where the sequences do not end where the tokens do."""
        return 1.0 if self.whole is None else torch.where(self.whole, 1.0, torch.nan)

    def _reduced(self, x: Tensor, reduce: str, initial: float) -> Tensor:
        return torch.segment_reduce(x, reduce, lengths=self.cu_seqlens.diff(), unsafe=True, initial=initial)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def packed(logprobs: Any, loss_mask: Any, cu_seqlens: Any, by_sequence: bool) -> Pack:
    """``[T]`` with ``cu_seqlens``, which is read only ``by_sequence``, or ``[B, L]``, a row a sequence."""
    check_tensor("logprobs", logprobs, dtypes=NUMBERS)
    if logprobs.ndim not in (1, 2):
        raise ValueError(f"logprobs must have shape [T] (packed) or [B, L] (padded), got {list(logprobs.shape)}")
    check_tensor("loss_mask", loss_mask, dtypes=NUMBERS, device=logprobs.device)
    if loss_mask.shape != logprobs.shape:
        raise ValueError(
            f"loss_mask must have the log-probs' shape {list(logprobs.shape)}, got {list(loss_mask.shape)}"
        )
    mask, tokens = choosing("loss_mask", loss_mask).reshape(-1), logprobs.numel()
    if logprobs.ndim == 2:
        bounds = torch.arange(logprobs.shape[0] + 1, device=mask.device) * logprobs.shape[1]
        return Pack(logprobs.shape, mask, bounds, None)
    end = torch.full((1,), tokens, device=mask.device)
    if not by_sequence:  # one stretch: no number here is a sequence's
        return Pack(logprobs.shape, mask, torch.cat((torch.zeros_like(end), end)), None)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else cu_seqlens
        raise ValueError(f"cu_seqlens must be a tensor [N+1] where sequences have a ratio or a bound; got {got}")
    bounds = cu_seqlens.to(torch.int64)
    if bounds.is_cpu and int(bounds[-1]) != tokens:
        raise ValueError(
            f"cu_seqlens must end at the {tokens} tokens, got {int(bounds[-1])}; a sequence that is split over ranks "
            "has no ratio of its own on any of them"
        )
    return Pack(logprobs.shape, mask, torch.cat((bounds[:-1].clamp(0, tokens), end)), bounds[-1] == tokens)


class Rejected(NamedTuple):
    """What AReaL's rejection sampling leaves."""

    mask: Tensor  # bool [T]
    weights: Tensor  # [T], 0 where the mask is False
    share: Tensor  # of the tokens that took part: dropped by "mask", changed by "clamp"


def by_sequence(rejection: Any) -> bool:
    """Whether a configuration judges sequences; ValueError for a word that it does not have."""
    if rejection is None:
        return False
    for name, legal in LEGAL.items():
        if not hasattr(rejection, name):
            raise TypeError(
                f"rejection_sampling must have {', '.join(LEGAL)}, as AReaL's does; got {describe(rejection)}"
            )
        check_choice(f"rejection_sampling.{name}", getattr(rejection, name), legal)
    if not hasattr(rejection, "lower") or not hasattr(rejection, "upper"):
        raise TypeError(f"rejection_sampling must have lower and upper, got {describe(rejection)}")
    upper = check_number("rejection_sampling.upper", rejection.upper)
    if rejection.lower is not None:
        check_number("rejection_sampling.lower", rejection.lower, high=upper)
    return rejection.level == "sequence"


@torch.no_grad()
def rejected(pack: Pack, proximal: Tensor, old: Tensor, o: Any) -> Rejected:
    """AReaL's ``apply_rejection_sampling`` with a configuration ``o`` of it.

    The weights are proximal / old, or the geometric mean of a sequence's; "mask" drops what is out of bounds, "clamp"
    bounds its weight.
    """
    apart = _wide(proximal) - _wide(old)
    log_ratio = torch.where(apart.isfinite(), apart, 0)
    of_ratio = o.metric == "ratio"
    if of_ratio:
        metric = log_ratio
    else:
        metric = {"kl_k1": apart, "kl_k2": apart.square() / 2, "kl_k3": torch.expm1(-apart) + apart}[o.metric]
    weights, judged = log_ratio.exp(), metric
    if o.level == "sequence":
        owner = pack.owner()
        if of_ratio:
            weights = pack.means(log_ratio).exp()[owner]
        judged = {"sum": pack.sums, "mean": pack.means, "max": pack.largest}[o.agg](metric)[owner]
    judged = judged.exp() if of_ratio else judged
    low, high = 0.0 if o.lower is None else float(o.lower), float(o.upper)
    inside = (judged <= high) if o.lower is None else (judged >= low) & (judged <= high)
    if o.action == "mask":
        kept = pack.mask & inside
        changed = pack.mask & ~inside
    else:
        kept, bounded = pack.mask, weights.clamp(low, high)
        bounded = torch.where(inside, weights, bounded) if o.level == "sequence" else bounded
        changed, weights = pack.mask & (weights != bounded), bounded
    share = changed.sum() / pack.mask.sum().clamp_min(1)
    return Rejected(kept, torch.where(kept, weights, 0), share)


@torch.no_grad()
def m2po(mask: Tensor, old: Tensor, proximal: Tensor, threshold: float) -> Tensor:
    """M2PO's mask, bool ``[T]``: of the tokens that take part the largest (old - proximal)^2 are dropped, as few as
    leave a mean below ``threshold``; one stays where none does."""
    squares, order = torch.where(mask, (old - proximal).square(), -1).sort(descending=True)
    count = mask.sum()
    place = torch.arange(mask.shape[0], device=mask.device)
    there = place < count
    rest = torch.where(there, squares, 0).flip(0).cumsum(0).flip(0)  # from each place on
    fits = there & (rest / (count - place).clamp_min(1) < threshold)
    first = torch.where(fits.any(), fits.to(torch.int8).argmax(), count - 1) if mask.shape[0] else count
    return torch.zeros_like(mask).scatter(0, order, there & (place >= first))


def loglinear(new: Tensor, old: Tensor, versions: Tensor, current_version: int) -> Tensor:
    """AReaL's stand-in for proximal log-probs: between the sampler's and the policy's, by the versions between them.

    The proximal policy is that of one version before; a prompt's token (version below 0) keeps the sampler's.
    """
    behind = current_version - versions.to(new.dtype)
    between = torch.where((behind > 0) & (versions >= 0), (behind - 1) / behind, 0).clamp(0, 1)
    return old + between * (new.detach() - old)
