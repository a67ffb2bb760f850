"""Tasks that reply within a rollout: what the environment writes, who is credited for it, and what counts as right."""

from __future__ import annotations

import pytest
import torch

from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.tokenizer import decode, encode
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.packing import pack_rollouts
from trajkern.trainer.sampling import environment, sample
from trajkern.trainer.tasks import Question, Reply, Task, load_task
from trajkern.trainer.tasks.entities import ATTRIBUTES, ENTITIES, KINDS
from trajkern.trainer.tasks.tools import ELEMENTS, ToolTask
from trajkern.trainer.tasks.twenty_questions import LIMIT, TwentyQuestions, read_game


@pytest.fixture(params=["tools", "tools_long", "tools_fold", "twenty_questions"])
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, seed=2)


def test_the_environment_replies_to_a_demonstration_as_it_is_written(task: Task) -> None:
    for question in task.distinct(2, 60):
        written = ""
        for text, learned in task.pieces(question):
            if not learned:
                assert task.reply(question, written) == Reply(text)
            written += text
        assert written == question.answer and task.reward(question, written) == 1.0


class Echo(Task):
    """After each "a" the environment writes "xy", after a "b" it ends the rollout with "z"."""

    interactive = True

    def questions(self, split: int):
        yield Question("q", "q", "a", {})

    def read(self, question, text):
        raise NotImplementedError

    def reply(self, question: Question, text: str) -> Reply | None:
        return {"a": Reply("xy"), "b": Reply("z", done=True), "c": Reply("", done=True)}.get(text[-1:])


def test_replies_are_read_but_not_sampled() -> None:
    torch.manual_seed(0)
    model = CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    with torch.no_grad():  # few characters, so that all kinds of turns occur
        model.head.weight[[i for i in range(len(model.head.weight)) if i not in encode("abcd")]] = 0
        model.head.weight[encode("abcd")] *= 2
    task = Echo("echo")
    questions = [Question(p, p, "", {}) for p in ("q", "word", "x=")]
    prompts = [model.prompt(q) for q in questions]
    many = [q for q in questions for _ in range(60)]
    generator = torch.Generator().manual_seed(3)
    drawn = sample(
        model, prompts, copies=60, max_new=9, generator=generator, environment=environment(model, task, many)
    )
    batch = pack_rollouts(drawn, torch.zeros(180), torch.arange(180))
    pairs = batch.head_inputs()
    with torch.no_grad():
        logits = model(batch.tokens, batch.cu_seqlens, pairs.rows)
    expected = logits.log_softmax(-1).gather(1, pairs.targets[:, None]).squeeze(1)
    torch.testing.assert_close(batch.sampler_logprobs[pairs.tokens], expected, rtol=0, atol=2e-6)
    assert not batch.sampler_logprobs[~batch.loss_mask].any()
    kinds = set()
    for n, tokens in enumerate(drawn.completions()):
        text, by_policy = decode(tokens), drawn.sampled[n, drawn.prompt_length :][: len(tokens)].tolist()
        at = 0
        while at < len(text):
            assert by_policy[at], f"the policy's turn in {text!r}"
            reply = {"a": "xy", "b": "z"}.get(text[at], "")
            assert text[at + 1 :].startswith(reply[: len(text) - at - 1])
            assert not any(by_policy[at + 1 : at + 1 + len(reply)])
            if text[at] in "bc":
                kinds.add(text[at])
                assert len(text) == at + 1 + len(reply) or len(text) == 9
            at += 1 + len(reply)
    assert kinds == {"b", "c"}, "the case needs rollouts that the environment ends"


def test_tools() -> None:
    task = ToolTask("tools")
    fact = {"calls": ["Fe", "26+37"], "answer": "63"}
    question = Question("Fe+37=", "", "", fact)
    right = "<tool>Fe</tool>26;<tool>26+37</tool>63;63"
    assert task.reward(question, right) == 1 and task.right_calls(question, right) == 2
    assert task.reward(question, "63") == 1 and task.right_calls(question, "63") == 0
    assert task.reward(question, right[:-1]) == 0 and task.reward(question, "") == 0
    twice = "<tool>Fe</tool>26;<tool>Fe</tool>26;<tool>37+26</tool>63;63"
    assert task.right_calls(question, twice) == 1
    spans = [(twice[x.begin : x.end], x.right) for x in task.action_spans(question, twice)]
    expected = [("<tool>Fe</tool>", True), ("<tool>Fe</tool>", False), ("<tool>37+26</tool>", False)]
    assert spans == expected
    odd = "<tool>Fe<tool>Fe</tool>26;x</tool>error;<tool>Fe</tool>26;<tool>U"
    spans = [(odd[x.begin : x.end], x.right) for x in task.action_spans(question, odd)]
    assert spans == [("<tool>Fe</tool>", False), ("x</tool>", False), ("<tool>Fe</tool>", True)]
    for call, result in (
        ("U", "92"),
        ("9-12", "-3"),
        ("-3+5-1", "1"),
        ("1/0", "error"),
        ("Xx", "error"),
        ("", "error"),
    ):
        assert task.reply(question, f"so <tool>{call}</tool>") == Reply(f"{result};")
    assert task.reply(question, "<tool>Fe</tool") is None
    assert (ELEMENTS["H"], ELEMENTS["Au"], ELEMENTS["Og"], len(ELEMENTS)) == (1, 79, 118, 118)
    assert task.statistics([question, question], [right, "63"]) == {"calls": 1.0, "right_calls": 0.5}


def test_folding() -> None:
    task = ToolTask("tools_fold")
    question = Question("Fe+37-Cu=", "", "", {"calls": ["Fe", "Cu", "26+37", "63-29"], "answer": "34"})
    lookups = "<tool>Fe</tool>26;<tool>Cu</tool>29;"
    assert task.reply(question, f"{lookups}<fold>26+37-29</fold>") == Reply("34;")
    assert task.reply(question, f"{lookups}<fold>no sum</fold>") == Reply("error;")
    text = f"{lookups}<fold>26+37-29</fold>34;<fold>Fe</fold>error;<tool>Fe</tool>26;34"
    found = [(text[x.begin : x.end], x.right, x.folds) for x in task.action_spans(question, text)]
    assert found == [
        ("<tool>Fe</tool>", True, False),
        ("<tool>Cu</tool>", True, False),
        ("<fold>26+37-29</fold>", False, True),
        ("<fold>Fe</fold>", False, True),
        ("<tool>Fe</tool>", False, False),
    ]
    assert task.reward(question, text) == 1
    shown = [q.answer for q in task.distinct(2, 60)]
    assert 15 < sum("<fold>" in text for text in shown) < 45
    plain = ToolTask("tools_long")
    assert plain.reply(question, "<fold>1+1</fold>") is None and not plain.action_spans(question, "<fold>1+1</fold>")


def test_simulated_tools() -> None:
    """A simulator's answer stands in the place of the tools', of any length; calls are judged as ever."""
    task, asked = ToolTask("tools"), []

    def simulate(call: str) -> str:
        asked.append(call)
        return {"Fe": "twenty <tool>six</tool>"}.get(call, "63")

    played = task.simulated(simulate)
    question = Question("Fe+37=", "", "", {"calls": ["Fe", "26+37"], "answer": "63"})
    assert played.reply(question, "<tool>Fe</tool>") == Reply("twenty <tool>six</tool>;") and asked == ["Fe"]
    text = "<tool>Fe</tool>twenty <tool>six</tool>;<tool>26+37</tool>63;63"
    assert [(x.end, x.right) for x in played.action_spans(question, text)] == [(15, True), (57, True)]
    assert played.reward(question, text) == 1 and asked == ["Fe"]
    assert task.reply(question, "<tool>Fe</tool>") == Reply("26;"), "the task itself asks its own tools"
    with pytest.raises(TypeError, match=r"simulate must return a string, got 26 \(int\) for the call 'Fe'"):
        task.simulated(lambda call: 26).reply(question, "<tool>Fe</tool>")
    with pytest.raises(ValueError, match="simulate must return a text without ';' for task tools, got '2;6'"):
        task.simulated(lambda call: "2;6").reply(question, "<tool>Fe</tool>")


def test_a_game() -> None:
    task = TwentyQuestions("twenty_questions")
    cat = Question("dog:b+c-?", "", "", {"entity": "cat", "known": "bc"})
    assert task.reply(cat, "i") == Reply("+") and task.reply(cat, "i+d") == Reply("-")
    assert task.reply(cat, "i+") is None and task.reply(cat, "=ca") is None
    assert task.reply(cat, "Z") == Reply("!")
    assert task.reply(cat, "=cat\n") == Reply("", done=True)
    assert task.reply(cat, "i+" * LIMIT + "d") == Reply("-", done=True)
    assert task.reward(cat, "i+d-=cat\n") == 1 and task.reward(cat, "=cat\n") == 1
    assert task.reward(cat, "i+=dog\n") == 0 and task.reward(cat, "i+=ca") == 0 and task.reward(cat, "i+d-") == 0
    assert task.penalties(cat, "i+b+i+Z!=cat\n") == [0, -1, -1, -5, 0]
    assert task.statistics([cat, cat], ["i+b+=cat\n", "=cat\n"]) == {"turns": 1.0, "fresh_questions": 0.5}
    assert read_game("a+b-=x\n") == ("ab", "x\n") and read_game("a+b") == ("ab", None) and read_game("") == ("", None)


def test_entities_are_many_and_no_two_alike() -> None:
    assert len(ENTITIES) >= 200 and len(ATTRIBUTES) == 24
    assert len(ENTITIES) == sum(map(len, KINDS)) == len(set(ENTITIES.values()))
    assert all(name.isascii() and name.isalpha() and name.islower() and len(name) <= 10 for name in ENTITIES)
    assert set().union(*ENTITIES.values()) == set(ATTRIBUTES)
    assert "a" in ENTITIES["dog"] and "c" in ENTITIES["eagle"] and "p" in ENTITIES["bus"] and "j" in ENTITIES["apple"]
    assert "c" not in ENTITIES["penguin"] and "a" not in ENTITIES["sword"] and "b" not in ENTITIES["shark"]
    for name, attributes in ENTITIES.items():
        assert "b" not in attributes or "a" in attributes, f"{name}: a mammal is an animal"
        assert not {"a", "k"} <= attributes, f"{name}: no animal is a plant"
        assert not {"h", "i"} <= attributes, f"{name}: nothing bigger than a person fits into a hand"
