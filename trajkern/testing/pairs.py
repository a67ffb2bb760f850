"""Pairwise designs: few combinations of options that hold every pair of two options' values."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Options = dict[str, Any]  # the name of a value for each factor
Pair = frozenset[tuple[str, str]]  # two (factor, value) pairs


def pair(a: str, x: str, b: str, y: str) -> Pair:
    return frozenset({(a, x), (b, y)})


def held(options: Mapping[str, str]) -> set[Pair]:
    """The pairs that a combination, or a part of one, has."""
    return {frozenset(two) for two in combinations(options.items(), 2)}


def all_pairs(factors: Mapping[str, Sequence[str]]) -> set[Pair]:
    return {
        pair(a, x, b, y) for a, b in combinations(factors, 2) for x, y in product(factors[a], factors[b])
    }  # in any order


def covering(
    factors: Mapping[str, Sequence[str]], refused: Iterable[Pair], seed: int = 0, tries: int = 2
) -> list[dict[str, str]]:
    """Combinations that together hold every pair of values but the refused ones, which none of them holds.

    Greedy: each row begins with a pair that none has yet, and every other factor takes the value that adds the most
    new pairs, the best of a few orders. A value that nothing legal goes with is a ValueError.
    """
    refused, draw = set(refused), random.Random(seed)
    missing = all_pairs(factors) - refused
    rows = []
    while missing:
        first = dict(min(missing, key=lambda two: sorted(two)))
        grown = [row for _ in range(tries) if (row := _grown(first, factors, refused, missing, draw)) is not None]
        if not grown:
            raise ValueError(f"no legal combination holds {first}")
        rows.append(max(grown, key=lambda row: len(held(row) & missing)))
        missing -= held(rows[-1])
    return rows


def _grown(
    first: dict[str, str],
    factors: Mapping[str, Sequence[str]],
    refused: set[Pair],
    missing: set[Pair],
    draw: random.Random,
) -> dict[str, str] | None:
    row, others = dict(first), [name for name in factors if name not in first]
    draw.shuffle(others)
    for name in others:
        values = list(factors[name])
        draw.shuffle(values)
        added = {x: {pair(name, x, other, y) for other, y in row.items()} for x in values}
        legal = [x for x in values if not added[x] & refused]
        if not legal:
            return None
        row[name] = max(legal, key=lambda x: len(added[x] & missing))
    return {name: row[name] for name in factors}
