"""Whole runs, small ones: what they leave, how they stop and continue, and that the backends agree."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trajkern as tk
from trajkern.trainer import cli_main
from trajkern.trainer import collect as collecting
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import load
from trajkern.trainer.config import Then, TrainConfig, WarmUp, parse
from trajkern.trainer.folder import CHECKPOINT, METRICS, WARM
from trajkern.trainer.place import Clock, Start
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.stopping import Interrupted
from trajkern.trainer.summary import summary
from trajkern.trainer.systems.dro import DRO
from trajkern.trainer.tasks import load_task

Make = Callable[..., TrainConfig]


def _records(folder: Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    lines = (folder / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens/s", "seconds")} for line in lines]


def _interrupt(monkeypatch: pytest.MonkeyPatch, step: str, after: int, number: int = signal.SIGINT) -> None:
    """Press Ctrl-C, or send another signal, during the ``after``-th call of ``training.<step>``."""
    original, calls = getattr(training, step), []

    def interrupted(*args):
        calls.append(step)
        if len(calls) == after:
            signal.raise_signal(number)
        return original(*args)

    monkeypatch.setattr(training, step, interrupted)


@pytest.fixture(autouse=True)
def _heeds_the_keyboard() -> Iterator[None]:
    """A shell starts what it runs in the background with Ctrl-C ignored, and a run leaves what is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_leaves_its_results(config: Make, capsys: pytest.CaptureFixture) -> None:
    result = training.train(config())
    text = capsys.readouterr().out
    for path in (result.curve, result.metrics, result.checkpoint):
        assert path.stat().st_size > 100 and str(path) in text
    assert result.curve.read_bytes().startswith(b"\x89PNG")
    records = _records(result.metrics.parent)
    assert [r["step"] for r in records if r["phase"] == "warmup"] == list(range(1, 41))
    assert [r["step"] for r in records if r["phase"] == "main"] == list(range(1, 7))
    assert [r["step"] for r in records if r["phase"] == "heldout"] == [0, 6]
    assert sum(r["live_groups"] for r in records if r["phase"] == "main") >= 6, "the case needs something to learn from"
    assert [r["step"] for r in records if r["phase"] == "main" and "val_pass@1" in r] == [3, 6]
    for words in ("pass@1", "pass@4", "greedy", "after warm-up", "after 6 steps of grpo", "tokens per second"):
        assert words in text
    assert "shared prefixes" in text


def test_the_same_seed_gives_the_same_bits(config: Make) -> None:
    one, two = (training.train(config(out)) for out in ("a", "b"))
    other = training.train(config("c", seed=1))
    weights = [load_file(r.checkpoint) for r in (one, two, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["policy.head.weight"], weights[2]["policy.head.weight"])
    assert _records(one.metrics.parent) == _records(two.metrics.parent)


TREES = {"recipe": "tree_grpo", "task": "chain_sum_steps"}
SECOND = {"recipe": "psr", "steps": 3, "then": Then("nsr", steps=2, lr=1e-3, prompts=8)}
LAGGED = {"reward_policy": "lagged", "lag_rate": 0.5, "lag_every": 2}
ROUNDS = {
    "recipe": "dro",
    "task": "chain_sum_steps",
    "dro": DRO(drop_fraction=0.5, round_steps=3, candidates=24, carry=0.5, **LAGGED),
    "loss": tk.PolicyLoss(kl_coef=0.1),
}


@pytest.mark.parametrize(
    ("step", "after", "changes"),
    [
        pytest.param("supervised_step", 5, {}, id="warm-up"),
        pytest.param("policy_step", 3, {"steps": 50, "token_limit": 1200}, id="main"),
        pytest.param("policy_step", 3, TREES, id="trees"),
        pytest.param("policy_step", 4, SECOND, id="then", marks=pytest.mark.slow),
        pytest.param("policy_step", 4, ROUNDS, id="rounds and copies", marks=pytest.mark.slow),
    ],
)
def test_resume_equals_an_uninterrupted_run(
    config: Make, monkeypatch: pytest.MonkeyPatch, step: str, after: int, changes: dict[str, Any]
) -> None:
    whole = training.train(config("whole", **changes))
    with monkeypatch.context() as patch:
        _interrupt(patch, step, after)
        with pytest.raises(Interrupted) as stopped:
            training.train(config("parts", **changes))
    checkpoint = stopped.value.args[0]
    (checkpoint.parent / METRICS).open("a").write('{"phase": "main", "st')  # what a crash may leave behind
    resumed = training.train(parse(["--resume", str(checkpoint)]))
    assert resumed.checkpoint == checkpoint
    expected, came = load_file(whole.checkpoint), load_file(resumed.checkpoint)
    assert expected.keys() == came.keys() and resumed.steps == whole.steps
    assert [k for k in expected if not torch.equal(expected[k], came[k])] == []
    assert _records(resumed.metrics.parent) == _records(whole.metrics.parent)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)


@pytest.mark.parametrize("flag", ["--eval.samples=2", "--eval.heldout=8", "--seed=1", "--task=count_bits"])
def test_a_start_that_was_measured_otherwise_is_not_shown(config: Make, flag: str) -> None:
    short = config("short", steps=1, warmup=WarmUp(steps=2, batch=4, demonstrations=16, check_every=2))
    first = training.train(short)
    assert first.before is not None
    path = str(first.checkpoint.parent / WARM)
    same = training.train(parse(["--resume", path, "--out", str(short.out / "same")]))
    other = parse(["--resume", path, "--out", str(short.out / "other"), flag])
    changed = training.train(other)
    assert same.before == first.before and changed.before is None
    row = next(line for line in summary(other, changed).splitlines() if line.startswith("after warm-up"))
    assert row.split()[2:] == ["-", "-", "-"]
    again = training.train(parse(["--resume", "last", "--out", str(other.out), "--steps", "2"]))
    assert again.before is None


def test_a_second_recipe_goes_on_with_a_fresh_optimiser(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, original = [], training.collect
    monkeypatch.setattr(training, "collect", lambda run, some: drawn.append(len(some)) or original(run, some))
    rates, setting = [], training.set_lr
    monkeypatch.setattr(training, "set_lr", lambda run, lr: rates.append(lr) or setting(run, lr))
    whole = training.train(config("whole", **SECOND))
    assert drawn == [16] * 3 + [8] * 2
    assert rates[-5:] == pytest.approx([5e-4, 5e-4 * 0.7, 5e-4 * 0.4, 1e-3, 1e-3 * 0.55])
    stored, lines = load(whole.checkpoint), [r for r in _records(whole.metrics.parent) if r["phase"] == "main"]
    assert {float(x) for name, x in stored.tensors.items() if name.endswith(".step")} == {2.0}, "of the optimiser"
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5] and whole.steps == 5
    assert stored.place["clock"]["sampled"] == whole.clock.sampled > 0
    first = training.train(config("first", recipe="psr", steps=3))
    flags = "--then.recipe nsr --then.steps 2 --then.lr 1e-3 --then.prompts 8".split()
    later = training.train(parse(["--resume", str(first.checkpoint), *flags]))
    came = load(later.checkpoint).tensors
    assert [k for k, x in stored.tensors.items() if not torch.equal(x, came[k])] == []
    none = ["--then.recipe", "None", "--then.steps", "0", "--then.lr", "None", "--then.prompts", "None"]
    with pytest.raises(ValueError, match=r"then.recipe must be given to resume .*, where it has begun; got None"):
        training.train(parse(["--resume", str(later.checkpoint), *none]))


def test_a_token_limit_counts_both_recipes() -> None:
    given = TrainConfig(recipe="psr", token_limit=1000, then=Then("nsr", steps=2))
    run: Any = SimpleNamespace(config=given.second, start=Start(3, 600), clock=Clock(sampled=700, scored=100))
    assert training.share_of_tokens(run) == 0.5, "of what the first recipe left"
    run.ranks, run.began = ALONE, time.monotonic()
    assert training.reached_limit(run) is None
    run.clock.scored = 300
    assert training.reached_limit(run) == "token limit of 1,000"


@pytest.mark.parametrize("name", ["psr", "nsr", "w_reinforce"])
def test_what_a_recipe_leaves_out_is_not_trained(config: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trained = []
    original = training.update
    monkeypatch.setattr(training, "update", lambda run, lesson: trained.append(lesson) or original(run, lesson))
    training.train(config(recipe=name, steps=3))
    rewards = torch.cat([lesson.credit.rollouts.reward("reward") for lesson in trained])
    advantages = torch.cat([lesson.credit.rows for lesson in trained])
    assert set(rewards.tolist()) == {"psr": {1.0}, "nsr": {0.0}, "w_reinforce": {0.0, 1.0}}[name]
    expected = torch.where(rewards > 0, 0.1 if name == "w_reinforce" else 1.0, -1.0)
    assert torch.equal(advantages, expected)


@pytest.mark.parametrize("changes", [{}, pytest.param(TREES, marks=pytest.mark.slow)], ids=str)
def test_groups_in_which_nothing_differs_stay_if_asked_to(config: Make, changes: dict[str, str]) -> None:
    runs = [training.train(config(f"{flag}", drop_equal=flag, steps=1, **changes)) for flag in (False, True)]
    stay, drop = ([r for r in _records(x.metrics.parent) if r["phase"] == "main"][0] for x in runs)
    assert stay["live_groups"] == drop["live_groups"] and stay["reward"] == drop["reward"]
    assert stay["num_tokens"] > drop["num_tokens"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_writes_a_checkpoint_and_exits_with_its_status(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _interrupt(monkeypatch, "policy_step", 2, number)
    before = signal.getsignal(number)
    arguments = (
        f"--task chain_sum --steps 6 --prompts 4 --rollouts 4 --questions 100 --out {tmp_path / 'run'} --threads 1"
        " --warmup.steps 2 --warmup.batch 8 --warmup.demonstrations 16 --eval.heldout 8 --eval.validation 4"
        " --tiny.layers 1 --tiny.width 16 --tiny.heads 2"
    )
    assert cli_main(arguments.split()) == status
    assert f"--resume {tmp_path / 'run' / CHECKPOINT}" in capsys.readouterr().err
    stored = load(tmp_path / "run" / CHECKPOINT)
    assert (stored.place["phase"], stored.place["step"]) == ("main", 2)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "changes",
    [{}, TREES, pytest.param({"recipe": "gigpo", "task": "chain_sum_steps"}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize(
    "other", [pytest.param({"reference": True}, marks=pytest.mark.slow), {"head": "eager"}], ids=str
)
def test_another_way_to_compute_gives_the_same_curve(
    config: Make, changes: dict[str, str], other: dict[str, Any]
) -> None:
    results = training.train(config("fused", **changes)), training.train(config("other", **changes, **other))
    for one, two in zip(*(_records(r.metrics.parent) for r in results), strict=True):
        assert one.keys() == two.keys()
        assert one.pop("phase") == two.pop("phase")
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), f"{name} at step {one['step']}"


@pytest.mark.parametrize("kind", ["grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("changes", [{}, TREES, {"recipe": "gigpo", "task": "chain_sum_steps"}], ids=str)
def test_updates_kl_entropy_and_corrections_reach_the_loss(config: Make, kind: str, changes: dict[str, str]) -> None:
    loss = dataclasses.replace(config().loss, kind=kind, kl_coef=0.1, entropy_coef=0.01, sampler_correction="tis")
    settings = config(updates=2, steps=3, loss=loss, **changes)
    result = training.train(settings)
    steps = [r for r in _records(result.metrics.parent) if r["phase"] == "main" and r["live_groups"]]
    assert steps and all(r["kl"] >= 0 and r["entropy"] > 0 for r in steps)
    assert any(r["ratio_max"] != 1 for r in steps), "the second update is off-policy"
    assert any(k.startswith("anchor.") for k in load_file(result.checkpoint))


def test_random_rewards_are_the_groups_own() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).repeat(50, 1)
    groups = torch.arange(150).repeat_interleave(4)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))  # of the pack
    source = collecting.dealt(groups[order], torch.rand(600, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(groups[order][source], groups[order]) and torch.equal(source.sort().values, torch.arange(600))
    dealt = torch.empty(600).scatter(0, order, rewards.flatten()[order][source]).view(150, 4)
    assert torch.equal(dealt.sum(1), rewards.sum(1))
    first = dealt[::3, 0].mean()
    assert 0.1 < first < 0.45, "a group's single reward should land anywhere"


def test_controls_start_from_the_same_warm_up(config: Make) -> None:
    main = training.train(config("main"))
    weight = load_file(main.checkpoint)["policy.head.weight"]
    warm = main.checkpoint.with_name("warmup.safetensors")
    for control in ("random-rewards", "supervised"):
        out = main.checkpoint.parent.with_name(control)
        result = training.train(parse(["--resume", str(warm), "--control", control, "--out", str(out)]))
        assert result.before == main.before
        assert not torch.equal(load_file(result.checkpoint)["policy.head.weight"], weight)
        assert _records(out)[:41] == _records(main.metrics.parent)[:41]


def test_supervised_control_costs_what_a_policy_step_costs(config: Make) -> None:
    settings = config(steps=20, control="supervised", warmup=dataclasses.replace(config().warmup, steps=1))
    result = training.train(settings)
    batches = sum(r["batches"] for r in _records(result.metrics.parent) if r["phase"] == "main")
    demonstrations = load_task("chain_sum").splits(heldout=16, validation=8, demonstrations=256, train=300)
    lengths = [(len(q.prompt), len(q.answer) + 1) for q in demonstrations.demonstrations]
    prompt, answer = (sum(x) / len(x) for x in zip(*lengths, strict=True))
    policy_step = 16 * prompt + 64 * answer + 3 * 64 * (prompt + answer)
    assert 32 * 3 * (prompt + answer) * (batches + 1) >= 20 * policy_step


def test_the_time_limit_says_when_it_bites(config: Make, capsys: pytest.CaptureFixture) -> None:
    result = training.train(config(time_limit=1e-6))
    assert result.steps == 0
    assert "time limit of 1e-06 s reached: stopped after 0 of 6 steps" in capsys.readouterr().out


def test_the_token_limit_stops_the_run_and_its_learning_rate(
    config: Make, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    original = training.set_lr
    monkeypatch.setattr(training, "set_lr", lambda run, lr: (rates.append(lr), original(run, lr)))
    begun = training.train(config(steps=2))
    tokens = [r["tokens"] for r in _records(begun.metrics.parent) if r["phase"] == "main"]
    assert tokens[1] == begun.clock.sampled and not begun.clock.scored
    limit = 2 * tokens[1]
    result = training.train(config("limited", steps=100, token_limit=limit))
    spent = [r["tokens"] for r in _records(result.metrics.parent) if r["phase"] == "main"]
    assert spent[0] == tokens[0] and spent[-2] < limit <= spent[-1]
    assert f"token limit of {limit:,} reached: stopped after {result.steps} of 100 steps" in capsys.readouterr().out
    assert rates[-result.steps :] == [5e-4 * (1 - 0.9 * x / limit) for x in [0, *spent[:-1]]]


def test_damaged_or_foreign_checkpoints_overwrite_nothing(config: Make) -> None:
    result = training.train(config())
    folder = result.checkpoint.parent
    contents = {p.name: p.read_bytes() for p in folder.iterdir()}
    wider = dataclasses.replace(config().tiny, width=16)
    with pytest.raises(ValueError, match="checkpoint must be of the same model"):
        training.train(config(resume=result.checkpoint, tiny=wider))
    cut = folder.parent / "cut.safetensors"
    cut.write_bytes(contents[CHECKPOINT][:-10])
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        training.train(config(resume=cut))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == contents


def test_tensorboard_gets_the_same_numbers(config: Make, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = training.train(config(tensorboard=tmp_path / "board"))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    rewards = [e.value for e in events.Scalars("main/reward")]
    assert rewards == pytest.approx([r["reward"] for r in _records(result.metrics.parent) if r["phase"] == "main"])
