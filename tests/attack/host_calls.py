"""Functions of host trainers' that are called with a batch in pieces."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tests.attack.hosts import meant
from tests.attack.mutated import Mutation
from tests.attack.target import Target
from trajkern.integrations import _skyrl_advantages, prime_rl, slime


def targets() -> Iterator[Target]:
    """What hosts call with their batch in pieces."""
    x, mask = -torch.rand(3) - 0.1, torch.ones(3, dtype=torch.int32)
    args = Namespace(tis_clip=1.2, tis_clip_low=0.8, context_parallel_size=1)
    given: dict[str, Any] = {"args": args, "pg_loss": torch.cat((x, x)), "train_log_probs": [x, x]}
    given |= {"rollout_log_probs": [x - 0.1, x - 0.2], "loss_masks": [mask, mask]}
    lengths = {"total_lengths": [5, 4], "response_lengths": [3, 3]}
    more: dict[str, Any] = {"another": meant, "words": ("sample", "train_log_probs")}
    for function in (slime.tis, slime.icepop):
        unread = ("loss_masks", "context_parallel_size")
        call = partial(_by_name, partial(_but_masks, function), given)
        yield Target(f"slime.{function.__name__}", call, given, "arguments", unread=unread, **more)
    call = partial(_by_name, partial(_without_ranks, slime.sequence_mask), given | lengths)
    optional = ("context_parallel_size",)
    yield Target("slime.sequence_mask", call, given | lengths, "arguments", optional=optional, **more)
    reduced = lengths | {"loss_masks": [mask, mask], "calculate_per_token_loss": False}
    call = partial(_by_name, lambda **kwargs: slime.pg_loss_reducer(**kwargs)(torch.cat((x, x))), reduced)
    yield Target("slime.pg_loss_reducer", call, reduced, "arguments", **more)
    names = ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages")
    streams: dict[str, Any] = {name: [x, x - 0.1] for name in names} | {"loss_mask": [mask > 0, mask > 0]}
    streams |= {"rl_weights": [mask.float()] * 2, "ce_weights": [mask.float()] * 2, "ref_kl_weights": None}
    streams |= {"rl_scale": 2.0, "ce_scale": 2.0, "ref_kl_scale": 2.0}
    call = partial(_by_name, partial(prime_rl.compute_loss, rl_loss_fn=_closing(prime_rl.policy_loss, {})), streams)
    more["words"] = ("trainer_logprobs", "inference_logprobs")
    more["optional"] = ("rl_weights", "ce_weights", "ref_logprobs", "ref_kl_weights")
    yield Target("prime_rl.compute_loss", call, streams, "arguments", **more)
    rows = {"token_level_rewards": torch.ones(2, 3), "response_mask": torch.ones(2, 3), "index": ["a", "a"]}
    of_rows = {"words": ("token_level_rewards", "response_mask", "index")}
    for function in (_skyrl_advantages.grpo, _skyrl_advantages.rloo, _skyrl_advantages.maxrl):
        call = partial(_by_name, function, rows)
        yield Target(f"skyrl.{function.__name__}", call, rows, "arguments", another=_of_index, **of_rows)
    rows = {"token_level_rewards": torch.ones(2, 3), "response_mask": torch.ones(2, 3), "values": torch.ones(2, 3)}
    rows |= {"gamma": 1.0, "lambd": 0.9}
    yield Target(
        "skyrl.gae", partial(_by_name, _skyrl_advantages.gae, rows), rows, "arguments", another=meant, **of_rows
    )


def _by_name(function: Callable[..., Any], known: dict[str, Any], arguments: Any) -> Any:
    """Python's own refusal of a call without an argument is not asked."""
    if not isinstance(arguments, dict) or arguments.keys() != known.keys():
        raise TypeError("arguments must all be there")
    return function(**arguments)


def _closing(custom_fn: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """What prime-rl's setup makes of a custom loss."""
    return lambda inputs: custom_fn(inputs, **kwargs)


def _of_index(change: Mutation) -> bool:
    return change.names[-1:] == ("index",) or meant(change)


def _but_masks(function: Callable[..., Any], **arguments: Any) -> Any:
    """Without the masks, which are given back as they are."""
    loss, _, metrics = function(**arguments)
    return loss, metrics


def _without_ranks(function: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return function(**arguments)
    except RuntimeError as error:
        if "neither is loaded" in str(error):  # of a host's function, as documented
            raise ValueError(str(error)) from error
        raise
