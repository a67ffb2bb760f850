"""Which tokens have the largest covariance, against exact fractions and a plain sort."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch

from trajkern.losses.covariance import largest_covariances


def chosen(a, p, mask=None, candidates=None, *, fraction: float, band=None, dtype=torch.float64) -> list[int]:
    mask = torch.tensor([True] * len(a) if mask is None else mask, dtype=torch.bool)
    candidates = mask if candidates is None else torch.tensor(candidates, dtype=torch.bool)
    a, p = (torch.tensor(x, dtype=dtype) for x in (a, p))
    out = largest_covariances(a, p, mask, candidates, fraction, band)
    assert out.dtype == torch.bool and out.shape == a.shape
    return out.nonzero().flatten().tolist()


def expected(a, p, mask: Sequence[bool], candidates: Sequence[bool], fraction: float, band=None) -> list[int]:
    scored = [t for t, m in enumerate(mask) if m]
    if not scored:
        return []
    mean_a, mean_p = (sum(Fraction(x[t]) for t in scored) / len(scored) for x in (a, p))
    covariance = {t: (Fraction(a[t]) - mean_a) * (Fraction(p[t]) - mean_p) for t in scored if candidates[t]}
    if band is not None:
        covariance = {t: c for t, c in covariance.items() if band[0] < c < band[1]}
    order = sorted(covariance, key=lambda t: (-covariance[t], t))
    return sorted(order[: max(1, int(fraction * len(scored)))])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.25, 0.29, 1.0])
@pytest.mark.parametrize("band", [None, (-0.5, 0.25), (0.0, 9.0), (5.0, 6.0)], ids=str)
def test_random_tokens(seed: int, fraction: float, band: tuple[float, float] | None) -> None:
    rng = random.Random(seed)
    a, p = ([rng.gauss(0, 1) for _ in range(137)] for _ in range(2))
    mask = [rng.random() < 0.8 for _ in a]
    candidates = [m and rng.random() < 0.7 for m in mask]
    actual = chosen(a, p, mask, candidates, fraction=fraction, band=band)
    assert actual == expected(a, p, mask, candidates, fraction, band)


def test_literal() -> None:
    """Means 0 and -2: covariances -2, -1, 0, 0, 3 and, of the masked token, none."""
    a, p, mask = [2, -1, 0, 2, -3, 100], [-3, -1, -1, -2, -3, 0], [True] * 5 + [False]
    assert chosen(a, p, mask, fraction=0.2) == [4]
    assert chosen(a, p, mask, fraction=0.4) == [2, 4], "of two zeros the earlier"
    assert chosen(a, p, mask, fraction=0.59) == [2, 4], "the number of tokens is rounded down"
    assert chosen(a, p, mask, fraction=0.6) == [2, 3, 4]
    assert chosen(a, p, mask, fraction=0.0) == [4], "at least one"


def test_the_band_is_open() -> None:
    a, p = [2, -1, 0, 2, -3], [-3, -1, -1, -2, -3]
    assert chosen(a, p, fraction=0.2, band=(-1.0, 3.0)) == [2]
    assert chosen(a, p, fraction=1.0, band=(-1.0, 3.0)) == [2, 3], "fewer than asked for"
    assert chosen(a, p, fraction=1.0, band=(-2.0, 0.0)) == [1]
    assert chosen(a, p, fraction=1.0, band=(0.0, 3.0)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_go_to_the_earlier_token(dtype: torch.dtype) -> None:
    """Long enough that an unstable sort would mix them."""
    a = [1.0, -1.0] * 512
    assert chosen(a, a, fraction=0.125, dtype=dtype) == list(range(128))
    assert chosen(a, a, [True] * 1024, [t % 2 == 1 for t in range(1024)], fraction=0.125, dtype=dtype) == list(
        range(1, 256, 2)
    )


def test_candidates_choose_but_do_not_shape_the_mean() -> None:
    a, p = [4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 2.0]  # means 1 and 1.5
    assert chosen(a, p, candidates=[False, True, True, True], fraction=0.25) == [1]
    assert chosen(a, p, candidates=[False, False, False, True], fraction=1.0) == [3]
    assert chosen(a, p, candidates=[False] * 4, fraction=1.0) == []


def test_what_is_masked_is_not_read() -> None:
    nan = float("nan")
    assert chosen([2.0, nan, -2.0, 0.0], [-1.0, 0.0, -2.0, nan], [True, False, True, False], fraction=0.5) == [0]


@pytest.mark.parametrize("seed", range(3))
def test_float32_tokens_have_float64_means(seed: int) -> None:
    """Near 10,000 a float32 mean is off by as much as these numbers differ."""
    rng = random.Random(seed)
    a, p = (torch.tensor([1e4 + rng.gauss(0, 0.01) for _ in range(501)]) for _ in range(2))
    every = [True] * 501
    actual = chosen(a.tolist(), p.tolist(), fraction=0.1, dtype=torch.float32)
    assert actual == expected(a.tolist(), p.tolist(), every, every, 0.1)


@pytest.mark.parametrize("size", [0, 3])
def test_nothing_scored(size: int) -> None:
    assert chosen([1.0] * size, [2.0] * size, [False] * size, fraction=1.0) == []


def test_no_gradient() -> None:
    x = torch.randn(4, requires_grad=True)
    keep = torch.ones(4, dtype=torch.bool)
    assert not largest_covariances(x, x, keep, keep, 0.5).requires_grad
