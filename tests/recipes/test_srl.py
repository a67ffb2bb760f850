"""SRL: difflib's ratio with all its quirks, the penalty for bad form, and the groups that teach something."""

from __future__ import annotations

import difflib
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern import _ext
from trajkern.recipes.srl import keep_groups, rewards, similarity

TEXT = st.text(alphabet="ab c\n7é", max_size=30)
PIECE = st.text("abcdefgh", min_size=1, max_size=60)
LONG = st.builds(lambda a, n, b: (a * n + b)[:700], PIECE, st.integers(4, 40), TEXT)


def ratio(a: str, b: str, autojunk: bool = True) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk).ratio()


def test_literal_similarity() -> None:
    """Blocks "b" and "d" of "abcd" and "bxd": 2 * 2 / 7; two empty actions are alike, one is not."""
    out = similarity(["abcd", "", "", "x = 3"], ["bxd", "", "a", "x = 3"])
    assert out.tolist() == [2 * 2 / 7, 1.0, 0.0, 1.0] and out.dtype == torch.float64


def test_quirks() -> None:
    # not symmetric
    a, b = "tide", "diet"
    assert similarity([a, b], [b, a]).tolist() == [ratio(a, b), ratio(b, a)] == [0.25, 0.5]
    # the block "xxxx" leaves nothing on its one side to match; the longest common subsequence "abcde" counts 5
    assert similarity(["abcdexxxx"], ["xxxxa1b2c3d4e"]).item() == 2 * 4 / 22
    # from 200 characters on, a frequent character starts no block but at the very front
    prose = "ab" * 100
    assert similarity([prose[1:-1], prose[1:], prose], [prose[:-1], prose, prose]).tolist() == [2 * 198 / 397, 0.0, 1.0]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(TEXT | LONG, TEXT | LONG), max_size=4), st.booleans())
def test_identical_to_difflib(pairs: list[tuple[str, str]], autojunk: bool) -> None:
    out = similarity([a for a, _ in pairs], [b for _, b in pairs], autojunk=autojunk)
    assert out.tolist() == [ratio(a, b, autojunk) for a, b in pairs]


def test_identical_on_edited_prose() -> None:
    """Long texts whose blocks nest deep, more of them than threads, in every width that Python stores strings in."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(60)]
    pairs = []
    for wide in ("", "é", "ы", "\ud800", "\U0001f600"):
        for edits in (1, 5, 40):
            expert = draw.choices([*words, wide], k=draw.choice([20, 40, 150]))
            action = list(expert)
            for _ in range(edits):
                action[draw.randrange(len(action))] = draw.choice(words)
            pairs.append((" ".join(action), " ".join(expert)))
    for autojunk in (True, False):
        out = similarity([a for a, _ in pairs], [b for _, b in pairs], autojunk=autojunk).tolist()
        assert out == [ratio(a, b, autojunk) for a, b in pairs]
        assert len(set(out)) > 10


def test_what_takes_too_long_is_refused_or_given_a_value() -> None:
    """A row whose blocks nest one in another: cubic for difflib."""
    hard, easy = "".join(f"{'a' * n}{chr(1000 + n)}" for n in range(20, 0, -1)), "a = 3"
    expert = "".join(f"{'a' * n}{chr(3000 + n)}" for n in range(20, 0, -1))
    pairs: Any = ([easy, hard, easy], [easy, expert, "b = 3"])
    whole = similarity(*pairs, autojunk=False)
    assert whole.tolist() == [ratio(a, b, False) for a, b in zip(*pairs, strict=True)]
    for beyond in (-1, math.nan):
        out = similarity(*pairs, autojunk=False, max_steps=10**5, beyond=beyond)
        torch.testing.assert_close(out, torch.tensor([1.0, beyond, whole[2]], dtype=torch.float64), equal_nan=True)
    with pytest.raises(ValueError, match=r"^actions must be .*max_steps = 100000 steps; number 1, of 230 characters"):
        similarity(*pairs, autojunk=False, max_steps=10**5)
    with pytest.raises(ValueError, match="^max_steps must be at least 1, got 0"):
        similarity(["a"], ["b"], max_steps=0)
    with pytest.raises(TypeError, match="^beyond must be a number, got 'none'"):
        similarity(["a"], ["b"], beyond="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("built", [True, False])
def test_the_limit_is_of_the_texts_alone(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four characters of two letters: 4 + 2 * 2 * 2 steps and no more, in every company and order."""
    monkeypatch.setattr(_ext, "CPU_BUILT", built)
    for max_steps, done in ((11, False), (12, True)):
        out = similarity(["abab", "", "x" * 5000, "abab"], ["abab"] * 4, max_steps=max_steps, beyond=2)
        assert out.tolist() == [1.0 if done else 2.0, 0.0, 2.0, 1.0 if done else 2.0]


def test_one_expert_for_a_group() -> None:
    expert = "carry the one, then add 17 and 25 " * 9
    actions = ["", expert, expert[:40], "add 25 and 17", expert.upper()]
    assert similarity(actions, [expert] * 5).tolist() == [ratio(a, expert) for a in actions]


def test_rewards(device: str) -> None:
    alike = torch.tensor([0.5, math.nan, 0.75], device=device)
    well_formed = torch.tensor([True, False, True], device=device)
    assert rewards(alike, well_formed).tolist() == [0.5, -1.0, 0.75]
    assert rewards(alike, well_formed, penalty=-0.25).tolist() == [0.5, -0.25, 0.75]


# deviations with ddof 1: 0.1 * sqrt(1/2), 0, none (alone)
SCORES, GROUPS = [0.5, 0.6, 0.1, 0.1, 0.1, 0.9], [1, 1, 2, 2, 2, 3]


def test_literal_keep_groups(device: str) -> None:
    scores, groups = torch.tensor(SCORES, device=device), torch.tensor(GROUPS, device=device)
    assert keep_groups(scores, groups, min_std=0).tolist() == [True, True] + [False] * 4
    assert keep_groups(scores, groups, min_std=0.06).tolist() == [True, True] + [False] * 4
    assert keep_groups(scores, groups, min_std=0.06, ddof=0).tolist() == [False] * 6
    assert keep_groups(scores, groups, min_std=0.08).tolist() == [False] * 6


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), max_size=16),
    st.floats(0, 1),
    st.sampled_from([0, 1]),
)
def test_keep_groups_matches_a_plain_loop(rows: list[tuple[float, int]], min_std: float, ddof: int) -> None:
    deviation = (statistics.pstdev, statistics.stdev)[ddof]
    expected = []
    for _, group in rows:
        peers = [r for r, g in rows if g == group]
        std = deviation(peers) if len(peers) > 1 else 0.0
        expected.append(None if abs(std - min_std) < 1e-9 and std else std > min_std)
    out = keep_groups(
        torch.tensor([r for r, _ in rows], dtype=torch.float64),
        torch.tensor([g for _, g in rows], dtype=torch.int64),
        min_std=min_std,
        ddof=ddof,
    ).tolist()
    assert all(e is None or o == e for o, e in zip(out, expected, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: similarity("abc", ["a", "b", "c"]), TypeError, "actions must be a sequence of strings"),
        (lambda: similarity(["a"], [None]), TypeError, "expert_actions must be a sequence of strings, got None"),
        (lambda: similarity(["a"], []), ValueError, "expert_actions must have one string for each of the 1 actions"),
        (lambda: rewards(torch.ones(2), torch.ones(2)), TypeError, "well_formed must have dtype bool"),
        (lambda: rewards(torch.ones(2), torch.ones(1) > 0), ValueError, r"well_formed must have shape \[2\]"),
        (lambda: keep_groups(torch.ones(1), torch.ones(1).long(), min_std=-1), ValueError, "min_std must be at least"),
        (lambda: keep_groups(torch.ones(1), torch.ones(1).long(), min_std=0, ddof=2), ValueError, "ddof must be one"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Twice(Sequence):
    """Two texts by its length, five by its places; the second time numbers."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i):
        if i >= 5:
            raise IndexError
        self.read += 1
        return "abc" if self.read <= 5 else 5


class Nine(list):
    def __len__(self) -> int:
        return 9


@pytest.mark.parametrize(
    ("actions", "experts"), [(Twice(), ["a", "b"]), (["a"] * 9, Nine(["a"])), (Nine(["abc"]), ["a"] * 9)]
)
def test_sequences_are_read_once(actions: Sequence[str], experts: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="expert_actions must have one string for each"):
        similarity(actions, experts)
