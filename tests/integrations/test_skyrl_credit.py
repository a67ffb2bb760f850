"""Credits in SkyRL's trainer: what it finds in a batch, what becomes of its masks, what is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tests.integrations import skyrl_batches as host
from trajkern import credit
from trajkern.integrations import _skyrl_credit, skyrl

HANDED_ON = (  # packages and parts of SkyRL that its trainer hands work to
    *("ray", "jaxtyping", "loguru", "omegaconf", "skyrl_gym", "tensordict", "cloudpathlib", "transformers"),
    *(f"skyrl.backends.skyrl_train.{x}" for x in ("distributed", "inference_servers", "workers", "training_batch")),
    *(f"skyrl.train.{x}" for x in ("generators", "evaluate", "utils", "dataset")),
    "skyrl.backends.skyrl_train.utils.io",
)
P, L, PADDED = 4, 6, 2


class Data(dict):
    """``TrainingInputBatch``, as far as the trainer's method uses it."""

    def __init__(self, fields: dict[str, Any], metadata: dict[str, Any]) -> None:
        super().__init__(fields)
        self.metadata = metadata

    def to(self, device: str) -> Data:
        return self


def make_data() -> Data:
    """Five rows of prompt and response, aligned to the right, with observations, and two more that fill up."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = torch.tensor([2, 4, 3, 2, 3, 1, 1]), torch.tensor([6, 3, 5, 4, 6, 6, 6])
    place = torch.arange(P + L)
    real = place >= P + L - (prompts + responses)[:, None]
    response = place[P:] >= P + L - responses[:, None]
    observed = torch.zeros(7, L, dtype=torch.bool)
    observed[0, 2], observed[2, 3], observed[4, 3:5] = True, True, True
    loss = (response & ~observed).long()
    loss[5:] = 0
    rewards = torch.zeros(7, L)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 9.0, 9.0])
    rewards[0, 1] = 0.25
    fields = {
        "sequences": torch.randint(3, 50, (7, P + L), generator=g),
        "attention_mask": real.long(),
        "response_mask": response.long(),
        "loss_mask": loss,
        "rewards": rewards,
        "values": None,
        "action_log_probs": -torch.rand(7, L, generator=g),
        "rollout_logprobs": None,
    }
    return Data(fields, {"uids": ["x", "y", "x", "y", "x", "pad0", "pad1"], "pad_size": 2, "avg_response_length": 5.0})


def make_trainer(owner: type, **changed: Any) -> Any:
    algorithm = host.options(
        loss_reduction="token_mean",
        advantage_estimator="trajkern_credit",
        advantage_batch_normalize=False,
        gamma=1.0,
        lambd=1.0,
        grpo_norm_by_std=True,
    )
    trainer = owner.__new__(owner)
    trainer.all_metrics = {}
    trainer.tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [str(x) for x in ids])
    trainer.cfg = SimpleNamespace(
        trainer=SimpleNamespace(algorithm=algorithm), generator=SimpleNamespace(step_wise_trajectories=False)
    )
    for name, value in changed.items():
        setattr(trainer.cfg.generator if name.startswith("step") else algorithm, name, value)
    return trainer


def stand_in_trainer(core: Any) -> ModuleType:
    """``RayPPOTrainer`` by the call that its ``compute_advantages_and_returns`` makes of an estimator."""
    module: Any = ModuleType(_skyrl_credit.TRAINER)

    class RayPPOTrainer:
        def compute_advantages_and_returns(self, data: Any) -> Any:
            algorithm = self.cfg.trainer.algorithm  # type: ignore[attr-defined]
            data["advantages"], data["returns"] = core.AdvantageEstimatorRegistry._functions[
                algorithm.advantage_estimator
            ](
                token_level_rewards=data["rewards"],
                response_mask=data["response_mask"],
                index=data.metadata["uids"],
                values=data["values"],
                grpo_norm_by_std=algorithm.grpo_norm_by_std,
                gamma=algorithm.gamma,
                lambd=algorithm.lambd,
                config=algorithm,
            )
            return data

    module.RayPPOTrainer = RayPPOTrainer
    return module


class _StandIns:
    """Finds a module of which every attribute can be imported for each of what the trainer hands work to."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        wanted = any(f"{name}.".startswith(f"{package}.") for package in HANDED_ON)
        return ModuleSpec(name, self, is_package=True) if wanted else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(params=["by its signatures", "installed"])
def owner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The trainer's class: written from its signatures, and the package's own where it is installed."""
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "0.3.0")
    before, finder = set(sys.modules), _StandIns()
    if request.param == "installed":
        found = find_spec("skyrl")
        if found is None or found.origin is None:
            pytest.skip("skyrl is not installed")
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
        package = ModuleType("skyrl.backends")
        package.__path__ = [str(Path(found.origin).parent / "backends")]
        sys.modules["skyrl.backends"] = package
        importlib.import_module("ray").is_initialized = lambda: False
    else:
        core = host.core_module(skyrl.CORE)
        host.put(core, monkeypatch.setitem)
        host.put(stand_in_trainer(core), monkeypatch.setitem)
    try:
        skyrl.register()
        yield importlib.import_module(_skyrl_credit.TRAINER).RayPPOTrainer
    finally:
        skyrl.unregister()
        if request.param == "installed":
            sys.meta_path.remove(finder)  # type: ignore[arg-type]
            for name in set(sys.modules) - before:
                if name.split(".")[0] == "skyrl" or isinstance(sys.modules[name], MagicMock):
                    del sys.modules[name]


def long_enough(rollouts: credit.Rollouts) -> torch.Tensor:
    assert rollouts.texts is not None and len(rollouts.texts) == 5
    return torch.tensor([len(eval(text)) > 3 for text in rollouts.texts])


def run(owner: type, spec: credit.Spec | None, **changed: Any) -> tuple[Data, Any]:
    skyrl.register(credit=spec)
    trainer, data = make_trainer(owner, **changed), make_data()
    owner.compute_advantages_and_returns(trainer, data)  # type: ignore[attr-defined]
    return data, trainer


def group_relative(rewards: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def test_a_gate(owner: type) -> None:
    """Rows of one uid are a group, filled-up rows nobody; a row left out is in no mask and no statistic."""
    data, trainer = run(owner, credit.outcome().gate(long_enough))
    x = group_relative(torch.tensor([1.25, 0.5, -1.0]))
    y = torch.tensor([2 / (1 + 1e-6)])  # alone, since the other response has 3 tokens
    expected = torch.stack([x[0], torch.zeros(()), x[1], y[0], x[2], torch.zeros(()), torch.zeros(())])
    before = make_data()["loss_mask"]
    torch.testing.assert_close(data["advantages"], expected[:, None] * before)
    torch.testing.assert_close(data["loss_mask"], before * (torch.arange(7) != 1)[:, None])
    torch.testing.assert_close(data["returns"], data["advantages"])
    assert trainer.all_metrics["credit/kept"] == pytest.approx(0.8)


def test_turns_are_runs_of_the_loss_mask(owner: type) -> None:
    def lengths(rollouts: credit.Rollouts) -> torch.Tensor:
        turns = rollouts.spans["turn"]
        return (turns.end - turns.start).float()

    spec = credit.spans("turn", reward=lengths, baseline="none", scale="none")
    data, _ = run(owner, spec, loss_reduction="sequence_mean")
    torch.testing.assert_close(data["advantages"][0], torch.tensor([2.0, 2.0, 0.0, 3.0, 3.0, 3.0]))
    torch.testing.assert_close(data["advantages"][4], torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0, 1.0]))
    assert not data["advantages"][PADDED + 3 :].any()
    torch.testing.assert_close(data["loss_mask"], make_data()["loss_mask"])


def test_an_estimator_that_must_know_who_calls(owner: type) -> None:
    data, _ = run(owner, None, advantage_estimator="trajkern_reinforce++")
    inside = data["response_mask"] > 0
    assert float(data["advantages"][inside].mean()) == pytest.approx(0, abs=1e-5)
    assert float(data["advantages"][inside].std()) == pytest.approx(1, abs=1e-4)


REFUSED: list[tuple[credit.Spec, dict[str, Any], dict[str, Any], str]] = [
    (
        credit.outcome().gate(long_enough),
        {"loss_reduction": "sequence_mean"},
        {},
        "loss_reduction must be 'token_mean' where 'trajkern_credit' leaves tokens or rollouts out",
    ),
    (credit.outcome(), {"advantage_batch_normalize": True}, {}, "advantage_batch_normalize must be False"),
    (
        credit.outcome(),
        {"step_wise_trajectories": True},
        {},
        "step_wise_trajectories must be False for trajkern_credit",
    ),
    (credit.outcome(), {}, {"values": torch.zeros(7, L)}, "trainer.critic.model.path must be None"),
]


@pytest.mark.parametrize("expression, changed, fields, message", REFUSED, ids=["means", "scaled", "steps", "critic"])
def test_refused(owner: type, expression: credit.Spec, changed: dict, fields: dict, message: str) -> None:
    skyrl.register(credit=expression)
    trainer, data = make_trainer(owner, **changed), make_data()
    data |= fields
    data.metadata["is_last_step"] = [True] * 7
    with pytest.raises(ValueError, match=message):
        owner.compute_advantages_and_returns(trainer, data)  # type: ignore[attr-defined]


def test_refused_before_there_is_a_batch(owner: type) -> None:
    for spec, message in (
        (credit.outcome("tone"), "credit must be one that SkyRL's trainer can feed: .*needs 'tone'"),
        (credit.directive(), "needs 'teacher_logprobs'"),
        (credit.spans("turn"), "needs 'span_rewards:turn'"),
        (credit.recipe("dro"), "credit must be one that SkyRL's trainer can feed"),
    ):
        with pytest.raises(ValueError, match=message):
            skyrl.register(credit=spec)
    with pytest.raises(TypeError, match="credit must be an expression of trajkern.credit"):
        skyrl.register(credit=3)  # type: ignore[arg-type]
    skyrl.register(credit=f"{__name__}:named")
    assert skyrl._hooks[0].spec == named
    skyrl.register()
    with pytest.raises(RuntimeError, match="trajkern_credit needs more than SkyRL hands to an estimator"):
        skyrl.by_credit()
    data = make_data()
    del data.metadata["uids"]
    skyrl.register(credit=named)
    with pytest.raises(ValueError, match="metadata must have uids for trajkern_credit"):
        _skyrl_credit.credited(_skyrl_credit.Running(make_trainer(owner), data), "trajkern_credit", named)


named = credit.outcome(scale="none")


def test_unregister(owner: type) -> None:
    ours = owner.compute_advantages_and_returns  # type: ignore[attr-defined]
    skyrl.unregister()
    assert owner.compute_advantages_and_returns is ours.__wrapped__  # type: ignore[attr-defined]
