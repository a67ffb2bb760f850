"""The reference reflection rewards against a table worked by hand, plain Python loops, and numerical derivatives."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import pytest
import torch

from trajkern import reference

F64 = torch.float64


def by_hand(x, bounds, ids, baseline=None, ddof=0, normalize=True):
    """(rewards, weights, std, scores by ascending id), token by token."""
    groups = defaultdict(list)
    for n, group in enumerate(ids):
        groups[group].append(n)
    rewards, weights, std, scores = [0.0] * len(ids), [0.0] * len(x), [0.0] * len(x), []
    for _, members in sorted(groups.items()):
        length, s = bounds[members[0] + 1] - bounds[members[0]], []
        for j in range(length):
            values = [x[bounds[n] + j] for n in members]
            mean = math.fsum(values) / len(values)
            squares = math.fsum((v - mean) ** 2 for v in values)
            s.append(math.sqrt(squares / (len(values) - ddof)) if len(values) > ddof else 0.0)
        total = math.fsum(s)
        for n in members:
            for j in range(length):
                at = bounds[n] + j
                std[at], weights[at] = s[j], s[j] / total if normalize and total else s[j]
                rewards[n] += weights[at] * (x[at] - (baseline[at] if baseline else 0.0))
        scores.append(max(s, default=0.0))
    return rewards, weights, std, scores


def call(x, bounds, ids, baseline=None, **options):
    return reference.reflection_rewards(
        torch.tensor(x, dtype=F64),
        torch.tensor(bounds),
        torch.tensor(ids, dtype=torch.int64),
        baseline=None if baseline is None else torch.tensor(baseline, dtype=F64),
        **options,
    )


# two rollouts of group 7 (three tokens) around one of group -2 (two tokens): deviations 1, 0 and 3
TABLE = [-1.0, -2.0, -8.0, -4.0, -5.0, -3.0, -2.0, -2.0]
BOUNDS, IDS = [0, 3, 5, 8], [7, -2, 7]


def test_table() -> None:
    result = call(TABLE, BOUNDS, IDS)
    assert result.std.tolist() == [1, 0, 3, 0, 0, 1, 0, 3]
    assert result.weights.tolist() == [0.25, 0, 0.75, 0, 0, 0.25, 0, 0.75]
    assert result.rewards.tolist() == [-6.25, 0, -2.25]
    assert result.group_score.tolist() == [0, 3]


def test_table_with_a_baseline_and_plain_weights() -> None:
    baseline = [-2.0, -9.0, -4.0, -1.0, -1.0, -2.0, -9.0, -4.0]
    result = call(TABLE, BOUNDS, IDS, baseline, normalize=False)
    assert result.weights.tolist() == [1, 0, 3, 0, 0, 1, 0, 3]
    assert result.rewards.tolist() == [1 - 12, 0, -1 + 6]


def test_table_unbiased() -> None:
    """Two rollouts: the variance doubles."""
    result = call(TABLE, BOUNDS, IDS, ddof=1)
    root = math.sqrt(2)
    assert result.std.tolist() == pytest.approx([root, 0, 3 * root, 0, 0, root, 0, 3 * root], rel=1e-15)
    assert result.weights.tolist() == pytest.approx([0.25, 0, 0.75, 0, 0, 0.25, 0, 0.75], rel=1e-15)


def test_table_of_gradients() -> None:
    """Group 7 of the table with upstream (1, 0) on its rewards: A = (-1, -2, -8), sum A w = -6.25, S = 4."""
    x = torch.tensor(TABLE, dtype=F64, requires_grad=True)
    baseline = torch.zeros(8, dtype=F64, requires_grad=True)
    out = reference.reflection_rewards(x, torch.tensor(BOUNDS), torch.tensor(IDS), baseline=baseline)
    grads = torch.autograd.grad(out.rewards[0], (x, baseline))
    # ds = (5.25 / 4, 4.25 / 4, -1.75 / 4); (x - mean) / (2 s) is +-1/2, or 0 where s is 0
    slope = [5.25 / 8, 0.0, 1.75 / 8]
    assert grads[0].tolist() == [0.25 + slope[0], 0, 0.75 + slope[2], 0, 0, -slope[0], 0, -slope[2]]
    assert grads[1].tolist() == [-0.25, 0, -0.75, 0, 0, 0, 0, 0]


def test_score_goes_to_the_first_of_two_largest() -> None:
    x = torch.tensor([-1.0, -1.0, -3.0, -3.0], dtype=F64, requires_grad=True)
    out = reference.reflection_rewards(x, torch.tensor([0, 2, 4]), torch.tensor([0, 0]))
    assert torch.autograd.grad(out.group_score.sum(), x)[0].tolist() == [0.5, 0, -0.5, 0]


def packed(seed: int):
    """Groups of 1 to 5 rollouts, references of 0 to 6 tokens, shuffled."""
    draw = random.Random(seed)
    shapes = [(draw.randint(1, 5), draw.choice([0, 1, 3, 6])) for _ in range(4)]
    names = draw.sample(range(-(10**15), 10**15), 4)
    rollouts = [(name, n) for name, (k, n) in zip(names, shapes, strict=True) for _ in range(k)]
    draw.shuffle(rollouts)
    bounds = [0, *itertools.accumulate(n for _, n in rollouts)]
    x, baseline = ([-draw.expovariate(0.5) for _ in range(bounds[-1])] for _ in range(2))
    return x, bounds, [name for name, _ in rollouts], baseline


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_random_packs(seed: int, normalize: bool, ddof: int) -> None:
    x, bounds, ids, baseline = packed(seed)
    for b in (None, baseline):
        result = call(x, bounds, ids, b, ddof=ddof, normalize=normalize)
        expected = by_hand(x, bounds, ids, b, ddof, normalize)
        for actual, numbers in zip(result, expected, strict=True):
            assert actual.tolist() == pytest.approx(numbers, rel=1e-12, abs=1e-14)
    weights = reference.variance_weights(
        torch.tensor(x, dtype=F64), torch.tensor(bounds), torch.tensor(ids), ddof=ddof, normalize=normalize
    )
    assert torch.equal(weights, result.weights)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_derivatives(normalize: bool, ddof: int) -> None:
    """Against differences, through all four outputs; no two positions here share a largest deviation."""
    x, bounds, ids, baseline = packed(0)

    def outputs(x, b):
        return tuple(
            reference.reflection_rewards(
                x, torch.tensor(bounds), torch.tensor(ids), baseline=b, ddof=ddof, normalize=normalize
            )
        )

    leaves = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (x, baseline)]
    assert torch.autograd.gradcheck(outputs, leaves)


def test_constant_positions() -> None:
    """Exactly 0, under a value whose mean rounds; finite derivatives of 0."""
    x = torch.tensor([-0.1, -1.0, -0.1, -2.0, -0.1, -4.0], dtype=F64, requires_grad=True)
    out = reference.reflection_rewards(x, torch.tensor([0, 2, 4, 6]), torch.tensor([1, 1, 1]))
    assert out.std[::2].tolist() == [0, 0, 0] and out.weights.tolist() == [0, 1, 0, 1, 0, 1]
    (grad,) = torch.autograd.grad(out.std.sum() + out.rewards.sum(), x)
    assert grad[::2].tolist() == [0, 0, 0] and bool(grad.isfinite().all())
    constant = reference.reflection_rewards(x[::2], torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 1]))
    assert not any(bool(y.any()) for y in constant)


def test_empty() -> None:
    result = call([], [0, 0, 0], [4, 4])
    assert result.rewards.tolist() == [0, 0] and result.group_score.tolist() == [0]
    assert result.weights.shape == result.std.shape == (0,)
    result = call([], [0], [])
    assert [y.shape[0] for y in result] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_dtype(dtype: torch.dtype) -> None:
    result = reference.reflection_rewards(torch.tensor(TABLE, dtype=dtype), torch.tensor(BOUNDS), torch.tensor(IDS))
    assert {y.dtype for y in result} == {torch.float32}
