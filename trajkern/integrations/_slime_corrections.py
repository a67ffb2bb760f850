"""The corrections of a sampler's log-probs that slime and miles take by a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_tensor, describe
from trajkern._dtypes import FLOATS
from trajkern.integrations._outside import Outside
from trajkern.integrations._slime_batch import Samples, ratio_of, this_ranks
from trajkern.integrations._slime_options import check_layout, option

CORRECTIONS = {f"trajkern.integrations.slime.{kind}": kind for kind in ("tis", "icepop", "sequence_mask")} | {
    f"{module}.{name}": kind
    for module in ("slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss_hub.corrections")
    for name, kind in (("vanilla_tis_function", "tis"), ("icepop_function", "icepop"))
}
Corrected = tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]


class Correction(NamedTuple):
    factor: Tensor  # [R], of each token's loss
    kept: Tensor | None  # bool [R], where whole samples leave the loss
    metrics: dict[str, Tensor]  # [R] each
    stays: Tensor | None = None  # bool [N], which samples do not


@torch.no_grad()
def correction(args: Any, kind: str, log_ratio: Tensor, samples: Samples | None) -> Correction:
    """The correction of log p(trainer) - log p(sampler) ``[R]``; ``samples`` are needed by sequence_mask."""
    low, high = option(args, "tis_clip_low"), option(args, "tis_clip")
    if not 0 <= low <= high:
        raise ValueError(f"tis_clip_low must be from 0 to tis_clip = {high}, got {low}")
    log_ratio = log_ratio if samples is None else samples.taken(log_ratio)
    ratio, kept, stays = ratio_of(log_ratio), None, None
    if kind == "tis":
        factor = ratio.clamp(low, high)
        changed = factor != ratio
    elif kind == "icepop":
        changed = (ratio < low) | (ratio > high)
        factor = torch.where(changed, 0, ratio)
    else:
        assert samples is not None
        mean = ratio_of(samples.means(log_ratio))
        stays = (mean >= low) & (mean <= high)
        kept = tk.spread(stays.float(), samples.whole) != 0
        factor, changed = torch.ones_like(ratio), ~kept
    metrics = {"tis": ratio, "tis_clipfrac": changed.float(), "tis_abs": (ratio - 1).abs()}
    return Correction(factor, kept, metrics, stays)


def _of_loss(args: Any, kind: str, pg_loss: Tensor, train: Any, rollout: Any, samples: Samples | None) -> Correction:
    check_tensor("pg_loss", pg_loss, dtypes=FLOATS, ndim=1)
    parts = []
    for name, x in (("train_log_probs", train), ("rollout_log_probs", rollout)):
        if not (found := Outside(name, x).tensors(device=pg_loss.device)):
            raise ValueError(f"{name} must have a tensor for at least one sample, got {describe(x)}")
        parts.append(torch.cat(found).detach())
        if parts[-1].shape != pg_loss.shape:
            raise ValueError(f"{name} must have the {list(pg_loss.shape)} tokens of pg_loss, got {describe(parts[-1])}")
    return correction(args, kind, parts[0] - parts[1], samples)


def tis(
    args: Any,
    *,
    pg_loss: Tensor,  # [R]
    train_log_probs: Sequence[Tensor],  # [R_n] each
    rollout_log_probs: Sequence[Tensor],  # [R_n] each
    loss_masks: Sequence[Tensor],
    **_: Any,
) -> Corrected:
    """For ``--custom-tis-function-path``: the loss times w = exp(trainer - sampler) within [tis_clip_low, tis_clip].

    The hosts' own default, with the log-ratio bounded at 20. The ratio carries no gradient; sequences may be split over
    context-parallel ranks, since each token stands for itself.

    Returns:
        (loss ``[R]``, the masks as they were, the metrics tis, tis_clipfrac and tis_abs, ``[R]`` each).
    """
    found = _of_loss(args, "tis", pg_loss, train_log_probs, rollout_log_probs, None)
    return pg_loss * found.factor, loss_masks, found.metrics


def icepop(
    args: Any,
    *,
    pg_loss: Tensor,  # [R]
    train_log_probs: Sequence[Tensor],  # [R_n] each
    rollout_log_probs: Sequence[Tensor],  # [R_n] each
    loss_masks: Sequence[Tensor],
    **_: Any,
) -> Corrected:
    """As :func:`tis`, but a token outside of the bounds has loss 0; it still counts in what the sum is divided by."""
    found = _of_loss(args, "icepop", pg_loss, train_log_probs, rollout_log_probs, None)
    return pg_loss * found.factor, loss_masks, found.metrics


def sequence_mask(
    args: Any,
    *,
    pg_loss: Tensor,  # [R]
    train_log_probs: Sequence[Tensor],  # [R_n] each
    rollout_log_probs: Sequence[Tensor],  # [R_n] each
    loss_masks: Sequence[Tensor],  # [R_n] each
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    **_: Any,
) -> Corrected:
    """As :func:`tis`, but a sample whose exp(mean log w) lies outside of the bounds leaves the loss, the others stay.

    It is masked out; what its rollout is divided by stays, as the hosts have it. The mean is over all of the sample's
    tokens, of all context-parallel ranks.
    """
    check_layout(args, "sequence_mask")
    samples = Samples.of(total_lengths, response_lengths, loss_masks)
    found = _of_loss(args, "sequence_mask", pg_loss, train_log_probs, rollout_log_probs, this_ranks(args, samples))
    assert found.stays is not None
    kept = tk.spread(found.stays.float(), samples.whole) != 0
    return pg_loss, samples.split(torch.where(kept, samples.loss_masks, 0)), found.metrics
