"""NeMo-RL (0.7.0, and read at commit 7ea279a): its clipped policy loss in one call of trajkern's op::

    from trajkern.integrations import nemo_rl
    grpo_train(..., loss_fn=nemo_rl.ClippedPGLossFn(master_config.loss_fn), ...)
    nemo_rl.enable()                     # or: NeMo-RL's own setup makes it, in the process that calls it
    nemo_rl.enable(credit=credit.outcome() + 0.5 * credit.outcome("format"))   # grpo.adv_estimator.name=trajkern_credit

NeMo-RL gathers log-probs over context-parallel ranks before a loss, so no row is split here; its wrappers of packed
sequences call the loss row by row, or once with the rows padded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import suggesting
from trajkern.credit import Spec
from trajkern.integrations import _nemo_rl_credit
from trajkern.integrations import _nemo_rl_terms as terms
from trajkern.integrations._adapter import Enabled, Patches, check_signature, check_version, credited_by, held
from trajkern.integrations._credit_checks import spec_of
from trajkern.integrations._nemo_rl_terms import Batch, Options

TESTED = ("0.6.0", "0.7.0")  # the commit calls itself 0.6.0; the release of that number has another loss
FUNCTIONS = "nemo_rl.algorithms.loss.loss_functions"
INTERFACES = "nemo_rl.algorithms.loss.interfaces"
HOLDERS = (  # hold the name from their import on
    FUNCTIONS,
    "nemo_rl.algorithms.loss",
    "nemo_rl.algorithms.grpo",
    "nemo_rl.algorithms.ppo",
    "nemo_rl.algorithms.single_controller_utils.setup",
)
_patches = Patches()


@suggesting
def enable(*, credit: Spec | str | None = None, any_version: bool = False) -> Enabled:
    """Puts :class:`ClippedPGLossFn` in the place of NeMo-RL's in this process. A second call undoes the first.

    It is NeMo-RL's ``setup``, in the driver, that makes the loss; the workers get it as it was made.

    Args:
        credit: an expression of :mod:`trajkern.credit`, or its "package.module:name", that forms the advantages of
            ``grpo_train`` and ``async_grpo_train``; ``grpo.adv_estimator.name`` must then be "trajkern_credit". It
            finds "reward"; each component ``reward/NAME`` of a batch as NAME; the flag "truncated"; the spans "turn";
            and what a batch lists of a rollout in the rows of a function. It may leave nothing out of the loss.
        any_version: do not warn of a NeMo-RL that this was not tested with.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: NeMo-RL is missing.
        RuntimeError: a version of it that lacks what this replaces, where that takes something else, or whose
            configuration has other options.
        TypeError, ValueError: a credit that is none; one that needs what NeMo-RL does not have, or can leave tokens or
            rollouts out. What only a batch can tell is refused at the first one.
    """
    check_version("nemo-rl", TESTED, any_version)
    disable()
    spec = None if credit is None else spec_of("credit", credit)
    if spec is not None:
        _nemo_rl_credit.check(spec)
    module = importlib.import_module(FUNCTIONS)
    theirs, config = held(module, "ClippedPGLossFn"), held(module, "ClippedPGLossConfig")
    check_signature("NeMo-RL's ClippedPGLossFn", theirs.__init__, ClippedPGLossFn.__init__)
    check_signature("NeMo-RL's ClippedPGLossFn.__call__", theirs.__call__, ClippedPGLossFn.__call__)
    declared, known = set(getattr(config, "model_fields", ())), set(Options.__dataclass_fields__)
    if declared != known:
        raise RuntimeError(
            f"NeMo-RL's ClippedPGLossConfig must declare {', '.join(sorted(known))}; in this version "
            f"{', '.join(sorted(declared ^ known))} are only on one side"
        )
    for holder in HOLDERS:
        if holder in sys.modules and vars(sys.modules[holder]).get("ClippedPGLossFn") is theirs:
            _patches.put(vars(sys.modules[holder]), "ClippedPGLossFn", ClippedPGLossFn)
    if spec is not None:
        _nemo_rl_credit.put(_patches, spec)
    return _patches.enabled("NeMo-RL", disable, credited_by(spec))


def disable() -> None:
    """Takes back what :func:`enable` did; twice does nothing."""
    _patches.undo()


class ClippedPGLossFn:
    r"""NeMo-RL's loss of that name, with its configuration, its metrics and its gradients to rounding.

    With the ratio r of the policy to ``prev_logprobs``, A the advantage and w the importance weight of
    ``prev_logprobs`` to ``generation_logprobs``,

        mean of w max(-r A, -clip(r) A), with dual clip c and A < 0 at most -c A,
        + penalty * mean of KL(policy || reference) + weight * mean of -log p over rows with a positive reward

    over tokens, or over rows of each one's mean over tokens, divided by the global count that NeMo-RL gives. The first
    term is :func:`trajkern.policy_loss`'s in one call (kinds dapo, gspo, cispo and reinforce); the KL term, whose
    clamps and sampling gradient the op does not have, is plain torch on the tokens. Where NeMo-RL reads the device for
    each metric, all are read at once.

    Different from NeMo-RL's are only: log-ratios beyond 20 either way are bounded in the clipped term; what stands
    under the masks is not read; and "sampling_importance_ratio" of several rows with
    ``sequence_level_importance_ratios`` is the sum of the rows' weights over the global rows, where NeMo-RL takes that
    sum over all rows and multiplies it by the number of valid ones.

    Args:
        cfg: NeMo-RL's ``ClippedPGLossConfig``, or a mapping of its options.
        use_fused_linear_logprobs: as NeMo-RL's; read by what prepares the log-probs, not here.

    Raises:
        ImportError: NeMo-RL is missing; its enumerations are what tells it how the loss is normalised.
        ValueError: an option that is unknown, or not allowed with another; all are named.
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        interfaces = importlib.import_module(INTERFACES)
        types = held(interfaces, "LossType")
        self.options = Options.of(cfg)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.reference_policy_kl_penalty = self.options.kl_penalty
        self.input_type = held(interfaces, "LossInputType").LOGPROB
        self.loss_type = types.TOKEN_LEVEL if self.options.token_level_loss else types.SEQUENCE_LEVEL
        self.metric_normalizations = _normalizations(self.options, getattr(interfaces, "MetricNormalizer", None))
        self._config = self.options.policy_loss()

    def __call__(
        self,
        next_token_logprobs: Tensor,  # [B, S-1]
        data: Mapping[str, Any],
        global_valid_seqs: Tensor | float | None,
        global_valid_toks: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics) of a micro-batch.

        Args:
            next_token_logprobs: float ``[B, S-1]``, differentiable: log p of ``input_ids[:, 1:]``.
            data: ``token_mask``, ``advantages``, ``generation_logprobs`` and ``prev_logprobs`` (but where the ratio is
                forced to 1) ``[B, S]`` and ``sample_mask`` ``[B]``, masks of 0 and 1; ``reference_policy_logprobs``
                ``[B, S]`` where there is a KL term, with ``curr_logprobs_unfiltered`` ``[B, S-1]`` where sampling is
                filtered; ``rewards`` ``[B]`` where positive examples are weighed, else that term is 0 as in NeMo-RL.
            global_valid_seqs, global_valid_toks: how many rows and tokens take part in the global batch; None: in
                this micro-batch.

        Raises:
            TypeError, ValueError: naming the entry of ``data`` that is missing or of another shape. Masks that weigh
                are an error on a CPU, and make the loss NaN on a GPU.
        """
        o = self.options
        x = terms.batch_of(next_token_logprobs, data, o.force_on_policy_ratio)
        device = x.rows.mask.device
        tokens = x.rows.mask.sum() if global_valid_toks is None else torch.as_tensor(global_valid_toks, device=device)
        rows = x.samples.sum() if global_valid_seqs is None else torch.as_tensor(global_valid_seqs, device=device)
        weights = terms.weights_of(x, o)
        guard = torch.where(x.legal, 1.0, torch.nan)
        a = x.advantages
        if o.use_importance_sampling_correction:
            a = a * terms.spread(x, weights.raw, o.sequence_level_importance_ratios)
        correct, of_correct = self._positive(x, data), o.positive_example_nll_weight
        loss, told = tk.policy_loss(
            x.new,
            None if o.force_on_policy_ratio or o.disable_ppo_ratio else x.old,
            a,
            x.rows.cu_seqlens,
            config=self._config,
            mask=x.rows.mask,
            normalizer=(tokens if o.token_level_loss else rows).to(x.new.device) * guard,
            per_token=True,
            supervised_weights=correct if correct is None else of_correct * correct,
        )
        nll = x.new.new_zeros(()) if correct is None else told["supervised_loss"] / of_correct
        few = 1e-8  # what NeMo-RL adds to a number that divides
        of_metrics = tokens.to(x.new.device) + few, rows.to(x.new.device) + few
        kl = self._kl(x, data, *of_metrics)
        loss = loss + self.reference_policy_kl_penalty * kl
        found = terms.metrics_of(x, o, weights, *of_metrics)
        found |= {"loss": loss.detach(), "kl_penalty": kl.detach(), "positive_nll_loss": nll}
        values = torch.stack([value.to(torch.float64) for value in found.values()]).tolist()  # the one read
        return loss, dict(zip(found, values, strict=True))

    def _kl(self, x: Batch, data: Mapping[str, Any], tokens: Tensor, rows: Tensor) -> Tensor:
        if not self.reference_policy_kl_penalty:
            return x.new.new_zeros(())
        kl = terms.kl_term(x, data, self.options)
        if self.options.token_level_loss:
            return torch.where(x.rows.mask, kl, 0).sum() / tokens
        return x.means(kl).sum() / rows

    def _positive(self, x: Batch, data: Mapping[str, Any]) -> Tensor | None:
        """1 on the tokens of rows with a positive reward, ``[T]``, whose mean log-prob is in the loss as well."""
        if not self.options.positive_example_nll_weight > 0 or "rewards" not in data:
            return None
        rewards = data["rewards"]
        if not isinstance(rewards, Tensor) or rewards.shape != x.samples.shape:
            got = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(f"data['rewards'] must have shape [B] = {list(x.samples.shape)}, got {got}")
        return (x.rows.mask & (rewards > 0)[x.of_rows]).to(x.advantages.dtype)


def _normalizations(o: Options, kinds: Any) -> dict[str, Any]:
    """By which global count each metric is divided, in NeMo-RL's words; {} for a version that does not ask."""
    if kinds is None:
        return {}
    of_loss = kinds.TOKENS if o.token_level_loss else kinds.SEQUENCES
    of_ratio = kinds.SEQUENCES if o.sequence_level_importance_ratios else kinds.TOKENS
    tokens = ("probs_ratio", "probs_ratio_clamped", "token_mult_prob_error", "gen_kl_error", "policy_kl_error")
    own = [f"{name}_{end}" for name in ("probs_ratio", "probs_ratio_clamped") for end in ("min", "max")]
    found = dict.fromkeys(("loss", "kl_penalty"), of_loss) | {"sampling_importance_ratio": of_ratio}
    found |= dict.fromkeys((*tokens, "js_divergence_error", "approx_entropy"), kinds.TOKENS)
    found |= dict.fromkeys((*own, "num_valid_samples", "positive_nll_loss"), kinds.NONE)
    if o.truncated_importance_sampling_type is not None:
        by_row = o.truncated_importance_sampling_type == "seq-mask-tis"
        found["is_oob_ratio"] = kinds.SEQUENCES if by_row else kinds.TOKENS
    return found
