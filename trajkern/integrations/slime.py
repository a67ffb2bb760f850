"""slime (0.3.1) and miles (0.1.0): trajkern's loss, advantages, sampler corrections and reducers by their path flags::

    --loss-type custom_loss --custom-loss-function-path trajkern.integrations.slime.policy_loss
    --custom-advantage-function-path trajkern.integrations.slime.advantages                      (slime only)
    --use-tis --custom-tis-function-path trajkern.integrations.slime.icepop                      (or tis, sequence_mask)
    --custom-pg-loss-reducer-function-path trajkern.integrations.slime.pg_loss_reducer

Each works without the others. The hosts hand out lists of a tensor a sample; here they are one pack, so that no
computation is repeated per sample. Read at slime's commit 624b824a898a and miles' 31f1ca961a94.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_flag, check_number, check_tensor, describe, renamed
from trajkern._dtypes import FLOATS
from trajkern.integrations._adapter import clipped
from trajkern.integrations._slime_batch import (
    Samples,
    check_reducer,
    denominators_of,
    entry,
    loaded,
    ratio_of,
    samples_of,
    scored,
    this_ranks,
)
from trajkern.integrations._slime_corrections import (
    CORRECTIONS,
    Correction,
    correction,
    icepop,
    sequence_mask,
    tis,
)
from trajkern.integrations._slime_credit import advantages
from trajkern.integrations._slime_options import check_layout, is_miles, option
from trajkern.losses.kinds import LOG_RATIO_BOUND

KINDS = {"gspo": "gspo", "cispo": "cispo"} | dict.fromkeys(
    ("grpo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"), "grpo"
)
KL_TYPES = ("k1", "k2", "k3", "low_var_kl")
__all__ = ["advantages", "fixed_length", "icepop", "pg_loss_reducer", "policy_loss", "sequence_mask", "tis"]


def policy_loss(
    args: Any,
    batch: Mapping[str, Any],
    logits: Tensor,  # [1, T, V]
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The hosts' ``policy_loss_function``, for ``--custom-loss-function-path``: its loss, gradient and metrics.

    With the ratio r, the advantage A and the weight w of a token's sample (one over the unmasked tokens of its rollout,
    or 1 with ``--calculate-per-token-loss``) it is

        sum of w (c f(r, A) + kl_loss_coef KL - entropy_coef H)

    where f is the kind of ``--advantage-estimator`` in :func:`trajkern.policy_loss`: gspo, cispo, else grpo, clipped by
    ``eps_clip``, ``eps_clip_high`` and ``eps_clip_c``; c is the sampler correction (``--use-tis`` and
    ``--get-mismatch-metrics``, which both apply it) times the mask of ``--use-opsm``. KL is in all of
    ``--kl-loss-type``, with ``--use-unbiased-kl`` times r. w may be another in the first term, by a reducer of this
    module. Log-ratios are bounded at 20 either way, which slime does not do.

    ``sum_of_sample_mean`` is not called but once, to see that w is what it multiplies with.

    Under context parallelism a rank's loss and metrics are its share of them, which add up to the batch's as the hosts'
    do; log-probs are the hosts' then, and what is of a whole sample (gspo's ratio, OPSM's mean, a sequence mask, miles'
    effective sample size) is over all ranks' tokens, a number or a few a sample travelling.

    Args:
        args: the host's options.
        batch: a micro-batch: unconcat_tokens, total_lengths, response_lengths, loss_masks, advantages, log_probs, and
            what the options need of rollout_log_probs, ref_log_probs, rollout_mask_sums and opd_reverse_kl.
        logits: float32 or bfloat16 ``[1, T, V]``, not yet divided by ``rollout_temperature``.
        sum_of_sample_mean: the host's reducer.

    Returns:
        (loss, metrics): a scalar, and the host's metrics by its names, scalars on the device without a gradient. A
        micro-batch without a response token has loss 0.

    Raises:
        TypeError, ValueError: naming what the batch or the options lack, or an option that is refused:
            ``qkv_format`` bshd, ``true_on_policy_mode``, a correction or a reducer
            that is not of this module (nor one of the hosts' own corrections).
    """
    call = _Call.of(args, batch)
    check_reducer(sum_of_sample_mean, call.samples, call.weights)
    wants_entropy = option(args, "entropy_coef") != 0 or option(args, "observe_training_entropy", True)
    new, entropy = scored(args, batch, logits, call.samples, wants_entropy)
    old, train = call.old_log_probs(new.detach())
    moved = call.samples.taken(new.detach() - old)
    corrected = call.correction(train)
    kept = None if corrected is None else corrected.kept
    weights = call.weights if kept is None else torch.where(kept, call.weights, 0)
    factor, masked = call.factor(moved, corrected)
    pg_loss, _ = tk.policy_loss(
        new,
        old,
        call.advantages * call.pg_weights(weights, kept) * factor,
        call.samples.cu_seqlens,
        config=call.config,
        mask=call.samples.mask,
        per_token=True,
        sequence_group=call.samples.ranks if call.config.resolved_ratio_level == "sequence" else None,
    )
    pg_loss = call.share(pg_loss)
    loss, metrics = pg_loss, {"pg_loss": pg_loss.detach(), "entropy_loss": torch.zeros_like(pg_loss.detach())}
    if entropy is not None:
        entropy_loss = call.samples.taken(entropy) @ weights
        metrics["entropy_loss"] = entropy_loss.detach()
        if option(args, "entropy_coef") != 0:
            loss = loss - option(args, "entropy_coef") * entropy_loss
    if option(args, "use_kl_loss"):
        kl_loss = call.kl(new, old) @ weights
        metrics["kl_loss"] = kl_loss.detach()
        if option(args, "kl_loss_coef") != 0:
            loss = loss + option(args, "kl_loss_coef") * kl_loss
    metrics |= masked | call.metrics(new.detach(), old, moved, weights)
    if corrected is not None:
        ratio = ratio_of(call.of_ratio(moved))
        metrics |= {name: x @ call.weights for name, x in (corrected.metrics | {"ois": ratio}).items()}
    return loss, {"loss": loss.detach(), **metrics}


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of the loss: its options and its micro-batch, checked."""

    args: Any
    batch: Mapping[str, Any]
    samples: Samples
    config: tk.PolicyLoss
    advantages: Tensor  # [R]
    weights: Tensor  # [R]

    @classmethod
    def of(cls, args: Any, batch: Mapping[str, Any]) -> _Call:
        check_layout(args, "policy_loss")
        samples = this_ranks(args, samples_of(batch))
        if batch.get("advantages") is None:
            raise ValueError(
                "the batch must have advantages, which --disable-compute-advantages-and-returns leaves out"
            )
        estimator = option(args, "advantage_estimator")
        if estimator not in KINDS:
            raise ValueError(f"advantage_estimator must be one of {', '.join(KINDS)}, got {estimator!r}")
        high = option(args, "eps_clip_high")
        name = "eps_clip" if high is None else "eps_clip_high"
        with renamed({"clip_low": "eps_clip", "clip_high": name, "clip_dual": "eps_clip_c"}):
            config = tk.PolicyLoss(
                KINDS[estimator],
                clip_low=option(args, "eps_clip"),
                clip_high=option(args, name),
                clip_dual=None if estimator == "cispo" else option(args, "eps_clip_c", None),
                aggregate="token_sum",
            )
        weights = samples.weights(denominators_of(batch, samples), option(args, "calculate_per_token_loss"))
        return cls(args, batch, samples, config, samples.flat("advantages", batch["advantages"]), weights)

    def share(self, loss: Tensor) -> Tensor:
        """The rank's of what the hosts add up over ranks: of a loss that each has whole an equal one."""
        if self.samples.ranks is None or self.config.resolved_ratio_level == "token":
            return loss
        return loss - (1 - 1 / dist.get_world_size(self.samples.ranks)) * loss.detach()

    def field(self, name: str, why: str) -> Tensor:
        """A list of the batch as ``[R]``; ValueError where there is none."""
        found = entry(self.batch, name)
        if found is None:
            raise ValueError(f"the batch must have {name} where {why}; it has none")
        return self.samples.flat(name, found)

    def old_log_probs(self, new: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what the ratio is taken to, what the trainer scored, if anything), ``[R]`` each."""
        stored = entry(self.batch, "log_probs")
        anew = option(self.args, "skip_actor_forward_only") if is_miles(self.args) else not stored
        train = new if anew else None
        if stored and not anew:
            train = self.samples.flat("log_probs", stored)
        if option(self.args, "use_rollout_logprobs"):
            return self.field("rollout_log_probs", "use_rollout_logprobs is True"), train
        train = self.field("log_probs", "skip_actor_forward_only is False") if train is None else train
        return train, train

    def correction(self, train: Tensor | None) -> Correction | None:
        if not (option(self.args, "use_tis") or option(self.args, "get_mismatch_metrics")):
            return None
        path = option(self.args, "custom_tis_function_path")
        kind = "tis" if path is None else CORRECTIONS.get(path)
        if kind is None:
            raise ValueError(
                f"custom_tis_function_path must be None or one of {', '.join(CORRECTIONS)} beside trajkern's "
                f"policy_loss, which has no loss per token to hand to another; got {path!r}"
            )
        rollout = self.field("rollout_log_probs", "use_tis or get_mismatch_metrics is True")
        train = self.field("log_probs", "use_tis or get_mismatch_metrics is True") if train is None else train
        return correction(self.args, kind, train - rollout, self.samples)

    def factor(self, moved: Tensor, corrected: Correction | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What each token's policy term is multiplied with, ``[R]``, and the metrics of what is masked out."""
        factor = torch.ones_like(self.weights) if corrected is None else corrected.factor
        if not option(self.args, "use_opsm"):
            return factor, {}
        apart = tk.spread(-self.samples.means(moved), self.samples.whole)
        out = (self.advantages < 0) & (apart > option(self.args, "opsm_delta"))
        of_sample = tk.span_reduce(out.float(), self.samples.whole, "sum")
        fraction = (of_sample / self.samples.counts.clamp_min(1)).sum()
        return torch.where(out, 0, factor), {"opsm_clipfrac": fraction}

    def pg_weights(self, weights: Tensor, kept: Tensor | None) -> Tensor:
        """What each token's policy term is summed with, ``[R]``: as the other terms, but for a reducer."""
        path = option(self.args, "custom_pg_loss_reducer_function_path", None)
        if path is None:
            return weights
        reducer = loaded("custom_pg_loss_reducer_function_path", path)
        if not isinstance(reducer, Reducer):
            raise ValueError(
                "custom_pg_loss_reducer_function_path must be None or name trajkern.integrations.slime's "
                "pg_loss_reducer or a fixed_length(...) beside its policy_loss, which has no loss per token to hand "
                f"to another; got {path!r}"
            )
        of_tokens = reducer.weights(self.samples, option(self.args, "calculate_per_token_loss"))
        return of_tokens if kept is None else torch.where(kept, of_tokens, 0)

    def kl(self, new: Tensor, old: Tensor) -> Tensor:
        """The estimate of KL(policy || reference) of each token, ``[R]``, 0 under the mask."""
        ref = self.field("ref_log_probs", "use_kl_loss is True")
        ratio = ratio_of(self.samples.taken(new - old)) if option(self.args, "use_unbiased_kl") else None
        return _kl(option(self.args, "kl_loss_type"), self.samples.taken(new - ref), ratio)

    def of_ratio(self, moved: Tensor) -> Tensor:
        """log r of each token, as the kind of loss has it."""
        if self.config.kind != "gspo":
            return moved
        return tk.spread(self.samples.means(moved), self.samples.whole)

    @torch.no_grad()
    def metrics(self, new: Tensor, old: Tensor, moved: Tensor, weights: Tensor) -> dict[str, Tensor]:
        log_ratio = self.of_ratio(moved)
        ratio = ratio_of(log_ratio)
        if self.config.kind == "cispo":
            outside = (ratio < 1 - self.config.clip_low) | (ratio > 1 + self.config.clip_high)
        else:
            below, above = clipped(ratio, self.advantages, self.config)
            outside = below | above
        found = {"pg_clipfrac": outside.float() @ weights, "ppo_kl": -log_ratio @ weights}
        if (found_rollout := entry(self.batch, "rollout_log_probs")) is not None:
            rollout = self.samples.flat("rollout_log_probs", found_rollout)
            base = new if option(self.args, "use_rollout_logprobs") and not is_miles(self.args) else old
            apart = self.samples.taken(rollout - base)
            found["train_rollout_logprob_abs_diff"] = apart.abs() @ weights
            if is_miles(self.args):
                found["train_rollout_kl"] = _kl("low_var_kl", apart) @ weights
        if is_miles(self.args):
            found["ess_ratio"] = self._effective_share(ratio)
        if (reverse := entry(self.batch, "opd_reverse_kl")) is not None:
            apart = self.samples.flat("opd_reverse_kl", reverse)
            found["opd_reverse_kl"] = self.samples.taken(apart) @ weights
        return found

    def _effective_share(self, ratio: Tensor) -> Tensor:
        """The sum over samples of (sum r)^2 / (tokens * sum r^2); with a loss per token times their tokens.

        Of all context-parallel ranks' tokens, and told by the first, as miles adds the ranks' up.
        """
        tokens = self.samples.counts.clamp_min(1)
        of_sample = self.samples.sums(ratio).square() / self.samples.sums(ratio.square()).clamp_min(1e-8)
        share = (of_sample if option(self.args, "calculate_per_token_loss") else of_sample / tokens).sum()
        return share if self.samples.ranks is None or dist.get_rank(self.samples.ranks) == 0 else 0 * share


def _kl(kind: str, log_ratio: Tensor, ratio: Tensor | None = None) -> Tensor:
    if kind not in KL_TYPES:
        raise ValueError(f"kl_loss_type must be one of {', '.join(KL_TYPES)}, got {kind!r}")
    bounded = (-log_ratio).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    kl = {"k1": lambda: log_ratio, "k2": lambda: log_ratio.square() / 2}.get(kind, lambda: bounded.expm1() - bounded)()
    kl = kl if ratio is None else ratio * kl
    return kl.clamp(-10, 10) if kind == "low_var_kl" else kl


@dataclass(frozen=True)
class Reducer:
    """What ``--custom-pg-loss-reducer-function-path`` may name: :data:`pg_loss_reducer` or a :func:`fixed_length`.

    Called with the samples it returns the function of a loss per token ``[R]`` that sums it, with a gradient.
    """

    length: float | None

    def __call__(
        self,
        total_lengths: Sequence[int],
        response_lengths: Sequence[int],
        loss_masks: Sequence[Tensor],  # [R_n] each
        calculate_per_token_loss: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        samples = Samples.of(total_lengths, response_lengths, loss_masks)
        weights = self.weights(samples, calculate_per_token_loss)

        def summed(x: Tensor) -> Tensor:
            check_tensor("the loss", x, dtypes=FLOATS)
            if x.shape != weights.shape:
                raise ValueError(
                    f"the loss must have the {list(weights.shape)} tokens of response_lengths, which no context "
                    f"parallelism has split; got {describe(x)}"
                )
            return samples.taken(x) @ weights.to(x.dtype)

        return summed

    def weights(self, samples: Samples, per_token: bool) -> Tensor:
        """What each token is multiplied with, ``[R]``."""
        per_token = check_flag("calculate_per_token_loss", per_token)
        if self.length is None:
            return samples.weights(None, per_token)
        if per_token:
            raise ValueError(
                "calculate_per_token_loss must be False with fixed_length, which divides by a length of its own"
            )
        return samples.mask.float() / self.length


pg_loss_reducer = Reducer(None)  # each sample by its own tokens, where the hosts take those of its rollout


def fixed_length(length: float) -> Reducer:
    """Each sample's sum divided by ``length``, as Dr. GRPO has it (arXiv 2503.20783).

    Name it in a module of yours, ``reducer = slime.fixed_length(4096)``, and that in the flag.
    """
    return Reducer(check_number("length", length, above=0))
