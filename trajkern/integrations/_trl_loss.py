"""The losses of TRL's GRPOTrainer and RLOOTrainer on trajkern's, with what these trainers log.

What is logged stays on the device, in the lists where TRL keeps numbers, until :func:`read_logged` reads it at once.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import as_number, renamed
from trajkern.integrations._adapter import (
    GRPO_AGGREGATES,
    GRPOOptions,
    check_reads,
    check_signature,
    clipped,
    held,
    padded_rows,
)

COUNTED = "trajkern_counted"  # completions of a generation, of all ranks, that a loss's mean is of, where not all are
_LEAST = -18.420680743952367  # log 1e-8, TRL's bound of a weight's logarithm
_unread: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers that hold tensors where TRL holds numbers
_CONTROLLER = ("entropy_coef", "_last_world_entropy")  # numbers that an adaptive entropy bonus moves
_PASSED = {
    "model",
    "input_ids",
    "attention_mask",
    "logits_to_keep",
    "batch_size",
    "compute_entropy",
    "compute_aux_loss",
}


# What the _compute_loss of each trainer reads in the tested versions, and what stands in for it honours.
READ = {
    "GRPOTrainer": {
        "self": "_entropy_bonus_enabled _entropy_window_stats _get_per_token_logps_and_entropies _last_world_entropy"
        " _metrics accelerator args aux_loss_enabled beta current_gradient_accumulation_steps entropy_coef epsilon_high"
        " epsilon_low get_gamma_weights get_high_entropy_mask get_off_policy_mask importance_sampling_level loss_type"
        " max_completion_length model off_policy_mask_threshold router_aux_loss_coef top_entropy_quantile"
        " use_adaptive_entropy use_vllm vllm_importance_sampling_correction",
        "args": "delta entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target sapo_temperature_neg"
        " sapo_temperature_pos steps_per_generation use_bias_correction_kl vespo_k_neg vespo_k_pos vespo_lambda_neg"
        " vespo_lambda_pos",
        "inputs": "advantages completion_ids completion_mask image_grid_thw image_position_ids image_sizes"
        " importance_sampling_ratio mm_token_type_ids num_images num_items_in_batch num_tiles old_per_token_logps"
        " pixel_attention_mask pixel_values prompt_ids prompt_mask ref_per_token_logps sampling_per_token_logps"
        " spatial_shapes token_type_ids tool_mask",
    },
    "AsyncGRPOTrainer": {
        "self": "_last_forward_time_s _metrics _step_forward_s _step_forward_tokens _step_samples"
        " _step_seq_len_weighted _step_trained_tokens accelerator aux_loss_enabled current_gradient_accumulation_steps"
        " epsilon_high epsilon_low router_aux_loss_coef",
        "inputs": "advantages attention_mask global_n_forward_tokens global_n_tokens input_ids mean_seq_len"
        " old_log_probs position_ids segment_id shift_labels token_index tree_max_seqlens",
    },
    "RLOOTrainer": {
        "self": "_get_per_token_logps_and_entropies _metrics accelerator args aux_loss_enabled epsilon_high epsilon_low"
        " model router_aux_loss_coef",
        "inputs": "advantages completion_ids completion_mask image_grid_thw image_position_ids image_sizes"
        " mm_token_type_ids num_images num_tiles old_logps pixel_attention_mask pixel_values prompt_ids prompt_mask"
        " spatial_shapes token_type_ids",
    },
}


def loss_method(name: str) -> str:
    """What a trainer of TRL by that name calls its loss."""
    return "compute_loss" if name == "AsyncGRPOTrainer" else "_compute_loss"


def check_fit(name: str, trainer: type, ours: Any) -> None:
    """RuntimeError where a trainer of TRL by that name has not the loss that ``ours`` stands in for."""
    method = loss_method(name)
    theirs = held(trainer, method)
    scored = method == "_compute_loss"  # else the loss runs the model itself
    for other in ("log", "_save_checkpoint", *["_get_per_token_logps_and_entropies"] * scored):
        held(trainer, other)
    check_signature(f"{name}.{method}", theirs, ours)
    known = {f"{of}.{x}" for of, names in READ[name].items() for x in names.split()}
    check_reads(f"{name}.{method}", theirs, known)


def checked_loss(trainer: Any) -> tk.PolicyLoss:
    """The loss of a GRPOTrainer's options as they are now; ValueError where they ask for one that trajkern has not."""
    if trainer.loss_type not in GRPO_AGGREGATES:
        raise ValueError(
            f"loss_type must be one that TRL's GRPOTrainer of the tested versions has, got {trainer.loss_type!r}"
        )
    return options_of(trainer).policy_loss()


def options_of(trainer: Any) -> GRPOOptions:
    """A GRPOTrainer's options, which it keeps in two places."""
    args = trainer.args
    return GRPOOptions(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        beta=trainer.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        max_completion_length=trainer.max_completion_length,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
    )


def clip_of(trainer: Any, **options: Any) -> tk.PolicyLoss:
    """The clipped loss of a trainer that has no other."""
    low, high = (as_number(name, getattr(trainer, name)) for name in ("epsilon_low", "epsilon_high"))
    with renamed({"clip_low": "epsilon_low", "clip_high": "epsilon_high"}):
        return tk.PolicyLoss("grpo", clip_low=low, clip_high=high, **options)


def grpo_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """GRPOTrainer._compute_loss."""
    config = checked_loss(self)
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    new, entropy, auxiliary = _scored(self, model, inputs)
    high = None
    if self.top_entropy_quantile < 1.0:
        high = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
    old, a = inputs.get("old_per_token_logps"), inputs["advantages"]
    a = a[:, None] if a.ndim == 1 else a
    weighted, to_sampler = _weighted(self, inputs, new.detach(), old, a, mask, high)
    accumulation = self.current_gradient_accumulation_steps if self.model.training else 1.0
    rows, per_token = padded_rows("completion_mask", mask), weighted.shape[1] > 1
    common: dict[str, Any] = {
        "mask": rows.mask,
        "per_token": per_token,
        "ref_logprobs": rows.pack("ref_per_token_logps", inputs["ref_per_token_logps"]) if self.beta else None,
        "normalizer": _normalizer(self, inputs, mask, accumulation),
    }

    def loss_of(old: Tensor | None, a: Tensor, config: tk.PolicyLoss) -> Tensor:
        old = None if old is None else rows.pack("old_per_token_logps", old)
        a = a.expand(rows.shape).reshape(-1) if per_token else a[:, 0]
        return tk.policy_loss(rows.pack("log-probs", new), old, a, rows.cu_seqlens, config=config, **common)[0]

    if to_sampler is old or not (self.beta and config.kl == "k3_corrected"):
        loss = loss_of(to_sampler, weighted, config)
    else:  # the KL's ratio is to the old policy all the same
        loss = loss_of(to_sampler, weighted, replace(config, kl_coef=0.0)) + loss_of(old, 0 * weighted, config)
    policy = loss.detach()
    if self.loss_type not in ("cispo", "dapo", "vespo"):  # their normaliser counts the accumulated steps already
        loss = loss / accumulation
    mode = "train" if self.model.training else "eval"
    if self._entropy_bonus_enabled:
        self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy).nanmean())
        loss = loss - _bonus(self, entropy, mask if high is None else mask * high, accumulation)
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * auxiliary / accumulation
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(auxiliary).detach().mean())
    _unread.add(self)
    with torch.no_grad():
        _log(self, config, inputs, new.detach(), entropy, a, mask)
    return loss


def rloo_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """RLOOTrainer._compute_loss: the clipped objective of whole completions, each one's log-prob a single action's."""
    mask = inputs["completion_mask"]
    new, entropy, auxiliary = _scored(self, model, inputs)
    new, old, a = (new * mask).sum(1), inputs["old_logps"], inputs["advantages"]
    if a.ndim != 1:
        raise ValueError(f"advantages must have shape [B] for RLOOTrainer; got {a.ndim} dimensions")
    config = clip_of(self)
    of_one_token = torch.arange(new.shape[0] + 1, device=new.device)
    rows = _rows(self, inputs, new.shape[0])
    loss, _ = tk.policy_loss(new, old, a, of_one_token, config=config, per_token=False, normalizer=rows)
    metrics = self._metrics["train" if self.model.training else "eval"]
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * auxiliary
        metrics["aux_loss"].append(self.accelerator.gather_for_metrics(auxiliary).detach().mean())
    _unread.add(self)
    with torch.no_grad():
        metrics["entropy"].append(_mean(self, entropy, mask, of_tokens=True))
        low, high = clipped((new - old).exp(), a, config)
        for name, x in (("low", low), ("high", high), ("region", low | high)):
            gathered = self.accelerator.gather(x.float())
            metrics[f"clip_ratio/{name}_mean"].append(gathered.nanmean())
            if name != "region":
                end = gathered.min() if name == "low" else gathered.max()
                metrics[f"clip_ratio/{name}_{'min' if name == 'low' else 'max'}"].append(end)
    return loss


def read_logged(trainer: Any) -> None:
    """Makes numbers of the tensors that a trainer's losses left in its metrics and its entropy's controller."""
    lists = [values for of_mode in trainer._metrics.values() for values in of_mode.values()]
    places: list[tuple[Any, Any]] = [(values, at) for values in lists for at in range(len(values))]
    state = vars(trainer)
    places += [(state, name) for name in _CONTROLLER if name in state]
    places = [(owner, at) for owner, at in places if isinstance(owner[at], Tensor)]
    if places:
        numbers = torch.stack([owner[at].double() for owner, at in places]).tolist()
        for (owner, at), number in zip(places, numbers, strict=True):
            owner[at] = number
    _unread.discard(trainer)


def mark_unread(trainer: Any) -> None:
    """Says that a trainer's metrics hold tensors, which :func:`read_logged` is to read."""
    _unread.add(trainer)


def read_all_logged() -> None:
    """:func:`read_logged` of every trainer that has something unread."""
    for trainer in list(_unread):
        read_logged(trainer)


def note(trainer: Any, values: dict[str, Tensor]) -> None:
    """Adds numbers of this rank to what the trainer logs, each as the mean over ranks; no one waits for them."""
    every = trainer.accelerator.gather(torch.stack([x.float() for x in values.values()])[None]).nanmean(0)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, x in zip(values, every.unbind(), strict=True):
        metrics[name].append(x)
    _unread.add(trainer)


def policy_logprobs(self: Any, model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    """The completions' log-probs and, where asked for, entropies ``[B, L]`` and a mixture's balancing loss."""
    ids, attention = (torch.cat((inputs[f"prompt_{x}"], inputs[f"completion_{x}"]), 1) for x in ("ids", "mask"))
    score = self._get_per_token_logps_and_entropies
    others = {name: inputs.get(name) for name in inspect.signature(score).parameters if name not in _PASSED}
    return score(model, ids, attention, inputs["completion_ids"].shape[1], **others, **options)


def _scored(self: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    return policy_logprobs(self, model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled)


def _weighted(
    self: Any, inputs: dict[str, Any], new: Tensor, old: Tensor | None, a: Tensor, mask: Tensor, high: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(advantages ``[B, 1]`` or ``[B, L]``, old log-probs): what multiplies the policy's term, all of it in these.

    Every loss here has f(r, c A) = c f(r, A) for c >= 0, so a factor of the term is one of the advantage.
    """
    if self.off_policy_mask_threshold is not None:
        before = new if old is None else old
        sampled = inputs.get("sampling_per_token_logps", before)
        a = a * self.get_off_policy_mask(a, new, sampled, mask, self.off_policy_mask_threshold)
    if high is not None:
        a = a * high
    ratio: Any = inputs.get("importance_sampling_ratio")
    if self.loss_type == "vespo":
        if old is not None or ratio is not None:
            old = new - _vespo_log_ratio(new, old, mask, ratio)
    elif self.use_vllm and self.vllm_importance_sampling_correction:
        a = a * ratio
    return a, old


def _vespo_log_ratio(new: Tensor, old: Tensor | None, mask: Tensor, ratio: Tensor | None) -> Tensor:
    """The log-ratio to the sampler that VESPO's weight is of, bounded as TRL bounds it; each token has its share."""
    total = new.new_zeros(new.shape[0], 1)
    if old is not None:
        total = ((new - old).clamp(-20.0, 20.0) * mask).sum(1, keepdim=True)
    if ratio is not None:  # also of what is masked, as TRL has it
        total = total + ratio.log().clamp(_LEAST, 20.0).sum(1, keepdim=True)
    return total.clamp(_LEAST, 20.0) / mask.sum(1, keepdim=True).clamp(min=1) * mask


def _normalizer(self: Any, inputs: dict[str, Any], mask: Tensor, accumulation: float) -> Tensor | float:
    if self.loss_type == "bnpo":
        return mask.sum().float().clamp(min=1)
    if self.loss_type not in ("cispo", "dapo", "vespo"):
        return _rows(self, inputs, mask.shape[0])
    count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
    return count * accumulation / self.args.steps_per_generation if self.model.training else count


def _rows(self: Any, inputs: dict[str, Any], rows: int) -> Tensor | float:
    """How many completions the mean of a micro-batch is of: its own, or its share of a generation's that count."""
    if COUNTED not in inputs:
        return max(rows, 1)
    count = inputs[COUNTED].clamp(min=1.0) / self.accelerator.num_processes
    return count / self.args.steps_per_generation if self.model.training else count


def _bonus(self: Any, entropy: Tensor, mask: Tensor, accumulation: float) -> Tensor:
    """The coefficient times the mean entropy; an adaptive coefficient moves at the end of each optimizer step."""
    total, count = (entropy * mask).sum(), mask.sum()
    adaptive, args = self.use_adaptive_entropy, self.args
    coefficient = self.entropy_coef
    if adaptive:
        low = _number(self._last_world_entropy, total) <= args.entropy_target
        coefficient = torch.where(low, _number(coefficient, total), 0).to(total.dtype)
    if self.model.training:
        if adaptive:
            self._entropy_window_stats = torch.stack((total.detach(), count)) + (
                0 if self._entropy_window_stats is None else self._entropy_window_stats
            )
            if self.accelerator.sync_gradients:
                _adapt(self)
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
    return coefficient * total / count.clamp(min=1.0) / accumulation


def _adapt(self: Any) -> None:
    total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
    args, mean = self.args, (total / count.clamp(min=1.0)).double()
    step = torch.where(mean <= args.entropy_target, args.entropy_coef_delta, -args.entropy_coef_delta)
    moved = _number(self.entropy_coef, mean) + step
    self.entropy_coef = moved.clamp(args.entropy_coef_min, args.entropy_coef_max)
    self._last_world_entropy, self._entropy_window_stats = mean, None


def _number(x: Any, like: Tensor) -> Tensor:
    """A number that may be on the device already, as float64 there, without a copy from the host."""
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=like.device)


def _log(
    self: Any, config: tk.PolicyLoss, inputs: dict[str, Any], new: Tensor, entropy: Tensor, a: Tensor, mask: Tensor
) -> None:
    """The shares, the KL and the entropy that GRPOTrainer logs, of the ratios that the loss has."""
    metrics, old = self._metrics["train" if self.model.training else "eval"], inputs.get("old_per_token_logps")
    difference = torch.zeros_like(new) if old is None else new - old
    ratio = difference.exp()
    if self.importance_sampling_level == "sequence":
        ratio = ((difference * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)).exp()
    if self.beta:
        d = inputs["ref_per_token_logps"] - new
        kl = d.exp() - d - 1
        metrics["kl"].append(_mean(self, kl * ratio if self.args.use_bias_correction_kl else kl, mask))
    metrics["entropy"].append(_mean(self, entropy, mask))
    if config.clip_dual is not None:
        ratio = ratio.clamp(max=config.clip_dual)  # before TRL asks what is above the band
    low, high = clipped(ratio, a, config)
    if options_of(self).clips:
        for name, x in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{name}_mean"].append(_mean(self, x.float(), mask))
        shares = [x.float()[:, 0] if x.shape[1] == 1 else (x * mask).sum(1) / mask.sum(1) for x in (low, high)]
        least, most = map(self.accelerator.gather, shares)
        metrics["clip_ratio/low_min"].append(-largest(-least))
        metrics["clip_ratio/high_max"].append(largest(most))
    elif self.loss_type == "cispo":
        metrics["cispo_clip_ratio"].append(_mean(self, high.float(), mask))
    elif self.loss_type == "vespo":
        shape = {x: getattr(self.args, f"vespo_{x}") for x in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
        weight = self.get_gamma_weights(a, difference, mask, inputs.get("importance_sampling_ratio"), **shape)
        metrics["vespo/phi_seq_mean"].append(_mean(self, weight, mask))


def largest(x: Tensor) -> Tensor:
    """Of the numbers, or NaN where there are none."""
    none = x.new_full((1,), -torch.inf)
    largest = torch.cat((torch.where(x.isnan(), none, x), none)).max()
    return torch.where(largest == -torch.inf, torch.nan, largest)


def _mean(self: Any, x: Tensor, mask: Tensor, *, of_tokens: bool = False) -> Tensor:
    """Over the tokens of all ranks; for one value a completion over completions, as GRPOTrainer has it.

    It takes completions of one token for that, too, which RLOOTrainer does not.
    """
    whole = x.shape[1] == 1 and not of_tokens
    total = x.sum() if whole else (x * mask).sum()
    count = torch.full_like(total, x.shape[0]) if whole else mask.sum().to(total.dtype)
    total, count = self.accelerator.reduce(torch.stack((total, count)), reduction="sum")
    return total / count.clamp(min=1.0)
