"""What Triton's policy loss launches: two kernels forward and one backward, spread over bounded programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from trajkern._triton import policy_loss  # noqa: E402
from trajkern._triton.configs import MOST_PROGRAMS, PIECES  # noqa: E402
from trajkern.losses.arguments import LossArguments  # noqa: E402
from trajkern.losses.config import PolicyLoss  # noqa: E402
from trajkern.losses.kinds import KINDS  # noqa: E402
from trajkern.ops._loss_arguments import check_loss  # noqa: E402


class _Recorder:
    """Stands for a kernel: notes its grid, and runs nothing."""

    def __init__(self, name: str, launches: list[tuple[str, int]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((self.name, grid[0]))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for name in [name for name in vars(policy_loss) if name.endswith("_kernel")]:
        monkeypatch.setattr(policy_loss, name, _Recorder(name, found))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "trajectories"), ((1, 1), (5000, 3), (3_000_000, 2), (100_000, 50_000)))
def test_three_launches(kind: str, tokens: int, trajectories: int, launches: list[tuple[str, int]]) -> None:
    logprobs, advantages = torch.zeros(tokens), torch.zeros(trajectories)
    cu_seqlens = torch.linspace(0, tokens, trajectories + 1, dtype=torch.float64).long()
    given = (logprobs, advantages, cu_seqlens, *(None,) * 6)
    arguments = check_loss(logprobs, None, LossArguments(PolicyLoss(kind, max_length=tokens), *given))
    *tensors, options, params = arguments.laid_out(torch.float32).inputs()
    _, _, grad = policy_loss.policy_loss(logprobs, None, logprobs > 0, *tensors, [*options, 1, 0], params)
    policy_loss.scale_gradients_(grad, None, torch.ones(()))
    assert [name for name, _ in launches] == ["tokens_kernel", "finish_kernel", "scale_kernel"]
    assert launches[0][1] <= MOST_PROGRAMS
    assert launches[1][1] * PIECES["BLOCK"] >= tokens
