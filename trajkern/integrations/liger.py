"""Liger-Kernel (0.8.5): its fused GRPO loss, under its own name and arguments, on trajkern's head::

    from trajkern.integrations.liger import LigerFusedLinearGRPOLoss    # instead of liger_kernel.chunked_loss

:func:`enable` puts the class in the place of Liger's own, for code that imports it from there, such as a TRL that has
``use_liger_kernel`` for GRPO. The class itself does not need Liger-Kernel.
"""

from __future__ import annotations

import importlib
import sys

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_divisor, check_number, renamed, suggesting
from trajkern.integrations._adapter import (
    GRPO_AGGREGATES,
    Enabled,
    GRPOOptions,
    PaddedRows,
    Patches,
    check_signature,
    check_version,
    clipped,
    held,
    padded_rows,
)
from trajkern.integrations._arguments import by_annotation

TESTED = ("0.8.5",)
HOLDERS = ("liger_kernel.chunked_loss", "liger_kernel.chunked_loss.grpo_loss", "trl.trainer.grpo_trainer")
_patches = Patches()


@suggesting
def enable(*, any_version: bool = False) -> Enabled:
    """Puts :class:`LigerFusedLinearGRPOLoss` in the place of Liger's. A second call undoes the first.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: Liger-Kernel is missing.
        RuntimeError: a version of it that lacks what this replaces, or where that takes something else. Another than
            the tested versions is warned of, unless ``any_version`` is True.
    """
    check_version("liger-kernel", TESTED, any_version)
    disable()
    for holder in HOLDERS[:2]:
        theirs = held(importlib.import_module(holder), "LigerFusedLinearGRPOLoss")
        check_signature("LigerFusedLinearGRPOLoss", theirs.__init__, LigerFusedLinearGRPOLoss.__init__)
        check_signature("LigerFusedLinearGRPOLoss.forward", theirs.forward, LigerFusedLinearGRPOLoss.forward)
    for holder in HOLDERS:
        if "LigerFusedLinearGRPOLoss" in vars(sys.modules.get(holder, sys)):
            _patches.put(vars(sys.modules[holder]), "LigerFusedLinearGRPOLoss", LigerFusedLinearGRPOLoss)
    return _patches.enabled("Liger-Kernel", disable)


def disable() -> None:
    """Takes back what :func:`enable` did; twice does nothing."""
    _patches.undo()


# what forward calls the arguments of trajkern.linear_policy_loss
INNER = {
    "hidden": "_input",
    "weight": "lin_weight",
    "targets": "selected_token_ids",
    "old_logprobs": "old_per_token_logps",
    "ref_logprobs": "ref_per_token_logps",
    "normalizer": "num_items_in_batch",
}
REFERENCE = {"hidden": "ref_input", "weight": "ref_weight", "bias": "ref_bias"}


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Liger's class of that name: GRPO and its relatives from hidden states, without the logits.

    Arguments, results and gradients are Liger's to rounding (:func:`trajkern.linear_policy_loss` has the formulas);
    ``compiled`` and ``chunk_size`` choose among Liger's own ways and change nothing here. Log-ratios and the KL's
    exponent are bounded at 20 either way. As in Liger, the means over rows count rows without an unmasked token.

    Not supported, and refused: ``delta`` below 1 + epsilon_high; "cispo" with epsilon_high, its upper bound, below 1;
    "luspo" with token-level ratios, a KL term or a ratio per token, where Liger averages padding too; "vespo" with
    ``vllm_is_ratio``.
    """

    @by_annotation()
    def __init__(
        self,
        # Liger's arguments in Liger's order. The reference and how Liger computes:
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        # The loss:
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        temperature = check_number("temperature", temperature, above=0)
        if loss_type not in GRPO_AGGREGATES:
            raise ValueError(f"loss_type must be one of {tuple(GRPO_AGGREGATES)}, got {loss_type!r}")
        if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"importance_sampling_level must be 'token' for loss_type {loss_type!r}, got 'sequence'")
        if loss_type == "luspo" and (importance_sampling_level != "sequence" or beta != 0):
            raise ValueError(
                f"loss_type 'luspo' must have importance_sampling_level 'sequence' and beta 0 here; "
                f"got {importance_sampling_level!r} and {beta}"
            )
        options = GRPOOptions(
            loss_type=loss_type,
            importance_sampling_level=importance_sampling_level,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            beta=beta if use_ref_model else 0.0,
            use_bias_correction_kl=use_bias_correction_kl,
            max_completion_length=max_completion_length,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )
        self.beta, self.use_ref_model, self.temperature = beta, use_ref_model, temperature
        self.loss_type, self.clips, self.config = loss_type, options.clips, options.policy_loss()

    @by_annotation(INNER)
    def forward(
        self,
        # Liger's arguments in Liger's order. The policy:
        _input: Tensor,  # [B, L, H]
        lin_weight: Tensor,  # [V, H]
        selected_token_ids: Tensor,  # [B, L]
        attention_mask: Tensor,  # [B, L]
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        # What it is compared with:
        ref_per_token_logps: Tensor | None = None,  # [B, L]
        old_per_token_logps: Tensor | None = None,  # [B, L]
        ref_input: Tensor | None = None,  # [B, L, H]
        ref_weight: Tensor | None = None,  # [V, H]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B, L], [B, 1] or [B]
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (mean KL where beta is not 0, clip fraction)); the loss is differentiable in _input, weight and bias.

        Without ``ref_per_token_logps`` the reference's log-probs are computed from its hidden states and head. As in
        Liger, none of these is read with ``use_ref_model`` False, and the KL is then 0.
        """
        rows = padded_rows("attention_mask", attention_mask)
        targets = rows.pack("selected_token_ids", selected_token_ids)
        reference = self._reference(rows, targets, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        old = None if old_per_token_logps is None else rows.pack("old_per_token_logps", old_per_token_logps)
        a, per_token = advantages.detach(), False
        if vllm_is_ratio is not None:
            a, per_token = self._weighted(rows, a, vllm_is_ratio), True
        hidden = self._hidden(rows, "_input", _input)
        loss, metrics = tk.linear_policy_loss(
            hidden,
            lin_weight.to(hidden.dtype),
            targets,
            old,
            a,
            rows.cu_seqlens,
            config=self.config,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=self.temperature,
            mask=rows.mask,
            ref_logprobs=reference,
            normalizer=self._normalizer(rows, num_items_in_batch),
            per_token=per_token,
            with_logprobs=True,
        )
        if self.clips and vllm_is_ratio is None:  # whose zeros are not clipped
            share = metrics["clip_low"] + metrics["clip_high"]
        else:
            share = self._clip_share(rows, metrics["logprobs"], old, advantages.detach())
        kl = metrics["kl"] if self.use_ref_model else torch.zeros_like(share)
        return loss, (kl, share) if self.beta != 0 else (share,)

    @staticmethod
    def _hidden(rows: PaddedRows, name: str, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[:2] != rows.shape:
            raise ValueError(f"{name} must have shape {[*rows.shape, 'H']}, got {list(x.shape)}")
        return x.reshape(-1, x.shape[-1])

    def _reference(self, rows, targets, logprobs, hidden, weight, bias) -> Tensor | None:
        if not self.use_ref_model or self.beta == 0:
            return None
        if logprobs is not None:
            return rows.pack("ref_per_token_logps", logprobs).float()
        if hidden is None or weight is None:
            raise ValueError(
                "ref_per_token_logps, or ref_input and ref_weight, must be given where use_ref_model is True"
            )
        flat = self._hidden(rows, "ref_input", hidden)
        with torch.no_grad(), renamed(REFERENCE):
            return tk.linear_logprobs(
                flat,
                weight.to(flat.dtype),
                targets,
                bias=None if bias is None else bias.to(flat.dtype),
                temperature=self.temperature,
                mask=rows.mask,
            )

    def _weighted(self, rows: PaddedRows, advantages: Tensor, ratio: Tensor) -> Tensor:
        """w A per token, which gives w times the policy's term: all of these have f(r, w A) = w f(r, A)."""
        if self.loss_type == "vespo":
            raise ValueError("vllm_is_ratio must be None for loss_type 'vespo', which is not supported with it here")
        ratio = ratio[:, None] if ratio.ndim == 1 else ratio
        legal = [(rows.shape[0], 1)] + ([] if self.loss_type == "luspo" else [tuple(rows.shape)])
        if tuple(ratio.shape) not in legal:
            raise ValueError(f"vllm_is_ratio must have shape {' or '.join(map(str, legal))}, got {tuple(ratio.shape)}")
        return (ratio.detach() * advantages[:, None]).expand(rows.shape).reshape(-1)

    def _normalizer(self, rows: PaddedRows, num_items: float | Tensor | None) -> float | Tensor | None:
        if self.loss_type == "bnpo":
            return None
        if self.config.resolved_aggregate != "token_mean":
            return max(rows.shape[0], 1)
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if spread else 1
        if num_items is None:
            count = rows.mask.sum().float()
            if spread:
                torch.distributed.all_reduce(count)
        else:
            check_divisor("num_items_in_batch", num_items, rows.mask.device)
            count = torch.as_tensor(num_items, device=rows.mask.device).float()
        return (count / ranks).clamp_min(1)

    def _clip_share(self, rows: PaddedRows, new: Tensor, old: Tensor | None, advantages: Tensor) -> Tensor:
        """The share of tokens whose ratio the first clip cuts in the direction of the advantage, as Liger counts."""
        if old is None or not (self.clips or self.loss_type == "cispo"):
            return new.new_zeros(())
        log_ratio, mask = rows.pad(torch.where(rows.mask, new - old, 0)), rows.pad(rows.mask)
        if self.config.resolved_ratio_level == "sequence":
            log_ratio = (log_ratio.sum(-1) / mask.sum(-1).clamp_min(1))[:, None].expand(rows.shape)
        low, high = clipped(log_ratio.exp(), advantages[:, None], self.config)
        return rows.mean((low | high if self.clips else high).to(new.dtype))
