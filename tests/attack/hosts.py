"""Batches and options of host trainers, as far as they need no host."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.attack.mutated import Mutation
from tests.attack.target import Target, same
from tests.integrations import slime_batches
from tests.integrations.slime_ranks import options, rollout_data
from trajkern.integrations import slime


def targets() -> Iterator[Target]:
    yield from _of_slime()


def _of_slime() -> Iterator[Target]:
    batch, logits = slime_batches.micro_batch(1)
    reducer = slime_batches.reducer(batch, False)
    args = Namespace(**(slime_batches.SLIME | {"use_tis": True, "use_kl_loss": True, "entropy_coef": 0.1}))
    of_batch = partial(_slime_loss, args, logits=logits, reducer=reducer)
    more: dict[str, Any] = {"another": _any, "right": partial(_as_host, partial(_slime_expected, args, logits=logits))}
    yield Target("slime.policy_loss", of_batch, batch, "batch", unread=("opd_reverse_kl",), **more)
    of_args = partial(_slime_loss, batch=batch, logits=logits, reducer=reducer)
    more["right"] = partial(_as_host, partial(_slime_expected, batch=batch, logits=logits))
    yield Target("slime.policy_loss", of_args, args, "args", unread=("get_mismatch_metrics", "opsm_delta"), **more)
    data, given = rollout_data(list(range(6))), options()
    of_data, of_args = partial(_slime_advantages, given), partial(_slime_advantages, data=data)
    more["right"] = partial(_as_grpo, given)
    yield Target("slime.advantages", of_data, data, "rollout_data", **more)
    more["right"] = lambda change, result, base: _as_grpo(change.value, change, result, base, data)
    yield Target("slime.advantages", of_args, given, "args", **more)


def _slime_loss(args: Any, batch: Any, logits: Tensor, reducer: Any) -> Any:
    try:
        return slime.policy_loss(args, batch, logits, reducer)
    except RuntimeError as error:
        if "neither is loaded" in str(error):  # of a host's function, as documented
            raise ValueError(str(error)) from error
        raise


def _slime_expected(args: Any, batch: Any, logits: Tensor) -> Any:
    batch, args = {"log_probs": None, **batch}, Namespace(**({"eps_clip_c": None} | vars(args)))
    for name, x in vars(args).items():
        setattr(args, name, float(x) if type(x) is int else x)
    args.eps_clip_high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    if batch.get("rollout_mask_sums") is None:
        batch["rollout_mask_sums"] = [x.sum() for x in batch["loss_masks"]]
    return slime_batches.expected(args, batch, logits.double())


def _slime_advantages(args: Any, data: Any) -> Any:
    data = dict(data) if isinstance(data, dict) else data
    slime.advantages(args, data)
    return {name: data[name] for name in ("advantages", "returns", "loss_masks")}


def _as_grpo(args: Any, change: Mutation, result: Any, base: Any, data: Any = None) -> bool:
    """Rewards less their group's mean, over its deviation where that is asked for, on the tokens of the masks."""
    data = change.value if data is None else data
    places = torch.as_tensor(data["partition"])
    rewards = torch.tensor([float(data["raw_reward"][int(x)]) for x in places], dtype=torch.float64)
    for group in places.div(args.n_samples_per_prompt, rounding_mode="floor").unique():
        own = (places.div(args.n_samples_per_prompt, rounding_mode="floor") == group) & ~rewards.isnan()
        centred = rewards[own] - rewards[own].mean()
        rewards[own] = centred / (centred.std() + 1e-6) if args.grpo_std_normalization else centred
    rewards = rewards.nan_to_num(0)  # of who is left out
    expected = [x * (mask != 0) for x, mask in zip(rewards, data["loss_masks"], strict=True)]
    return all(map(close, result["advantages"], expected)) and same(result["advantages"], result["returns"])


def _any(change: Mutation) -> bool:
    return True


def _as_host(theirs: Callable[[Any], Any], change: Mutation, result: Any, base: Any) -> bool:
    """Whether it is what the host's formula makes of it, or says by NaN that it is nothing."""
    if slime_batches.FULLY_MASKED in change.path:
        return same(result, base)
    if not bool(result[0].isfinite()):
        return True
    try:
        loss, metrics = theirs(change.value)
    except Exception:
        return False
    return close(result[0], loss) and all(close(x, metrics[name]) for name, x in result[1].items() if name in metrics)


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
