"""torch's defaults and modes are a user's own: no result depends on them, and no random number is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import trajkern as tk
from trajkern import credit
from trajkern.testing import SPECS, OpSpec, check, run


@contextlib.contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """New memory is filled with NaN, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


DEFAULTS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),  # any other than the tensors': memory there is none that a kernel has
    "float64": lambda: _dtype(torch.float64),
    "bfloat16": lambda: _dtype(torch.bfloat16),
    "deterministic": _deterministic,
    "functions": _Functions,
    "dispatch": _Dispatch,
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.name)
def test_ops(op: OpSpec, backend: str, default: str) -> None:
    with tk.use_backend(backend):
        for case in [case for case in op.cases if not case.large][:6]:
            inputs = op.inputs(case, torch.float32)
            expected = run(op, getattr(tk, op.name), inputs)
            state = torch.get_rng_state()
            with DEFAULTS[default]():
                found = run(op, getattr(tk, op.name), inputs)
            assert torch.equal(torch.get_rng_state(), state), case.name
            for name, x in expected.items():
                assert found[name].device == x.device and found[name].dtype == x.dtype, (case.name, name)
                assert torch.equal(found[name].nan_to_num(), x.nan_to_num()), (case.name, name)


TOKENS = torch.tensor([5, 6, 7, 5, 6, 8, 9])
SCORED = torch.tensor([False, True, True, False, True, False, True])
TEACHER = -torch.linspace(0.1, 3, 7)
BOUNDS = torch.tensor([0, 3, 7])
GROUPS, REWARDS, WINS = torch.tensor([0, 0]), torch.tensor([1.0, 0.0]), torch.tensor([[0, 1], [0, 0]])


def _batch() -> tk.PackedBatch:
    return tk.PackedBatch(TOKENS, BOUNDS, SCORED, GROUPS, REWARDS, old_logprobs=-TOKENS.float())


def _of_batch(batch: tk.PackedBatch) -> list[Tensor]:
    return [batch.tokens, batch.cu_seqlens, batch[[0]].tokens, batch[1:].old_logprobs]


def _of_tree(tree: tk.Tree) -> list[Tensor]:
    paths = [tree.flat_index, tree.positions, tree.rows, tree.attention_mask(dense=True), *tree.path_nodes]
    return [tree.parent, tree.node_lengths, *tree.leaf_range, *paths]


def _of_spans(spans: tk.Spans) -> list[Tensor]:
    return [spans.start, spans.end, spans.trajectory, spans.token_span, *spans.ranges]


def _padded() -> tk.PackedBatch:
    rows = TOKENS[:6].view(2, 3)
    return tk.PackedBatch.from_padded(rows, rows > 5, loss_mask=rows > 6, group_ids=GROUPS)


LAYOUTS: dict[str, Callable[[], list[Tensor]]] = {
    "batch": lambda: _of_batch(_batch()),
    "padded": lambda: [_padded().tokens, _padded().cu_seqlens, _padded().to_padded(_padded().tokens)],
    "tree": lambda: _of_tree(tk.Tree.from_trajectories(_batch())),
    "segments": lambda: [tk.Tree.from_segments(torch.stack([x for x in BOUNDS[:2]]), BOUNDS[:2]).parent],
    "turns": lambda: _of_spans(tk.Spans.turns(SCORED, BOUNDS)),
    "advantages": lambda: [
        (credit.outcome() + 0.5 * credit.directive())
        .whiten()(credit.Rollouts(_batch(), {"reward": REWARDS}, teacher_logprobs=TEACHER))
        .advantages
    ],
    "ratings": lambda: [tk.recipes.reward_models.elo(WINS)],
    "verdicts": lambda: [tk.recipes.reward_models.rule_rewards(["<answer>[[A]]</answer>"], ["A"], rule="rm_r1")],
    "similarity": lambda: [tk.recipes.srl.similarity(["one two"], ["one"])],
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, default: str) -> None:
    expected = LAYOUTS[layout]()
    with DEFAULTS[default]():
        found = LAYOUTS[layout]()
    for x, y in zip(found, expected, strict=True):
        assert x.device == y.device and x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("default", DEFAULTS)
def test_check(default: str) -> None:
    with DEFAULTS[default]():
        results = check(tk.token_logprobs, like="token_logprobs", cases="typical", dtypes=torch.float32, intensity=0)
    assert results.passed
