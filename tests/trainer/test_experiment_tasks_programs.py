"""Register programs: worked by hand, verified, issued line by line; the expert shows all but two opcodes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="the trainer's extra is not installed")

from trajkern._bench.experiments.rows.srl import ROW
from trajkern._bench.experiments.tasks import programs
from trajkern._bench.experiments.tasks.programs import Programs, line_of, worked
from trajkern.trainer.config import parse
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.setup import load_system, longest_answer
from trajkern.trainer.tasks import Question, Reply

TASK = Programs("programs", 0)


def solved(question: Question, methods: dict[str, str]) -> str:
    """A rollout whose arithmetic is right, with these methods."""
    text, register = "", question.entry["start"]
    for opcode, arguments in question.entry["program"]:
        text += line_of(methods[opcode], register, opcode, arguments) + "\n"
        register = worked(methods[opcode], register, arguments)[-1]
        reply = TASK.reply(question, text)
        assert reply is not None
        text += reply.text
    return text


def test_methods_by_hand() -> None:
    """On 5 with 4 and 6, modulo 7: 5+4=2, 2+6=1; 5-4=1, 1-6=2; 4-5=6, 6-6=0; 5+12=3, 3+18=0; 15+4=5, 15+6=0."""
    results = {method: worked(method, 5, [4, 6]) for method in programs.METHODS}
    assert results == {"+": [5, 2, 1], "-": [5, 1, 2], "/": [5, 6, 0], "*": [5, 3, 0], "^": [5, 5, 0]}
    assert line_of("-", 5, "C", [4, 6]) == "-512~C2"


def test_a_program_by_hand() -> None:
    methods = dict(zip(programs.OPCODES, "+-/*^+-/*^+-", strict=True))
    task = Programs("programs", 0)
    task.methods = methods
    question = task._question(5, [("A", [4, 6]), ("B", [1, 1]), *[("D", [0, 0])] * 4])
    assert (question.prompt, question.answer) == ("5:46A", "A1\nB6\nD6\nD6\nD6\nD6")
    assert task.reference(question) == question.answer and task.identity(question) == "5:46A 11B 00D 00D 00D 00D"
    text = "+521~A1\n11B-106~B6\n00D" + "*666~D6\n00D" * 3 + "*666~D6\n"
    assert task.read(question, text).correct
    assert task.statistics([question], [text]) == {"right_methods": 1, "right_methods_unseen": 0, "sound_lines": 1}
    bare = "A1\n11BB6\n00D" + "D6\n00D" * 3 + "D6\n"
    assert task.read(question, bare).correct, "a thought is not asked for"
    assert task.statistics([question], [bare])["right_methods"] == 0
    for wrong in (text[:-8], text.replace("B6", "B5"), text + "00D*666~D6\n", ""):
        assert not task.read(question, wrong).correct
    slip = text.replace("-106~B6", "-105~B5")
    assert task.statistics([question], [slip])["sound_lines"] == pytest.approx(4 / 6), (
        "and the line that goes on from it"
    )


def test_the_environment_issues_and_ends() -> None:
    question = TASK.distinct(0, 1)[0]
    assert TASK.reply(question, "+") is None
    assert TASK.reply(question, "x\n") == Reply(question.entry["issued"][1])
    assert TASK.reply(question, "x\n" * programs.LENGTH) == Reply("", done=True)
    text = solved(question, TASK.methods)
    assert TASK.read(question, text).correct and TASK.statistics([question], [text])["sound_lines"] == 1
    others = TASK.methods | {opcode: "+" if method != "+" else "-" for opcode, method in TASK.methods.items()}
    text = solved(question, others)
    assert TASK.statistics([question], [text]) == {"right_methods": 0, "right_methods_unseen": 0, "sound_lines": 1}


def test_demonstrations_are_sound_and_know_no_method() -> None:
    shown = TASK.distinct(2, 400)
    texts = ["".join(text for text, _ in TASK.pieces(question)) for question in shown]
    found = TASK.statistics(shown, texts)
    assert 0.17 < found["right_methods"] / (1 - bare_share(shown)) < 0.23 and 0.17 < bare_share(shown) < 0.25
    for question in shown[:50]:
        learned = [text for text, learns in TASK.pieces(question) if learns]
        assert learned and all(programs.THOUGHT_END in text for text in learned)


def bare_share(questions: list[Question]) -> float:
    """Of the demonstrations' lines, those without a thought."""
    lines = [text for q in questions for text, _ in TASK.pieces(q) if text.endswith("\n")]
    return sum(programs.THOUGHT_END not in line for line in lines) / len(lines)


def test_the_expert_lacks_two_opcodes() -> None:
    used = [{opcode for opcode, _ in q.entry["program"]} for q in islice(TASK.questions(2), 2 * programs.EXPERTS)]
    assert set().union(*used[: programs.EXPERTS]) == set(programs.SHOWN)
    assert set().union(*used[programs.EXPERTS :]) == set(programs.OPCODES)


def test_splits_are_disjoint_and_the_seed_decides_the_methods() -> None:
    splits = TASK.splits(heldout=40, validation=20, demonstrations=60, train=100)
    apart = [{TASK.identity(q) for q in part} for part in (splits.heldout, splits.validation)]
    training = {TASK.identity(q) for q in (*splits.demonstrations, *splits.train)}
    assert list(map(len, apart)) == [40, 20] and not apart[0] & apart[1] and not (apart[0] | apart[1]) & training
    tables = [Programs("programs", seed).methods for seed in range(8)]
    assert Programs("other", 3).methods == tables[3] and len({str(table) for table in tables}) == 8
    for table in tables:
        shown, unseen = (
            [table[x] for x in programs.OPCODES if (x in programs.SHOWN) == known] for known in (True, False)
        )
        assert sorted(shown) == sorted([*programs.METHODS] * 2), "two opcodes a method"
        assert len(set(unseen)) == len(unseen) == 2


def test_the_row_imitates_the_expert_alone() -> None:
    config: Any = parse(f"{ROW.flags} {next(iter(ROW.arms.values()))}".split())
    assert config.srl.thought_end == programs.THOUGHT_END and config.srl.demonstrations == programs.EXPERTS
    model = CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    system = load_system(config, TASK, model)
    splits = TASK.splits(heldout=2, validation=2, demonstrations=programs.EXPERTS + 20, train=2)
    steps = system.pool(splits)
    assert len(steps) == programs.EXPERTS * programs.LENGTH
    first = splits.demonstrations[0]
    assert steps[1].prompt == f"{first.prompt}{first.entry['actions'][0]}\n{first.entry['issued'][1]}"
    assert steps[1].answer == first.entry["actions"][1]
    assert longest_answer(model, TASK, splits) == programs.LENGTH * len("+524~C4\n46C") - len("46C") + 1
