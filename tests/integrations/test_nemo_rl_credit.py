"""Credits in NeMo-RL's trainers: what an estimator finds in a batch of ``grpo_train``, and what is refused."""

from __future__ import annotations

import sys
from collections import UserDict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.test_nemo_rl import host  # noqa: F401
from trajkern import credit
from trajkern.integrations import nemo_rl as adapter
from trajkern.integrations._nemo_rl_credit import GRPO


class GDPOAdvantageEstimator:
    """NeMo-RL's of that name, as its trainers call it."""

    def compute_advantage(self, prompt_ids, rewards, mask, repeated_batch, **kwargs): ...


def _create_advantage_estimator(master_config: Any) -> Any:
    return GDPOAdvantageEstimator()


@pytest.fixture
def trainer(host, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """The module of NeMo-RL's trainers."""
    module = sys.modules[GRPO]
    if not hasattr(module, "_create_advantage_estimator"):
        monkeypatch.setattr(module, "GDPOAdvantageEstimator", GDPOAdvantageEstimator, raising=False)
        monkeypatch.setattr(module, "_create_advantage_estimator", _create_advantage_estimator, raising=False)
    yield module
    adapter.disable()


REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0])
FORMAT = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
MESSAGES = (  # of each rollout, how many tokens each message has; the policy wrote every second one
    ((2, 3), (2, 2, 3, 1), (2, 4), (1, 5), (1, 2, 2, 2)),
    (0, 1, 0, 1, 1),  # who shares a prompt
)
WIDTH = 9


def _batch() -> dict[str, Any]:
    """What ``grpo_train`` passes to an estimator, a row of it masked by its ``sample_mask``."""
    g, logs, masks = torch.Generator().manual_seed(0), [], []
    for sizes in MESSAGES[0]:
        ids = [torch.randint(3, 50, (size,), generator=g) for size in sizes]
        logs.append([{"role": "user assistant".split()[n % 2], "token_ids": x} for n, x in enumerate(ids)])
        written = torch.cat([torch.full((size,), n % 2) for n, size in enumerate(sizes)])
        masks.append(torch.nn.functional.pad(written, (0, WIDTH - len(written))))
    mask = torch.stack(masks).float()
    mask[2] = 0
    repeated = {
        "message_log": logs,
        "total_reward": REWARDS,
        "reward/format": FORMAT,
        "truncated": torch.tensor([False, True, False, False, False]),
        "extra_env_info": [{"answer": str(n)} for n in range(5)],
        "length": torch.tensor([sizes[0] for sizes in MESSAGES[0]]),
    }
    return {
        "prompt_ids": torch.tensor([[7, 8], [9, 0]])[list(MESSAGES[1])],
        "rewards": REWARDS,
        "mask": mask,
        "repeated_batch": UserDict(repeated),
        "logprobs_policy": torch.zeros(5, WIDTH),
        "logprobs_reference": None,
    }


def _estimator(trainer: ModuleType, spec: Any, name: str = "trajkern_credit") -> Any:
    adapter.enable(credit=spec)
    grpo = SimpleNamespace(adv_estimator=SimpleNamespace(name=name))
    return trainer._create_advantage_estimator(SimpleNamespace(grpo=grpo, loss_fn=None))


def _centred(x: Tensor) -> Tensor:
    found = x.clone()
    for group in (0, 1):
        rows = torch.tensor(MESSAGES[1]) == group
        found[rows] = x[rows] - x[rows].mean()
    return found


def test_rewards_and_groups_are_the_trainers(trainer) -> None:
    spec = credit.outcome(scale="none") + 0.5 * credit.outcome("format", scale="none")
    estimator, batch = _estimator(trainer, spec), _batch()
    found = estimator.compute_advantage(**batch, sample_mask=torch.ones(5), generation_logprobs=None)
    expected = (_centred(REWARDS) + 0.5 * _centred(FORMAT))[:, None] * batch["mask"]
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and estimator.last_metrics["credit/kept"] == 1


def test_turns_are_what_the_policy_wrote(trainer) -> None:
    def later(rollouts: credit.Rollouts) -> Tensor:
        return (rollouts.spans["turn"].index > 0).float()

    found = _estimator(trainer, credit.spans("turn", reward=later, scale="none")).compute_advantage(**_batch())
    assert found[1, 2] == found[1, 3] != found[1, 7] and not found[1, 4:7].any() and not found[2].any()


def test_functions_read_rows_and_flags(trainer) -> None:
    def right(rollouts: credit.Rollouts) -> Tensor:
        said = [row["message_log"][-1]["token_ids"].shape[0] for row in rollouts.rows]
        asked = torch.tensor([float(row["extra_env_info"]["answer"]) for row in rollouts.rows])
        return asked + torch.tensor(said) * rollouts.flags["truncated"]

    batch = _batch()
    found = _estimator(trainer, credit.outcome(right, scale="none")).compute_advantage(**batch)
    expected = _centred(torch.tensor([0.0, 1.0 + 1.0, 2.0, 3.0, 4.0]))[:, None] * batch["mask"]
    torch.testing.assert_close(found, expected)


REFUSED: list[tuple[Any, str]] = [
    (credit.outcome().gate("truncated"), "leave no token and no rollout out of the loss in NeMo-RL"),
    (credit.recipe("psr"), "leave no token and no rollout out"),
    (credit.directive(), "credit must do without 'teacher_logprobs' in NeMo-RL: its trainers hand"),
    (credit.recipe("dro"), "credit must do without 'score' in NeMo-RL"),
    ("nothing", '"package.module:name" is expected'),
]


@pytest.mark.parametrize(("expression", "message"), REFUSED, ids=[x[1][:32] for x in REFUSED])
def test_refused_at_once(trainer, expression: Any, message: str) -> None:
    before = trainer._create_advantage_estimator, trainer.ClippedPGLossFn
    with pytest.raises(ValueError, match=message):
        adapter.enable(credit=expression)
    assert (trainer._create_advantage_estimator, trainer.ClippedPGLossFn) == before


def test_refused_at_the_first_batch(trainer) -> None:
    estimator = _estimator(trainer, credit.outcome())

    def refused(message: str, spec: Any = None, **changed: Any) -> None:
        batch = _batch()
        batch["repeated_batch"] = UserDict(batch["repeated_batch"] | changed.pop("repeated_batch", {}))
        found = estimator if spec is None else _estimator(trainer, spec)
        with pytest.raises(ValueError, match=message):
            found.compute_advantage(**batch | changed)

    refused("needs 'manner', which the rollouts do not have", credit.outcome("manner"))
    refused("no reward of NaN", rewards=torch.tensor([1.0, 0.0, float("nan"), 2.0, torch.nan]))
    refused("message_log must have the tokens of the mask's", mask=torch.ones(5, WIDTH))
    refused("message_log must have the tokens of the mask's", mask=torch.zeros(5, 4))
    bare = {name: x for name, x in _batch()["repeated_batch"].items() if name != "message_log"}
    with pytest.raises(ValueError, match=r"repeated_batch must have message_log.*data_plane.enabled must be False"):
        estimator.compute_advantage(**_batch() | {"repeated_batch": bare})


def test_another_estimator_and_another_version(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = trainer._create_advantage_estimator
    with pytest.raises(ValueError, match=r"grpo.adv_estimator.name must be 'trajkern_credit' .*got 'grpo'"):
        _estimator(trainer, credit.outcome(), "grpo")
    adapter.disable()
    assert trainer._create_advantage_estimator is theirs
    monkeypatch.setattr(trainer, "_create_advantage_estimator", lambda master_config, device: None)
    with pytest.raises(RuntimeError, match=r"_create_advantage_estimator must take \(master_config\)"):
        adapter.enable(credit=credit.outcome())
    monkeypatch.setattr(trainer, "_create_advantage_estimator", theirs)
    monkeypatch.setattr(trainer.GDPOAdvantageEstimator, "compute_advantage", lambda self, data, mask: None)
    with pytest.raises(RuntimeError, match="NeMo-RL's compute_advantage must take"):
        adapter.enable(credit=credit.outcome())
