"""What a task may offer beside questions and a verifier. It offers a capability by having the method, and no more.

A class defines the method, or, where only some of its tasks can answer, sets it on those in ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from trajkern.trainer.tasks.base import Question, Task


class Belief(NamedTuple):
    """How a policy is asked what it believes: what is written for it, and the hidden answer that it should go on with.

    The log-probability of ``target`` after ``probe`` is the belief.
    """

    probe: str
    target: str


class Action(NamedTuple):
    """Characters ``begin:end`` of a rollout's text, in which the policy acted, and whether it was right to.

    An action that ``folds`` the rollout's memory is credited by what it saves, not by being right.
    """

    begin: int
    end: int
    right: bool
    folds: bool = False


@runtime_checkable
class BeliefTask(Protocol):
    """A task with a hidden answer that the policy comes to know turn by turn."""

    def belief_target(self, question: Question, text: str) -> Belief | None:
        """How to ask for the belief after ``text``, a rollout up to one of its turns: alike after each of a question's.
        None where it is not to be asked, as after a guess."""


@runtime_checkable
class PenaltyTask(Protocol):
    """A task that knows turns to be invalid or of no use."""

    def penalties(self, question: Question, text: str) -> list[float]:
        """At most 0, of each turn of the policy in ``text``."""


@runtime_checkable
class ActionTask(Protocol):
    """A task whose rollouts act: call tools, for one."""

    def action_spans(self, question: Question, text: str) -> list[Action]:
        """The actions in ``text``, in order and disjoint."""


@runtime_checkable
class SimulatedTask(Protocol):
    """A task with tools, which something else may play while the policy is trained."""

    def simulated(self, simulate: Callable[[str], str]) -> Task:
        """This task, its tools' answers being ``simulate(call)``, a text, for each call that the policy makes."""


@runtime_checkable
class HintTask(Protocol):
    """A task that can help a rollout that went wrong."""

    def hint(self, question: Question, text: str) -> str | None:
        """What would have helped the rollout ``text``, in the environment's words; None where there is nothing."""


@runtime_checkable
class FamilyTask(Protocol):
    """A task of several kinds of questions."""

    def family(self, question: Question) -> str:
        """The name of the question's kind."""


@runtime_checkable
class ReferenceTask(Protocol):
    """A task that knows a worked solution of each question."""

    def reference(self, question: Question) -> str:
        """The solution, a step a line, the answer on the last one; without what an environment writes after a line."""


@runtime_checkable
class ReasoningTask(Protocol):
    """A task that knows which part of a text is reasoning; elsewhere it is all up to the last newline."""

    def reasoning(self, question: Question, text: str) -> tuple[int, int]:
        """Where in ``text`` the reasoning begins and ends, in characters; what stands behind it is the answer."""


@runtime_checkable
class ResponseTask(Protocol):
    """A task that knows responses to its questions, for a judge to learn on."""

    def responses(self, question: Question) -> Sequence[str]:
        """Right ones and wrong ones, at least one of each; which they are, the verifier says."""


@runtime_checkable
class CritiqueTask(Protocol):
    """A task that can check a response, for a judge to learn how."""

    def critique(self, question: Question, response: str) -> str:
        """How it is checked, a step a line, right or wrong; the verdict follows from it."""


@runtime_checkable
class VoteTask(Protocol):
    """A task in which several answers to a question can be put to the vote."""

    def ballot(self, question: Question, text: str) -> Hashable | None:
        """What ``text`` answers, in a form that is equal where answers mean the same, so that they earn the same; None
        where it cannot be read."""


def family_of(task: Task, question: Question) -> str:
    """The question's family; that of a task without families is the task."""
    return task.family(question) if isinstance(task, FamilyTask) else task.name


def reasoning_of(task: Task, question: Question, text: str) -> tuple[int, int]:
    """Where in ``text`` the reasoning begins and ends.

    Raises:
        ValueError: a task whose reasoning is no part of the text.
    """
    if not isinstance(task, ReasoningTask):
        return 0, text.rfind("\n") + 1
    begin, end = task.reasoning(question, text)
    if not 0 <= begin <= end <= len(text):
        raise ValueError(
            f"the reasoning of task {task.name} must be a part of a text of {len(text)} characters; got {begin}:{end}"
        )
    return begin, end
