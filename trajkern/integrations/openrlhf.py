"""OpenRLHF (0.11.2): trajkern's log-probs and policy loss in its actor::

    from trajkern.integrations import openrlhf
    openrlhf.enable()

OpenRLHF has no registry: :func:`enable` puts :func:`log_probs_from_logits` and :class:`PolicyLoss` in the place of its
own wherever they are held. It must run in every process that trains, which Ray does by itself where the job's
``runtime_env`` names ``trajkern.integrations.openrlhf.enable`` as its ``worker_process_setup_hook``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_count, check_divisor, check_number, renamed, suggesting
from trajkern.integrations._adapter import (
    Enabled,
    PaddedRows,
    Patches,
    check_signature,
    check_version,
    held,
    padded_rows,
)
from trajkern.integrations._arguments import by_annotation

TESTED = ("0.11.2",)
HOLDERS = {  # who holds the name from its import on; the last only if it is loaded already
    "log_probs_from_logits": ("openrlhf.models.utils", "openrlhf.models.actor"),
    "PolicyLoss": ("openrlhf.models.loss", "openrlhf.models", "openrlhf.trainer.ray.ppo_actor"),
}
LEVELS, MODES, GATES = ("off", "token", "seq"), ("mask", "clip"), ("ratio", "binary_kl", "tv")
_patches = Patches()


@suggesting
def enable(*, any_version: bool = False) -> Enabled:
    """Patches OpenRLHF in this process. A second call undoes the first.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: OpenRLHF is missing.
        RuntimeError: a version of it that lacks what this replaces, or where that takes something else. Another than
            the tested versions is warned of, unless ``any_version`` is True.
    """
    check_version("openrlhf", TESTED, any_version)
    disable()
    importlib.import_module("openrlhf.models")
    theirs = held(sys.modules["openrlhf.models.loss"], "PolicyLoss")
    scores = held(sys.modules["openrlhf.models.utils"], "log_probs_from_logits")
    check_signature("openrlhf's log_probs_from_logits", scores, log_probs_from_logits)
    check_signature("openrlhf's PolicyLoss", theirs.__init__, PolicyLoss.__init__)
    check_signature("openrlhf's PolicyLoss.forward", theirs.forward, PolicyLoss.forward)
    for name, holders in HOLDERS.items():
        for holder in holders:
            if holder in sys.modules:
                _patches.put(vars(sys.modules[holder]), name, globals()[name])
    return _patches.enabled("OpenRLHF", disable)


def disable() -> None:
    """Takes back what :func:`enable` did; twice does nothing."""
    _patches.undo()


@by_annotation({"targets": "labels"})
def log_probs_from_logits(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
) -> Tensor:
    """OpenRLHF's function of that name: log softmax(logits / temperature) at the labels.

    Float32 (float64 for float64) whatever the logits are, where OpenRLHF's has their dtype. The logits are left as they
    are, where OpenRLHF's divides them by the temperature in place.
    """
    return tk.token_logprobs(logits, labels, temperature=temperature)


class PolicyLoss(torch.nn.Module):
    """OpenRLHF's module of that name, with its arguments, its five results and their gradients to rounding.

    The kinds are "ppo" (:func:`trajkern.policy_loss`'s grpo) and "gspo". The correction of the rollout engine's
    log-probs is a weight per token, in all of OpenRLHF's forms. Where OpenRLHF divides 0 by 0 (no unmasked token in the
    batch), the results are 0; gspo's log-ratio is bounded at 20 either way for each token.
    """

    @by_annotation()
    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, legal in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, LEVELS),
            ("is_correction_mode", is_correction_mode, MODES),
            ("is_correction_gating", is_correction_gating, GATES),
        ):
            if value not in legal:
                raise ValueError(f"{name} must be one of {legal}, got {value!r}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode 'clip' needs is_correction_level 'token' and is_correction_gating 'ratio'"
            )
        self.threshold = tuple(check_number("is_correction_threshold", x) for x in is_correction_threshold)
        if len(self.threshold) != 2:
            raise ValueError(f"is_correction_threshold must be (low, high), got {is_correction_threshold!r}")
        if is_correction_gating != "ratio" and is_correction_level != "off" and self.threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold must begin with 0 for {is_correction_gating!r}, which is bounded from above; "
                f"got {is_correction_threshold!r}"
            )
        self.level, self.mode, self.gating = is_correction_level, is_correction_mode, is_correction_gating
        self.policy_loss_type = policy_loss_type
        gspo = policy_loss_type == "gspo"  # a mean over rows, whatever was asked for
        self.token_level_loss = token_level_loss and not gspo
        with renamed({"clip_low": "clip_eps_low", "clip_high": "clip_eps_high", "clip_dual": "dual_clip"}):
            self.config = tk.PolicyLoss(
                "gspo" if gspo else "grpo",
                clip_low=clip_eps_low,
                clip_high=clip_eps_high,
                clip_dual=dual_clip,
                aggregate="token_mean" if self.token_level_loss else "seq_mean_token_mean",
            )

    @by_annotation({"logprobs": "log_probs", "old_logprobs": "old_log_probs"})
    def forward(
        self,
        log_probs: Tensor,  # [B, L]
        old_log_probs: Tensor,  # [B, L]
        advantages: Tensor,  # [B, L]
        action_mask: Tensor | None = None,  # [B, L]
        rollout_log_probs: Tensor | None = None,  # [B, L]
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clip fraction, mean of old - new, mean of rollout - old, share of what the correction dropped).

        The last two are None without a correction, and for gspo, whose ratio is taken to ``rollout_log_probs`` where
        there is one. ``batch_num_tokens`` and ``global_batch_size`` are the global counts of the two ways to aggregate.
        """
        dp_size = check_count("dp_size", dp_size, low=1)
        for name, x in (("batch_num_tokens", batch_num_tokens), ("global_batch_size", global_batch_size)):
            check_divisor(name, x, log_probs.device)
        rows = padded_rows("action_mask", torch.ones_like(log_probs) if action_mask is None else action_mask)
        new, old, a = (
            rows.pack(name, x)
            for name, x in (("log_probs", log_probs), ("old_log_probs", old_log_probs), ("advantages", advantages))
        )
        old, a = old.detach(), a.detach()
        corrects = self.level != "off"
        rollout = old
        if corrects:
            if rollout_log_probs is None:
                raise ValueError(f"rollout_log_probs must be given where is_correction_level is {self.level!r}")
            rollout = rows.pack("rollout_log_probs", rollout_log_probs).detach()
        count = batch_num_tokens if self.token_level_loss else global_batch_size
        layout: dict[str, Any] = {"mask": rows.mask, "per_token": True}
        normalizer = None if count is None else count / dp_size
        gspo = self.policy_loss_type == "gspo"
        base = rollout if gspo else old
        weights, dropped = (None, None) if gspo or not corrects else self._correction(rows, old, rollout)
        with renamed({"normalizer": "batch_num_tokens" if self.token_level_loss else "global_batch_size"}):
            loss, metrics = tk.policy_loss(
                new,
                base,
                a if weights is None else a * weights,
                rows.cu_seqlens,
                config=self.config,
                normalizer=normalizer,
                **layout,
            )
        if weights is not None:  # OpenRLHF counts before the correction's zeros
            metrics = tk.policy_loss(new.detach(), base, a, rows.cu_seqlens, config=self.config, **layout)[1]
        clipped = metrics["clip_low"] + metrics["clip_high"]  # by the first clip, before the dual one
        apart = None if weights is None else rows.mean(rollout - old)
        return loss, clipped, rows.mean(old - new), apart, dropped

    @torch.no_grad()
    def _correction(self, rows: PaddedRows, old: Tensor, rollout: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's weight ``[B * L]``, and the share of the tokens or rows that are outside the thresholds.

        A row without an unmasked token counts as outside, as with OpenRLHF, whose mean there is 0 / 0.
        """
        low, high = self.threshold
        log_ratio = old - rollout
        if self.gating == "ratio":
            gated = log_ratio
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            tv = self.gating == "tv"
            gated = (p - q).abs() if tv else p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if self.level == "seq":
            mask = rows.pad(rows.mask)
            gated = torch.where(mask, rows.pad(gated), 0).sum(-1) / mask.sum(-1)
        statistic = gated.exp() if self.gating == "ratio" else gated
        keep = (statistic >= low) & (statistic <= high)
        if self.mode == "clip":
            return statistic.clamp(low, high), rows.mean((~keep).to(old.dtype))
        if self.level == "seq":
            of_token = keep[:, None].expand(rows.shape).reshape(-1)
            return torch.where(of_token, log_ratio.exp(), 0), (~keep).to(old.dtype).mean()
        return torch.where(keep, log_ratio.exp(), 0), rows.mean((~keep).to(old.dtype))
