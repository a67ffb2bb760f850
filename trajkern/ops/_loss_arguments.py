"""Checks of the arguments that the policy losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import (
    as_number,
    check_boundaries,
    check_flag,
    check_instance,
    check_number,
    check_process_group,
    check_shape,
    check_tensor,
    describe,
    readable,
)
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._values import check_cu_seqlens
from trajkern.losses.arguments import LossArguments
from trajkern.losses.config import PolicyLoss
from trajkern.ops.policy_loss_ranks import check_agreement, check_parts
from trajkern.ops.tree_loss import Paths, check_branch, leaf_counts


def check_loss(
    logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments, *, in_head: bool = False
) -> LossArguments:
    """Raises, or returns the arguments with what nothing reads left out, ``normalizer`` a tensor, ``per_token`` a bool.

    Args:
        logprobs: as given, or what has the shape and dtype that the head's will have.
        entropy: likewise.
        in_head: whether the head reads ``cu_seqlens``, before a launcher of the loss can check it.
    """
    config, branch = arguments.config, arguments.branch
    if branch is not None and arguments.advantages is not None:
        raise ValueError(f"advantages must be None where branch is given; got {describe(arguments.advantages)}")
    check_tensor("logprobs", logprobs, dtypes=FLOATS, ndim=1)
    check_instance("config", config, PolicyLoss)
    check_process_group("sequence_group", arguments.sequence_group)
    if arguments.per_token is not None:
        arguments = arguments._replace(per_token=check_flag("per_token", arguments.per_token))
    _check_tokens(logprobs, entropy, arguments, in_head)
    _check_streams(arguments, logprobs)
    if arguments.sequence_group is not None:
        arguments = check_parts(arguments)
    if branch is not None:
        check_branch(arguments, logprobs)
        if readable(logprobs):
            check_cu_seqlens(arguments.cu_seqlens, logprobs.shape[0])
    if isinstance(branch, Paths):
        per_token = False
    else:
        advantages = arguments.advantages if branch is None else branch.positive
        per_token = _check_advantages(logprobs, advantages, arguments.cu_seqlens, arguments.per_token)
    checked = LossArguments(
        config,
        arguments.old_logprobs,
        arguments.advantages,
        arguments.cu_seqlens,
        arguments.mask,
        arguments.ref_logprobs if config.kl_coef else None,
        arguments.sampler_logprobs,
        branch,
        _check_normalizer(arguments, logprobs, per_token),
        per_token,
        arguments.sequence_group,
        arguments.supervised_weights,
        _stream_normalizer("supervised", arguments.supervised_weights, arguments.supervised_normalizer, logprobs),
        arguments.kl_weights if config.kl_coef else None,
        _stream_normalizer("kl", arguments.kl_weights, arguments.kl_normalizer, logprobs) if config.kl_coef else None,
    )
    if checked.sequence_group is not None and readable(logprobs):
        check_agreement(checked)
    return checked


def _check_tokens(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments, in_head: bool) -> None:
    config, cu_seqlens, mask = arguments.config, arguments.cu_seqlens, arguments.mask
    device, length = logprobs.device, tuple(logprobs.shape)
    per_token = (
        ("old_logprobs", arguments.old_logprobs, False),
        ("ref_logprobs", arguments.ref_logprobs, config.kl_coef != 0),
        ("sampler_logprobs", arguments.sampler_logprobs, config.sampler_correction != "none"),
        ("entropy", entropy, config.entropy_coef != 0),
    )
    for name, x, needed in per_token:
        if x is None and needed:
            raise ValueError(f"{name} must be given for this config (kind {config.kind!r}), got None")
        if x is not None:
            check_tensor(name, x, dtypes=FLOATS, device=device)
            check_shape(name, x, length, "one value a token")
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=device)
        check_shape("mask", mask, length, "one flag a token")
    check_boundaries("cu_seqlens", cu_seqlens, device)
    # what ranks tokens or adds up a part's reads cu_seqlens before a launcher can check it
    early = in_head or config.ranks_tokens or arguments.sequence_group is not None
    if (early or _backends.wants_reference("policy_loss", logprobs)) and readable(cu_seqlens):
        check_cu_seqlens(cu_seqlens, length[0])


def _check_streams(arguments: LossArguments, logprobs: Tensor) -> None:
    given = (
        ("supervised", arguments.supervised_weights, arguments.supervised_normalizer),
        ("kl", arguments.kl_weights, arguments.kl_normalizer),
    )
    for name, weights, normalizer in given:
        if weights is None:
            if normalizer is not None:
                raise ValueError(f"{name}_normalizer must come with {name}_weights; got {describe(normalizer)}")
            continue
        check_tensor(f"{name}_weights", weights, dtypes=FLOATS, device=logprobs.device)
        check_shape(f"{name}_weights", weights, tuple(logprobs.shape), "one weight a token")
        if arguments.sequence_group is not None:
            raise ValueError(
                f"{name}_weights must be None with sequence_group, over whose ranks they are not counted; "
                f"got {describe(weights)}"
            )
        if arguments.branch is not None:
            raise ValueError(
                f"{name}_weights must be None where branch is given, whose tokens stand for several rollouts: "
                "index everything per token with tree.flat_index, and pass tree.flat_cu_seqlens"
            )
    if arguments.kl_weights is not None and arguments.config.kl_coef and arguments.config.kl == "k3_corrected":
        raise ValueError(
            "kl_weights must be None for kl 'k3_corrected', whose ratio only tokens of the mask have; "
            f"got {describe(arguments.kl_weights)}"
        )


def _stream_normalizer(name: str, weights: Tensor | None, normalizer: Any, logprobs: Tensor) -> Tensor | None:
    if weights is None or normalizer is None:
        return None
    return _as_normalizer(f"{name}_normalizer", normalizer, logprobs, lambda: bool((weights != 0).any()))


def _check_advantages(logprobs: Tensor, advantages: Any, cu_seqlens: Tensor, per_token: bool | None) -> bool:
    check_tensor("advantages", advantages, dtypes=FLOATS, ndim=1, device=logprobs.device)
    tokens, trajectories = logprobs.shape[0], cu_seqlens.shape[0] - 1
    if per_token is None:
        per_token = advantages.shape[0] != trajectories
    if advantages.shape[0] != (tokens if per_token else trajectories):
        raise ValueError(
            f"advantages must have length {trajectories} (one a trajectory) or {tokens} (one a token); "
            f"got {describe(advantages)}"
        )
    return per_token


def _check_normalizer(arguments: LossArguments, logprobs: Tensor, per_token: bool) -> Tensor | None:
    if arguments.normalizer is None:
        return None
    return _as_normalizer("normalizer", arguments.normalizer, logprobs, lambda: _learns(arguments, logprobs, per_token))


def _as_normalizer(name: str, normalizer: Any, logprobs: Tensor, learns: Callable[[], bool]) -> Tensor:
    """As a tensor; what it is where nothing is to be learnt does not matter, and may be 0."""
    dtype = accumulator(logprobs)
    if isinstance(normalizer, Tensor):
        check_tensor(name, normalizer, dtypes=(*FLOATS, *INTEGERS), device=logprobs.device)
        if normalizer.numel() != 1:
            raise ValueError(f"{name} must have one element; got {describe(normalizer)}")
        if not readable(normalizer):
            return normalizer.detach().to(dtype).reshape(())
        normalizer = normalizer.detach().reshape(())
    if (normalizer := as_number(name, normalizer)) != 0:
        normalizer = check_number(name, normalizer, above=0, dtype=dtype)
    elif readable(logprobs):
        if learns():
            raise ValueError(f"{name} must be greater than 0, got {normalizer}, where something is to be learnt")
        normalizer = 1
    if torch.compiler.is_compiling():  # torch.full would fix the value in the graph
        return torch.ones((), dtype=dtype, device=logprobs.device) * normalizer
    return torch.full((), normalizer, dtype=dtype, device=logprobs.device)


def _learns(arguments: LossArguments, logprobs: Tensor, per_token: bool) -> bool:
    """Whether a scored token has a term that is not 0 by its coefficients. Reads device values."""
    config, branch, mask = arguments.config, arguments.branch, arguments.mask
    scored = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    if config.kl_coef or config.entropy_coef or config.ranks_tokens or not bool(scored.any()):
        return bool(scored.any())
    if isinstance(branch, Paths):
        counts = leaf_counts(arguments, branch.gate)
        return bool(((counts > 0) & (branch.advantages != 0)).any())
    advantages = arguments.advantages if branch is None else branch.positive.abs() + branch.negative.abs()
    assert advantages is not None
    live = advantages != 0
    if not per_token:
        check_cu_seqlens(arguments.cu_seqlens, logprobs.shape[0])
        live = live.repeat_interleave(arguments.cu_seqlens.diff())
    return bool((live & scored).any())
