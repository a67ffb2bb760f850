"""What autograd does with every differentiable op: right, or an error with the op's public name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import trajkern as tk
from trajkern.ops import span, tree
from trajkern.testing import SPECS, OpSpec, run, spec_of

LINEAR = {"discounted_returns", "gae", "span_reduce", "spread", "branch_coefficients"}  # in what they differentiate
INDEXED = {"gae", "discounted_returns", "span_reduce", "spread"}  # they save integers alone, which no hook gets
FORMED = {"policy_loss", "linear_policy_loss"}  # their gradients exist once, from the forward
NAMED = {"linear_policy_loss": "full", "policy_loss": "tis_grpo", "linear_token_stats": "everything"}
REDUCTIONS = {"span_reduce": span.REDUCTIONS, "subtree_reduce": tree.REDUCTIONS}  # each has a case of its name
OPS = [spec.name for spec in SPECS]
VERSION = "modified by an inplace operation"


class Problem:
    """An op on one small case: its arguments, those with a gradient apart, and a fixed number made of its results."""

    def __init__(self, name: str, case_name: str | None = None) -> None:
        self.spec: OpSpec = next(spec for spec in SPECS if spec.name == name)
        wanted = case_name or NAMED.get(name)
        case = next(c for c in self.spec.cases if not c.large and c.name == (wanted or c.name))
        self.inputs: dict[str, Any] = self.spec.inputs(case, torch.float32)
        given = (k for k in self.spec.differentiable if isinstance(self.inputs.get(k), Tensor))
        self.leaves = {k: self.inputs[k].detach().requires_grad_() for k in given}

    def results(self, **arguments: Any) -> list[Tensor]:
        """Those with a gradient."""
        outputs = self.spec.outputs(getattr(tk, self.spec.name)(**self.inputs | self.leaves | arguments))
        recorded = {name: x for name, x in outputs.items() if x.requires_grad or not torch.is_grad_enabled()}
        return [x for name, x in recorded.items() if name not in self.spec.no_grad_outputs]

    def loss(self, **arguments: Any) -> Tensor:
        return self.weighted_sum(self.results(**arguments))

    @classmethod
    def weighted_sum(cls, results: list[Tensor]) -> Tensor:
        return torch.stack([(x * weight).sum() for x, weight in cls.weighted(results)]).sum()

    @staticmethod
    def weighted(results: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(0)
        return [(x, torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)) for x in results]

    def gradients(self, loss: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(self.leaves.values()), **options)

    @property
    def expected(self) -> tuple[Tensor, ...]:
        return self.gradients(self.loss())


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_second_backward(op: str) -> None:
    problem = Problem(op)
    loss = problem.loss()
    first = [g.clone() for g in problem.gradients(loss, retain_graph=True)]
    if op in FORMED:
        with pytest.raises(RuntimeError, match=f"{op}: a second backward"):
            problem.gradients(loss)
    else:
        assert same(problem.gradients(loss), first)
    assert same(problem.expected, first)


def _has_constant_gradients(problem: Problem) -> bool:
    """By the reference's second derivatives, which torch has."""
    with tk.use_backend("reference"):
        squares = [g.square().sum() for g in problem.gradients(problem.loss(), create_graph=True) if g.requires_grad]
    return not squares or not any(g.any() for g in problem.gradients(sum(squares), materialize_grads=True))


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in REDUCTIONS.get(op, (None,))])
def test_second_derivatives(op: str, case: str | None) -> None:
    """None is left out without a word: not where the upstream is a constant, and not where another path has one."""
    problem = Problem(op, case)
    penalty = sum(x.square().sum() for x in problem.leaves.values())
    if op not in LINEAR or not _has_constant_gradients(problem):
        for loss in (problem.loss(), problem.loss() + penalty):
            with pytest.raises(RuntimeError, match=f"trajkern.{op}.*differentiable once"):
                problem.gradients(loss, create_graph=True)
        return
    gradients = problem.gradients(problem.loss() + penalty, create_graph=True)
    second = problem.gradients(sum(g.square().sum() for g in gradients))
    for gradient, x in zip(gradients, second, strict=True):
        assert torch.equal(x, 4 * gradient.detach())
    with pytest.raises(RuntimeError, match=f"trajkern.{op}.*differentiable once"):
        problem.gradients(problem.loss().square(), create_graph=True)


def _dual(problem: Problem, name: str, function: Callable[..., Any]) -> None:
    with forward_ad.dual_level():
        x = problem.leaves[name].detach()
        function(**{name: forward_ad.make_dual(x, torch.ones_like(x))})


TRANSFORMS: dict[str, Callable[[Problem, str, Callable[..., Any]], Any]] = {
    "grad": lambda problem, name, f: torch.func.grad(lambda x: f(**{name: x}))(problem.leaves[name].detach()),
    "jvp": lambda problem, name, f: torch.func.jvp(
        lambda x: f(**{name: x}), (problem.leaves[name].detach(),), (problem.leaves[name].detach(),)
    ),
    "vmap": lambda problem, name, f: torch.func.vmap(lambda x: f(**{name: x}))(problem.leaves[name].detach()[None]),
    "forward_ad": _dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_transforms_are_refused_by_name(op: str, transform: str) -> None:
    problem = Problem(op)
    for name in problem.leaves:
        with pytest.raises(RuntimeError, match=f"trajkern.{op} runs in no transform"):
            TRANSFORMS[transform](problem, name, problem.loss)


@pytest.mark.parametrize("op", OPS)
def test_a_trace_of_jit_is_refused_by_name(op: str) -> None:
    """It would hold the memory of the results, and not what wrote it."""
    problem = Problem(op)
    name, x = next(iter(problem.leaves.items()))
    with pytest.raises(RuntimeError, match=f"trajkern.{op} cannot be recorded by torch.jit.trace"):
        torch.jit.trace(lambda x: tuple(problem.results(**{name: x})), x.detach(), check_trace=False)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_what_torch_has(op: str) -> None:
    """Plain torch is refused nothing: the second derivative of one of its losses exists."""
    problem = Problem(op)
    with tk.use_backend("reference"):
        gradients = problem.gradients(problem.loss(), create_graph=True, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("op", OPS)
def test_transformed_upstreams_are_refused_by_name(op: str) -> None:
    problem = Problem(op)
    loss = problem.loss()
    with pytest.raises(RuntimeError, match=f"trajkern.{op}.*batched gradients"):
        problem.gradients(loss, grad_outputs=torch.ones(2), is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"trajkern.{op}.*no forward-mode derivative"):
        problem.gradients(loss, grad_outputs=forward_ad.make_dual(torch.ones(()), torch.ones(())))


@pytest.mark.parametrize("op", OPS)
def test_upstreams_of_any_layout(op: str) -> None:
    """Expanded, strided and negative-bit gradients are the numbers that they stand for."""
    problem = Problem(op)
    layouts: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: torch.stack((x, -x), -1)[..., 0],
        lambda x: torch._neg_view(-x),
        lambda x: x.reshape(-1)[:1].expand(x.numel()).reshape(x.shape),
    )
    for layout in layouts:
        upstream = [layout(weight) for _, weight in problem.weighted(problem.results())]
        plain = [x.resolve_neg().clone() for x in upstream]
        leaves = list(problem.leaves.values())
        found = torch.autograd.grad(problem.results(), leaves, upstream)
        assert same(found, torch.autograd.grad(problem.results(), leaves, plain))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_checkpoint(op: str, reentrant: bool) -> None:
    problem = Problem(op)
    names = list(problem.leaves)

    def loss(*xs: Tensor) -> Tensor:
        return problem.loss(**dict(zip(names, xs, strict=True)))

    checkpoint(loss, *problem.leaves.values(), use_reentrant=reentrant).backward()
    assert same([x.grad for x in problem.leaves.values()], problem.expected)


@pytest.mark.parametrize("op", OPS)
def test_anomaly_mode_and_hooks(op: str) -> None:
    problem = Problem(op)
    expected, seen = problem.expected, []
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = problem.loss()
        for x in problem.leaves.values():
            x.register_hook(seen.append)
        loss.backward()
    assert same([x.grad for x in problem.leaves.values()], expected)
    assert len(seen) == len(expected)


def _apart(x: Tensor) -> Tensor:
    """Equal numbers, whose neighbours in memory are others."""
    return torch.stack((x, ~x if x.dtype == torch.bool else x + 1), -1)[..., 0]


@pytest.mark.parametrize("op", OPS)
def test_hooks_that_give_back_what_was_saved_elsewhere(op: str) -> None:
    problem = Problem(op)
    expected, hooks = problem.expected, torch.autograd.graph.saved_tensors_hooks
    for context in (torch.autograd.graph.save_on_cpu(), hooks(lambda x: x, _apart), hooks(_apart, lambda x: x)):
        with context:
            loss = problem.loss()
        assert same(problem.gradients(loss), expected)


@pytest.mark.parametrize("op", OPS)
def test_hooks_that_give_back_something_else_are_refused(op: str) -> None:
    problem, saved = Problem(op), []
    expected = problem.expected

    def narrower(x: Tensor) -> Tensor:
        return x.to({torch.float32: torch.float16, torch.int64: torch.int32}.get(x.dtype, x.dtype))

    for other in (narrower, lambda x: x.reshape(-1)[:0]):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, other):
            results = problem.results()
        loss = problem.weighted_sum(results)
        if op in FORMED | INDEXED:
            assert same(problem.gradients(loss), expected)
            continue
        with pytest.raises(RuntimeError, match=f"the backward of .*trajkern.{op}.* must be as it was saved, .* gave "):
            problem.gradients(loss)
    assert bool(saved) != (op in FORMED | INDEXED)
    assert not any(x.dtype in (torch.int32, torch.int64) for x in saved), "a kernel would address by it"


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_no_bit(op: str, backend: str) -> None:
    """Neither around the op nor around the backward: results and products have the dtypes that were given."""
    problem = Problem(op)

    def run(forward: bool, backward: bool) -> list[Tensor]:
        with tk.use_backend(backend):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                results = problem.results()
            loss = problem.weighted_sum(results)
            with torch.autocast("cpu", torch.bfloat16, enabled=backward and backend == "native"):
                return [*results, *problem.gradients(loss)]

    expected = run(False, False)
    for forward, backward in ((True, False), (False, True), (True, True)):
        assert same(run(forward, backward), expected)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, tuple):
        return [t for part in x for t in _tensors(part)]
    return [x] if isinstance(x, Tensor) and x.numel() else []


@pytest.mark.parametrize("op", OPS)
def test_what_changes_before_the_backward(op: str) -> None:
    """An argument or a result that is written between forward and backward raises, or the gradients are the same."""
    problem = Problem(op)
    expected, checked = problem.expected, 0
    for name in problem.inputs:
        for x in _tensors(problem.leaves.get(name, problem.inputs[name])):
            loss, before = problem.loss(), x.detach().clone()
            with torch.no_grad():
                x.copy_(~x if x.dtype == torch.bool else 0 * x)
            checked += _raises_or_same(problem, loss, expected)
            with torch.no_grad():
                x.copy_(before)
    results = problem.results()
    loss = problem.weighted_sum(results)
    for x in results:
        x.detach().zero_()
    _raises_or_same(problem, loss, expected)
    assert checked or op in FORMED | {"gae", "discounted_returns", "span_reduce", "spread"}


def _raises_or_same(problem: Problem, loss: Tensor, expected: tuple[Tensor, ...]) -> bool:
    """Whether torch noticed."""
    try:
        found = problem.gradients(loss)
    except RuntimeError as error:
        assert VERSION in str(error)
        return True
    assert same(found, expected)
    return False


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_arguments_without_a_gradient(op: str, backend: str) -> None:
    """They may require one, and get none whatever runs; where there are any, the docstring says so."""
    problem = Problem(op)
    others = {
        name: x.detach().requires_grad_()
        for name, x in problem.inputs.items()
        if name not in problem.leaves and isinstance(x, Tensor) and x.is_floating_point()
    }
    with tk.use_backend(backend):
        problem.loss(**others).backward()
    assert all(x.grad is None for x in others.values())
    assert all(x.grad is not None for x in problem.leaves.values())
    text = " ".join(str(getattr(tk, op).__doc__).split())
    if op == "linear_token_stats":
        text = " ".join(str(tk.linear_logprobs.__doc__).split())
    assert not others or re.search("no gradient|no other argument|differentiable once.*alone|rewards alone", text)


ALONE = [(spec.name, case.name) for spec in SPECS if len(spec.differentiable) > 1 for case in spec.cases]


@pytest.mark.parametrize(("op", "case"), [pytest.param(*x, id="-".join(x)) for x in ALONE if x[1] != "v151936"])
def test_a_gradient_alone_is_as_beside_the_others(op: str, case: str) -> None:
    """Frozen parts take other paths."""
    spec = spec_of(op)
    function, inputs = getattr(tk, op), spec.inputs(spec.case(case), torch.float64)
    together = run(spec, function, inputs, scale=1.0)
    for name in spec.differentiable:
        if (whole := together.get(f"grad_{name}")) is not None and whole.numel():
            found = run(replace(spec, differentiable=(name,)), function, inputs, scale=1.0)[f"grad_{name}"]
            finite = whole[whole.isfinite()].abs()
            size = float(finite.max()) if finite.numel() else 1.0
            torch.testing.assert_close(found, whole, rtol=1e-7, atol=1e-9 * size, equal_nan=True)
