"""Group advantages of trajectories that are spread over ranks are those of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed

import trajkern as tk
from tests.ranks import over_ranks
from trajkern.testing import budget_share, oracle
from trajkern.testing.advantage import GROUP_ADVANTAGES

RANKS = 3
CASES = [case for case in GROUP_ADVANTAGES.cases if not case.large]


def _owner(count: int) -> torch.Tensor:
    """The rank of each trajectory: in no order, in unequal numbers, and of few trajectories none on the last."""
    owner = torch.randint(4, (count,), generator=torch.Generator().manual_seed(count)).clamp_max(RANKS - 1)
    return owner.clamp_max(1) if count < 10 else owner


def _rank(rank: int) -> dict[str, torch.Tensor | str]:
    function = partial(tk.group_advantages, process_group=torch.distributed.group.WORLD)
    results: dict[str, torch.Tensor | str] = {}
    for case in CASES:
        inputs = GROUP_ADVANTAGES.inputs(case, torch.float32)
        here = _owner(inputs["rewards"].numel()) == rank
        mine = {k: v[here] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        mine["rewards"] = mine["rewards"].detach()
        results[case.name] = function(**mine)
    with pytest.raises(ValueError) as error:
        function(torch.ones(2, requires_grad=True), torch.zeros(2).long())
    results["error"] = str(error.value)
    return results


def test_over_ranks(tmp_path: Path) -> None:
    of_ranks = over_ranks(RANKS, _rank, tmp_path)
    assert of_ranks[0]["error"] == "rewards must not require a gradient with process_group, which gives none"
    for case in CASES:
        inputs = GROUP_ADVANTAGES.inputs(case, torch.float32)
        high, low = oracle(GROUP_ADVANTAGES, inputs)
        (name,) = (name for name in high if not name.startswith("grad_"))
        owner, whole = _owner(inputs["rewards"].numel()), torch.empty_like(high[name], dtype=torch.float32)
        for rank, results in enumerate(of_ranks):
            whole[owner == rank] = results[case.name]
        assert budget_share(GROUP_ADVANTAGES, name, whole, high[name], low[name]) <= 1, case.name


def test_a_group_of_equal_rewards_is_zero_wherever_it_lies(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        rewards, groups = torch.full((6,), 0.1), torch.tensor([3, 3, 7, 7, 7, 3])
        out = tk.group_advantages(rewards, groups, process_group=torch.distributed.group.WORLD)
        assert torch.equal(out, torch.zeros(6))
    finally:
        torch.distributed.destroy_process_group()
