"""torch's default dtype is a user's own: no recipe and no credit computes in it, and float64 is float64 all through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trajkern as tk
from tests.attack import recipes
from tests.attack.functions import _batch
from trajkern import credit
from trajkern.recipes import TREE_RECIPES, delta_belief, dro, feedback, reward_models, rlcr, sdpo

DRAW = torch.Generator().manual_seed(0)
TREE = tk.Tree(torch.tensor([-1, 0, 1, 1, 1, 2, 0]), torch.tensor([2, 1, 1, 3, 1, 2, 1]))
LEAVES = torch.tensor([1.0, -1.0, 2.0, 0.3])
BELIEFS, CONFIDENCE = -torch.rand(9, generator=DRAW), torch.rand(300, generator=DRAW)
TURNS = {
    "log_beliefs": BELIEFS,
    "cu_beliefs": torch.tensor([0, 4, 9]),
    "won": torch.tensor([True, False]),
    "penalty": torch.tensor([0, -1, 0, 0, 0, -5, 0]),
}
PACKED = tk.PackedBatch(
    torch.arange(6),
    torch.tensor([0, 3, 6]),
    torch.tensor([False, True, True] * 2),
    torch.zeros(2).long(),
    old_logprobs=-torch.rand(6, generator=DRAW),
)
ROLLOUTS = {
    "batch": PACKED,
    "rewards": {"reward": torch.tensor([0.7, 0.2])},
    "flags": {"right": torch.tensor([True, False])},
    "teacher_logprobs": -torch.rand(6, generator=DRAW),
}


def _of_tree(advantages: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda rewards: advantages(TREE, rewards, torch.ones(TREE.num_tokens, dtype=torch.bool))


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{
        f.__qualname__: (f, x)
        for f, x in recipes.good(_batch()).items()
        if f is not feedback.majority_vote and hasattr(f, "__qualname__")
    },
    **{f"tree: {name}": (_of_tree(x.advantages), {"rewards": LEAVES}) for name, x in TREE_RECIPES.items()},
    "turn_rewards": (delta_belief.turn_rewards, TURNS),
    "rrm": (
        reward_models.rule_rewards,
        {"judgements": torch.tensor([1, 2]), "labels": torch.tensor([1, 1]), "rule": "rrm"},
    ),
    "calibration": (rlcr.calibration, {"correct": CONFIDENCE > 0.3, "confidence": CONFIDENCE}),
}
SPECS = {name: credit.recipe(name) for name in ("grpo", "psr", "nsr", "w_reinforce", "sdpo") if name in credit.PRESETS}
SPECS["sum"] = 0.3 * credit.outcome().gate("right") + credit.directive().whiten()
SPECS["asymmetric"] = credit.outcome(baseline="none", scale="none").asymmetric(positive=0.7)
OF_CREDIT = {name: (lambda spec=spec, **known: spec(credit.Rollouts(**known))) for name, spec in SPECS.items()}


def tensors(x: Any) -> list[Tensor]:
    if isinstance(x, credit.Credit):
        return tensors([x.advantages, x.mask, x.metrics])
    if isinstance(x, nn.Module):
        return [p.detach() for p in x.parameters()]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [x] if isinstance(x, Tensor) else [y for part in parts for y in tensors(part)]


def widened(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: widened(y) for key, y in x.items()}
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def scaled(x: Any) -> Any:
    """Numbers that no 16 bits hold, where the call takes them."""
    if isinstance(x, dict):
        return {key: scaled(y) for key, y in x.items()}
    return x * 0.987654321 if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CALLS, *(f"credit: {x}" for x in OF_CREDIT)])
def test_no_result_is_of_torchs_default_dtype(name: str, default: torch.dtype, wide: bool) -> None:
    function, given = CALLS[name] if name in CALLS else (OF_CREDIT[name.removeprefix("credit: ")], ROLLOUTS)
    given = scaled(given) if function not in (rlcr.calibration, tk.whiten) else dict(given)
    given = widened(given) if wide else given
    expected = tensors(function(**copy.deepcopy(given)))
    torch.set_default_dtype(default)
    try:
        found = tensors(function(**copy.deepcopy(given)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())


def test_float64_is_not_rounded_on_the_way() -> None:
    """Against Python's own numbers."""
    found = delta_belief.turn_rewards(**widened(TURNS), scale=0.1)
    bounds = TURNS["cu_beliefs"].tolist()
    expected = []
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        turns, beliefs = end - begin - 1, BELIEFS[begin:end].double().tolist()
        whole = (2.0 if bool(TURNS["won"][n]) else 0.0) - 0.05 * turns
        expected += [whole + 0.1 * max(b - a, 0.0) for a, b in zip(beliefs, beliefs[1:], strict=False)]
    expected = [x + float(y) for x, y in zip(expected, TURNS["penalty"], strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)
    tree, rewards = tk.Tree(torch.tensor([-1, 0, 1, 1, 1, 2]), torch.ones(6).long()), torch.tensor([1.0, -1.0, 2.0])
    steps = TREE_RECIPES["gigpo"].advantages(tree, rewards.double(), torch.ones(6, dtype=torch.bool))
    assert (steps - 0.4911904761904762).abs().min() < 1e-15


def test_a_fraction_counts_one_at_least_and_leaves_one() -> None:
    one = {"cu_seqlens": torch.tensor([0, 3]), "group_ids": torch.tensor([0])}
    assert dro.rank_filter(torch.tensor([1, 1, 1]), **one, worst_fraction=1e-10, top_k=5).all()
    assert dro.keep_groups(torch.arange(5.0), drop_fraction=0.9999999999).tolist() == [False] * 4 + [True]
    x, std = torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 0.5])
    assert dro.propagated(x, torch.tensor([0, 2]), std, gamma=0.1, fraction=1e-10)[1] < -1


def test_equal_votes_go_to_the_first() -> None:
    assert rlcr.vote(["b"] * 3 + ["a"] * 3, [0.3, 0.2, 0.1, 0.1, 0.2, 0.3]).answer == "b"


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))
        self.q = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


def test_a_teacher_with_frozen_integers() -> None:
    teacher, student = Frozen(), Frozen()
    student.a.data += 1
    sdpo.update_teacher(teacher, student, 0.25)
    assert teacher.a.tolist() == [0.25, 0.25] and teacher.q.tolist() == [0, 0]
    shared = Frozen()
    shared.q = student.q
    with pytest.raises(ValueError, match="parameters of its own; q is the student's"):
        sdpo.update_teacher(shared, student)
    assert shared.a.tolist() == [0, 0], "nothing has changed"
