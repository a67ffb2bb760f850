"""Credits by slime's --custom-advantage-function-path: who is compared with whom, what is found, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.integrations import slime_batches as host
from tests.integrations.slime_ranks import SHARES, options, rollout_data
from trajkern import credit
from trajkern.integrations import _slime_credit, slime

ROOT = Path(__file__).resolve().parents[2]
EVERYWHERE = list(range(6))
REWARDS = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, 1.0])


def finished(rollouts: credit.Rollouts) -> torch.Tensor:
    return ~rollouts.flags["truncated"]


plain = credit.outcome()
gated = credit.outcome().gate(finished)
directed = credit.outcome(scale="none") + 0.5 * credit.directive()
toned = credit.outcome("tone")


def advantages(places: list[int], spec: str | None = None, **changed: Any) -> dict[str, Any]:
    data = rollout_data(places)
    named = {} if spec is None else {"trajkern_credit": f"{__name__}:{spec}"}
    slime.advantages(options(**named, **changed), data)
    return data


def on_tokens(data: dict[str, Any], values: torch.Tensor) -> list[torch.Tensor]:
    return [value * (mask != 0) for value, mask in zip(values, data["loss_masks"], strict=True)]


@pytest.mark.parametrize("places", [EVERYWHERE, [3, 0, 5, 1, 4, 2]])
@pytest.mark.parametrize("scale", [True, False])
def test_of_raw_rewards(places: list[int], scale: bool) -> None:
    """GRPO of slime's own groups, the samples of a prompt that follow one another in the whole batch."""
    data = advantages(places, grpo_std_normalization=scale)
    rewards = REWARDS.view(2, 3)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = (centred / (centred.std(1, keepdim=True) + 1e-6) if scale else centred).flatten()[places]
    torch.testing.assert_close(data["advantages"], on_tokens(data, expected))
    assert [x.shape[0] for x in data["advantages"]] == [host.RESPONSES[place] for place in places]
    assert data["returns"] is not data["advantages"] and all(x.dtype == torch.float32 for x in data["returns"])
    torch.testing.assert_close(data["returns"], data["advantages"])
    torch.testing.assert_close(data["loss_masks"], rollout_data(places)["loss_masks"])


def test_a_gate_takes_samples_out_of_the_loss() -> None:
    data, before = advantages(EVERYWHERE, "gated", calculate_per_token_loss=True), rollout_data(EVERYWHERE)
    kept = torch.tensor([1, 0, 1, 0, 1, 1])
    for n, mask in enumerate(data["loss_masks"]):
        torch.testing.assert_close(mask, before["loss_masks"][n] * int(kept[n]))
    first, second = torch.tensor([1.0, 0.5]), torch.tensor([2.0, 1.0])
    first, second = ((x - x.mean()) / (x.std() + 1e-6) for x in (first, second))
    expected = torch.stack([first[0], torch.tensor(0.0), first[1], torch.tensor(0.0), second[0], second[1]])
    torch.testing.assert_close(data["advantages"], on_tokens(data, expected))


def test_a_teacher_directs() -> None:
    """Each token by log p(teacher) - log p(old), which stand 0.3 apart here."""
    data = advantages(EVERYWHERE, "directed")
    rewards = REWARDS.view(2, 3)
    expected = (rewards - rewards.mean(1, keepdim=True)).flatten() + 0.5 * 0.3
    torch.testing.assert_close(data["advantages"], on_tokens(data, expected))


@pytest.mark.slow  # two processes that import torch
def test_groups_over_two_ranks(tmp_path: Path) -> None:
    specs = {name: f"{__name__}:{name}" for name in ("plain", "gated")}
    command = [sys.executable, "-m", "tests.integrations.slime_ranks", str(tmp_path), *specs.values()]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    for rank, places in enumerate(SHARES):
        of_rank = torch.load(tmp_path / f"{rank}.pt")
        for name, spec in specs.items():
            whole = advantages(EVERYWHERE, name, calculate_per_token_loss=True)
            for found, field in zip(of_rank[spec], ("advantages", "loss_masks"), strict=True):
                torch.testing.assert_close(found, [whole[field][place] for place in places])


def test_ranks_are_those_of_data_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    megatron, group = ModuleType("megatron.core.parallel_state"), object()
    megatron.get_data_parallel_group = lambda with_context_parallel: {False: group}[with_context_parallel]
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, megatron.__name__, megatron)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    assert _slime_credit._ranks() is group


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"kl_coef": 0.1}, {}, "kl_coef must be 0 with trajkern's advantages"),
    ({"qkv_format": "thd"}, {}, "args must be slime's, as miles has no custom_advantage_function_path"),
    ({"context_parallel_size": 2}, {}, "context_parallel_size must be 1 for trajkern's advantages, got 2"),
    ({"trajkern_credit": f"{__name__}:gated"}, {}, "calculate_per_token_loss must be True and normalize_advantages"),
    (
        {"trajkern_credit": f"{__name__}:gated", "calculate_per_token_loss": True, "normalize_advantages": True},
        {},
        "calculate_per_token_loss must be True and normalize_advantages",
    ),
    ({"trajkern_credit": f"{__name__}:nothing"}, {}, '"package.module:name" is expected'),
    ({"trajkern_credit": f"{__name__}:toned"}, {}, "tone"),
    ({}, {"values": [torch.zeros(1)]}, "values must not be there"),
    ({}, {"partition": None}, "rollout_data must have partition.*it has no partition"),
    ({}, {"rollout_ids": [0, 0, 1, 2, 3, 4]}, "several of one rollout_ids"),
    ({"rollout_batch_size": 3}, {}, r"n_samples_per_prompt \* rollout_batch_size = 3 \* 3 samples"),
    ({}, {"raw_reward": [1.0, float("nan"), 0.5, -1.0, 2, 1]}, "where a credit leaves tokens or rollouts out"),
    ({}, {"tokens": [torch.zeros(2).long()]}, "tokens must be the 34 of total_lengths, got 2"),
]


@pytest.mark.parametrize("changed, fields, message", REFUSED)
def test_refused(changed: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slime.advantages(options(**changed), rollout_data(EVERYWHERE) | fields)


def test_types() -> None:
    with pytest.raises(TypeError, match="trajkern_credit must be an expression of trajkern.credit"):
        advantages(EVERYWHERE, "REWARDS")
    with pytest.raises(TypeError, match="raw_reward must be a number a sample"):
        slime.advantages(options(), rollout_data(EVERYWHERE) | {"raw_reward": [{"score": 1.0}] * 6})
