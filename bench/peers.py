"""The packages that do the same work: what each offers for an op, to be gated and timed like every other contender."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from trajkern._bench.case import Function, Problem
from trajkern._bench.table import NO_SUCH_OP
from trajkern.testing.numerics import Outcome


class Cannot(Exception):
    """Why a peer has nothing to time on a problem."""


@dataclass(frozen=True)
class Peer:
    """A package beside trajkern.

    Args:
        distribution: its name on the package index, whose version the report gives.
        module: what must import for it to work.
        forms: op -> (problem, device) -> the peer's function of the op's arguments; raises Cannot.
        gpu_only: whether it has kernels for GPUs and nothing else.
    """

    distribution: str
    module: str
    forms: Mapping[str, Callable[[Problem, str], Function]]
    gpu_only: bool = False


def contenders(problem: Problem, device: str) -> tuple[dict[str, Function], dict[str, str]]:
    """(name -> function of those that can, name -> reason of those that cannot) for a problem."""
    able: dict[str, Function] = {}
    unable: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            able[name] = _form(peer, problem, device)
        except Cannot as reason:
            unable[name] = str(reason)
        except ImportError as error:
            unable[name] = f"installed but broken: {_line(error)}"
        except Exception as error:  # of its own or of its form here, which cannot be told apart
            unable[name] = f"could not be prepared: {_line(error)}"
    return able, unable


def versions() -> dict[str, str]:
    """Peer -> its version, or why it is not there."""
    return {name: version(peer) for name, peer in PEERS.items()}


def version(peer: Peer) -> str:
    return trouble(peer) or metadata.version(peer.distribution)


@cache
def _import_error(module: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a broken package raises
        return _line(error)
    return None


def trouble(peer: Peer) -> str | None:
    """Why the peer cannot be used at all, or None."""
    try:
        metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
    error = _import_error(peer.module)
    return error and f"installed but broken: {error}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _form(peer: Peer, problem: Problem, device: str) -> Function:
    if problem.op not in peer.forms and not (problem.compose and "linear_logprobs" in peer.forms):
        raise Cannot(NO_SUCH_OP)
    if why := trouble(peer):
        raise Cannot(why)
    if peer.gpu_only and device == "cpu":
        raise Cannot("has no CPU kernel")
    if problem.op in peer.forms:
        return peer.forms[problem.op](problem, device)
    assert problem.compose is not None
    return problem.compose(peer.forms["linear_logprobs"](problem, device))


# TRL


def _trl_logprobs(problem: Problem, device: str) -> Function:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, targets, **_: {"logprobs": selective_log_softmax(logits, targets)}


def _trl_stats(problem: Problem, device: str) -> Function:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda logits, targets, **_: dict(
        zip(("logprobs", "entropy"), selective_log_softmax_and_entropy(logits, targets), strict=True)
    )


def _trl_linear(problem: Problem, device: str) -> Function:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda hidden, weight, targets, **_: {
        "logprobs": ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())[0]
    }


def _trl_topk(problem: Problem, device: str) -> Function:
    """The student's part of SDPO's loss."""
    from trl.experimental.sdpo.loss_utils import add_tail_bucket

    def form(hidden: Tensor, weight: Tensor, k: int, **_: Any) -> Outcome:
        logits = (hidden @ weight.t()).float()
        logprobs = logits.topk(k, dim=-1).values - logits.logsumexp(-1, keepdim=True)
        return {"logprobs": logprobs, "tail": add_tail_bucket(logprobs)[:, -1]}

    return form


# Liger


def _liger_logprobs(problem: Problem, device: str) -> Function:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    if device == "cpu":
        raise Cannot("has no CPU kernel")
    if problem.upstream:
        raise Cannot("has no backward")
    return lambda logits, targets, **_: {
        "logprobs": fused_selective_log_softmax(logits[None], targets[None], temperature=1.0)[0]
    }


def _liger_linear(problem: Problem, device: str) -> Function:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as f

    def form(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Outcome:
        out = f.apply(hidden, weight, targets)
        return {"logprobs": -(out[0] if isinstance(out, tuple) else out)}

    return form


def _liger_loss(problem: Problem, device: str, **options: Any) -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if len(set(problem.inputs["cu_seqlens"].diff().tolist())) > 1:
        raise Cannot("takes trajectories of one length")
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", **options)

    def form(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        **_: Any,
    ) -> Outcome:
        rows = (advantages.shape[0], -1)
        scored = torch.ones_like(targets) if mask is None else mask.to(targets.dtype)
        return {
            "loss": loss(
                hidden.view(*rows, hidden.shape[1]),
                weight,
                targets.view(rows),
                scored.view(rows),
                advantages,
                old_per_token_logps=old_logprobs.view(rows),
            )[0]
        }

    return form


# torch, Apple, flash-attn, QuACK


def _torch_linear(problem: Problem, device: str) -> Function:
    f = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if f is None:
        raise Cannot(f"torch {torch.__version__} has none")
    return lambda hidden, weight, targets, **_: {"logprobs": -f(hidden, weight, targets, reduction="none")}


def _cce_linear(problem: Problem, device: str) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    f = partial(linear_cross_entropy, reduction="none", impl="torch_compile" if device == "cpu" else "cce")
    return lambda hidden, weight, targets, **_: {"logprobs": -f(hidden, weight, targets)}


def _flash_logprobs(problem: Problem, device: str) -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    in_place = bool(problem.inputs.get("inplace_backward"))
    return lambda logits, targets, **_: {"logprobs": -cross_entropy_loss(logits, targets, inplace_backward=in_place)[0]}


def _quack_logprobs(problem: Problem, device: str) -> Function:
    from quack import cross_entropy

    in_place = bool(problem.inputs.get("inplace_backward"))
    return lambda logits, targets, **_: {
        "logprobs": -cross_entropy(logits, targets, reduction="none", inplace_backward=in_place)
    }


# verl


def _verl_logprobs(problem: Problem, device: str) -> Function:
    from verl.utils.torch_functional import logprobs_from_logits

    in_place = bool(problem.inputs.get("inplace_backward"))
    return lambda logits, targets, **_: {"logprobs": logprobs_from_logits(logits, targets, inplace_backward=in_place)}


def _verl_stats(problem: Problem, device: str) -> Function:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    return lambda logits, targets, **_: {
        "logprobs": logprobs_from_logits(logits, targets, inplace_backward=False),
        "entropy": entropy_from_logits(logits),
    }


def _verl_linear(problem: Problem, device: str) -> Function:
    if device == "cuda":
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, targets, **_: {"logprobs": linear_cross_entropy(hidden, weight, targets)[0]}
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return lambda hidden, weight, targets, **_: {
        "logprobs": fused(hidden[None], weight, targets[None], temperature=1.0)[0][0]
    }


def _verl_topk(problem: Problem, device: str) -> Function:
    """The student's part of its distillation loss, in chunks, which keep the least."""
    from verl.trainer.distillation.fsdp.losses import _chunked_topk_log_probs

    def form(hidden: Tensor, weight: Tensor, k: int, **_: Any) -> Outcome:
        logits = (hidden @ weight.t()).float()[None]
        return {"logprobs": _chunked_topk_log_probs(logits, logits.topk(k, dim=-1).indices)[0]}

    return form


def _verl_groups(problem: Problem, device: str) -> Function:
    """In its favour: it is given the ids as the array of objects that its trainer has."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    ids = problem.inputs["group_ids"].cpu().numpy().astype(object)

    def form(rewards: Tensor, **_: Any) -> Outcome:
        x = rewards[:, None]
        return {"advantages": compute_grpo_outcome_advantage(x, torch.ones_like(x), ids)[0][:, 0]}

    return form


def _verl_whiten(problem: Problem, device: str) -> Function:
    from verl.utils.torch_functional import masked_whiten

    return lambda x, mask, **_: {"whitened": torch.where(mask, masked_whiten(x, mask), 0)}


def _verl_loss(problem: Problem, device: str) -> Function:
    """In its favour: everything but the log-probs is given in the padded rows that it takes."""
    from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, kl_penalty
    from verl.workers.config import FSDPActorConfig

    x = problem.inputs
    config = x["config"]
    lengths = x["cu_seqlens"].diff()
    longest = int(lengths.max())
    real = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [N, longest]
    places = real.flatten().nonzero().squeeze(1)  # [T]

    def padded(values: Tensor) -> Tensor:  # [T] -> [N, longest]
        return values.new_zeros(real.numel()).index_copy(0, places, values).view_as(real)

    old, ref, mask = (padded(x[name]) for name in ("old_logprobs", "ref_logprobs", "mask"))
    advantages = x["advantages"][:, None].expand_as(old)
    mode = "seq-mean-token-mean"
    actor = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=config.clip_low,
        clip_ratio_low=config.clip_low,
        clip_ratio_high=config.clip_high,
        loss_agg_mode=mode,
    )

    def form(logprobs: Tensor, **_: Any) -> Outcome:
        rows = padded(logprobs)
        policy, _metrics = compute_policy_loss_vanilla(old, rows, advantages, mask, mode, actor)
        kl = agg_loss(kl_penalty(rows, ref, "low_var_kl"), mask, mode)
        return {"loss": policy + config.kl_coef * kl}

    return form


PEERS = {
    "trl": Peer(
        "trl",
        "trl.trainer.utils",
        {
            "token_logprobs": _trl_logprobs,
            "token_stats": _trl_stats,
            "linear_logprobs": _trl_linear,
            "linear_topk": _trl_topk,
        },
    ),
    "liger": Peer(
        "liger-kernel",
        "liger_kernel.chunked_loss",
        {"token_logprobs": _liger_logprobs, "linear_logprobs": _liger_linear, "linear_policy_loss": _liger_loss},
    ),
    "torch": Peer("torch", "torch", {"linear_logprobs": _torch_linear}),
    "cce": Peer("cut-cross-entropy", "cut_cross_entropy", {"linear_logprobs": _cce_linear}),
    "flash-attn": Peer("flash-attn", "flash_attn", {"token_logprobs": _flash_logprobs}, gpu_only=True),
    "quack": Peer("quack-kernels", "quack", {"token_logprobs": _quack_logprobs}, gpu_only=True),
    "verl": Peer(
        "verl",
        "verl.trainer.ppo.core_algos",
        {
            "token_logprobs": _verl_logprobs,
            "token_stats": _verl_stats,
            "linear_logprobs": _verl_linear,
            "linear_topk": _verl_topk,
            "group_advantages": _verl_groups,
            "whiten": _verl_whiten,
            "policy_loss": _verl_loss,
        },
    ),
}
