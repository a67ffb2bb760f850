"""TRL's rows of rollouts that share prefixes, as trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._values import check_finite
from trajkern.integrations._arguments import choosing
from trajkern.integrations._host_tree import TreeRollouts

_FIELDS = ("input_ids", "completion_mask", "old_log_probs", "advantage", "group_id")


def tree_rollouts(row: Any, device: torch.device | str = "cpu") -> TreeRollouts:
    """A ``TreeRow`` of TRL's AsyncGRPOTrainer as the tree of its samples; leaf n is sample n.

    Whatever its samples share at their beginning is shared, also among prompts; where TRL repeats a token for each
    branch behind it, so that each has one label, the tree has it once. Each sample keeps a mask, log-probs and an
    advantage of its own. As TRL does, a sample's first token, which nothing predicts, is left out of its mask. Read at
    TRL 1.16.0 (``trl.experimental.async_grpo.packing``); of the row its ``samples`` are read, and their entries
    ``input_ids``, ``completion_mask``, ``old_log_probs``, ``advantage`` and ``group_id``.

    Args:
        row: a ``TreeRow``.
        device: where the tensors are wanted.

    Raises:
        TypeError: something else than such a row.
        ValueError: a row without samples; a sample without one of these entries, without tokens, with entries of other
            lengths than its tokens', with an advantage or, where it learns, a log-prob that is no number.
    """
    samples = getattr(row, "samples", None)
    if not isinstance(samples, list):
        raise TypeError(f"row must be a TreeRow of TRL, which has a list of samples; got {type(row).__name__}")
    if not samples:
        raise ValueError("row must have at least one sample, got none")
    for n, sample in enumerate(samples):
        _check(n, sample)
    lengths = torch.tensor([0, *(len(sample["input_ids"]) for sample in samples)], device="cpu")
    tokens, mask, old = (_joined(samples, name) for name in _FIELDS[:3])
    cu_seqlens = lengths.cumsum(0)
    mask = choosing("completion_mask", mask)
    mask[cu_seqlens[:-1]] = False
    advantages = torch.tensor([float(sample["advantage"]) for sample in samples], dtype=torch.float32, device="cpu")
    check_finite("advantage of the samples", advantages)
    number: dict[Any, int] = {}
    groups = torch.tensor([number.setdefault(sample["group_id"], len(number)) for sample in samples], device="cpu")
    batch = tk.PackedBatch(tokens.long(), cu_seqlens, mask, groups, old_logprobs=old.float())
    nothing = tk.PackedBatch(batch.tokens, cu_seqlens, torch.zeros_like(mask), torch.zeros_like(groups))
    tree = tk.Tree.from_trajectories(nothing)  # of tokens alone: masks and groups part nobody
    assert tree.source is not None
    advantages = torch.where(mask, torch.repeat_interleave(advantages, lengths[1:]), 0)
    return TreeRollouts(tree.to(device), batch.to(device), batch.tokens[tree.source].to(device), advantages.to(device))


def _check(n: int, sample: Any) -> None:
    if missing := [name for name in _FIELDS if name not in sample]:
        raise ValueError(f"samples must have {', '.join(_FIELDS)}; sample {n} has no {missing[0]}")
    length = len(sample["input_ids"])
    if not length:
        raise ValueError(f"input_ids must have at least one token; sample {n} has none")
    for name in _FIELDS[1:3]:
        if len(sample[name]) != length:
            raise ValueError(f"{name} must have one entry a token, {length} in sample {n}; got {len(sample[name])}")


def _joined(samples: list[Any], name: str) -> Tensor:
    return torch.cat([torch.as_tensor(sample[name], device="cpu") for sample in samples])
