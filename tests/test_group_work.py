"""What group_advantages costs on a GPU grows as its rows do, and runs of equal ids cost less than shuffled ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import trajkern as tk

ptx = pytest.importorskip("trajkern.testing.ptx")

pytestmark = pytest.mark.slow
ROWS = (2048, 16384)
GROUP = 8


def _shuffled(n: int) -> Tensor:
    return _sorted(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


def _sorted(n: int) -> Tensor:
    return torch.arange(n) // GROUP


def _work(ids: Tensor) -> int:
    """Instructions of all lanes, forward and backward."""
    n = ids.shape[0]
    rewards = torch.randn(n, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with ptx.compiled("sm_90") as execution, tk.use_backend("cuda"):
        tk.group_advantages(rewards, ids).sum().backward()
    assert sum(execution.launches.values()) <= 4
    return execution.stats["lane instructions"]


@pytest.mark.parametrize("order", (_shuffled, _sorted), ids=("shuffled", "sorted"))
def test_work_grows_as_the_rows_do(order) -> None:
    few, many = (_work(order(n)) for n in ROWS)
    assert math.log(many / few) / math.log(ROWS[1] / ROWS[0]) <= 1.1


def test_ids_in_runs_cost_less() -> None:
    shuffled, in_runs = (_work(x) for x in (_shuffled(ROWS[0]), _shuffled(ROWS[0] // GROUP).repeat_interleave(GROUP)))
    assert in_runs < 0.6 * shuffled
