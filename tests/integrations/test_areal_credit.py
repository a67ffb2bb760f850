"""Credits in AReaL's actor: what it finds in a rank's trajectories, what becomes of its masks, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integrations.test_areal import actor  # noqa: F401
from trajkern import credit
from trajkern.integrations import _adapter, _areal_credit
from trajkern.integrations import areal as adapter

CONFIG = {
    **dict.fromkeys(("adv_norm", "reward_norm", "m2_threshold", "rejection_sampling", "c_clip"), None),
    **{"kl_ctl": 0.0, "kl_estimator": "k1", "discount": 1.0, "gae_lambda": 1.0, "temperature": 1.0, "eps_clip": 0.2},
    **{"reward_bias": 0.5, "reward_scaling": 2.0, "reward_clip": 20.0, "overlong_reward_penalty": False},
    **{"mask_no_eos_with_zero": False, "use_decoupled_loss": True, "recompute_logprob": True},
    "prox_logp_method": "recompute",
}


class PPOActor:
    """AReaL 1.0.4's, as far as a trajectory without a critic and without a KL goes, dictionary by dictionary."""

    def __init__(self, config: Any, engine: Any) -> None:
        self.config, self.engine = config, engine

    def compute_advantages(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found, width = [], max(x["attention_mask"].shape[1] for x in data)
        for x in data:
            rows, ends = torch.arange(x["rewards"].shape[0]), x["attention_mask"].sum(1) - 2
            score = (x["rewards"] + self.config.reward_bias) * self.config.reward_scaling
            if self.config.mask_no_eos_with_zero:
                score = torch.where(ends + 2 == width, 0, score)
            rewards = torch.zeros(x["input_ids"].shape)
            rewards[rows, ends] = score
            mask, logprobs = (x[name].float().roll(-1, -1) for name in ("loss_mask", "logprobs"))
            advantages = rewards.flip(1).cumsum(1).flip(1) * mask
            own = {"tot_rewards": rewards, "loss_mask": mask, "logprobs": logprobs * mask, "advantages": advantages}
            found.append(x | own | {"returns": advantages})
        return found


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("areal", "areal.utils", "areal.trainer", "areal.trainer.ppo", *adapter.HOLDERS):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in adapter.HOLDERS:
        functions = {"ppo_actor_loss_fn": adapter.ppo_actor_loss_fn, "sapo_loss_fn": adapter.sapo_loss_fn}
        vars(sys.modules[name]).update(functions)
    module = sys.modules[adapter.HOLDERS[2]]
    vars(module).update(PPOActor=PPOActor, stats_tracker=SimpleNamespace())
    return module


@pytest.fixture(params=["written down", "installed"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    written = request.param == "written down"
    module = _stand_in(monkeypatch) if written else request.getfixturevalue("actor")
    if not written:  # what AReaL decorates it with is not there
        called = lambda self, data: module.batched_call(self._compute_advantages, data)  # noqa: E731
        monkeypatch.setattr(module.PPOActor, "compute_advantages", called)
    monkeypatch.setattr(_adapter, "version", lambda package: "1.0.4")
    monkeypatch.setattr(module, "stats_tracker", SimpleNamespace(scalar=lambda **found: LOGGED.update(found)))
    LOGGED.clear()
    yield module
    adapter.disable()


ROOT = Path(__file__).resolve().parents[2]
KEYS = ("advantages", "loss_mask")
LOGGED: dict[str, float] = {}
PROMPTS, RESPONSES = ((2, 2, 2), (3, 3)), ((4, 1, 3), (2, 6))
REWARDS = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0])


def _trajectories() -> list[dict[str, Any]]:
    """Two prompts with three and two rollouts; the first and the last rollout see something amid their response."""
    g, found, begin = torch.Generator().manual_seed(0), [], 0
    for prompts, responses in zip(PROMPTS, RESPONSES, strict=True):
        lengths = torch.tensor(prompts) + torch.tensor(responses)
        shape = len(prompts), int(lengths.max())
        place = torch.arange(shape[1])
        real, response = place < lengths[:, None], place >= torch.tensor(prompts)[:, None]
        mask = (real & response).int()
        mask[0 if begin == 0 else 1, 4] = 0
        draw = lambda shape=shape: -torch.rand(shape, generator=g)  # noqa: E731
        old = draw()
        own = {"tone": torch.arange(begin, begin + shape[0]), "well_formed": torch.arange(begin, begin + shape[0]) % 2}
        found.append(
            {
                "input_ids": torch.randint(3, 50, shape, generator=g),
                "attention_mask": real.long(),
                "loss_mask": mask,
                "rewards": REWARDS[begin : begin + shape[0]].clone(),
                "logprobs": old,
                "prox_logp": (old + 0.1).roll(-1, -1),
                **own,
            }
        )
        begin += shape[0]
    return found


def _computed(host: ModuleType, spec: Any, data: list[dict[str, Any]] | None = None, **changed: Any) -> Any:
    adapter.enable(credit=spec)
    config = SimpleNamespace(**CONFIG | changed)
    made = host.PPOActor.__new__(host.PPOActor)
    made.config, made.engine, made.adv_norm, made.reward_norm = config, SimpleNamespace(), None, None
    for name in ("reward_bias", "reward_scaling", "reward_clip", "kl_ctl", "discount", "gae_lambda"):
        setattr(made, name, getattr(config, name))
    made.mask_no_eos_with_zero, made.kl_estimator = config.mask_no_eos_with_zero, lambda x, y: x - y
    return made.compute_advantages(_trajectories() if data is None else data)


def _check(found: list[dict[str, Tensor]], values: Tensor, kept: Tensor | None = None) -> None:
    """A value a rollout on the tokens that learn, each in the column before its own, and 0 elsewhere."""
    sizes = [len(x) for x in PROMPTS]
    kept = torch.ones(5) if kept is None else kept
    for x, before, value, keeps in zip(found, _trajectories(), values.split(sizes), kept.split(sizes), strict=True):
        mask = before["loss_mask"].roll(-1, -1) * keeps[:, None]
        torch.testing.assert_close(x["loss_mask"], mask.float())
        torch.testing.assert_close(x["advantages"], mask * value[:, None])
        torch.testing.assert_close(x["returns"], x["advantages"])
        assert x["returns"] is not x["advantages"] and x["advantages"].dtype == torch.float32


def test_rewards_are_areals_and_groups_its_dictionaries(host) -> None:
    found = _computed(host, credit.outcome(scale="none") + 0.5 * credit.outcome("tone", scale="none"))
    first, second = (2 * REWARDS + 1).split([3, 2])
    tone = torch.tensor([-1.0, 0.0, 1.0, -0.5, 0.5])
    _check(found, torch.cat((first - first.mean(), second - second.mean())) + 0.5 * tone)
    assert LOGGED["credit/kept"] == 1 and LOGGED["credit/positive"] == pytest.approx(11 / 14)


def test_a_gate_takes_rollouts_out_of_the_loss(host) -> None:
    found = _computed(host, credit.outcome(scale="none").gate("well_formed"))
    kept = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    _check(found, torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0]), kept)  # each alone in its group
    data = _trajectories()
    for x in data:
        x["well_formed"] = torch.ones_like(x["well_formed"])
    data[0]["rewards"][1] = torch.nan
    found = _computed(host, credit.outcome(scale="none").gate("well_formed"), data)
    _check(found, torch.tensor([0.5, 0.0, -0.5, -3.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))


def test_turns_are_runs_of_the_mask(host) -> None:
    def later(rollouts: credit.Rollouts) -> Tensor:
        return (rollouts.spans["turn"].index > 0).float()

    found = _computed(host, credit.spans("turn", reward=later, scale="none"))
    turns = [x["advantages"][n] for x, n in ((found[0], 0), (found[1], 1))]
    assert all(len(x[x != 0].unique()) == 2 for x in turns)
    assert turns[0].tolist()[:5] == pytest.approx([0, -0.25, -0.25, 0, 0.75])


def test_a_teacher_directs_against_the_proximal_policy(host) -> None:
    data = _trajectories()
    for x in data:
        x["teacher_logp"] = x["prox_logp"] + 0.3
    _check(_computed(host, credit.directive(), data), torch.full((5,), 0.3))
    data = [{name: y for name, y in x.items() if name != "prox_logp"} for x in data]
    _check(_computed(host, credit.directive(), data), torch.full((5,), 0.4))


def test_nobody_learns(host) -> None:
    data = _trajectories()
    for x in data:
        x["well_formed"] = torch.zeros_like(x["well_formed"])
    with pytest.warns(UserWarning, match="nobody of a batch learn"):
        found = _computed(host, credit.outcome().gate("well_formed"), data)
    _check(found, torch.zeros(5))


SPREAD = {  # of both ranks: a statistic over the batch, and a gate that one rank's rollouts fail
    "whitened": credit.outcome(scale="none").whiten(),
    "gated": credit.outcome(scale="none").gate(lambda rollouts: rollouts.rewards["tone"] < 3),
}


def _spread(name: str, data: list[dict[str, Any]], group: Any = None) -> list[dict[str, Any]]:
    made = PPOActor(SimpleNamespace(**CONFIG), SimpleNamespace(data_parallel_group=group))
    logs = SimpleNamespace(stats_tracker=SimpleNamespace(scalar=lambda **found: None))
    return _areal_credit._credited(PPOActor.compute_advantages, SPREAD[name], logs)(made, data)


def _rank(store: str, out: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {name: _spread(name, _trajectories()[rank : rank + 1], dist.group.WORLD) for name in SPREAD}
    torch.save({name: [x[0][key] for key in KEYS] for name, x in found.items()}, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that import torch
def test_groups_over_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", __name__, str(tmp_path / "store"), str(tmp_path / "out")]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(2)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    for name in SPREAD:
        whole = _spread(name, _trajectories())
        for rank, x in enumerate(whole):
            theirs = torch.load(tmp_path / f"out.{rank}")[name]
            torch.testing.assert_close(theirs, [x[key] for key in KEYS])
    assert not whole[1]["loss_mask"].any() and whole[0]["loss_mask"].any()


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (credit.outcome(), {"kl_ctl": 0.1}, "actor.kl_ctl must be 0 with a credit.*got 0.1"),
    (credit.outcome(), {"discount": 0.9}, "actor.discount must be 1 with a credit"),
    (credit.outcome(), {"gae_lambda": 0.9}, "actor.gae_lambda must be 1 with a credit"),
    (credit.outcome(), {"adv_norm": object()}, r"actor.adv_norm must be None.*\.whiten\(\) does it"),
    (credit.outcome(), {"reward_norm": object()}, "actor.reward_norm must be None.*compares rewards by itself"),
    (credit.outcome("manner"), {}, "needs 'manner', which the rollouts do not have"),
    (credit.recipe("dro"), {}, "credit must do without 'rows:reference' in AReaL: a workflow's dictionary"),
    (credit.spans("turn"), {}, "credit must do without 'span_rewards:turn' in AReaL"),
    ("nothing", {}, '"package.module:name" is expected'),
]


@pytest.mark.parametrize(("expression", "changed", "message"), REFUSED, ids=[x[2][:40] for x in REFUSED])
def test_refused(host, expression: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _computed(host, expression, **changed)


def test_a_critic_is_refused_and_another_version(host, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _trajectories()
    data[0]["values"] = torch.zeros(1)
    with pytest.raises(ValueError, match="values must not be there"):
        _computed(host, credit.outcome(), data)
    adapter.disable()
    theirs = host.PPOActor.compute_advantages
    monkeypatch.setattr(host.PPOActor, "compute_advantages", lambda self, data, mask: data)
    with pytest.raises(RuntimeError, match=r"PPOActor.compute_advantages must take \(data\)"):
        adapter.enable(credit=credit.outcome())
    monkeypatch.setattr(host.PPOActor, "compute_advantages", theirs)


if __name__ == "__main__":
    _rank(*sys.argv[1:3], int(sys.argv[3]))
