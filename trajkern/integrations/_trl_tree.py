"""TRL's rows of rollouts that share prefixes, as trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import renamed
from trajkern.integrations._host_tree import TreeRollouts
from trajkern.integrations._outside import Outside

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
    given = Outside("row", getattr(row, "samples", None), "samples")
    if not isinstance(given.value, list):
        raise TypeError(f"row must be a TreeRow of TRL, which has a list of samples; got {type(row).__name__}")
    if not given.value:
        raise ValueError("row must have at least one sample, got none")
    samples = [_of(x) for x in given.each()]
    lengths = torch.tensor([0, *(len(sample["input_ids"]) for sample in samples)], device="cpu")
    tokens, mask = _joined(samples, "input_ids", torch.int64), _joined(samples, "completion_mask", torch.bool)
    cu_seqlens = lengths.cumsum(0)
    mask[cu_seqlens[:-1]] = False
    advantages = torch.tensor([sample["advantage"] for sample in samples], dtype=torch.float32, device="cpu")
    number: dict[Any, int] = {}
    groups = torch.tensor([number.setdefault(sample["group_id"], len(number)) for sample in samples], device="cpu")
    with renamed({"old_logprobs": "old_log_probs"}):
        old = _joined(samples, "old_log_probs", torch.float32)
        batch = tk.PackedBatch(tokens, cu_seqlens, mask, groups, old_logprobs=old)
    nothing = tk.PackedBatch(batch.tokens, cu_seqlens, torch.zeros_like(mask), torch.zeros_like(groups))
    tree = tk.Tree.from_trajectories(nothing)  # of tokens alone: masks and groups part nobody
    assert tree.source is not None
    advantages = torch.where(mask, torch.repeat_interleave(advantages, lengths[1:]), 0)
    return TreeRollouts(tree.to(device), batch.to(device), batch.tokens[tree.source].to(device), advantages.to(device))


def _of(sample: Outside) -> dict[str, Any]:
    """A sample's entries, as lists of Python's own."""
    sample.mapping()
    if missing := [name for name in _FIELDS if sample.get(name) is None]:
        raise ValueError(f"samples must have {', '.join(_FIELDS)}; {sample.path} has no {missing[0]}")
    ids, mask, old, advantage, group = (sample.at(name) for name in _FIELDS)
    tokens = ids._replace(value=ids.values()).ids()
    if not tokens:
        raise ValueError(f"input_ids must have at least one token; {sample.path} has none")
    found: dict[str, Any] = {"completion_mask": mask.choices(), "old_log_probs": old.reals(missing=True)}
    for name, values in found.items():
        if len(values) != len(tokens):
            raise ValueError(f"{name} must have one entry a token, {len(tokens)} in {sample.path}; got {len(values)}")
    if not isinstance(group.value, (str, int)):
        raise group.refuse("a text or an int")
    return found | {"input_ids": tokens, "advantage": advantage.real(), "group_id": group.value}


def _joined(samples: list[dict[str, Any]], name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor([x for sample in samples for x in sample[name]], dtype=dtype, device="cpu")
