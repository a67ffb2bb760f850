"""TreePO: the mean over depths by hand and against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.treepo import WEIGHTINGS, advantages

# prompt 5 branches into 1 (two rollouts) and 2 (one); prompt 6 has a single rollout
IDS = [[5, 1, 0], [5, 1, 1], [5, 2, 0], [6, 1, 0]]
REWARDS = [1.0, 0.0, 0.0, 0.7]
EXPECTED = {
    # depth 0 has mean 1/3 over 3; depth 1 mean 1/2 over 2; elsewhere rollouts are alone, which counts at depth 0 only
    "average": [(2 / 3 + 1 / 2) / 2, (-1 / 3 - 1 / 2) / 2, -1 / 3, 0.7],
    "group_size": [(3 * 2 / 3 + 2 / 2) / 5, (-3 / 3 - 2 / 2) / 5, -1 / 3, 0.7],
}


def plain(rewards: list[float], ids: list[list[int]], weighting: str) -> list[float]:
    out = []
    for i, row in enumerate(ids):
        terms = []
        for d in range(len(row)):
            peers = [rewards[j] for j, other in enumerate(ids) if other[: d + 1] == row[: d + 1]]
            if len(peers) > 1:
                terms.append((rewards[i] - sum(peers) / len(peers), len(peers)))
            elif d == 0:
                terms.append((rewards[i], 1))
        if weighting == "average":
            terms = [(x, 1) for x, _ in terms]
        out.append(sum(x * k for x, k in terms) / sum(k for _, k in terms))
    return out


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_literal(weighting: str, device: str) -> None:
    out = advantages(torch.tensor(REWARDS, device=device), torch.tensor(IDS, device=device), weighting=weighting)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), torch.tensor(EXPECTED[weighting]))


def test_default() -> None:
    torch.testing.assert_close(advantages(torch.tensor(REWARDS), torch.tensor(IDS)), torch.tensor(EXPECTED["average"]))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.3]), *[st.integers(-1, 1)] * 3), max_size=16),
    st.sampled_from(WEIGHTINGS),
    st.integers(1, 3),
)
def test_matches_a_plain_loop(rows: list[tuple], weighting: str, depths: int) -> None:
    rewards, ids = [row[0] for row in rows], [list(row[1 : 1 + depths]) for row in rows]
    out = advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(ids, dtype=torch.int64).reshape(len(ids), depths),
        weighting=weighting,
    )
    expected = torch.tensor(plain(rewards, ids, weighting), dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.permutations(range(len(IDS))))
def test_permutes_with_its_rows(order: list[int]) -> None:
    rewards, ids = torch.tensor(REWARDS), torch.tensor(IDS)
    out = advantages(rewards, ids)
    torch.testing.assert_close(advantages(rewards[order], ids[order]), out[order])


def test_edges() -> None:
    equal = advantages(torch.full((6,), 0.1), torch.tensor([[0, d % 2] for d in range(6)]))
    assert equal.tolist() == [0] * 6
    # rollouts that have ended stand alone by their negative ids and change nothing
    ended = torch.tensor([[5, 1, -1], [5, 1, -2], [5, -3, -3], [6, -4, -4]])
    assert torch.equal(advantages(torch.tensor(REWARDS), ended), advantages(torch.tensor(REWARDS), torch.tensor(IDS)))
    assert torch.equal(
        advantages(torch.tensor(REWARDS), torch.tensor(IDS, dtype=torch.int32)),
        advantages(torch.tensor(REWARDS), torch.tensor(IDS) * 2**40),
    )


@pytest.mark.parametrize(
    ("ids", "weighting", "error", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), "average", ValueError, r"branch_ids must have shape \[4, D\]"),
        (torch.zeros(4, 0, dtype=torch.int64), "average", ValueError, r"D at least 1\); got \[4, 0\]"),
        (torch.zeros(4, dtype=torch.int64), "average", ValueError, "branch_ids must have 2 dimensions"),
        (torch.zeros(4, 1), "average", TypeError, "branch_ids must have dtype int64, int32"),
        (torch.tensor(IDS), "depth", ValueError, "weighting must be one of 'average', 'group_size'"),
    ],
)
def test_refuses(ids: torch.Tensor, weighting: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        advantages(torch.tensor(REWARDS), ids, weighting=weighting)
