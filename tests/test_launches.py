"""No public call waits for a GPU, and how many kernels each launches; on a GPU, the same calls inside a CUDA graph.

Without a GPU the tensors are meta tensors that the ops take for a GPU's (tests/device_watch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from tests.device_watch import HostRead, Watch, on_meta, watched
from trajkern.testing import SPECS
from trajkern.testing.launches import BESIDE, FAMILIES, HEAD_LAUNCHES, LAUNCHES
from trajkern.testing.registry import Case, OpSpec

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter runs no launcher", allow_module_level=True)


def _small(specs: Iterable[OpSpec]) -> list[Any]:
    return [
        pytest.param((spec, case), id=f"{spec.name}-{case.name}")
        for spec in specs
        for case in spec.cases
        if not case.large
    ]


SMALL = _small(SPECS)


def _arguments(spec: OpSpec, case: Case, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The registry's; those that have a gradient ask for it."""
    inputs = spec.inputs(case, dtype, "cpu" if device == "meta" else device)
    arguments = {k: on_meta(v) for k, v in inputs.items()} if device == "meta" else inputs
    if spec.name == "reflection_rewards":
        arguments["num_groups"] = int(inputs["group_ids"].unique().numel())
    for name in spec.differentiable:
        if isinstance(arguments.get(name), Tensor):
            arguments[name].requires_grad_()
    return arguments


def _call(spec: OpSpec, arguments: dict[str, Any]) -> list[Tensor]:
    found = spec.outputs(getattr(tk, spec.name)(**arguments))
    return [x for x in found.values() if x is not None]


def _backward(spec: OpSpec, arguments: dict[str, Any], outputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    leaves = [x for name in spec.differentiable if isinstance(x := arguments.get(name), Tensor)]
    chosen = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
    if not chosen:
        return []
    grads = torch.autograd.grad([x for x, _ in chosen], leaves, [g for _, g in chosen], allow_unused=True)
    return [g for g in grads if g is not None]


def _watched_both_ways(spec: OpSpec, case: Case) -> tuple[Watch, Watch]:
    arguments = _arguments(spec, case, "meta")
    with watched() as forward:
        outputs = _call(spec, arguments)
    upstream = [torch.empty_like(x) for x in outputs]
    with watched() as backward:
        _backward(spec, arguments, outputs, upstream)
    return forward, backward


def _has_row(spec: OpSpec, case: Case) -> bool:
    """A tree's sums over leaves and a choice of tokens by rank are calls beside the loss."""
    inputs = spec.inputs(case, torch.float32)
    if spec.name == "policy_loss" and inputs["config"].ranks_tokens:
        return False
    return spec.name in LAUNCHES and all(inputs.get(name) is None for name in BESIDE)


@pytest.mark.parametrize("small", SMALL)
def test_no_call_waits_and_none_launches_more_than_its_row(small: tuple[OpSpec, Case]) -> None:
    spec, case = small
    forward, backward = _watched_both_ways(spec, case)
    if _has_row(spec, case):
        assert forward.kernels <= LAUNCHES[spec.name][0], forward.launches
        assert backward.kernels <= LAUNCHES[spec.name][1], backward.launches


@pytest.mark.parametrize("op", LAUNCHES)
def test_the_rows_are_what_is_launched(op: str) -> None:
    """A row that nothing reaches any more is too high."""
    (spec,) = (spec for spec in SPECS if spec.name == op)
    counts = [_watched_both_ways(spec, case) for case in spec.cases if not case.large and _has_row(spec, case)]
    assert LAUNCHES[op] == tuple(max(watch.kernels for watch in way) for way in zip(*counts, strict=True))
    assert max(LAUNCHES[op]) <= FAMILIES.get(spec.family, max(LAUNCHES[op]))


def _head_call(op: str, rows_of_workspace: int) -> Callable[[], Any]:
    tokens, width, vocabulary = 96, 32, 1024
    new = partial(torch.empty, device="meta")
    hidden, weight = (new(n, width, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, vocabulary))
    targets = new(tokens, dtype=torch.int64)
    options = {"workspace_bytes": rows_of_workspace * 4 * vocabulary}
    if op == "linear_logprobs":
        return lambda: tk.linear_logprobs(hidden, weight, targets, **options).backward(new(tokens))
    old, advantages, cu_seqlens = new(tokens), new(2), new(3, dtype=torch.int64)
    loss = tk.PolicyLoss("grpo")
    return lambda: tk.linear_policy_loss(hidden, weight, targets, old, advantages, cu_seqlens, config=loss, **options)[
        0
    ].backward()


@pytest.mark.parametrize("op", HEAD_LAUNCHES)
def test_a_block_of_the_head(op: str) -> None:
    """More blocks differ in what a block launches: three products of it, and the rest of it."""
    counts = []
    for rows in (24, 12):
        call = _head_call(op, rows)
        with watched() as watch:
            call()
        counts.append((watch.products, watch.kernels - watch.products))
    products, others = (more - fewer for fewer, more in zip(*counts, strict=True))
    assert products >= 3 and others / (products / 3) <= HEAD_LAUNCHES[op], watch.launches


# what the watch sees

X = partial(torch.empty, 6, device="meta")
INDEX, FLAGS = partial(X, dtype=torch.int64), partial(X, dtype=torch.bool)
WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: X().sum().item(),
    "int": lambda: int(INDEX()[0]),
    "bool": lambda: bool((X() > 0).any()),
    "tolist": lambda: X().tolist(),
    "cpu": lambda: X().cpu(),
    "to the device": lambda: torch.ones(6).to("meta"),
    "copy_": lambda: X().copy_(torch.ones(6)),
    "nonzero": lambda: X().nonzero(),
    "boolean index": lambda: X()[FLAGS()],
    "put where": lambda: X().index_put((FLAGS(),), X()),
    "masked_select": lambda: X().masked_select(FLAGS()),
    "unique": lambda: INDEX().unique(),
    "repeat_interleave": lambda: X().repeat_interleave(INDEX()),
    "tensor": lambda: torch.tensor([1, 2], device="meta"),
    "new_tensor": lambda: X().new_tensor([1.0]),
    "a number put to places": lambda: X().__setitem__(INDEX(), 1),
}
NO_WAITS: dict[str, Callable[[], Any]] = {
    "a number put to a slice": lambda: X().__setitem__(slice(2, 4), 1),
    "a number put where": lambda: X().__setitem__(FLAGS(), 1),
    "values put to places": lambda: X().__setitem__(INDEX(), X()),
    "full": lambda: torch.full((), 3.0, device="meta"),
    "where": lambda: torch.where(FLAGS(), X(), 1),
    "index": lambda: X()[INDEX()],
    "repeat_interleave": lambda: X().repeat_interleave(INDEX(), output_size=9),
    "on the host": lambda: torch.tensor([1, 2]).unique().tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen_and_its_line_named(name: str) -> None:
    with pytest.raises(HostRead, match=r"test_launches\.py:\d+: "), watched():
        WAITS[name]()


@pytest.mark.parametrize("name", NO_WAITS)
def test_what_waits_for_nothing_is_let_through(name: str) -> None:
    with watched():
        NO_WAITS[name]()


def test_kernels_are_counted_and_views_are_not() -> None:
    with watched() as watch:
        x = X().view(2, 3).t()[0]
        torch.empty_like(x).copy_(x + 1)
    assert watch.launches == {"aten::add": 1, "aten::copy_": 1}


# on a GPU

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def _both_ways(spec: OpSpec, arguments: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    outputs = _call(spec, arguments)
    return [*(x.detach() for x in outputs), *_backward(spec, arguments, outputs, upstream)]


def _on_the_gpu(small: tuple[OpSpec, Case]) -> tuple[OpSpec, dict[str, Any], list[Tensor], list[Tensor]]:
    """An op, its arguments, the gradients of its outputs, and what comes of a call, by which all is compiled."""
    spec, case = small
    arguments = _arguments(spec, case, "cuda")
    upstream = [torch.ones_like(x) for x in _call(spec, arguments)]
    return spec, arguments, upstream, _both_ways(spec, arguments, upstream)


@ON_A_GPU
@pytest.mark.parametrize("small", _small(SPECS))
def test_no_call_synchronises(small: tuple[OpSpec, Case]) -> None:
    spec, arguments, upstream, _ = _on_the_gpu(small)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _both_ways(spec, arguments, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_A_GPU
@pytest.mark.parametrize("small", _small(SPECS))
def test_a_graph_computes_the_same_bits(small: tuple[OpSpec, Case]) -> None:
    """Captured, nothing runs: what stands in the results was written by the replay."""
    spec, arguments, upstream, expected = _on_the_gpu(small)
    graph, warm = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        _both_ways(spec, arguments, upstream)
    torch.cuda.current_stream().wait_stream(warm)
    with torch.cuda.graph(graph):
        results = _both_ways(spec, arguments, upstream)
    graph.replay()
    torch.cuda.synchronize()
    for actual, known in zip(results, expected, strict=True):
        assert torch.equal(actual.nan_to_num(77), known.nan_to_num(77))
