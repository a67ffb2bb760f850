"""The recipe dro in the trainer: who scores, what is reported, whole groups that a rubric gates, rounds of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.trainer.test_systems import credited, logprob, played, run_of
from trajkern.trainer import setup
from trajkern.trainer.compose import Compose
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.lagging import Lag, follow
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.place import Clock, Start
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.rounds import questions_of
from trajkern.trainer.run import Run
from trajkern.trainer.stopping import Interrupt
from trajkern.trainer.systems.dro import DRO
from trajkern.trainer.tasks import Question

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def model() -> CharacterModel:
    torch.manual_seed(5)
    return CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))


def test_a_copy_follows_as_its_lag_says() -> None:
    policy, copies = torch.nn.Linear(2, 1), {name: torch.nn.Linear(2, 1) for name in ("mean", "copied", "static")}
    lags = {"mean": Lag(0.25), "copied": Lag(1, every=3), "static": Lag()}
    for copy in copies.values():
        copy.load_state_dict({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)})
    seen = []
    for step in range(1, 5):
        policy.load_state_dict({"weight": torch.full((1, 2), float(step)), "bias": torch.ones(1)})
        follow(copies, lags, policy, step)
        seen.append([copies[name].weight[0, 0].item() for name in copies])
    assert seen == [[0.25, 0, 0], [0.6875, 0, 0], [1.265625, 3, 0], [1.94921875, 3, 0]]


def test_dro_tells_right_from_wrong(model: CharacterModel) -> None:
    run = run_of(model, "chain_sum_steps", "dro")
    question = Question("1+2+3+4=", "", "3\n6\n10", {"answer": "10"})
    texts = ["3\n6\n10", "2\n5\n9", "3\n5\n10", "4\n1", "3\n6\n10", "3\n9"]
    sample = played(run.system, [question] * 6, [[(t, True)] for t in texts], [5, 5, 5, 2, 0, 0])
    rollouts, _ = credited(run, sample)
    x = rollouts.reward("reflection").double()
    gaps = torch.stack([x[4] - x[5], (x[0] + x[2]) / 2 - x[1]])
    torch.testing.assert_close(run.system.report(rollouts, run.spec.needs)["right_minus_wrong"], gaps)


@pytest.mark.parametrize(("reward_policy", "asked"), [("policy", False), ("lagged", True), ("static", True)])
def test_dro_asks_its_reward_policy(model: CharacterModel, reward_policy: str, asked: bool) -> None:
    run = run_of(model, "chain_sum_steps", "dro", dro=DRO(reward_policy=reward_policy, lag_rate=0.5, lag_every=3))
    assert run.system.lags() == ({"scorer": Lag(0.5, 3) if reward_policy == "lagged" else Lag()} if asked else {})
    torch.manual_seed(6)
    other = CharacterModel(model.config)
    run.system.copies = {name: other for name in run.system.lags()}
    question = Question("1+2+3+4=", "", "3\n6\n10", {"answer": "10"})
    texts = ["3\n6\n10", "2\n5\n9"]
    sample = played(run.system, [question] * 2, [[(t, True)] for t in texts], [0, 0])
    rollouts, _ = credited(run, sample)
    scorer = other if asked else model
    x = torch.stack([logprob(scorer, question.prompt + c, model.answer("10")) for c in ("3\n6\n", "2\n5\n")]).double()
    w = x.std(0, correction=0)
    expected = ((w / w.sum()) * x).sum(1).float()
    torch.testing.assert_close(rollouts.reward("reflection"), expected, rtol=1e-5, atol=1e-5)
    own = rollouts.score([model.encode("1+2=")], ["3"])[0]
    torch.testing.assert_close(own, logprob(scorer, "1+2=", model.encode("3")), rtol=0, atol=1e-5)


def test_a_rubric_gates_whole_groups_of_dro(model: CharacterModel) -> None:
    for gate, expected in ((None, "pass_rate"), ("drop_rollout", "drop_rollout")):
        run = run_of(model, "chain_sum_steps", "dro", compose=Compose(rubric="well_formed", gate=gate))
        assert f".gate('rubric', mode='{expected}')" in repr(run.spec)
    plain = run_of(model, "chain_sum_steps", "grpo", compose=Compose(rubric="well_formed"))
    assert ".gate('rubric', mode='drop_rollout')" in repr(plain.spec)


def in_rounds(model: CharacterModel, control: str = "none", **settings: Any) -> Any:
    """As much of a run as choosing questions reads, on a pool of 60."""
    settings = {"drop_fraction": 0.5, "round_steps": 2, "candidates": 10, "carry": 0.4} | settings
    run = run_of(model, "chain_sum_steps", "dro", control=control, prompts=8, rollouts=3, dro=DRO(**settings))
    run.pool, run.step, run.start, run.max_new = run.system.task.distinct(3, 500, most=60), 0, Start(), 6
    run.clock = Clock()
    run.generator = torch.Generator().manual_seed(0)
    run.draw = lambda *some: Run.draw(run, *some)
    return run


def test_dro_s_rounds_train_on_what_the_filter_keeps_and_carry_some_over(model: CharacterModel) -> None:
    run = in_rounds(model)
    number = {q.prompt: n for n, q in enumerate(run.pool)}
    trained, rounds = [], []
    for run.step in range(4):
        trained.append({number[q.prompt] for q in questions_of(run)})
        rounds.append(set(run.system.round_prompts()))
    assert all(len(some) == 8 for some in trained), "others of the pool join the five that the filter keeps"
    assert rounds[0] == rounds[1] <= trained[0] & trained[1] and len(rounds[0]) == 5
    assert rounds[2] == rounds[3] <= trained[2] & trained[3] and len(rounds[2] & rounds[0]) >= 2
    assert len(rounds[2]) <= 7 and run.clock.sampled > 0
    state = json.loads(json.dumps(run.system.state()))
    again = in_rounds(model)
    again.system.restore(state)
    assert again.system.state() == state and set(again.system.round_prompts()) == rounds[2]
    random = in_rounds(model, "random-drop")
    questions_of(random)
    assert len(random.system.round_prompts()) == 5 and set(random.system.round_prompts()) != rounds[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 400}, r"dro.candidates must be from 1 \(the ranks\) to 300 \(the pool\), got 400"),
        ({"candidates": 0}, "dro.candidates must be at least 1, got 0"),
        ({"round_steps": -1}, "dro.round_steps must be at least 0, got -1"),
        ({"lag_every": 0}, "dro.lag_every must be at least 1, got 0"),
        ({"lag_rate": 1.5}, "dro.lag_rate must be between 0 and 1, got 1.5"),
    ],
)
def test_rounds_and_lags_that_cannot_be_are_refused(config: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dro = DRO(**{"round_steps": 2, **settings})
        setup.set_up(config(task="chain_sum_steps", recipe="dro", dro=dro), ALONE, Interrupt())
