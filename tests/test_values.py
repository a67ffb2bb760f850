"""Values at the edge of what is legal: each is right, or refused by its name, in every op that can be given it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import delta_belief, feedback, gigpo
from trajkern.testing import SPECS, run

NAN, INF = math.nan, math.inf
SMALL = [(spec, case) for spec in SPECS for case in spec.cases if not case.large]
NAMED = [f"{spec.name}-{case.name}" for spec, case in SMALL]
CU_SEQLENS = torch.tensor([0, 2, 2, 4])
X = torch.tensor([-1.0, -2.0, -0.5, -3.0])
HEAD = {"hidden": torch.ones(2, 3), "weight": torch.arange(12.0).view(4, 3) / 6, "targets": torch.tensor([1, 3])}
LOGITS = {"logits": torch.arange(10.0).view(2, 5) / 3, "targets": torch.tensor([0, 4])}
LOSS = {"logprobs": X, "old_logprobs": X + 0.1, "advantages": torch.tensor([1.0, 5.0, -1.0]), "cu_seqlens": CU_SEQLENS}
TREE = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([1, 2, 1]))


@pytest.fixture(params=["owner", "reference"])
def route(request: pytest.FixtureRequest):
    """The CPU's own kernels, and plain torch."""
    with tk.use_backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield request.param


# Views: how a tensor lies in memory is no business of its values.


def _negative(x: Tensor) -> Tensor:
    """The sign is a bit of the view, as in ``z.conj().imag``."""
    return torch._neg_view(-x) if x.dtype != torch.bool else x


def _every_other(x: Tensor) -> Tensor:
    wide = torch.stack((x, torch.zeros_like(x)), -1)
    return wide[..., 0]


def _further_on(x: Tensor) -> Tensor:
    return torch.cat((torch.ones_like(x).flatten(), x.flatten()))[x.numel() :].view(x.shape)


VIEWS = {"negative": _negative, "every_other": _every_other, "further_on": _further_on}


def _seen(x: Any, view) -> Any:
    if isinstance(x, Tensor):
        return view(x)
    if isinstance(x, tk.Paths):
        return tk.Paths(x.tree, view(x.advantages), None if x.gate is None else view(x.gate))
    if isinstance(x, tuple) and all(isinstance(part, Tensor) for part in x):
        parts = [view(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


@pytest.mark.parametrize(("op", "example"), SMALL, ids=NAMED)
def test_views(op, example) -> None:
    """Of every tensor in every op, value and gradient."""
    for dtype in (torch.float32, torch.float64)[: 2 if example is op.cases[0] else 1]:
        inputs = op.inputs(example, dtype)
        plain = run(op, getattr(tk, op.name), inputs)
        for view, see in VIEWS.items():
            seen = run(op, getattr(tk, op.name), {k: _seen(v, see) for k, v in inputs.items()})
            for name, x in plain.items():
                message = f"{name}, {view}"
                torch.testing.assert_close(seen[name], x, rtol=1e-5, atol=1e-6, equal_nan=True, msg=message)


@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.name)
def test_views_of_upstream_gradients(op) -> None:
    inputs = op.inputs(op.cases[0], torch.float32)
    grads = []
    for view in (lambda x: x, _negative):
        given = {k: v.clone().requires_grad_() if k in op.differentiable else v for k, v in inputs.items()}
        outputs = op.outputs(getattr(tk, op.name)(**given))
        names = [k for k, x in outputs.items() if x.requires_grad and k not in op.no_grad_outputs]
        generator = torch.Generator().manual_seed(0)
        upstream = [view(torch.randn(outputs[k].shape, generator=generator)) for k in names]
        leaves = [x for k, x in given.items() if k in op.differentiable]
        grads.append(torch.autograd.grad([outputs[k] for k in names], leaves, upstream, allow_unused=True))
    for plain, seen in zip(*grads, strict=True):
        torch.testing.assert_close(seen, plain)


def test_negative_views_in_layouts() -> None:
    """Those that are read on the host."""
    parent, lengths = torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 3])
    tree, seen = tk.Tree(parent, lengths), tk.Tree(_negative(parent), _negative(lengths))
    assert torch.equal(seen.flat_index, tree.flat_index) and torch.equal(seen.leaves, tree.leaves)
    mask, bounds = torch.tensor([False, True, True, False, True]), torch.tensor([0, 3, 5])
    assert torch.equal(tk.Spans.turns(mask, _negative(bounds)).start, tk.Spans.turns(mask, bounds).start)
    tokens, ids = torch.tensor([5, 6, 7, 5, 6, 8]), torch.tensor([1, 1])
    bounds, mask = torch.tensor([0, 3, 6]), torch.tensor([False, True, True] * 2)
    fields = tokens, bounds, torch.randn(3).repeat(2)
    trees = [
        tk.Tree.from_trajectories(tk.PackedBatch(view(t), view(c), mask, ids, old_logprobs=view(x)))
        for view, (t, c, x) in ((lambda x: x, fields), (_negative, fields))
    ]
    assert torch.equal(trees[0].parent, trees[1].parent) and torch.equal(trees[0].source, trees[1].source)
    assert trees[0].num_nodes == 3


# What is masked or gated out is not read: it may be the NaN of what could not be scored.


def _unscored(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """NaN for the floats that a mask or a gate hides, of as many rows as it has; None where there are none."""
    keep = inputs.get("gate", inputs.get("mask"))
    if isinstance(branch := inputs.get("branch"), tk.Paths) and branch.gate is not None:
        poisoned = torch.where(branch.gate, branch.advantages, torch.nan)
        return inputs | {"branch": tk.Paths(branch.tree, poisoned, branch.gate)}
    if keep is None:
        return None
    weights = {name: x for name in ("supervised_weights", "kl_weights") if (x := inputs.get(name)) is not None}
    for x in weights.values():  # a token that has one is read whatever the mask
        keep = keep | (x != 0)
    rows, poisoned = keep.ndim, dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[:rows] == keep.shape:
            poisoned[name] = torch.where(keep.view(*keep.shape, *[1] * (x.ndim - rows)), x, torch.nan)
    if isinstance(poisoned.get("temperature"), Tensor):  # a number that is wanted of every row
        poisoned["temperature"] = inputs["temperature"]
    return poisoned | weights


HIDDEN = [(s, c) for s, c in SMALL if {"mask", "gate", "branch"} & s.inputs(c, torch.float32).keys()]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("op", "example"), HIDDEN, ids=[f"{s.name}-{c.name}" for s, c in HIDDEN])
def test_what_is_hidden_is_not_read(op, example) -> None:
    inputs = op.inputs(example, torch.float32)
    if (poisoned := _unscored(inputs)) is None or inputs.get("rows") is not None:
        return  # rows: which hidden state is hidden is no row's mask
    function = getattr(tk, op.name)
    plain, seen = run(op, function, inputs), run(op, function, poisoned)
    for name, x in plain.items():
        torch.testing.assert_close(seen[name], x, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.usefixtures("route")
def test_a_reward_that_could_not_be_scored() -> None:
    rewards, ids = torch.tensor([1.0, NAN, 0.0, INF]), torch.tensor([0, 0, 0, 1])
    gate = torch.tensor([True, False, True, False])
    expected = torch.tensor([0.70710578, 0, -0.70710578, 0])
    for options in ({"gate": gate}, {"weights": gate.double()}, {"gate": gate, "weights": rewards.abs().nan_to_num(2)}):
        if "weights" in options and "gate" in options:
            options["weights"] = torch.tensor([1.0, NAN, 1.0, -1.0])  # nor is the weight of what is gated out
        leaf = rewards.clone().requires_grad_()
        out = tk.group_advantages(leaf, ids, **options)
        torch.testing.assert_close(out.detach(), expected)
        (grad,) = torch.autograd.grad(out, leaf, torch.tensor([1.0, NAN, 0.0, INF]))
        assert grad[[0, 2]].isfinite().all() and (grad[[1, 3]] == 0).all()
    with pytest.raises(ValueError, match="^rewards must be finite; it is nan at index 1"):
        tk.group_advantages(rewards, ids)


@pytest.mark.usefixtures("route")
def test_a_leaf_of_no_weight_may_have_any_advantage() -> None:
    branch = tk.branch_coefficients(torch.tensor([NAN, 2.0]), TREE, leaf_weights=torch.tensor([0.0, 1.0]))
    assert branch.positive.tolist() == [2, 0, 2] and branch.negative.tolist() == [0, 0, 0]
    paths = tk.Paths(TREE, torch.tensor([NAN, 2.0]), torch.tensor([False, True]))
    config = tk.PolicyLoss("grpo", ratio_level="sequence")
    loss, _ = tk.policy_loss(X, X, None, torch.tensor([0, 1, 3, 4]), config=config, branch=paths)
    assert loss == -2
    with pytest.raises(ValueError, match="^advantages must be finite; it is nan at index 0"):
        tk.Paths(TREE, torch.tensor([NAN, 2.0]), torch.tensor([True, True]))


# Overflow: a sum of squares neither overflows nor vanishes in silence.


def _spread(scale: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=dtype) * scale


RANGES = [(torch.float32, 1e30), (torch.float32, 8e37), (torch.float64, 1e140), (torch.float64, 3e144)]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("dtype", "scale"), RANGES)
def test_large_values_are_right(dtype: torch.dtype, scale: float) -> None:
    x, small = _spread(scale, dtype), _spread(1.0, dtype)
    ids, tree = torch.zeros(4, dtype=torch.int64), tk.Tree(torch.tensor([-1, 0, 0, 0, 0]), torch.ones(5).long())
    for baseline in ("mean", "leave_one_out"):
        out, expected = (tk.group_advantages(v, ids, baseline=baseline, eps=0.0) for v in (x, small))
        torch.testing.assert_close(out, expected)
    out, expected = (tk.whiten(v, eps=e) for v, e in ((x, 1e-8), (small, 1e-30)))
    torch.testing.assert_close(out, expected)
    out, expected = (tk.sibling_advantages(torch.cat((v[:1], v)), tree, eps=0.0) for v in (x, small))
    torch.testing.assert_close(out, expected)
    cu_seqlens, ids = torch.tensor([0, 2, 4]), torch.zeros(2, dtype=torch.int64)
    out, expected = (tk.variance_weights(v, cu_seqlens, ids) for v in (x, small))
    torch.testing.assert_close(out, expected)


TOO_LARGE = [
    ("group_advantages", "rewards", lambda x: {"group_ids": torch.zeros(4).long()}),
    (
        "sibling_advantages",
        "node_values",
        lambda x: {"tree": tk.Tree(torch.tensor([-1, 0, 0, 0]), torch.ones(4).long())},
    ),
    (
        "subtree_reduce",
        "leaf_values",
        lambda x: {"tree": tk.Tree(torch.full((4,), -1), torch.ones(4).long()), "op": "var"},
    ),
    (
        "variance_weights",
        "logprobs",
        lambda x: {"cu_seqlens": torch.tensor([0, 2, 4]), "group_ids": torch.zeros(2).long()},
    ),
]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("function", "name", "others"), TOO_LARGE, ids=[row[0] for row in TOO_LARGE])
def test_larger_values_are_refused(function: str, name: str, others) -> None:
    x = _spread(1e300, torch.float64)
    with pytest.raises(ValueError, match=f"^{name} must be of a magnitude of at most 3.12e\\+144"):
        getattr(tk, function)(**{name: x}, **others(x))


def test_whiten_refuses_what_overflows() -> None:
    with pytest.raises(ValueError, match="^x must differ from its mean by less than 1e154"):
        tk.whiten(_spread(1e300, torch.float64))
    assert tk.whiten(torch.tensor([1.0, NAN], dtype=torch.float64)).isnan().all()


# Infinite logits: what torch.log_softmax makes of them.


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 40, 5000])
def test_infinite_logits(dtype: torch.dtype, size: int) -> None:
    logits = torch.zeros(3, size, dtype=dtype)
    logits[0, size // 2], logits[1], logits[2, 0] = INF, -INF, NAN
    for target in {0, size // 2, size - 1}:
        targets = torch.full((3,), target)
        assert torch.log_softmax(logits.double(), -1)[torch.arange(3), targets].isnan().all()
        leaf = logits.clone().requires_grad_()
        stats = tk.token_stats(leaf, targets, outputs=("entropy", "sum_sq_probs", "is_top1"))
        assert stats.logprobs.isnan().all() and stats.entropy.isnan().all() and stats.sum_sq_probs.isnan().all()
        assert not stats.is_top1.any()
        assert torch.autograd.grad(stats.logprobs.sum(), leaf)[0].isnan().all()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_infinite_logits_of_the_head(value: float) -> None:
    bias = torch.tensor([0.0, value, 0.0, 0.0])
    stats = tk.linear_token_stats(**HEAD, bias=bias, outputs=("entropy", "sum_sq_probs", "is_top1"))
    if value == -INF:  # a token that is banned
        assert stats.logprobs[0] == -INF and stats.logprobs[1].isfinite() and stats.entropy.isfinite().all()
    else:
        assert stats.logprobs.isnan().all() and stats.entropy.isnan().all() and not stats.is_top1.any()


# A normaliser of 0, where nothing is to be learnt.

NOTHING = {
    "no_token_scored": {"mask": torch.zeros(4, dtype=torch.bool)},
    "no_advantage": {"advantages": torch.zeros(3)},
    "none_where_scored": {
        "advantages": torch.tensor([0.0, 1.0, 1.0]),
        "mask": torch.tensor([True, True, False, False]),
    },
    "no_rollout": {"branch": tk.Paths(TREE, torch.ones(2), torch.zeros(2, dtype=torch.bool)), "advantages": None},
}


def _loss_with(changes: dict[str, Any], config: tk.PolicyLoss, zero: Any) -> tuple[Tensor, Tensor]:
    arguments = LOSS | {"logprobs": X.clone().requires_grad_(), "config": config} | changes
    if "branch" in changes:
        arguments["cu_seqlens"] = torch.tensor([0, 1, 3, 4])
    loss, _ = tk.policy_loss(**arguments, normalizer=zero)
    return loss, torch.autograd.grad(loss, arguments["logprobs"])[0]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), torch.tensor(0), torch.tensor([0.0])], ids=repr)
def test_a_normalizer_of_zero(nothing: str, zero: Any) -> None:
    for aggregate in ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean"):
        config = tk.PolicyLoss("dapo", aggregate=aggregate)
        loss, grad = _loss_with(NOTHING[nothing], config, zero)
        assert loss == 0 and (grad == 0).all()
        with pytest.raises(ValueError, match="^normalizer must be greater than 0, got 0"):
            _loss_with({}, config, zero)
    if nothing == "no_advantage":  # but a penalty is learnt
        with pytest.raises(ValueError, match="^normalizer must be greater than 0, got 0"):
            _loss_with(NOTHING[nothing] | {"ref_logprobs": X}, tk.PolicyLoss("dapo", kl_coef=0.1), zero)


# Masks and indices.


@pytest.mark.parametrize("name", ["attention_mask", "loss_mask"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1.0])
def test_masks_that_are_none(name: str, value: float) -> None:
    masks = {"attention_mask": torch.ones(2, 3), "loss_mask": torch.tensor([[0.0, 1, 1], [0, 1, 1]])}
    tokens, ids = torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1])
    assert tk.PackedBatch.from_padded(tokens, **masks, group_ids=ids).num_tokens == 6
    masks[name][1, 2] = value
    with pytest.raises(
        ValueError, match=rf"^{name} must be 0 or a positive number everywhere; it is {value} at \[1, 2\]"
    ):
        tk.PackedBatch.from_padded(tokens, **masks, group_ids=ids)


def test_indices_that_are_none() -> None:
    ids = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="^turn must be at least 0; the smallest is -1"):
        delta_belief.turn_advantages(torch.ones(2), torch.tensor([0, 1]), torch.tensor([-1, 0]), ids)
    with pytest.raises(ValueError, match="^step must be at least 0; the smallest is -1"):
        feedback.step_advantages(torch.ones(2), ids, torch.tensor([0, -1]))
    for trajectory in ([-1, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"^trajectory must lie in \[0, 2\), the trajectories"):
            delta_belief.turn_advantages(torch.ones(2), torch.tensor(trajectory), torch.tensor([0, 1]), ids)
        with pytest.raises(ValueError, match=r"^trajectory must lie in \[0, 2\), the trajectories"):
            gigpo.step_advantages(torch.ones(2), torch.tensor(trajectory), ids, ids, episode_rewards=torch.ones(2))
    with pytest.raises(ValueError, match="^source must be at least 0; the smallest is -1"):
        tk.Tree(torch.tensor([-1]), torch.tensor([1]), source=torch.tensor([-1]))


@pytest.mark.usefixtures("route")
def test_an_ignored_target_is_told_of_the_mask() -> None:
    for call in (
        lambda t: tk.token_logprobs(LOGITS["logits"], t),
        lambda t: tk.linear_logprobs(HEAD["hidden"], HEAD["weight"], t),
    ):
        with pytest.raises(ValueError, match=r"^targets must lie .*targets is -100 at row 1; .* False in mask="):
            call(torch.tensor([0, -100]))
