"""The ops, layouts and recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from tests.attack import recipes
from tests.attack.case import Case, of_function


def _batch(**changed: Any) -> tk.PackedBatch:
    return tk.PackedBatch(**(_batch_fields() | changed))


def _batch_fields() -> dict[str, Any]:
    flags = torch.tensor([False, True, False, True])
    fields = {"tokens": torch.arange(4), "cu_seqlens": torch.tensor([0, 2, 4]), "loss_mask": flags}
    return fields | {"group_ids": torch.zeros(2, dtype=torch.int64), "rewards": torch.tensor([1.0, 0.0])}


def _spans() -> tk.Spans:
    return tk.Spans(*(torch.tensor(x) for x in ([0, 2], [2, 4], [0, 1], [0, 0])), 4)


def good() -> dict[Callable[..., Any], dict[str, Any]]:
    """Arguments that each function takes: four tokens, two trajectories of one group."""
    x, cu_seqlens = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([0, 2, 4])
    mask, ids, advantages = torch.ones(4, dtype=torch.bool), torch.tensor([5, 5]), torch.tensor([1.0, -1.0])
    logits, targets = torch.arange(20.0).view(4, 5), torch.tensor([0, 1, 2, 4])
    head = {"hidden": torch.ones(4, 3), "weight": torch.arange(15.0).view(5, 3) / 9, "targets": targets, "mask": mask}
    head |= {"rows": torch.arange(4), "bias": torch.zeros(5), "temperature": torch.ones(4), "softcap": 9.0}
    loss = {"old_logprobs": x, "advantages": advantages, "cu_seqlens": cu_seqlens, "config": tk.PolicyLoss(kl_coef=0.1)}
    loss |= {"ref_logprobs": x, "mask": mask, "normalizer": 2.0}
    teacher = {"teacher_hidden": torch.ones(4, 3), "teacher_weight": torch.ones(5, 3), "mask": mask}
    top = torch.full((4, 2), math.log(0.25))
    return {
        tk.token_logprobs: {"logits": logits, "targets": targets, "mask": mask, "temperature": torch.ones(4)},
        tk.token_stats: {"logits": logits, "targets": targets, "mask": mask},
        tk.linear_logprobs: head,
        tk.linear_token_stats: head,
        tk.linear_topk: head | {"k": 2},
        tk.linear_policy_loss: head | loss,
        tk.linear_divergence: {"hidden": head["hidden"], "weight": head["weight"], **teacher},
        tk.topk_divergence: {"student_logprobs": top, "teacher_logprobs": top, "mask": mask},
        tk.policy_loss: {"logprobs": x, **loss},
        tk.group_advantages: {"rewards": advantages, "group_ids": ids, "gate": mask[:2], "weights": torch.ones(2)},
        tk.discounted_returns: {"rewards": x, "cu_seqlens": cu_seqlens, "mask": mask},
        tk.gae: {"rewards": x, "values": x, "cu_seqlens": cu_seqlens, "bootstrap": advantages, "mask": mask},
        tk.whiten: {"x": x, "mask": mask},
        tk.variance_weights: {"logprobs": x, "cu_seqlens": cu_seqlens, "group_ids": ids},
        tk.reflection_rewards: {"logprobs": x, "cu_seqlens": cu_seqlens, "group_ids": ids, "baseline": x},
        tk.span_reduce: {"x": x, "spans": _spans()},
        tk.spread: {"values": advantages, "layout": _spans()},
        tk.subtree_reduce: {"leaf_values": advantages, "tree": recipes.tree()},
        tk.sibling_advantages: {"node_values": x[:3].clone(), "tree": recipes.tree()},
        tk.branch_coefficients: {"leaf_advantages": advantages, "tree": recipes.tree(), "leaf_weights": torch.ones(2)},
        **_layouts(mask),
        **recipes.good(_batch()),
    }


def _layouts(mask: Tensor) -> dict[Callable[..., Any], dict[str, Any]]:
    start, end, trajectory, index = (torch.tensor(x) for x in ([0, 2], [2, 4], [0, 1], [0, 0]))
    spans = {"start": start, "end": end, "trajectory": trajectory, "index": index, "num_tokens": 4}
    tree = {"parent": torch.tensor([-1, 0, 0]), "node_lengths": torch.tensor([2, 1, 1])}
    scored = torch.tensor([False, True, False, True])
    padded = {"tokens": torch.ones(2, 2, dtype=torch.int64), "attention_mask": mask.view(2, 2)}
    return {
        tk.PackedBatch: _batch_fields() | {"old_logprobs": torch.zeros(4)},
        tk.PackedBatch.from_padded: padded | {"loss_mask": scored.view(2, 2), "group_ids": torch.tensor([5, 5])},
        tk.Spans: spans | {"cu_seqlens": torch.tensor([0, 2, 4])},
        tk.Spans.turns: {"loss_mask": scored, "cu_seqlens": torch.tensor([0, 2, 4])},
        tk.Tree: tree | {"group_ids": torch.tensor([3]), "source": torch.arange(4)},
        tk.Tree.from_segments: {"segment_ids": torch.tensor([1, 1, 2, 3]), "parent_ids": torch.tensor([1, 1, 1, 1])},
        tk.Tree.from_trajectories: {"batch": _batch()},
        tk.Paths: {"tree": recipes.tree(), "advantages": torch.ones(2), "gate": torch.ones(2, dtype=torch.bool)},
        tk.PolicyLoss: {},
    }


def cases() -> Iterator[Case]:
    for function, arguments in good().items():
        yield from of_function(function.__qualname__, function, arguments, with_odd=False)  # see odd
    for layout in (_batch(), _spans(), recipes.tree()):
        yield from of_function(f"{type(layout).__name__}.to", layout.to, {"device": "cpu"}, {"device": "device"})
