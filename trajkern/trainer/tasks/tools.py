"""Sums of numbers and of chemical elements' atomic numbers, worked out with two tools: a lookup and a calculator."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from trajkern.recipes.toolpo import answered
from trajkern.trainer.tasks.base import STREAM, Answer, Question, Reply, Task
from trajkern.trainer.tasks.capabilities import Action

CALL, END = "<tool>", "</tool>"
FOLD, FOLDED = "<fold>", "</fold>"
REPLIED = ";"  # ends what the environment writes
TOOLS = {"tools": (2, 2), "tools_long": (2, 3), "tools_fold": (3, 3)}  # fewest and most terms
_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh "
    "Fl Mc Lv Ts Og "
)
ELEMENTS = {symbol: number for number, symbol in enumerate(_SYMBOLS.split(), start=1)}
_CALL = re.compile(re.escape(CALL) + "(.*?)" + re.escape(END), re.DOTALL)
_ENDS = {False: re.compile(END), True: re.compile(f"{END}|{FOLDED}")}  # by whether a task folds
_SUM = re.compile(r"-?\d{1,6}([+-]\d{1,6}){1,4}")


class ToolTask(Task):
    """``Fe+37=`` is answered by ``<tool>Fe</tool>26;<tool>26+37</tool>63;63``; the tools write ``26;`` and ``63;``.

    A call is right if the question needs it and it has not been made before: the lookup of each element, then each
    partial sum from the left. The answer is what stands after the last semicolon.

    In ``tools_fold`` a rollout may fold its memory, as half of the demonstrations do: after the lookups it writes down
    the sum that is left, ``<fold>26+37-29</fold>``, and the environment goes on with what that comes to, ``34;``.
    """

    interactive = True
    weight_decay = 0.1

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        self._least, self._most = TOOLS[name]
        self._folds, self._tool = name == "tools_fold", _result

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            terms = [_term(rng) for _ in range(rng.randint(self._least, self._most))]
            terms[rng.randrange(len(terms))] = rng.choice(list(ELEMENTS))
            signs = [rng.choice("+-") for _ in terms[1:]]
            yield _question(terms, signs, self._folds, self._folds and rng.random() < 0.5)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text.rpartition(";")[2] == question.entry["answer"])

    def reply(self, question: Question, text: str) -> Reply | None:
        if self._folds and text.endswith(FOLDED):
            return Reply(_result(text[: -len(FOLDED)].rpartition(FOLD)[2]) + REPLIED)
        if not text.endswith(END):
            return None
        answer = self._tool(text[: -len(END)].rpartition(CALL)[2])
        if REPLIED in answer:
            raise ValueError(f"simulate must return a text without {REPLIED!r} for task {self.name}, got {answer!r}")
        return Reply(answer + REPLIED)

    def simulated(self, simulate: Callable[[str], str]) -> ToolTask:
        task = copy.copy(self)
        task._tool = partial(answered, simulate)
        return task

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        return [*question.entry["turns"], (question.entry["answer"], True)]

    def action_spans(self, question: Question, text: str) -> list[Action]:
        return calls_in(text, question.entry["calls"], REPLIED, self._folds)

    def right_calls(self, question: Question, text: str) -> int:
        """How many of the calls that the question needs were made."""
        return sum(action.right for action in self.action_spans(question, text))

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """Calls of a rollout, and the share of those needed that were made."""
        calls = sum(len(_CALL.findall(text)) for text in texts)
        right = sum(self.right_calls(q, text) for q, text in zip(questions, texts, strict=True))
        needed = sum(len(q.entry["calls"]) for q in questions)
        return {"calls": calls / max(len(texts), 1), "right_calls": right / max(needed, 1)}


def calls_in(text: str, needed: Iterable[str], replied: str = "", folds: bool = False) -> list[Action]:
    """Every ``<tool>...</tool>`` in ``text``, right where it is ``needed`` and has not been made before.

    After each a reply goes on until ``replied``; there is none by default. An end without a beginning is a wrong call,
    from where the turn begins. With ``folds``, ``<fold>...</fold>`` is an action that folds.
    """
    due, begin, actions = set(needed), 0, []
    while stop := _ENDS[folds].search(text, begin):
        mark = CALL if stop[0] == END else FOLD
        call = text[begin : stop.start()].partition(mark)[2]  # one within another is none that is needed
        right = mark == CALL and call in due
        actions.append(Action(max(text.rfind(mark, begin, stop.start()), begin), stop.end(), right, mark == FOLD))
        due -= {call} if right else set()
        begin = stop.end()
        if replied:
            last = text.find(replied, begin)
            begin = len(text) if last < 0 else last + len(replied)
    return actions


def _term(rng: random.Random) -> str:
    return rng.choice(list(ELEMENTS)) if rng.random() < 0.5 else str(rng.randint(10, 99))


def _question(terms: list[str], signs: list[str], may_fold: bool = False, folds: bool = False) -> Question:
    values = [ELEMENTS.get(term) or int(term) for term in terms]
    lookups, sums, total = [term for term in dict.fromkeys(terms) if term in ELEMENTS], [], values[0]
    for sign, value in zip(signs, values[1:], strict=True):
        sums.append(f"{total}{sign}{value}")
        total = total + value if sign == "+" else total - value
    turns = [piece for call in lookups for piece in _turn(CALL, call, END)]
    if folds:
        turns += _turn(FOLD, _joined(list(map(str, values)), signs), FOLDED)
    else:
        turns += [piece for call in sums for piece in _turn(CALL, call, END)]
    expression, tool = _joined(terms, signs), f"{CALL}1+2{END} adds or subtracts"
    if may_fold:
        tool += f", {FOLD}1+2-3{FOLDED} gives up all else that was noted"
    text = (
        f"What is {expression}, where a chemical symbol stands for its atomic number? {CALL}Fe{END} looks a symbol up, "
        f"{tool}; the result follows each call. End with the number alone."
    )
    entry = {"calls": lookups + sums, "turns": turns, "answer": str(total)}
    return Question(expression + "=", text, "".join(piece for piece, _ in turns) + str(total), entry)


def _joined(terms: list[str], signs: list[str]) -> str:
    return terms[0] + "".join(sign + term for sign, term in zip(signs, terms[1:], strict=True))


def _turn(begin: str, call: str, end: str) -> list[tuple[str, bool]]:
    return [(f"{begin}{call}{end}", True), (_result(call) + REPLIED, False)]


def _result(call: str) -> str:
    if call in ELEMENTS:
        return str(ELEMENTS[call])
    if _SUM.fullmatch(call):
        return str(sum(int(term) for term in re.findall(r"[+-]?\d+", call)))
    return "error"
