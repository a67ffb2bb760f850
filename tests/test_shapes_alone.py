"""Meta and fake tensors get the shapes and dtypes that plain tensors get; layouts, which read values, refuse them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import trajkern as tk
from tests.attack.functions import good

OF_TENSORS = [
    tk.token_logprobs,
    tk.token_stats,
    tk.linear_logprobs,
    tk.linear_token_stats,
    tk.linear_topk,
    tk.linear_policy_loss,
    tk.linear_divergence,
    tk.topk_divergence,
    tk.policy_loss,
    tk.group_advantages,
    tk.discounted_returns,
    tk.gae,
    tk.whiten,
    tk.variance_weights,
]
LAYOUTS = [tk.PackedBatch, tk.PackedBatch.from_padded, tk.Spans, tk.Spans.turns, tk.Tree, tk.Tree.from_segments]


def _called(function: Callable[..., Any], kind: str, arguments: dict[str, Any]) -> Any:
    if kind == "meta":
        return function(**{name: x.to("meta") if isinstance(x, Tensor) else x for name, x in arguments.items()})
    with FakeTensorMode() as mode:
        return function(**{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()})


def _shapes(results: Any) -> list[tuple[torch.dtype, torch.Size]]:
    return [(x.dtype, x.shape) for x in tree_leaves(tree_map(lambda x: x, results)) if isinstance(x, Tensor)]


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("function", OF_TENSORS, ids=lambda function: function.__name__)
def test_shapes(function: Callable[..., Any], kind: str) -> None:
    arguments = good()[function]
    found = _called(function, kind, arguments)
    assert _shapes(found) == _shapes(function(**arguments))
    assert all(type(x) is not Tensor or x.is_meta for x in tree_leaves(found))


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__qualname__)
def test_a_layout_reads_values(layout: Callable[..., Any], kind: str) -> None:
    arguments = good()[layout]
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} must have values, .* a tensor of a shape alone"):
        _called(layout, kind, arguments)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_how_many_groups_there_are_must_be_given(kind: str) -> None:
    arguments = good()[tk.reflection_rewards]
    with pytest.raises(ValueError, match="num_groups must be given"):
        _called(tk.reflection_rewards, kind, arguments)
    found = _called(tk.reflection_rewards, kind, arguments | {"num_groups": 1})
    assert _shapes(found) == _shapes(tk.reflection_rewards(**arguments))
