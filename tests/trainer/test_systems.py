"""What each recipe adds to the trainer, against forwards done one by one and values worked out by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern import credit
from trajkern.recipes import delta_belief, rlcr, srl
from trajkern.trainer import checkpoint
from trajkern.trainer import collect as collecting
from trajkern.trainer import train as training
from trajkern.trainer.calibration import calibration
from trajkern.trainer.compose import Compose
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.packing import pack_pieces
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.setup import load_credit, load_system, longest_answer
from trajkern.trainer.systems import SYSTEMS, scoring
from trajkern.trainer.systems.base import GroupSystem, Played
from trajkern.trainer.systems.delta_belief import DeltaBelief
from trajkern.trainer.systems.dro import DRO
from trajkern.trainer.systems.feedback import Feedback
from trajkern.trainer.systems.hints import MARK
from trajkern.trainer.systems.scoring import score, score_pieces
from trajkern.trainer.systems.srl import SRL, StepImitation, steps_of
from trajkern.trainer.tasks import Answer, Question, Reply, Task, load_task
from trajkern.trainer.train import mean_lengths

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def model() -> CharacterModel:
    torch.manual_seed(5)
    return CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))


def run_of(model: CharacterModel, task: str, recipe: str, **settings) -> Any:
    """As much of a run as crediting reads."""
    config, known = TrainConfig(task=task, recipe=recipe, **settings), load_task(task)
    system = load_system(config, known, model)
    return SimpleNamespace(config=config, system=system, spec=load_credit(config, known), policy=model, ranks=ALONE)


def credited(run: Any, sample: Played) -> tuple[credit.Rollouts, credit.Credit]:
    rollouts = collecting.known(run, sample, None, {})
    return rollouts, run.spec(rollouts)


def by_tokens(values: torch.Tensor, sample: Played) -> torch.Tensor:  # [N]
    """Of the tokens that the policy wrote."""
    return torch.where(sample.batch.loss_mask, values.repeat_interleave(sample.batch.lengths), 0)


def played(
    system: GroupSystem, questions: list[Question], texts: list[list[tuple[str, bool]]], groups: list[int]
) -> Played:
    """Rollouts made of these pieces: a text, and whether the policy wrote it. Rewards are the verifier's."""
    rows = [
        [(system.prompt(q), False), *((system.policy.encode(t), by_policy) for t, by_policy in pieces)]
        for q, pieces in zip(questions, texts, strict=True)
    ]
    whole = ["".join(text for text, _ in pieces) for pieces in texts]
    batch = pack_pieces(rows, torch.tensor(groups))
    rewards = torch.tensor([system.task.reward(q, text) for q, text in zip(questions, whole, strict=True)])
    logprobs = torch.where(batch.loss_mask, -1.5, 0.0)
    batch = tk.PackedBatch(
        batch.tokens, batch.cu_seqlens, batch.loss_mask, batch.group_ids, rewards, sampler_logprobs=logprobs
    )
    return Played(questions, whole, batch)


def logprob(model: CharacterModel, context: str, text: list[int]) -> torch.Tensor:
    """log p of each token of ``text`` after ``context``, from a forward of their own."""
    tokens = torch.tensor(model.encode(context) + text)
    rows = torch.arange(len(tokens) - len(text) - 1, len(tokens) - 1)
    with torch.no_grad():
        logits = model(tokens, torch.tensor([0, len(tokens)]), rows)
    return logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).squeeze(1)


def test_scores_are_those_of_forwards_one_by_one(model: CharacterModel) -> None:
    rows = [("12+3=", "1", "5"), ("12+3=", "", "15"), ("9-1=", "8", "8"), ("12+3=", "1", "6")]
    pieces = [[(model.encode(a + b), False), (model.encode(c), True)] for a, b, c in rows]
    scores = score_pieces(model, pieces, torch.tensor([4, 4, 1, 4]), ranks=True)
    plain = score_pieces(model, pieces, torch.tensor([4, 4, 1, 4])).logprobs
    assert scores.cu_seqlens.tolist() == [0, 1, 3, 4, 5]
    for (a, b, c), (begin, end) in zip(rows, pairwise(scores.cu_seqlens.tolist()), strict=True):
        expected = logprob(model, a + b, model.encode(c))
        torch.testing.assert_close(scores.logprobs[begin:end], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(plain[begin:end], expected, rtol=0, atol=1e-5)
    logits = model(torch.tensor(model.encode("9-1=8")), torch.tensor([0, 5]), torch.tensor([4]))[0]
    assert scores.ranks[3] == 1 + (logits > logits[model.encode("8")[0]]).sum()
    contexts = [(model.encode(a), b) for a, b, _ in rows]
    for places in (False, True):
        found = score(model, contexts, [c for *_, c in rows], ranks=places)
        torch.testing.assert_close(found[0], plain, rtol=0, atol=1e-5)
        assert torch.equal(found[1], scores.cu_seqlens) and torch.equal(found[-1], scores.ranks if places else found[1])


def test_rlcr_rewards_what_was_stated(model: CharacterModel) -> None:
    run = run_of(model, "chain_sum_confidence", "rlcr")
    question = run.system.task.distinct(0, 1)[0]
    right = question.entry["answer"]
    texts = [f"{right} 90%", f"{right} 20%", "777 90%", f"{right}", f"{right} 140%"]
    sample = played(run.system, [question] * 5, [[(t, True)] for t in texts], [0] * 5)
    expected = rlcr.rewards(
        torch.tensor([1.0, 1, 0, 0, 0]),
        torch.tensor([0.9, 0.2, 0.9, 0, 0]),
        well_formed=torch.tensor([1, 1, 1, 0, 0]).bool(),
    )
    rollouts, found = credited(run, sample)
    torch.testing.assert_close(run.system.report(rollouts, run.spec.needs)["rlcr"], expected)
    torch.testing.assert_close(found.rows, expected - expected.mean())
    figures = calibration(run.system.task, [question] * 5, texts)
    assert figures["well_formed"] == 0.6
    assert figures["brier"] == pytest.approx((0.01 + 0.64 + 0.81) / 3)
    assert figures["ece"] == pytest.approx((0.8 + 2 * 0.4) / 3)
    assert calibration(load_task("chain_sum"), [question], ["1"]) == {}


@pytest.mark.parametrize(("masked", "learns"), [(False, "all"), (True, "reasoning")])
@pytest.mark.parametrize("weights", ["variance", "uniform"])
def test_dro_scores_the_reference_after_each_reasoning(
    model: CharacterModel, weights: str, masked: bool, learns: str
) -> None:
    run = run_of(model, "chain_sum_steps", "dro", dro=DRO(weights=weights, masked=masked, learns=learns))
    one = Question("1+2+3+4=", "", "3\n6\n10", {"answer": "10"})
    two = Question("9-1-1-1=", "", "8\n7\n6", {"answer": "6"})
    texts = ["3\n6\n10", "3\n9", "10", "8\n7\n6", "7\n5\n4"]
    reasoning = ["3\n6\n", "3\n", "", "8\n7\n", "7\n5\n"]
    questions = [one, one, one, two, two]
    sample = played(run.system, questions, [[(t, True)] for t in texts], [2, 2, 2, 0, 0])
    x = [
        logprob(model, q.prompt + c, model.answer(q.answer.split("\n")[-1]))
        for q, c in zip(questions, reasoning, strict=True)
    ]
    base = [logprob(model, q.prompt, model.answer(q.answer.split("\n")[-1])) for q in questions]
    expected = []
    for members in ([0, 1, 2], [3, 4]):
        stacked = torch.stack([x[n] for n in members]).double()
        w = stacked.std(0, correction=0)
        w = w / w.sum() if weights == "variance" else torch.ones_like(w) / len(w)
        expected += [(w * (x[n] - base[n] * masked)).sum() for n in members]
    rollouts, found = credited(run, sample)
    rewards = rollouts.reward("reflection")
    torch.testing.assert_close(rewards.double(), torch.stack(expected).double(), rtol=1e-5, atol=1e-5)
    assert rollouts.flags["in_reach"].all() and found.keep.all()
    advantages = by_tokens(tk.group_advantages(rewards, sample.batch.group_ids), sample)
    works = sample.batch.loss_mask.clone()
    for n, begin in enumerate(sample.batch.cu_seqlens[:-1].tolist()):
        answer = begin + len(questions[n].prompt) + len(reasoning[n])
        works[answer : int(sample.batch.cu_seqlens[n + 1])] = learns == "all"
    torch.testing.assert_close(found.advantages, torch.where(works, advantages, 0), rtol=0, atol=0)
    assert torch.equal(found.mask, works & sample.batch.loss_mask)


def test_dro_filters_prompts(model: CharacterModel) -> None:
    run = run_of(model, "chain_sum_steps", "dro", dro=DRO(drop_fraction=0.5, top_k=1))
    question = Question("1+2+3+4=", "", "3\n6\n10", {"answer": "10"})
    texts = ["3\n6\n10", "3\n6\n10", "3\n9", "4\n1"]  # the first prompt's rollouts agree
    sample = played(run.system, [question] * 4, [[(t, True)] for t in texts], [7, 7, 3, 3])
    rollouts, _ = credited(run, sample)
    assert not rollouts.flags["in_reach"][:2].any(), "no deviation: dropped first"
    reported = run.system.report(rollouts, run.spec.needs)
    assert reported["filtered"] == 4 and reported["right_minus_wrong"].shape == (0,), "no prompt has both"
    dealt = credit.Rollouts(
        sample.batch,
        rewards={"reflection": torch.tensor([1.0, 2, 3, 4])},
        flags={"in_reach": torch.tensor([0, 0, 1, 1]).bool()},
        spans=dict(rollouts.spans),
    )
    found = run.spec(dealt)
    assert found.keep.tolist() == [False, False, True, True]
    assert not found.advantages[: int(sample.batch.cu_seqlens[2])].any() and found.advantages.any()


def test_beliefs_are_asked_for_after_every_turn(model: CharacterModel) -> None:
    settings = DeltaBelief(scale=0.5, turn_cost=0.1)
    run = run_of(model, "twenty_questions", "delta_belief", delta_belief=settings)
    cat = Question("dog:b+?", "", "", {"entity": "cat", "known": "b"})
    games = [
        [("i", True), ("+", False), ("b", True), ("+", False), ("=cat\n", True)],
        [("=dog\n", True)],
        [("Z", True), ("!", False)],
    ]
    sample = played(run.system, [cat] * 3, games, [0, 0, 0])
    turns = tk.Spans.turns(sample.batch.loss_mask, sample.batch.cu_seqlens)
    histories = ["", "i+", "i+b+", None, "", None, "", "Z!"]
    expected = [
        torch.tensor(torch.nan) if h is None else logprob(model, f"dog:b+?{h}=", model.encode("cat\n")).sum()
        for h in histories
    ]
    beliefs, bounds = torch.stack(expected), torch.tensor([0, 4, 6, 8])
    rollouts, found = credited(run, sample)
    assert run.system.scored == 6 * len("cat\n")
    gains = beliefs.diff()[torch.tensor([0, 1, 2, 4, 6])]
    torch.testing.assert_close(rollouts.span_rewards["gain"], gains, rtol=0, atol=1e-5, equal_nan=True)
    rewards = delta_belief.turn_rewards(
        beliefs,
        bounds,
        won=torch.tensor([True, False, False]),
        penalty=torch.tensor([0.0, -1, 0, 0, -5]),
        scale=0.5,
        turn_cost=0.1,
    )
    torch.testing.assert_close(rollouts.span_rewards["turn"], rewards, rtol=0, atol=1e-5)
    rewards = rollouts.span_rewards["turn"]
    where = (turns.trajectory, torch.tensor([0, 1, 2, 0, 0]), torch.zeros(3).long())
    advantages = delta_belief.turn_advantages(rewards, *where)
    per_token = torch.zeros(sample.batch.num_tokens)
    for turn, (begin, end) in enumerate(zip(turns.start.tolist(), turns.end.tolist(), strict=True)):
        per_token[begin:end] = advantages[turn]
    torch.testing.assert_close(found.advantages, per_token)


def test_beliefs_that_count_for_nothing_are_not_asked_for(
    model: CharacterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        scoring, "score_pieces", lambda *args, **options: asked.append(1) or score_pieces(*args, **options)
    )
    run = run_of(model, "twenty_questions", "delta_belief", delta_belief=DeltaBelief(scale=0.0, turn_cost=0.0))
    cat = Question("dog:b+?", "", "", {"entity": "cat", "known": "b"})
    games = [[("i", True), ("+", False), ("=cat\n", True)], [("Z", True), ("!", False)]]
    sample = played(run.system, [cat] * 2, games, [0, 0])
    rollouts, _ = credited(run, sample)
    assert rollouts.span_rewards["turn"].tolist() == [2.0, 2.0, -5.0]
    assert "gain" not in rollouts.span_rewards and not asked
    known = run.system.known(sample, frozenset({"span_rewards:gain"}))
    assert known["span_rewards"]["gain"].isfinite().tolist() == [True, False, True] and asked
    assert credit.scored.BeliefGain(scale=0.0).needs == {"reward", "spans:turn"}
    assert credit.scored.BeliefGain().needs == {"reward", "spans:turn", "score", "rows:belief_target"}


def test_a_solution_becomes_its_steps(model: CharacterModel) -> None:
    question = Question("1+2+3+4=", "Add.", "3\n6\n10", {})
    steps = steps_of(load_task("chain_sum_steps"), question)
    assert [(s.prompt, s.answer) for s in steps] == [
        ("1+2+3+4=", "3"),
        ("1+2+3+4=3\n", "6"),
        ("1+2+3+4=3\n6\n", "10"),
    ]
    run = run_of(model, "chain_sum_steps", "srl")
    texts = ("10\n", "1", "\n", "so</think>10", "1", "1")
    sample = played(run.system, [steps[2]] * 6, [[(t, True)] for t in texts], [0] * 4 + [1] * 2)
    rollouts, found = credited(run, sample)
    rewards = torch.tensor([1.0, 2 / 3, -1.0, 1.0, 2 / 3, 2 / 3])
    reported = run.system.report(rollouts, run.spec.needs)
    torch.testing.assert_close(reported["similarity"], rewards)
    assert found.keep.tolist() == [True] * 4 + [False] * 2 and reported["filtered"] == 2, "the last two score alike"
    torch.testing.assert_close(found.rows[:4], tk.group_advantages(rewards[:4], torch.zeros(4).long()))
    assert run.system.task.reply(steps[0], "3\n").done and run.system.task.reply(steps[0], "3") is None


def test_a_step_that_takes_too_long_to_compare_is_not_well_formed(
    model: CharacterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of the policy must not end the run."""
    monkeypatch.setattr(srl, "similarity", functools.partial(srl.similarity, max_steps=3))
    run = run_of(model, "chain_sum_steps", "srl")
    step = steps_of(load_task("chain_sum_steps"), Question("1+2+3+4=", "Add.", "3\n6\n10", {}))[2]
    sample = played(run.system, [step] * 3, [[(t, True)] for t in ("10\n", "1", "0")], [0] * 3)
    rollouts, _ = credited(run, sample)
    reported = run.system.report(rollouts, run.spec.needs)
    torch.testing.assert_close(reported["similarity"], torch.tensor([-1.0, 2 / 3, 2 / 3]))


class Echo(Task):
    """An environment that answers each line with its number, and ends after ``last`` of them."""

    interactive, last = True, 2

    def questions(self, split: int) -> Iterator[Question]:
        yield from (Question(f"{digit}?", "?", "a\nb", {}) for digit in range(10))

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == "a\n1b\n")

    def reply(self, question: Question, text: str) -> Reply | None:
        count = text.count("\n")
        return Reply(str(count) if count < self.last else "", count >= self.last) if text.endswith("\n") else None

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        return [("~a\n", True), ("1", False), ("~b\n", True)]

    def reference(self, question: Question) -> str:
        return question.answer


def test_an_environment_writes_within_a_solution(model: CharacterModel) -> None:
    task, settings = Echo("echo"), SRL(thought_end="~", demonstrations=2)
    question = task.distinct(0, 1)[0]
    assert [(s.prompt, s.answer) for s in steps_of(task, question)] == [("0?", "a"), ("0?a\n1", "b")]
    system = StepImitation("srl", settings, task, model)
    imitated, warming = (
        [(model.spelling(tokens), learned) for tokens, learned in pieces]
        for pieces in (system.imitation(question), system.demonstration(question))
    )
    assert imitated == [("0?", False), ("a\n", True), ("1", False), ("b\n", True), ("", True)]
    assert warming == [("0?", False), ("~a\n", True), ("1", False), ("~b\n", True), ("", True)], "the task's own"
    assert [system.task.action(text) for text in ("th~a\n", "b", "th~")] == ["a", "b", ""]
    splits = task.splits(heldout=1, validation=1, demonstrations=4, train=10)
    assert [step.prompt for step in system.pool(splits)] == ["2?", "2?a\n1", "3?", "3?a\n1"]
    assert longest_answer(model, task, splits) == len("~a\n1~b\n") + 1
    assert mean_lengths(system.foreseen(splits)) == (2 + 3 / 2, 2), "a line of one character and its end"
    assert mean_lengths([system.imitation(q) for q in system.imitated(splits)]) == (2, 6)
    with pytest.raises(ValueError, match="srl.demonstrations must be at most 4, the warm-up's; got 5"):
        StepImitation("srl", SRL(demonstrations=5), task, model).pool(splits)
    task.last = 1
    with pytest.raises(ValueError, match="reference of task echo must end where .* does, after 1 lines; '0[?]' has 2"):
        steps_of(task, question)


def test_the_hinted_policy_teaches(model: CharacterModel) -> None:
    settings = Feedback(reward_weight=0.5, directive_weight=2.0)
    run = run_of(model, "chain_sum_steps", "feedback", feedback=settings)
    system = run.system
    question = next(q for q in system.task.distinct(0, 50))
    right, wrong = question.answer, question.answer.split("\n")[0] + "\n99\n99"
    sample = played(system, [question] * 2, [[(right, True)], [(wrong, True)]], [0, 0])
    _, found = credited(run, sample)
    hint = question.answer.split("\n")[1]
    taught = logprob(model, f"{hint}{MARK}{question.prompt}", model.encode(wrong))
    expected = torch.cat((torch.full((len(right),), 0.5), -0.5 + 2 * (taught + 1.5)))
    torch.testing.assert_close(found.advantages[sample.batch.loss_mask], expected, rtol=1e-5, atol=2e-5)
    shown = [system.demonstration(q) for q in system.task.distinct(0, 60)]
    marked = sum(model.spelling(pieces[0][0]).count(MARK) for pieces in shown)
    assert 15 < marked < 45


@pytest.mark.parametrize(
    ("recipe", "task", "text"),
    [
        ("grpo", "chain_sum_steps", None),
        ("rlcr", "chain_sum_confidence", None),
        ("dro", "chain_sum_steps", None),
        ("srl", "chain_sum_steps", None),
        ("delta_belief", "twenty_questions", "=dog\n"),
        ("toolpo", "tools_fold", "<tool>1/0</tool>"),
    ],
)
def test_what_a_credit_is_promised_is_known(model: CharacterModel, recipe: str, task: str, text: str | None) -> None:
    """What a credit may read before there are rollouts is what they know: neither is refused what it could have."""
    run = run_of(model, task, recipe, compose=Compose(rubric="well_formed"))
    promised = collecting.knowable(run.config, type(run.system), run.system.task)
    question = run.system.pool(run.system.task.splits(heldout=1, validation=1, demonstrations=1, train=2))[0]
    sample = played(run.system, [question] * 2, [[(text or question.answer, True)]] * 2, [0, 0])
    run.spec = SimpleNamespace(needs=frozenset(promised))
    names = collecting.known(run, sample, None, {}).names
    assert {name for name in names if not name.startswith("rows:")} == promised - {"rows:*"}


def test_skills_stand_before_the_question(config: Make) -> None:
    settings = config(recipe="skillrl", steps=3)
    result = training.train(settings)
    state = checkpoint.load(result.checkpoint).place["system"]
    assert len([s for s in state["skills"] if s["kind"] == "demonstration"]) == settings.skillrl.capacity
    system = load_system(settings, load_task("chain_sum"), CharacterModel(settings.tiny))
    system.restore(json.loads(json.dumps(state)))
    question = Question("1+1+1=", "", "3", {})
    shown = system.policy.spelling(system.prompt(question))
    assert shown.endswith("1+1+1=") and len(shown) > 10
    assert system.state() == state


def a_task_for(recipe: str) -> str:
    """A small one that has what the recipe requires."""
    needed = SYSTEMS[recipe].requires
    names = ("chain_sum_steps", "chain_sum_confidence", "tools", "twenty_questions")
    return next(name for name in names if needed is None or needed.met(load_task(name)))


QUICK = ("toolpo", "delta_belief", "feedback")  # spans, scores and a teacher


@pytest.mark.parametrize("recipe", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in SYSTEMS])
def test_every_system_trains_and_resumes(config: Make, recipe: str) -> None:
    settings = {"recipe": recipe, "task": a_task_for(recipe), "max_new": 30, "steps": 4}
    whole = training.train(config("whole", **settings))
    records = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert len([r for r in records if r["phase"] == "main"]) == 4
    resumed = training.train(config("resumed", resume=whole.checkpoint.with_name("warmup.safetensors"), **settings))
    one, two = (checkpoint.load(r.checkpoint) for r in (whole, resumed))
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    assert one.place["system"] == two.place["system"]
