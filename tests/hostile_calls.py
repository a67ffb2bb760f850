"""Hostile arguments for the public functions and layouts, run by ``python -m tests.hostile_calls FIRST STEP``.

A case is a call whose arguments are good but for one. It must end in a TypeError or ValueError with that argument's
name, or, where the case says so, in a result. Each case is announced on a line before it runs, so that whoever reads
the lines knows which one killed the process, and can go on behind it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import delta_belief, dro, gigpo, grpo, sdpo, srl, toolpo, tree_grpo

HUGE = 10**400
BOUNDS = ("cu_seqlens", "cu_beliefs")


class Case(NamedTuple):
    label: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    named: str  # what the message must name
    may_pass: bool


def _batch(**changed: Any) -> tk.PackedBatch:
    return tk.PackedBatch(**(_batch_fields() | changed))


def _batch_fields() -> dict[str, Any]:
    flags = torch.tensor([False, True, False, True])
    fields = {"tokens": torch.arange(4), "cu_seqlens": torch.tensor([0, 2, 4]), "loss_mask": flags}
    return fields | {"group_ids": torch.zeros(2, dtype=torch.int64), "rewards": torch.tensor([1.0, 0.0])}


def _tree() -> tk.Tree:
    return tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1]))


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
        tk.subtree_reduce: {"leaf_values": advantages, "tree": _tree()},
        tk.sibling_advantages: {"node_values": x[:3].clone(), "tree": _tree()},
        tk.branch_coefficients: {"leaf_advantages": advantages, "tree": _tree(), "leaf_weights": torch.ones(2)},
        **_layouts(mask),
        **_recipes(x, cu_seqlens, ids),
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
        tk.Paths: {"tree": _tree(), "advantages": torch.ones(2), "gate": torch.ones(2, dtype=torch.bool)},
        tk.PolicyLoss: {},
    }


def _recipes(x: Tensor, cu_seqlens: Tensor, ids: Tensor) -> dict[Callable[..., Any], dict[str, Any]]:
    """Of each shape that a recipe's arguments have, one."""
    turns = {"log_beliefs": x, "cu_beliefs": cu_seqlens, "penalty": torch.zeros(2)}
    top = torch.full((4, 2), math.log(0.25))
    least = {"worst_fraction": 0.5, "top_k": 1}
    steps = {"trajectory": torch.tensor([0, 1]), "anchor": torch.tensor([0, 0]), "group": ids}
    return {
        grpo: {"batch": _batch()},
        delta_belief.turn_rewards: turns | {"won": torch.ones(2, dtype=torch.bool)},
        dro.rank_filter: {"ranks": torch.tensor([1, 2, 1, 2]), "cu_seqlens": cu_seqlens, "group_ids": ids} | least,
        gigpo.step_advantages: {"returns": torch.ones(2), **steps, "episode_rewards": torch.ones(2)},
        sdpo.token_losses: {"student_logprobs": top, "teacher_logprobs": top, "logprobs": x, "old_logprobs": x},
        sdpo.peers: {"rewards": torch.ones(2), "group_ids": ids},
        srl.similarity: {"actions": ["a"], "expert_actions": ["b"]},
        toolpo.group_preference: {"lengths": torch.ones(2), "folded": torch.tensor([True, False]), "group_ids": ids},
        tree_grpo.node_rewards: {"leaf_rewards": torch.ones(2), "tree": _tree()},
    }


def without_memory(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors like ``x`` of which the memory, or a part of it, is gone."""
    freed, shrunk, view = x.clone(), x.clone(), torch.cat((x, x))[x.shape[0] :]
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    view.untyped_storage().resize_(2 * x.nbytes - 1)
    yield from (("freed", freed), ("shrunk", shrunk), ("a view of what was shrunk", view))
    yield "efficient zeros", torch._efficientzerotensor(x.shape, dtype=x.dtype)


def of_other_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "sparse", x.to_sparse()
    yield "nested", torch.nested.nested_tensor([x, x])
    yield "nested, one", torch.nested.nested_tensor([x])
    if x.is_floating_point():
        yield "jagged", torch.nested.nested_tensor([x, x], layout=torch.jagged)
        yield "mkldnn", x.to_mkldnn()
        yield "quantised", torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8)
    if x.ndim == 2:
        yield "sparse rows", x.to_sparse_csr()
    yield "meta", torch.empty_like(x, device="meta")


def boundaries(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for values in ([0, 2**40, 4], [0, 3, 9], [1, 2, 4], [0, 9, 4], [0, 2, 3], [0, -1, 4], [0, -(2**62), 4], [-1, 2, 4]):
        yield f"boundaries {values}", torch.tensor(values)
    yield "no boundary", x[:0]
    yield "int32 boundaries", torch.tensor([0, 9, 4], dtype=torch.int32)


FLAGS = ["no", "x", "", 0, 1, 0.5, None, [], [True], torch.tensor([True, False])]
NUMBERS = [HUGE, -HUGE, 10**5000, Fraction(HUGE), math.nan, math.inf, "1", [1.0], {}, None, True, 1j]
NUMBERS += [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor(1.0, device="meta"), np.array("x")]
CHOICES = [np.array([1, 2]), np.array(["mean", "std"]), [], {}, ["mean"], None, 0.5, b"mean", torch.ones(2), object()]
COUNTS = [HUGE, 10**5000, 2**62, -1, 1.5, "1", math.nan, None, True, torch.ones(2), np.array([1, 2])]
OBJECTS = [None, 3, "x", {}, (), torch.ones(2)]


def hostile(name: str, kind: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(label, value) of what must be refused for a parameter of the annotated kind that is given as ``value``."""
    if isinstance(value, Tensor):
        yield from without_memory(value)
        yield from of_other_layouts(value)
        yield from ((repr(x), x) for x in (3, "x", [1.0], object, np.ones(2)) if not _is_legal(name, kind, x))
        if name in BOUNDS:
            yield from boundaries(value)
        return
    given = OBJECTS
    if kind.startswith("bool"):
        given = FLAGS
    elif re.match(r"(float|Tensor \| float)", kind):
        given = NUMBERS
    elif kind.startswith("int"):
        given = COUNTS
    elif kind.startswith("str"):
        given = CHOICES
    elif kind.startswith(("Any", "Sequence", "torch.dtype", "tuple", "Tensor")):
        given = [x for x in OBJECTS if x not in ((), "x")] if kind.startswith("Sequence") else [3, "x", {}, []]
    for x in given:
        if not _is_legal(name, kind, x):
            yield repr(x)[:40] if not isinstance(x, int) or abs(x) < 2**63 else f"{x.bit_length()} bits", x


def _is_legal(name: str, kind: str, x: Any) -> bool:
    if x is None:
        return "| None" in kind
    if name == "top_k":  # a bound of a mean
        return isinstance(x, (int, float)) and x in (1.5, 2**62)
    if not isinstance(x, int):
        return False
    return (x == 3 and "float" in kind) or (x == 2**62 and name in ("workspace_bytes", "max_length", "top_k"))


def cases() -> Iterator[Case]:
    for function, arguments in good().items():
        name = function.__qualname__
        yield Case(f"{name}", function, arguments, "", True)
        for parameter in inspect.signature(function).parameters.values():
            value = arguments.get(parameter.name, parameter.default)
            for label, x in hostile(parameter.name, str(parameter.annotation), value):
                changed = arguments | {parameter.name: x}
                yield Case(f"{name}({parameter.name}: {label})", function, changed, parameter.name, False)
        yield Case(f"{name}(foo)", function, arguments | {"foo": 1}, function.__name__, False)


def verdict(case: Case) -> str:
    """Empty where the case ended well."""
    try:
        case.function(**case.arguments)
    except (TypeError, ValueError) as error:
        message = str(error)
        other = " on meta like the other tensors" in message  # of which the first has set the device
        if (re.search(rf"\b{case.named}\b", message) or other) and "pybind" not in message:
            return ""
        return f"{type(error).__name__} without the name {case.named}: {message[:150]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "" if case.may_pass else "was accepted"


def main(first: int, step: int) -> None:
    """Every ``step``-th case, the good calls among them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for i, case in enumerate(cases()):
        if i >= first and (i % step == 0 or case.may_pass):
            print(json.dumps([i, case.label]), flush=True)
            print(json.dumps([i, case.label, verdict(case)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
