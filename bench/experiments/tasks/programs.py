"""Register programs in a language that only an expert's actions explain, and not all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from trajkern.trainer.tasks.base import STREAM, Answer, Question, Reply, Task

METHODS: dict[str, Callable[[int, int], int]] = {  # of the register and an argument
    "+": lambda s, x: s + x,
    "-": lambda s, x: s - x,
    "/": lambda s, x: x - s,
    "*": lambda s, x: s + 3 * x,
    "^": lambda s, x: 3 * s + x,
}
MODULUS, ARGUMENTS, LENGTH = 7, 2, 6
OPCODES, SHOWN = "ABCDEFGHIJKL", "ABCDEFGHIJ"  # SHOWN: those that the expert's programs have
EXPERTS = 300
THOUGHT_END = "~"
DEMONSTRATIONS = 2  # the split that the warm-up shows


class Programs(Task):
    """``5:46C``: the register holds 5, and C is to be done with 4 and 6; ``+525~C5`` and a newline does it.

    The environment then issues the next instruction, ``20A``, and so on, ``LENGTH`` in all. An opcode stands for one
    of five methods, which is done with the register and each argument in turn, modulo 7; which one, only the seed
    knows. A line is a thought (the method, the register, what it becomes with each argument), ``~`` and the action:
    opcode and register. The verifier reads the actions and wants all of them.

    What an effect of step-wise likeness needs is here: by chance a program is right once in a thousand times, so that
    the outcome alone is silent, while every step's likeness varies; the expert shows actions without thoughts, too few
    to learn what comes of an opcode by heart; and the programs of the expert, the first ``EXPERTS`` of the
    demonstrations, lack two opcodes, which only an outcome can tell, once the others are known. Each method has two of
    the opcodes that are shown, so that what is learned of them is no reason to expect one of the others. The warm-up
    shows the arithmetic, with a method at random in every line, half of them after actions without thoughts.
    """

    interactive = True
    weight_decay = 0.1
    demonstrations = 6000

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        rng, methods = random.Random(f"methods:{seed}"), list(METHODS)
        meant = rng.sample(methods * 2, len(SHOWN)) + rng.sample(methods, len(OPCODES) - len(SHOWN))
        self.methods = dict(zip(OPCODES, meant, strict=True))

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            opcodes = SHOWN if split == DEMONSTRATIONS and index < EXPERTS else OPCODES
            start = rng.randrange(MODULUS)
            program = [(rng.choice(opcodes), [rng.randrange(MODULUS) for _ in range(ARGUMENTS)]) for _ in range(LENGTH)]
            yield self._question(start, program)

    def _question(self, start: int, program: list[tuple[str, list[int]]]) -> Question:
        issued = ["".join(map(str, arguments)) + opcode for opcode, arguments in program]
        register, actions = start, []
        for opcode, arguments in program:
            register = worked(self.methods[opcode], register, arguments)[-1]
            actions.append(f"{opcode}{register}")
        prompt = f"{start}:{issued[0]}"
        entry = {"start": start, "program": program, "issued": issued, "actions": actions}
        return Question(prompt, prompt, "\n".join(actions), entry)

    def identity(self, question: Question) -> str:
        return f"{question.entry['start']}:{' '.join(question.entry['issued'])}"

    def read(self, question: Question, text: str) -> Answer:
        return Answer([line.rpartition(THOUGHT_END)[2] for line in written(text)] == question.entry["actions"])

    def reply(self, question: Question, text: str) -> Reply | None:
        if not text.endswith("\n"):
            return None
        done = text.count("\n")
        return Reply("", done=True) if done >= LENGTH else Reply(question.entry["issued"][done])

    def reference(self, question: Question) -> str:
        return question.answer

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        rng = random.Random(f"{self.seed}:{self.identity(question)}")
        bare = rng.randrange(LENGTH) if rng.random() < 0.5 else 0  # lines without a thought, which are not learned
        register, found = question.entry["start"], []
        for number, (opcode, arguments) in enumerate(question.entry["program"]):
            if number:
                found.append((question.entry["issued"][number], False))
            line = line_of(rng.choice(list(METHODS)), register, opcode, arguments)
            action = line.rpartition(THOUGHT_END)[2]
            found.append((f"{action if number < bare else line}\n", number >= bare))
            register = int(action[1:])
        return found

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """Of all lines: how many have the right method, and of those with an opcode that the expert never shows; how
        many follow from their method and the line before."""
        chosen: dict[bool, list[bool]] = {False: [], True: []}
        sound = []
        for question, text in zip(questions, texts, strict=True):
            register: int | None = question.entry["start"]
            lines = written(text)[:LENGTH]
            for (opcode, arguments), line in zip(
                question.entry["program"], [*lines, *[""] * (LENGTH - len(lines))], strict=True
            ):
                method, action = line[:1], line.rpartition(THOUGHT_END)[2]
                chosen[opcode in SHOWN].append(THOUGHT_END in line and method == self.methods[opcode])
                sound.append(
                    method in METHODS and register is not None and line == line_of(method, register, opcode, arguments)
                )
                register = int(action[1:]) if action[1:].isdecimal() else None
        every = chosen[False] + chosen[True]
        return {
            "right_methods": sum(every) / max(len(every), 1),
            "right_methods_unseen": sum(chosen[False]) / max(len(chosen[False]), 1),
            "sound_lines": sum(sound) / max(len(sound), 1),
        }


def worked(method: str, register: int, arguments: Sequence[int]) -> list[int]:
    """The register at first, and after each argument."""
    values = [register]
    for argument in arguments:
        values.append(METHODS[method](values[-1], argument) % MODULUS)
    return values


def line_of(method: str, register: int, opcode: str, arguments: Sequence[int]) -> str:
    """A thought and an action, without the newline."""
    values = worked(method, register, arguments)
    return f"{method}{''.join(map(str, values))}{THOUGHT_END}{opcode}{values[-1]}"


def written(text: str) -> list[str]:
    """The policy's lines, without the instructions, which begin all but the first."""
    first, *others = text.removesuffix("\n").split("\n")
    return [first, *(line[ARGUMENTS + 1 :] for line in others)]
