"""Sums of numbers and of chemical elements' atomic numbers, worked out with two tools: a lookup and a calculator."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from trajkern.trainer.tasks.base import STREAM, Answer, Question, Reply, Task
from trajkern.trainer.tasks.capabilities import Action

CALL, END = "<tool>", "</tool>"
TOOLS = {"tools": (2, 2), "tools_long": (2, 3)}  # fewest and most terms
_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh "
    "Fl Mc Lv Ts Og "
)
ELEMENTS = {symbol: number for number, symbol in enumerate(_SYMBOLS.split(), start=1)}
_CALL = re.compile(re.escape(CALL) + "(.*?)" + re.escape(END), re.DOTALL)
_SUM = re.compile(r"-?\d{1,6}([+-]\d{1,6}){1,4}")


class ToolTask(Task):
    """``Fe+37=`` is answered by ``<tool>Fe</tool>26;<tool>26+37</tool>63;63``; the tools write ``26;`` and ``63;``.

    A call is right if the question needs it and it has not been made before: the lookup of each element, then each
    partial sum from the left. The answer is what stands after the last semicolon.
    """

    interactive = True
    weight_decay = 0.1

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        self._least, self._most = TOOLS[name]

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            terms = [_term(rng) for _ in range(rng.randint(self._least, self._most))]
            terms[rng.randrange(len(terms))] = rng.choice(list(ELEMENTS))
            signs = [rng.choice("+-") for _ in terms[1:]]
            yield _question(terms, signs)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text.rpartition(";")[2] == question.entry["answer"])

    def reply(self, question: Question, text: str) -> Reply | None:
        if not text.endswith(END):
            return None
        return Reply(f"{_result(text[: -len(END)].rpartition(CALL)[2])};")

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        turns = [piece for call in question.entry["calls"] for piece in _turn(call)]
        return [*turns, (question.entry["answer"], True)]

    def action_spans(self, question: Question, text: str) -> list[Action]:
        return calls_in(text, question.entry["calls"], lambda call: f"{_result(call)};")

    def right_calls(self, question: Question, text: str) -> int:
        """How many of the calls that the question needs were made."""
        return sum(action.right for action in self.action_spans(question, text))

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """Calls of a rollout, and the share of those needed that were made."""
        calls = sum(len(_CALL.findall(text)) for text in texts)
        right = sum(self.right_calls(q, text) for q, text in zip(questions, texts, strict=True))
        needed = sum(len(q.entry["calls"]) for q in questions)
        return {"calls": calls / max(len(texts), 1), "right_calls": right / max(needed, 1)}


def calls_in(text: str, needed: Iterable[str], reply: Callable[[str], str] = lambda call: "") -> list[Action]:
    """Every ``<tool>...</tool>`` in ``text``, right where it is ``needed`` and has not been made before.

    After each the text goes on with ``reply`` of it. An end without a beginning is a wrong call, from where the turn
    begins.
    """
    due, begin, actions = set(needed), 0, []
    while (stop := text.find(END, begin)) >= 0:
        turn, end = text[begin:stop], stop + len(END)
        call = turn.partition(CALL)[2]  # one within another is none that is needed
        actions.append(Action(max(text.rfind(CALL, begin, stop), begin), end, call in due))
        due.discard(call)
        begin = end + len(reply(turn.rpartition(CALL)[2]))
    return actions


def _term(rng: random.Random) -> str:
    return rng.choice(list(ELEMENTS)) if rng.random() < 0.5 else str(rng.randint(10, 99))


def _question(terms: list[str], signs: list[str]) -> Question:
    values = [ELEMENTS.get(term) or int(term) for term in terms]
    calls, total = [term for term in dict.fromkeys(terms) if term in ELEMENTS], values[0]
    for sign, value in zip(signs, values[1:], strict=True):
        calls.append(f"{total}{sign}{value}")
        total = total + value if sign == "+" else total - value
    expression = terms[0] + "".join(sign + term for sign, term in zip(signs, terms[1:], strict=True))
    entry = {"calls": calls, "answer": str(total)}
    answer = "".join(text for call in calls for text, _ in _turn(call)) + str(total)
    text = (
        f"What is {expression}, where a chemical symbol stands for its atomic number? {CALL}Fe{END} looks a symbol up, "
        f"{CALL}1+2{END} adds or subtracts; the result follows each call. End with the number alone."
    )
    return Question(expression + "=", text, answer, entry)


def _turn(call: str) -> list[tuple[str, bool]]:
    return [(f"{CALL}{call}{END}", True), (f"{_result(call)};", False)]


def _result(call: str) -> str:
    if call in ELEMENTS:
        return str(ELEMENTS[call])
    if _SUM.fullmatch(call):
        return str(sum(int(term) for term in re.findall(r"[+-]?\d+", call)))
    return "error"
