"""SkillRL in the trainer: what enters the bank, what a question is shown, and that a run is resumed with both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from trajkern.recipes.skillrl import Attempt, Sketch
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import load
from trajkern.trainer.config import TrainConfig, WarmUp
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.setup import load_system
from trajkern.trainer.stopping import Interrupted
from trajkern.trainer.systems import skillrl
from trajkern.trainer.systems.skillrl import SkillBased, SkillRL
from trajkern.trainer.tasks import Answer, Question, Splits, Task

HERE = __name__
CALLS: list[str] = []


class Kinds(Task):
    """``a17=`` is answered by ``a``; of ten families, the letters a to j."""

    def questions(self, split: int) -> Iterator[Question]:
        for number in range(1000):
            yield ask("abcdefghij"[number % 10], f"{1000 * split + number}")

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == question.answer)

    def family(self, question: Question) -> str:
        return question.prompt[0]


def ask(letter: str, number: str) -> Question:
    return Question(f"{letter}{number}=", f"{letter}{number}=", letter, {})


def lengths(texts: Sequence[str]) -> list[list[float]]:
    """Vectors whose angles are the texts' lengths, so that the most alike are of one length."""
    CALLS.append("embed")
    return [[float(torch.tensor(len(x) / 10).cos()), float(torch.tensor(len(x) / 10).sin())] for x in texts]


def distil(family: str | None, attempt: Attempt) -> list[Sketch]:
    CALLS.append("distil")
    return [Sketch("Letter", f"say {attempt.response} for {attempt.prompt}", "a letter comes first")]


def teach(family: str | None, attempts: Sequence[Attempt]) -> list[Sketch]:
    CALLS.append("teach")
    return [Sketch("Read", f"look again at {attempts[-1].prompt}")]


def system(shown: Sequence[Question] = (), **settings: Any) -> SkillBased:
    config = TrainConfig(
        task=f"{HERE}:Kinds",
        recipe="skillrl",
        skillrl=SkillRL(**settings),
        tiny=ModelConfig(layers=1, width=16, heads=1, ffn=16),
    )
    made = load_system(config, Kinds("kinds"), CharacterModel(config.tiny))
    assert isinstance(made, SkillBased)
    made.pool(Splits([], [], list(shown), []))
    return made


def prompt(made: SkillBased, question: Question) -> str:
    return made.policy.spelling(made.prompt(question))


A = [ask("a", "11"), ask("a", "12"), ask("a", "99999999")]
B = [ask("b", "11"), ask("b", "77")]


def test_up_to_six_of_the_family_above_delta_and_the_best_one_next_to_the_question() -> None:
    made = system([*A, *B])
    # by letters a11= and a13= are alike by 2 * 3 / 8, and a99999999= by 2 * 2 / 14
    assert prompt(made, ask("a", "13")) == "a12=\na\n\na11=\na\n\na13="
    assert prompt(made, ask("c", "13")) == "c13="
    assert prompt(system([*A, *B], delta=-1), ask("a", "13")).startswith("a99999999=\na\n\na12=")
    assert prompt(system([*A, *B], top_k=1), ask("a", "13")) == "a11=\na\n\na13="
    assert prompt(system([*A, *B], top_k=0), ask("a", "13")) == "a13="
    assert prompt(made, A[0]) == "a12=\na\n\na11=", "its own answer is not told"
    assert prompt(system([*A, *B], search="all", delta=0.7), ask("b", "12")) == "b11=\nb\n\na12=\na\n\nb12="
    many = [ask("a", f"1{n}") for n in range(9)]
    assert prompt(system(many), ask("a", "1x")).count("\na\n") == 6


def test_lessons_for_all_are_shown_always() -> None:
    made = system([A[0]], lessons_for="all", teacher=f"{HERE}:teach", threshold=0.5)
    for letter in "ab":
        made.learn([ask(letter, "5")], ["x"], [0.0])
    made.validated(0.2, {"a": 0.4, "b": 0.5})
    assert [(s.kind, s.family, s.name) for s in made.bank.skills[1:]] == [("lesson", None, "Read")]
    head = "Lessons from earlier attempts:\n- Read: look again at a5=\n\n"
    assert prompt(made, ask("c", "1")) == f"{head}c1="
    assert prompt(made, ask("a", "10")) == f"{head}a11=\na\n\na10="
    none = system([A[0]], general=0)
    none.restore(made.state())
    assert prompt(none, ask("c", "1")) == "c1="
    own = system(teacher=f"{HERE}:teach")
    own.learn([ask("a", "5")], ["x"], [0.0])
    own.validated(0.2, {"a": 0.3})
    assert [s.family for s in own.bank.skills] == ["a"]


def test_successes_become_patterns() -> None:
    made = system([A[0]], distiller=f"{HERE}:distil", delta=-1)
    made.learn([ask("a", "5"), ask("b", "5")], ["a", "x"], [1.0, 0.0])
    assert [(s.kind, s.prompt, s.applies) for s in made.bank.skills] == [
        ("pattern", x, "a letter comes first") for x in ("a11=", "a5=")
    ]
    shown = prompt(made, ask("a", "6"))
    assert shown.startswith("What has worked before:\n- Letter: say a for a") and shown.endswith("\n\na6=")


@pytest.mark.parametrize(("grows_by", "kinds"), [("successes", {"demonstration"}), ("lessons", {"lesson"})])
def test_success_and_failure_are_stored_apart(grows_by: Any, kinds: set[str]) -> None:
    made, both = system(grows_by=grows_by), system()
    for each in (made, both):
        each.learn([ask("a", "1"), ask("a", "2")], ["a", "b"], [1.0, 0.0])
        each.validated(0.0, {"a": 0.0})
    assert {skill.kind for skill in made.bank.skills} == kinds
    assert {skill.kind for skill in both.bank.skills} == {"demonstration", "lesson"}


def test_half_a_reward_may_be_a_failure() -> None:
    made = system(success_above=0.5, grows_by="lessons")
    made.learn([ask("a", "1"), ask("a", "2")], ["a", "b"], [0.6, 0.5])
    made.validated(0.0, {"a": 0.0})
    assert [skill.text for skill in made.bank.skills] == ['"b" is no answer to "a2="']


def test_a_control_shows_as_many_skills_of_other_families() -> None:
    shown = [ask(letter, f"{n}") for letter in "abcdefghij" for n in (10, 11)]
    asked = [ask(letter, f"{n}") for letter in "abcdefghij" for n in (20, 21)]
    own, other = system(shown, delta=-1), system(shown, delta=-1, search="other")
    assert own.statistics(asked) == {"shown": 2.0, "retrieved": 1.0}
    assert other.statistics(asked) == {"shown": 2.0, "retrieved": 0.0}
    drawn = {other.skills(question)[0].family for question in (ask("a", f"{n}") for n in range(20, 40))}
    assert len(drawn) > 5 and drawn < set("bcdefghij")
    assert len(prompt(other, asked[0])) == len(prompt(own, asked[0]))
    assert system([A[0]], search="other").skills(A[1]) == [], "there is no other family"
    assert system(shown).statistics([ask("a", "1"), ask("z", "1")]) == {"shown": 1.0, "retrieved": 0.5}


def test_likeness_may_be_that_of_vectors() -> None:
    made = system(A, embed=f"{HERE}:lengths", top_k=1)
    assert prompt(made, ask("a", "1234567")).startswith("a99999999=")
    assert prompt(made, ask("a", "13")).startswith("a11=")
    made.learn([ask("a", "7654321")], ["a"], [1.0])
    assert prompt(made, ask("a", "1234567")).startswith("a7654321="), "what the bank has learned is found at once"


def test_a_model_s_name_asks_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(skillrl, "embeddings", lambda name: asked.append(name) or lengths)
    system(A, embed="some/model")
    assert asked == ["some/model"]


def test_a_share_of_the_warm_up_shows_no_skill() -> None:
    questions = [ask("a", f"{n}") for n in range(100, 200)]
    made = system(questions, bare=0.4, capacity=4)
    begins = [made.policy.spelling(made.demonstration(question)[0][0]) for question in questions]
    bare = sum(text == question.prompt for text, question in zip(begins, questions, strict=True))
    assert 25 < bare < 55
    assert all(text.endswith(question.prompt) for text, question in zip(begins, questions, strict=True))
    assert begins == [made.policy.spelling(made.demonstration(question)[0][0]) for question in questions]
    assert all(len(made.prompt(question)) > 5 for question in questions), "questions themselves are never bare"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "skillrl.top_k must be at least 0, got -1"),
        ({"delta": 1.5}, "skillrl.delta must be between -1 and 1, got 1.5"),
        ({"delta": float("nan")}, "skillrl.delta must be between -1 and 1, got nan"),
        ({"general": -2}, "skillrl.general must be at least 0, got -2"),
        ({"bare": -0.1}, "skillrl.bare must be between 0 and 1, got -0.1"),
        ({"search": "some"}, "skillrl.search must be one of family, all, other; got 'some'"),
        ({"grows_by": "all"}, "skillrl.grows_by must be one of both, successes, lessons; got 'all'"),
        ({"lessons_for": "none"}, "skillrl.lessons_for must be one of family, all; got 'none'"),
        ({"success_above": 1.0}, "skillrl.success_above must be below 1, a right answer's, got 1.0"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"teacher": "nowhere:no"}, 'skillrl.teacher: "package.module:name" is expected'),
        ({"distiller": f"{HERE}:HERE"}, f"skillrl.distiller must be package.module:function; '{HERE}:HERE' is"),
        ({"embed": f"{HERE}:nothing"}, "skillrl.embed: "),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        system(**settings)


@pytest.mark.slow
def test_a_run_is_resumed_with_its_bank(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"embed": "lengths", "distiller": "distil", "teacher": "teach"}
    told = {setting: f"{HERE}:{name}" for setting, name in names.items()}
    settings: dict[str, Any] = {
        "task": f"{HERE}:Kinds",
        "recipe": "skillrl",
        "max_new": 2,
        "prompts": 4,
        "warmup": WarmUp(steps=4, batch=8, demonstrations=20, check_every=100),
        "skillrl": SkillRL(top_k=2, delta=-1, lessons_for="all", capacity=3, bare=0.3, **told),
    }
    whole = training.train(config("whole", **settings))
    steps = 0

    def stop(run: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            run.interrupt.set()
        return policy_step(run)

    policy_step = training.policy_step
    with monkeypatch.context() as patch:
        patch.setattr(training, "policy_step", stop)
        with pytest.raises(Interrupted) as stopped:
            training.train(config("parts", **settings))
    known = load(stopped.value.args[0]).place["system"]
    assert {skill["kind"] for skill in known["skills"]} == {"pattern", "lesson"}
    CALLS.clear()
    resumed = training.train(config("parts", resume=stopped.value.args[0], **settings))
    one, two = load(whole.checkpoint), load(resumed.checkpoint)
    assert [name for name in one.tensors if not torch.equal(one.tensors[name], two.tensors[name])] == []
    assert one.place["system"] == two.place["system"] and (whole.before, whole.after) == (resumed.before, resumed.after)
    assert CALLS.count("distil") < 20, "what was restored is not distilled again"
    lines = [json.loads(line) for line in resumed.metrics.read_text().splitlines()]
    assert all("val_retrieved" in line for line in lines if "val_pass@1" in line)
    assert 0 < whole.after.details["retrieved"] <= 1


@pytest.mark.slow
def test_another_recipe_s_warm_up_is_continued(config: Callable[..., TrainConfig]) -> None:
    warm_up = WarmUp(steps=2, batch=8, demonstrations=20, check_every=100)
    settings = {"task": f"{HERE}:Kinds", "max_new": 2, "prompts": 4, "steps": 0, "warmup": warm_up}
    first = training.train(config("first", **settings)).checkpoint
    done = training.train(config("second", recipe="skillrl", resume=first, **settings))
    assert len(load(done.checkpoint).place["system"]["skills"]) == 20
