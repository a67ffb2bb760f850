"""AReaL (1.0.4): its actor's loss on packed tokens, as stand-ins for its functions and as a loss for its engines::

    from trajkern.integrations import areal
    areal.enable()                                                        # in every process that trains
    areal.enable(credit=credit.outcome().gate("well_formed"))             # and its advantages by trajkern.credit
    engine.train_batch(batch, loss_fn=areal.GRPOLoss(eps_clip=0.2), loss_weight_fn=...)    # or in a loop of your own

AReaL's engines hand a loss whole sequences: they gather log-probs over Ulysses and context-parallel ranks before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_number, describe, renamed, suggesting
from trajkern.credit import Spec
from trajkern.integrations import _areal_credit
from trajkern.integrations import _areal_terms as terms
from trajkern.integrations._adapter import Enabled, Patches, check_signature, check_version, credited_by, held
from trajkern.integrations._areal_terms import Pack, Rejected, packed
from trajkern.integrations._arguments import by_annotation
from trajkern.integrations._credit_checks import spec_of

TESTED = ("1.0.4",)
FUNCTIONS = "areal.utils.functional.functional"
HOLDERS = (FUNCTIONS, "areal.utils.functional", "areal.trainer.ppo.actor")  # hold the names from their import on
LEVELS = ("token", "sequence")
UNBOUNDED = 1e9  # above exp(20), the op's largest ratio
_patches = Patches()


@suggesting
def enable(*, credit: Spec | str | None = None, any_version: bool = False) -> Enabled:
    """Puts :func:`ppo_actor_loss_fn` and :func:`sapo_loss_fn` in the place of AReaL's in this process.

    What is around them stays AReaL's: proximal log-probs, M2PO's mask, the teacher's terms, all that it logs. A second
    call undoes the first.

    Args:
        credit: an expression of :mod:`trajkern.credit`, or its "package.module:name". What AReaL's ``PPOActor`` then
            returns as ``advantages`` and ``returns`` is the expression's, and ``loss_mask`` is of who learns. It finds
            "reward", as AReaL shapes it; a reward or a flag for every entry ``[g]`` of a workflow's dictionary; the
            spans "turn"; and "teacher_logprobs" where there is a teacher. Rows of one dictionary are one group.
        any_version: do not warn of an AReaL that this was not tested with.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: AReaL is missing.
        RuntimeError: a version of it that lacks what this replaces, or where that takes something else.
        TypeError, ValueError: a credit that is none, or one that needs what AReaL's actor does not have. At the first
            batch: an option that a credit would not read (``kl_ctl``, ``discount``, ``gae_lambda``, ``adv_norm``,
            ``reward_norm``), and a critic's values.
    """
    check_version("areal", TESTED, any_version)
    disable()
    spec = None if credit is None else spec_of("credit", credit)
    module = importlib.import_module(FUNCTIONS)
    ours: dict[str, Callable[..., Any]] = {"ppo_actor_loss_fn": ppo_actor_loss_fn, "sapo_loss_fn": sapo_loss_fn}
    theirs = {name: held(module, name) for name in ours}
    for name, function in ours.items():
        check_signature(f"AReaL's {name}", theirs[name], function)
    for holder in HOLDERS:
        for name, function in ours.items():
            if holder in sys.modules and vars(sys.modules[holder]).get(name) is theirs[name]:
                _patches.put(vars(sys.modules[holder]), name, function)
    if spec is not None:
        _areal_credit.put(_patches, spec)
    return _patches.enabled("AReaL", disable, credited_by(spec))


def disable() -> None:
    """Takes back what :func:`enable` did; twice does nothing."""
    _patches.undo()


@by_annotation()
def ppo_actor_loss_fn(
    logprobs: Tensor,  # [T] or [B, L]
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,  # [N+1]
) -> tuple[Tensor, dict[str, Tensor]]:
    """AReaL's function of that name: PPO's clipped loss over the tokens of the mask, and statistics of tokens.

    The ratio is to ``proximal_logprobs``, of a token or a sequence's geometric mean (which takes a sequence's mean
    advantage); ``rejection_sampling`` masks tokens or sequences, or bounds their weights proximal / old; the divisor
    is the mask's tokens before that. Loss, gradients and statistics are AReaL's to rounding; log-ratios beyond 20
    either way are bounded in the loss, what stands under ``loss_mask`` is not read, and statistics are 0 there, those
    of the loss also where rejection masks; the filtered fraction is a tensor.

    Raises:
        TypeError, ValueError: naming the argument: another shape than the log-probs', ``c_clip`` of 1 or less, a level,
            metric, aggregation or action that AReaL has not, and ``cu_seqlens`` that is missing or does not end at the
            tokens where sequences have a ratio or a bound (on a GPU that is NaN): a sequence is split over ranks.
    """
    if c_clip is not None and not c_clip > 1:
        raise ValueError(f"c_clip must be greater than 1, got {c_clip}")
    sequence = _is_sequence(importance_sampling_level)
    pack = packed(logprobs, loss_mask, cu_seqlens, sequence or terms.by_sequence(rejection_sampling))
    prox, old, a = (
        pack.flat(name, x)
        for name, x in (
            ("proximal_logprobs", proximal_logprobs),
            ("old_logprobs", old_logprobs),
            ("advantages", advantages),
        )
    )
    count = pack.mask.sum().clamp_min(1)
    found = None if rejection_sampling is None else terms.rejected(pack, prox, old, rejection_sampling)
    given = pack  # before rejection: what AReaL's mean of the KL is of
    pack = pack if found is None else pack._replace(mask=found.mask)
    a = pack.means(a)[pack.owner()] if sequence else a
    higher = "eps_clip" if eps_clip_higher is None else "eps_clip_higher"
    with renamed({"clip_low": "eps_clip", "clip_high": higher, "clip_dual": "c_clip"}):
        config = tk.PolicyLoss(
            "gspo" if sequence else "dapo",
            aggregate="token_mean",
            clip_low=eps_clip,
            clip_high=eps_clip if eps_clip_higher is None else eps_clip_higher,
            clip_dual=c_clip,
        )
    loss = _loss(pack, logprobs, prox, a if found is None else a * found.weights, config, count)
    stat = _statistics(pack, logprobs, prox, old, a, config, found)
    return loss, stat | _shaped(given, {"approx_kl": logprobs.detach().reshape(-1) - prox})


@by_annotation({"sapo_tau_pos": "tau_pos", "sapo_tau_neg": "tau_neg", "ratio_level": "importance_sampling_level"})
def sapo_loss_fn(
    logprobs: Tensor,  # [T] or [B, L]
    old_logprobs: Tensor,
    advantages: Tensor,
    tau_pos: float,
    tau_neg: float,
    loss_mask: Tensor,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,  # [N+1]
) -> tuple[Tensor, dict[str, Tensor]]:
    """AReaL's function of that name: SAPO's gated ratio over the tokens of the mask, and statistics of tokens.

    As :func:`ppo_actor_loss_fn` otherwise; it raises what that raises.
    """
    for name, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if not tau > 0:
            raise ValueError(f"{name} must be positive, got {tau}")
    sequence = _is_sequence(importance_sampling_level)
    pack = packed(logprobs, loss_mask, cu_seqlens, sequence)
    old, a = pack.flat("old_logprobs", old_logprobs), pack.flat("advantages", advantages)
    a = pack.means(a)[pack.owner()] if sequence else a
    config = tk.PolicyLoss(
        "sapo",
        aggregate="token_mean",
        ratio_level=importance_sampling_level,
        sapo_tau_pos=tau_pos,
        sapo_tau_neg=tau_neg,
    )
    loss = _loss(pack, logprobs, old, a, config, pack.mask.sum().clamp_min(1))
    with torch.no_grad():
        log_ratio, ratio = _ratios(pack, logprobs, old, sequence)
        above, below = (torch.sigmoid(tau * (ratio - 1)) * (4 / tau) for tau in (tau_pos, tau_neg))
        gate = torch.where(a > 0, above, below)
        none = torch.zeros_like(pack.mask)
        stat = {
            "loss": -gate * a,
            "importance_weight": ratio,
            "approx_kl": log_ratio,
            "clip_mask": none,
            "dual_clip_mask": none,
            "sapo_soft_gate": gate,
            "sapo_scaled_gate_pos": above,
            "sapo_scaled_gate_neg": below,
        }
    return loss, _shaped(pack, stat)


def _is_sequence(level: str) -> bool:
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be one of {LEVELS}, got {level!r}")
    return level == "sequence"


def _loss(pack: Pack, new: Tensor, old: Tensor, a: Tensor, config: tk.PolicyLoss, count: Tensor) -> Tensor:
    loss, _ = tk.policy_loss(
        new.reshape(-1),
        old,
        a,
        pack.cu_seqlens,
        config=config,
        mask=pack.mask,
        normalizer=count * pack.guard(),
        per_token=True,
    )
    return loss


def _ratios(pack: Pack, new: Tensor, old: Tensor, sequence: bool) -> tuple[Tensor, Tensor]:
    """The log-ratios of tokens, and the ratio that the loss has, a sequence's on all of its tokens."""
    log_ratio = new.detach().reshape(-1) - old
    ratio = pack.means(log_ratio).exp()[pack.owner()] if sequence else log_ratio.exp()
    return log_ratio, torch.where(pack.mask, ratio, 0)


@torch.no_grad()
def _statistics(
    pack: Pack, new: Tensor, prox: Tensor, old: Tensor, a: Tensor, config: tk.PolicyLoss, found: Rejected | None
) -> dict[str, Tensor]:
    _, ratio = _ratios(pack, new, prox, config.resolved_ratio_level == "sequence")
    plain, bounded = -a * ratio, -a * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss, clipped = torch.maximum(plain, bounded), pack.mask & (plain < bounded)
    over = torch.zeros_like(clipped)
    if config.clip_dual is not None:
        bound = config.clip_dual * a.abs()
        over, loss = pack.mask & (bound < loss), torch.minimum(loss, bound)
    stat = {
        "loss": loss,
        "importance_weight": ratio,
        "clip_mask": clipped,
        "dual_clip_mask": over,
    }
    if found is not None:
        behaved = pack.mask & (found.weights > 0)
        stat |= {
            "loss": loss * found.weights,
            "behave_approx_kl": torch.where(behaved, prox - old, 0),
            "behave_imp_weight": found.weights,
            "behave_mask": behaved,
        }
    return _shaped(pack, stat) | ({} if found is None else {"filtered_fraction": found.share})


def _shaped(pack: Pack, stat: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.where(pack.mask, x, 0).to(x.dtype).view(pack.shape) for name, x in stat.items()}


def _number(data: Mapping[str, Any], name: str, default: float) -> float:
    return float(check_number(name, data.get(name, default)))


@dataclass(frozen=True)
class GRPOLoss:
    """AReaL's ``grpo_loss_fn`` with its options: a loss for ``engine.train_batch(batch, loss_fn=..., ...)``.

    The number is over the micro-batch's tokens; AReaL weighs micro-batches with ``loss_weight_fn``, which its actor has
    count the ``loss_mask``. It logs nothing: ``record`` is called with the statistics of :func:`ppo_actor_loss_fn` or
    :func:`sapo_loss_fn` where it is given.

    Args:
        eps_clip, eps_clip_higher, c_clip, rejection_sampling, importance_sampling_level: as
            :func:`ppo_actor_loss_fn` has them.
        m2_threshold: M2PO's: the tokens whose squared log-ratio of old to proximal is largest leave the loss, until the
            mean of the rest is below it.
        current_version, prox_logp_method: where the proximal log-probs are from: "recompute" and "metrics" need
            ``prox_logp`` in the batch; "loglinear" forms them without it, of ``versions`` and ``current_version``.
        use_sapo_loss, sapo_tau_pos, sapo_tau_neg: SAPO's loss, to the old log-probs; not with ``use_decoupled_loss``.
        record: what takes the statistics.
    """

    eps_clip: float = 0.2
    eps_clip_higher: float | None = None
    c_clip: float | None = None
    rejection_sampling: Any = None
    m2_threshold: float | None = None
    importance_sampling_level: str = "token"
    current_version: int | None = None
    prox_logp_method: str = "recompute"
    use_sapo_loss: bool = False
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    use_decoupled_loss: bool = False
    record: Callable[[dict[str, Tensor]], Any] | None = None

    def __post_init__(self) -> None:
        methods = ("recompute", "loglinear", "metrics")
        if self.prox_logp_method not in methods:
            raise ValueError(f"prox_logp_method must be one of {methods}, got {self.prox_logp_method!r}")
        if self.use_sapo_loss and self.use_decoupled_loss:
            raise ValueError("use_decoupled_loss must be False where use_sapo_loss is True, got True")

    def __call__(
        self,
        logprobs: Tensor,  # [T]
        entropy: Tensor | None,  # [T], only logged by AReaL
        input_data: Mapping[str, Any],
        vocab_min_logits: Tensor | None = None,
        vocab_max_logits: Tensor | None = None,
    ) -> Tensor:
        """The loss of a micro-batch: ``logprobs``, ``advantages``, ``loss_mask`` and, where options ask for them,
        ``prox_logp``, ``versions``, ``cu_seqlens``; a ``teacher_logp`` with ``rl_loss_weight`` and
        ``distill_loss_weight``. ``entropy`` and the logits' extremes are what an engine passes, and are not read."""
        if not isinstance(input_data, Mapping):
            raise TypeError(f"input_data must be a mapping, got {describe(input_data)}")
        for name in ("logprobs", "advantages", "loss_mask"):
            if input_data.get(name) is None:
                raise ValueError(f"input_data must have {name!r}, got {sorted(input_data)}")
        pack = packed(logprobs, input_data["loss_mask"], None, by_sequence=False)
        old = pack.flat("logprobs", input_data["logprobs"])
        prox = self._proximal(pack, logprobs, old, input_data)
        if self.m2_threshold is not None:
            pack = pack._replace(mask=terms.m2po(pack.mask, old, prox, self.m2_threshold))
        teacher, weight = input_data.get("teacher_logp"), _number(input_data, "rl_loss_weight", 1.0)
        distill = _number(input_data, "distill_loss_weight", 0.005)
        loss = logprobs.new_zeros(())
        if teacher is None or weight or self.record is not None:
            loss = self._rl(pack, logprobs, old, prox, input_data)
        if teacher is None:
            return loss
        apart = pack.flat("teacher_logp", teacher) - logprobs.reshape(-1)
        count = pack.mask.sum().clamp_min(1)
        if weight:
            return weight * loss - distill * (torch.where(pack.mask, apart, 0).sum() / count)
        unclipped = tk.PolicyLoss("dapo", clip_low=1.0, clip_high=UNBOUNDED)
        return _loss(pack, logprobs, old, distill * apart.detach(), unclipped, count)

    def _rl(self, pack: Pack, logprobs: Tensor, old: Tensor, prox: Tensor, input_data: Mapping[str, Any]) -> Tensor:
        shape, level = pack.shape, self.importance_sampling_level
        mask, old, prox = (x.view(shape) for x in (pack.mask, old, prox))
        advantages, bounds = input_data["advantages"], input_data.get("cu_seqlens")
        if self.use_sapo_loss:
            taus = self.sapo_tau_pos, self.sapo_tau_neg
            loss, stat = sapo_loss_fn(logprobs, old, advantages, *taus, mask, level, bounds)
        else:
            loss, stat = ppo_actor_loss_fn(
                logprobs,
                prox,
                old,
                advantages,
                self.eps_clip,
                mask,
                eps_clip_higher=self.eps_clip_higher,
                c_clip=self.c_clip,
                rejection_sampling=self.rejection_sampling,
                importance_sampling_level=level,
                cu_seqlens=bounds,
            )
        if self.record is not None:
            self.record(stat)
        return loss

    def _proximal(self, pack: Pack, logprobs: Tensor, old: Tensor, input_data: Mapping[str, Any]) -> Tensor:
        """The proximal log-probs ``[T]``; NaN where they are not finite, which a clamped log-ratio would hide."""
        given = input_data.get("prox_logp")
        if given is None:
            if self.prox_logp_method != "loglinear":
                raise ValueError(f"input_data must have 'prox_logp' for prox_logp_method {self.prox_logp_method!r}")
            versions = input_data.get("versions")
            if versions is None or self.current_version is None:
                raise ValueError("prox_logp_method 'loglinear' needs versions in input_data and current_version")
            new = logprobs.detach().reshape(-1)
            prox = terms.loglinear(new, old, pack.flat("versions", versions), self.current_version)
        else:
            prox = pack.flat("prox_logp", given)
        finite = prox.isfinite()
        if prox.is_cpu and not bool((finite | ~pack.mask).all()):
            raise ValueError("prox_logp must be finite where loss_mask is True")
        return torch.where(finite, prox, torch.nan)
