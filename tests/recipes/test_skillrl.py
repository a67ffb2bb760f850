"""The skill bank: what enters, what leaves, what is learned from failures, and what a prompt is shown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trajkern.recipes.skillrl import Attempt, Sketch, Skill, SkillBank


def _texts(bank: SkillBank) -> list[str]:
    return [skill.text for skill in bank.skills]


def test_a_success_enters_at_once_and_a_failure_waits() -> None:
    bank = SkillBank()
    assert bank.add("1+1", "2", 1.0, "sum") == Skill("demonstration", "sum", "1+1", "2", 1.0, 0)
    assert bank.add("1+2", "4", 0.0, "sum") is None  # the authors' failure: a score of at most 0
    assert bank.add("2+2", " \n", 1.0, "sum") is None
    assert _texts(bank) == ["2"]
    assert bank.update("sum", 0.39) == [Skill("lesson", "sum", "1+2", '"4" is no answer to "1+2"', 0.0, 1)]
    assert bank.update("sum", 0.0) == [] and len(bank) == 2, "the failures were used up"


def test_where_success_begins() -> None:
    bank = SkillBank(success_above=0.5)
    bank.add("p", "half", 0.5)
    bank.add("q", "more", 0.6)
    assert _texts(bank) == ["more"]


@pytest.mark.parametrize(("rate", "learns"), [(0.0, True), (0.399, True), (0.4, False), (1.0, False)])
def test_only_a_weak_family_learns(rate: float, learns: bool) -> None:
    bank = SkillBank()
    bank.add("p", "wrong", 0.0, "weak")
    bank.add("p", "other", 0.0, "untouched")
    assert len(bank.update("weak", rate)) == learns
    assert bank.update("weak", 0.0) == [], "an update forgets the failures either way"
    assert len(bank.update("untouched", 0.0)) == 1


def test_a_prompt_has_one_demonstration() -> None:
    bank = SkillBank()
    for text, reward in (("first", 0.5), ("equal", 0.5), ("worse", 0.2), ("better", 0.9)):
        bank.add("p", text, reward, "a")
    bank.add("p", "of another family", 0.1, "b")
    assert [(s.text, s.number) for s in bank.skills] == [("better", 1), ("of another family", 2)]


def test_capacity() -> None:
    """The lowest reward leaves, of equal ones the oldest; another family and another kind are not counted."""
    bank = SkillBank(capacity=2, growth=5)
    bank.add("z", "z", 1.0, "b")
    for prompt, reward in (("p", 0.5), ("q", 0.9), ("r", 0.5), ("s", 0.1), ("t", 0.9)):
        added = bank.add(prompt, prompt, reward, "a")
        assert (added is None) == (prompt == "s"), "what would leave at once does not enter"
    assert _texts(bank) == ["z", "q", "t"]
    for prompt in "uvw":
        bank.add(prompt, "no", 0.0, "a")
    assert [s.prompt for s in bank.update("a", 0.0)] == ["v", "u"], "the latest first, and what left again is not new"
    assert [s.prompt for s in bank.skills] == ["z", "q", "t", "v", "u"]


def test_a_teacher_sees_the_latest_failures_cut_to_their_ends() -> None:
    seen: list[Any] = []

    def teacher(family: str | None, attempts: tuple[Attempt, ...]) -> list[str]:
        seen.append((family, attempts))
        return ["  Check\n the sign. ", "", "Check the sign.", "x" * 30, "Third.", "Fourth."]

    bank = SkillBank(failures=2, growth=3, lines=1, lesson_length=20, teacher=teacher)
    for prompt in "abc":
        bank.add(prompt, "one\ntwo\nthree", -1.0, "f")
    added = bank.update("f", 0.1)
    assert seen == [("f", (Attempt("b", "one\n...\nthree", -1.0), Attempt("c", "one\n...\nthree", -1.0)))]
    assert [(s.text, s.prompt) for s in added] == [("Check the sign.", ""), ("x" * 17 + "...", ""), ("Third.", "")]
    bank.add("d", "no", 0.0, "f")
    assert [s.text for s in bank.update("f", 0.0)] == ["Fourth."], "known lessons are not learned twice"


def test_a_teacher_that_fails_changes_nothing() -> None:
    answers: list[Any] = [TimeoutError("no reply"), "one string", [1], ["Good."]]

    def teacher(family: str | None, attempts: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    bank = SkillBank(teacher=teacher)
    bank.add("p", "no", 0.0)
    with pytest.raises(TimeoutError):
        bank.update(None, 0.0)
    for _ in range(2):
        with pytest.raises(TypeError, match="teacher must return a sequence of strings"):
            bank.update(None, 0.0)
    assert len(bank) == 0 and [s.text for s in bank.update(None, 0.0)] == ["Good."]


def _filled(search: str = "family") -> SkillBank:
    bank = SkillBank(search=search)
    bank.add("count the apples", "3", 1.0, "count")
    bank.add("count the pears", "4", 1.0, "count")
    bank.add("sum of 1 and 2", "3", 1.0, "sum")
    bank.add("count the nears", "5", 1.0, "count")  # as near to "count the bears" as the pears
    bank.add("count the boars", "general", 1.0)
    return bank


@pytest.mark.parametrize(
    ("search", "family", "k", "expected"),
    [
        ("family", "count", 6, ["4", "5", "3", "general"]),
        ("family", "count", 2, ["4", "5", "general"]),
        ("family", "count", 0, []),
        ("family", "sum", 6, ["general"]),  # its own skill is not alike enough
        ("family", None, 6, ["general"]),
        ("family", "unknown", 6, ["general"]),
        ("all", "sum", 6, ["4", "5", "3", "general"]),
        ("all", "sum", 1, ["4", "general"]),
    ],
)
def test_retrieve(search: str, family: str | None, k: int, expected: list[str]) -> None:
    """Up to k of the task, the most alike first, of equal ones the older; then the general, always."""
    assert [skill.text for skill in _filled(search).retrieve("count the bears", family, k)] == expected


def test_delta_and_the_number_of_general_skills() -> None:
    bank = _filled()
    assert [s.text for s in bank.retrieve("count the bears", "sum", delta=-1)] == ["3", "general"]
    pears = difflib.SequenceMatcher(None, "count the pears", "count the bears", autojunk=False).ratio()
    assert [s.text for s in bank.retrieve("count the bears", "count", delta=pears)] == ["general"], "above, not at"
    assert [s.text for s in bank.retrieve("count the bears", "count", delta=pears - 1e-6)] == ["4", "5", "general"]
    bank.add("count the bees", "another", 1.0)
    for general, expected in ((None, ["general", "another"]), (1, ["general"]), (0, [])):
        assert [s.text for s in bank.retrieve("count the bears", None, general=general)] == expected


VECTORS = {  # of two dimensions: what a text is about
    "Add up. Carry the one. Long sums": [2.0, 0.0],
    "Signs. Mind the sign. When something is subtracted": [3.0, 4.0],
    "12-7": [0.0, 5.0],
    "nothing": [0.0, 0.0],
}


def test_embeddings() -> None:
    """Cosines 0, 4/5 to the prompt; a vector of nothing is like nothing; a skill is embedded once."""
    asked: list[str] = []

    def embed(texts: Any) -> list[list[float]]:
        asked.extend(texts)
        return [VECTORS[text] for text in texts]

    sketches = [
        Sketch("Add up", "Carry the one", "Long sums"),
        Sketch("Signs", "Mind the sign", "When something is subtracted"),
    ]
    bank = SkillBank(embed=embed, teacher=lambda family, attempts: sketches)
    bank.add("x", "no", 0.0, "f")
    bank.update("f", 0.0)
    assert [s.name for s in bank.retrieve("12-7", "f")] == ["Signs"]
    assert [s.name for s in bank.retrieve("12-7", "f", delta=-0.1)] == ["Signs", "Add up"]
    assert bank.retrieve("12-7", "f", delta=0.81) == [] and bank.retrieve("nothing", "f", delta=0) == []
    assert sorted(asked) == sorted([*list(VECTORS)[:2], *["12-7"] * 3, "nothing"])
    assert SkillBank(embed=embed).retrieve("12-7") == []
    for wrong in ([[1.0]], torch.tensor([[1.0], [float("nan")], [0.0]]), torch.ones(3)):
        bank = SkillBank(embed=lambda texts, wrong=wrong: wrong, teacher=lambda family, attempts: sketches)
        bank.add("x", "no", 0.0, "f")
        bank.update("f", 0.0)
        with pytest.raises(ValueError, match="embed must return 3 finite vectors, one a text"):
            bank.retrieve("12-7", "f")


def test_success_and_failure_are_stored_differently() -> None:
    """A success becomes patterns, once a prompt; a failure waits, and becomes lessons when its family is weak."""
    seen: list[Any] = []

    def distiller(family: str | None, attempt: Attempt) -> list[Sketch | str]:
        seen.append((family, attempt))
        return [Sketch(" Add  up", "From the right.", "sums"), "Check it.", "", "Check it."]

    bank = SkillBank(
        distiller=distiller, teacher=lambda family, attempts: [Sketch("Carry", "Carry the one.")], growth=2
    )
    first = bank.add("1+1", "2", 0.5, "sum")
    assert first == Skill("pattern", "sum", "1+1", "From the right.", 0.5, 0, "Add up", "sums")
    assert bank.add("1+1", "two", 1.0, "sum") is None and bank.add("2+2", "4", 1.0, "sum") is None
    assert seen == [("sum", Attempt("1+1", "2", 0.5)), ("sum", Attempt("2+2", "4", 1.0))]
    assert bank.add("1+9", "1", 0.0, "sum") is None
    lesson = bank.update("sum", 0.1, general=True)
    assert lesson == [Skill("lesson", None, "", "Carry the one.", 0.0, 2, "Carry")]
    assert [(s.kind, s.text) for s in bank.skills] == [
        ("pattern", "From the right."),
        ("pattern", "Check it."),
        ("lesson", "Carry the one."),
    ]
    assert bank.retrieve("1+1", "sum", delta=-1) == lesson, "what it taught itself is not shown"
    twin = SkillBank()
    twin.load_state_dict(json.loads(json.dumps(bank.state_dict())))
    assert twin.skills == bank.skills
    for wrong in ("text", [3], [Sketch("a", 3)], Sketch("a", "b"), iter(["a"])):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="distiller must return a sequence of strings or Sketches"):
            SkillBank(distiller=lambda family, attempt, wrong=wrong: wrong).add("p", "r", 1.0)


def test_similarity_is_difflibs() -> None:
    """Long prompts too, of which difflib's shortcut would leave nothing to compare."""
    words = "the quick brown fox jumps over the lazy dog and runs on to its den".split()
    prompts = [" ".join(words[(i * j) % len(words)] for j in range(1, 60)) for i in range(1, 9)]
    query = " ".join(reversed(words)) * 4
    bank = SkillBank(search="all")
    for prompt in prompts:
        bank.add(prompt, "x", 1.0, "f")
    ratios = {p: difflib.SequenceMatcher(None, p, query, autojunk=False).ratio() for p in prompts}
    expected = sorted(prompts, key=lambda prompt: -ratios[prompt])
    assert len(set(ratios.values())) > 5 and min(ratios.values()) > 0.1
    assert [s.prompt for s in bank.retrieve(query, "f", 8, delta=0)] == expected


def test_a_prompt_is_never_shown_its_own_answer() -> None:
    bank = SkillBank()
    bank.add("p", "the answer", 1.0, "f")
    bank.add("p", "a wrong one", 0.0, "f")
    bank.update("f", 0.0)
    assert len(bank) == 2 and bank.retrieve("p", "f", delta=-1) == []
    assert len(bank.retrieve("p ", "f")) == 2


def test_a_lesson_of_a_teacher_is_compared_by_its_text() -> None:
    bank = SkillBank(teacher=lambda family, attempts: ["Carry the one.", "Name the colour."])
    bank.add("p", "no", 0.0)
    bank.update(None, 0.0)
    assert [s.text for s in bank.retrieve("Name a colour")] == ["Name the colour.", "Carry the one."]


def test_render() -> None:
    skills = [
        Skill("demonstration", "f", "1+1", "2", 1.0, 0),
        Skill("lesson", "f", "", "Mind the sign.", 0.0, 1),
        Skill("demonstration", "f", "2+2", "4", 1.0, 2),
        Skill("lesson", None, "", "Read twice.", 0.0, 3),
    ]
    expected = "Lessons from earlier attempts:\n- Mind the sign.\n- Read twice.\n\n2+2\n4\n\n1+1\n2\n\n1+3"
    assert SkillBank.render("1+3", skills) == expected
    named = [
        Skill("pattern", "f", "4+4", "From the right.", 1.0, 4, "Add up", "sums"),
        Skill("lesson", None, "", "Carry the one.", 0.0, 5, "Carry"),
    ]
    listed = "What has worked before:\n- Add up: From the right. Apply when: sums\n\n"
    listed += "Lessons from earlier attempts:\n- Carry: Carry the one.\n\n"
    assert SkillBank.render("1+3", [*named, skills[0]]) == f"{listed}1+1\n2\n\n1+3"
    assert SkillBank.render("1+3", skills[:1]) == "1+1\n2\n\n1+3"
    assert SkillBank.render("1+3", []) == "1+3"


def test_state_survives_json() -> None:
    def go_on(bank: SkillBank) -> list[Skill]:
        bank.add("later", "no", 0.0, "f")
        bank.add("again", "yes", 1.0, None)
        bank.update("f", 0.0)
        return bank.retrieve("late", "f")

    bank = _filled()
    bank.add("early", "no", 0.0, "f")
    bank.add("anywhere", "no", 0.0, None)
    twin = SkillBank()
    twin.load_state_dict(json.loads(json.dumps(bank.state_dict())))
    assert twin.skills == bank.skills and len(twin) == 5
    assert go_on(twin) == go_on(bank) and twin.state_dict() == bank.state_dict()


def _broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = json.loads(json.dumps(_filled().state_dict()))
    change(state)
    return state


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("skills"),
        lambda state: state.pop("taken"),
        lambda state: state.update(taken=2),
        lambda state: state["skills"].reverse(),
        lambda state: state["skills"][0].update(kind="rule"),
        lambda state: state["skills"][0].update(family=3),
        lambda state: state["skills"][0].update(reward="high"),
        lambda state: state["skills"][0].update(number=None),
        lambda state: state["skills"][0].update(applies=None),
        lambda state: state["skills"][0].pop("text"),
        lambda state: state["skills"][0].update(colour="red"),
        lambda state: state.update(failures=[["f", [{"prompt": "p", "response": 1, "reward": 0.0}]]]),
        lambda state: state.update(failures=3),
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(change: Callable[[dict[str, Any]], Any]) -> None:
    bank = SkillBank()
    bank.add("p", "kept", 1.0)
    with pytest.raises(ValueError, match="state must be what SkillBank.state_dict returned"):
        bank.load_state_dict(_broken(change))
    assert _texts(bank) == ["kept"]


def test_a_larger_banks_state_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 2 skills of a family and kind.*3 demonstrations of family 'count'"):
        SkillBank(capacity=2).load_state_dict(_filled().state_dict())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threshold": 1.5}, "threshold must be at most 1, got 1.5"),
        ({"threshold": -0.1}, "threshold must be at least 0"),
        ({"success_above": float("nan")}, "success_above must be a number, got NaN"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"growth": 1.5}, "growth must be an int, got 1.5"),
        ({"failures": True}, "failures must be an int, got True"),
        ({"lines": 0}, "lines must be at least 1"),
        ({"lesson_length": 3}, "lesson_length must be at least 4"),
        ({"search": "embedding"}, "search must be one of 'family', 'all'"),
        ({"teacher": "o3"}, "teacher must be callable or None"),
        ({"embed": "qwen"}, "embed must be callable or None, got 'qwen'"),
        ({"distiller": 3}, "distiller must be callable or None, got 3"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        SkillBank(**settings)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda bank: bank.add(1, "r", 0.0), "prompt must be a string, got 1"),
        (lambda bank: bank.add("p", None, 0.0), "response must be a string, got None"),
        (lambda bank: bank.add("p", "r", float("nan")), "reward must be a number, got NaN"),
        (lambda bank: bank.add("p", "r", "1"), "reward must be a number, got '1'"),
        (lambda bank: bank.add("p", "r", 1.0, 7), "family must be a string or None, got 7"),
        (lambda bank: bank.update("f", 1.1), "success_rate must be at most 1, got 1.1"),
        (lambda bank: bank.update("f", float("nan")), "success_rate must be at least 0, got nan"),
        (lambda bank: bank.retrieve("p", "f", -1), "k must be at least 0, got -1"),
        (lambda bank: bank.retrieve("p", delta=2), "delta must be at most 1, got 2"),
        (lambda bank: bank.retrieve("p", general=-1), "general must be at least 0, got -1"),
        (lambda bank: bank.update("f", 0.5, general="f"), "general must be True or False, got 'f'"),
        (lambda bank: bank.retrieve("p", 3), "family must be a string or None, got 3"),
        (lambda bank: bank.render(b"p", []), "prompt must be a string, got b'p'"),
    ],
)
def test_bad_arguments(call: Callable[[SkillBank], Any], match: str) -> None:
    bank = SkillBank()
    with pytest.raises((TypeError, ValueError), match=match):
        call(bank)
    assert bank.state_dict() == {"skills": [], "failures": [], "taken": 0}
