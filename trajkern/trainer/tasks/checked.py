"""What a task of one's own returns, checked where it returns it: later it would be an error that names nothing, or a
number that means something else."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import torch

from trajkern.trainer.returned import agreed, as_flag, as_list, as_number, as_place, as_text, ask, refuse, shown
from trajkern.trainer.tasks.base import Answer, Question, Reply, Splits, Task
from trajkern.trainer.tasks.capabilities import Action, Belief

Spelt = Collection[str] | None  # what the model can spell, where that is not everything


def checked(task: Task) -> Task:
    """The task, whose methods raise TypeError or ValueError, by their names, where what they return is not theirs to
    return. Its class becomes one of the same name, so that what a method of its own asks of others is checked as well.

    Raises:
        TypeError, ValueError: an attribute that is not what a task's is, or a method that does not take what it is
            called with.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task must be a trajkern.trainer.tasks.Task, got {shown(task)}")
    kind = type(task)
    if "_checked" in vars(kind):
        return task
    _check_attributes(task)
    own = vars(task)
    for method in CHECKS:
        found = getattr(task, method, None)
        if found is None or _is_ours(found):
            continue
        _check_call(f"{kind.__name__}.{method}", method, found)
        if method in own or inspect.getattr_static(kind, method, None) is None:  # as of __getattr__
            own[method] = _Returning(found, f"{kind.__name__}.{method}", method, task)
    methods = frozenset(m for m in CHECKS if m not in own and not _is_ours(getattr(task, m, None)))
    object.__setattr__(task, "__class__", _checked_type(kind, methods))
    return task


def spelling_in(task: Task, alphabet: Collection[str]) -> None:
    """Have a checked task refuse texts for a model that cannot spell them."""
    if "_checked" in vars(type(task)):
        vars(task)["_spelt_in"] = frozenset(alphabet)


class _Returning:
    """A method that a task has set on itself."""

    def __init__(self, method: Callable[..., Any], name: str, check: str, task: Task) -> None:
        self.method, self.name, self.check, self.task = method, name, check, task

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = agreed if self.check in AGREED else ask
        return CHECKS[self.check](self.name, call(self.name, self.method, *args, **kwargs), self.task, kwargs)


def as_answer(name: str, value: Any) -> Answer:
    """An Answer, its fields Python's own. Raises TypeError or ValueError for all else."""
    if not isinstance(value, Answer):
        raise refuse(TypeError, name, "an Answer", value)
    expected = "an Answer with a correct of True, False or a number between"
    correct = as_number(name, value.correct, expected, low=0, high=1, part="correct")
    confidence = value.confidence
    if confidence is not None:
        expected = "an Answer with a confidence in [0, 1] or None"
        confidence = as_number(name, confidence, expected, low=0, high=1, part="confidence")
    expected = "an Answer with a well_formed of True or False"
    well_formed = as_flag(name, value.well_formed, expected, "well_formed")
    return Answer(bool(correct) if correct in (0, 1) else correct, confidence, well_formed)  # type: ignore[arg-type]


@cache
def _checked_type(kind: type[Task], methods: frozenset[str]) -> type[Task]:
    """The class with these methods checked."""

    def overriding(method: str) -> Callable[..., Any]:
        name, check, call = f"{kind.__name__}.{method}", CHECKS[method], agreed if method in AGREED else ask

        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            return check(name, call(name, getattr(super(made, self), method), *args, **kwargs), self, kwargs)

        return called

    def copied(self: Any, version: Any) -> Any:
        how = super(made, self).__reduce_ex__(version)
        is_plain = isinstance(how, tuple) and how[0] is copyreg.__newobj__  # type: ignore[attr-defined]
        return (_remade, (kind, *how[1][1:]), *how[2:]) if is_plain else how

    body: dict[str, Any] = {method: overriding(method) for method in methods}
    body |= {"_checked": True, "__reduce_ex__": copied, "__module__": kind.__module__, "__doc__": kind.__doc__}
    metaclass: Any = type(kind)
    try:
        made: type[Task] = metaclass(kind.__name__, (kind,), {**body, "__qualname__": kind.__qualname__})
    except Exception as error:  # of an __init_subclass__, or a metaclass
        raise TypeError(f"{kind.__name__} must be a class of which another can be made; {error}") from None
    return made


def _remade(kind: type[Task], *args: Any) -> Task:
    """What a copy or a pickle of a checked task is filled into."""
    task = kind.__new__(kind, *args)
    methods = frozenset(m for m in CHECKS if not _is_ours(getattr(kind, m, None)))
    object.__setattr__(task, "__class__", _checked_type(kind, methods))
    return task


def _spelt(task: Any) -> Spelt:
    return vars(task).get("_spelt_in")


def _is_ours(method: Any) -> bool:
    """A method that there is not, or one of this package's own tasks'."""
    return method is None or (getattr(method, "__module__", None) or "").startswith("trajkern.trainer.")


def _check_attributes(task: Task) -> None:
    name = type(task).__name__
    missing = [x for x in ("name", "seed") if not hasattr(task, x)]
    if missing:
        raise TypeError(f"{name} must call Task.__init__, which sets {' and '.join(missing)}; it does not")
    try:
        for attribute in ("interactive", "states_confidence"):
            as_flag(f"{name}.{attribute}", getattr(task, attribute))
        count = as_place(f"{name}.demonstrations", task.demonstrations, "a whole number of at least 1")
        as_number(f"{name}.demonstrations", count, "at least 1", low=1)
        as_number(f"{name}.weight_decay", task.weight_decay, "a number of at least 0", low=0)
        for attribute in ("name", "fingerprint"):
            as_text(f"{name}.{attribute}", getattr(task, attribute))
        if task.alphabet is not None:
            for character in _entries(f"{name}.alphabet", task.alphabet):
                as_text(f"{name}.alphabet", character, "a set of characters or None", part="one")
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(" must return ", " must be ", 1)) from None


def _entries(name: str, value: Any) -> Collection[Any]:
    if not isinstance(value, (str, list, tuple, set, frozenset)):
        raise refuse(TypeError, name, "a set of characters or None", value)
    return value


def _check_call(name: str, method: str, found: Any) -> None:
    """Raise TypeError where a method does not take what it is called with."""
    if not callable(found):
        raise TypeError(f"{name} must be a method, got {shown(found)}")
    arguments, named = _ARGUMENTS[method]
    try:
        inspect.signature(found).bind(*arguments, **dict.fromkeys(named))
    except TypeError as error:
        expected = ", ".join((*arguments, *named))
        raise TypeError(f"{name} must take ({expected}); {error}") from None
    except ValueError:  # of a callable that has no signature
        pass


def _questions(name: str, value: Any, task: Any, named: Any) -> Iterator[Question]:
    try:
        drawn = iter(value)
    except Exception:  # whatever an object's own iter raises
        raise refuse(TypeError, name, "an iterator of Question", value) from None
    return _drawn(name, drawn, task)


def _drawn(name: str, drawn: Iterator[Any], task: Any) -> Iterator[Question]:
    none = object()
    while (value := ask(name, next, drawn, none)) is not none:
        yield _question(name, value, task)


def _question(name: str, value: Any, task: Any) -> Question:
    expected = "Question(prompt, text, answer, entry), three texts and a dict"
    if not isinstance(value, Question) or not isinstance(value.entry, Mapping):
        raise refuse(TypeError, name, expected, value)
    spelt, texts = _spelt(task), {x: as_text(name, getattr(value, x), expected, part=x) for x in value._fields[:3]}
    if spelt is not None and not value.prompt:
        raise refuse(ValueError, name, "a Question with a prompt that is not empty", value.prompt, "prompt")
    passed_over = task.alphabet is not None and not set(value.prompt + value.answer) <= set(task.alphabet)
    for part in () if passed_over else ("prompt", "answer"):
        as_text(name, texts[part], expected, spelt, part)
    entry = value.entry if isinstance(value.entry, dict) else ask(name, dict, value.entry)
    return value._replace(**texts, entry=entry)


def _some_questions(name: str, value: Any, task: Any, named: Any) -> list[Question]:
    return [_question(name, each, task) for each in as_list(name, value, "a list of Question")]


def _splits(name: str, value: Any, task: Any, named: Any) -> Splits:
    if not isinstance(value, Splits):
        raise refuse(TypeError, name, "Splits", value)
    found = Splits(*(_some_questions(f"{name}, as {part},", x, task, ()) for part, x in vars(value).items()))
    for part in ("heldout", "validation"):
        if len(getattr(found, part)) != named[part]:
            count = len(getattr(found, part))
            raise ValueError(f"{name} must return Splits with {named[part]} questions in {part}, got {count}")
    if not found.train:
        raise ValueError(f"{name} must return Splits with questions in train, got none")
    taken: dict[str, str] = {}
    for part, questions in vars(found).items():
        identities = [(task.identity(question), question) for question in questions]
        for identity, question in identities:
            if identity in taken:
                where = f"{taken[identity]} and {part} both have {question.prompt!r:.200}"
                raise ValueError(f"{name} must keep what is held out and for validation apart from all else; {where}")
        if part in ("heldout", "validation"):
            taken |= {identity: part for identity, _ in identities}
    return found


def _answer(name: str, value: Any, task: Any, named: Any) -> Answer:
    return as_answer(name, value)


def _reward(name: str, value: Any, task: Any, named: Any) -> float:
    return as_number(name, value)


def _reply(name: str, value: Any, task: Any, named: Any) -> Reply | None:
    if value is None:
        return None
    expected = "a Reply with a text and whether that is the end, or None"
    if not isinstance(value, Reply):
        raise refuse(TypeError, name, expected, value)
    return Reply(
        as_text(name, value.text, expected, _spelt(task), "text"),
        as_flag(name, value.done, expected, "whether it ends"),
    )


def _pieces(name: str, value: Any, task: Any, named: Any) -> list[tuple[str, bool]]:
    expected, found = "a list of (text, whether it is learnt)", []
    for each in as_list(name, value, expected):
        if not isinstance(each, (tuple, list)) or len(each) != 2:
            raise refuse(TypeError, name, expected, each, "an entry")
        text = as_text(name, each[0], expected, _spelt(task), "a text")
        found.append((text, as_flag(name, each[1], expected, "whether it is learnt")))
    return found


def _statistics(name: str, value: Any, task: Any, named: Any) -> dict[str, float]:
    expected = "a dict of names and numbers"
    if not isinstance(value, Mapping):
        raise refuse(TypeError, name, expected, value)
    found = {}
    for key, x in dict(value).items():
        as_text(name, key, expected, part="a name")
        found[key] = as_number(name, x, expected, nan=True, part=repr(key))  # NaN is a mean of nothing
    return found


def _text(name: str, value: Any, task: Any, named: Any) -> str:
    return as_text(name, value, alphabet=_spelt(task))


def _name(name: str, value: Any, task: Any, named: Any) -> str:
    return as_text(name, value)


def _hint(name: str, value: Any, task: Any, named: Any) -> str | None:
    return None if value is None else as_text(name, value, "a text or None", _spelt(task))


def _solution(name: str, value: Any, task: Any, named: Any) -> str:
    expected = "a solution that is not blank"
    if not as_text(name, value, expected, _spelt(task)).strip():
        raise refuse(ValueError, name, expected, value)
    return str(value)


def _belief(name: str, value: Any, task: Any, named: Any) -> Belief | None:
    expected = "Belief(probe, target), two texts, or None"
    if value is None:
        return None
    if not isinstance(value, Belief):
        raise refuse(TypeError, name, expected, value)
    probe, target = (as_text(name, getattr(value, x), expected, _spelt(task), x) for x in ("probe", "target"))
    if not target:
        raise refuse(ValueError, name, "a Belief with a target that is not empty", target, "target")
    return Belief(probe, target)


def _penalties(name: str, value: Any, task: Any, named: Any) -> list[float]:
    expected = "a list of numbers of at most 0, one a turn"
    return [as_number(name, x, expected, high=0, part="an entry") for x in as_list(name, value, expected)]


def _actions(name: str, value: Any, task: Any, named: Any) -> list[Action]:
    expected, found = "a list of Action(begin, end, right, folds)", []
    for each in as_list(name, value, expected):
        if not isinstance(each, Action):
            raise refuse(TypeError, name, expected, each, "an entry")
        begin, end = (as_place(name, x, expected, what) for x, what in ((each.begin, "begin"), (each.end, "end")))
        right, folds = (as_flag(name, x, expected, what) for x, what in ((each.right, "right"), (each.folds, "folds")))
        found.append(Action(begin, end, right, folds))
    return found


def _reasoning(name: str, value: Any, task: Any, named: Any) -> tuple[int, int]:
    expected = "where the reasoning begins and ends, two whole numbers"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise refuse(TypeError, name, expected, value)
    begin, end = (as_place(name, x, expected, "one of them") for x in value)
    return begin, end


def _responses(name: str, value: Any, task: Any, named: Any) -> list[str]:
    expected = "a list of texts"
    return [as_text(name, x, expected, _spelt(task), "an entry") for x in as_list(name, value, expected)]


def _simulated(name: str, value: Any, task: Any, named: Any) -> Task:
    if not isinstance(value, Task):
        raise refuse(TypeError, name, "a Task", value)
    other = checked(value)
    if (spelt := _spelt(task)) is not None:
        spelling_in(other, spelt)
    return other


def _ballot(name: str, value: Any, task: Any, named: Any) -> Any:
    if not _is_comparable(value):
        raise refuse(TypeError, name, "what can be compared and hashed (a text, a number, a tuple), or None", value)
    return value


def _is_comparable(value: Any) -> bool:
    """Whether it is equal to another of its meaning, and hashes alike."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return False
    if isinstance(value, (tuple, frozenset)) and not all(map(_is_comparable, value)):
        return False
    compare: Any = type(value).__eq__
    if compare is object.__eq__:  # nothing but itself is equal to it
        return value is None or isinstance(value, Enum)
    try:
        hash(value)
        return bool(value == value)
    except Exception:  # whatever an object makes of these
        return False


# method -> what becomes of its result: called with its name, the result, the task, and the named arguments
CHECKS: dict[str, Callable[[str, Any, Any, Any], Any]] = {
    "questions": _questions,
    "read": _answer,
    "reward": _reward,
    "reply": _reply,
    "pieces": _pieces,
    "statistics": _statistics,
    "identity": _name,
    "distinct": _some_questions,
    "splits": _splits,
    "belief_target": _belief,
    "penalties": _penalties,
    "action_spans": _actions,
    "simulated": _simulated,
    "hint": _hint,
    "family": _name,
    "reference": _solution,
    "reasoning": _reasoning,
    "responses": _responses,
    "critique": _text,
    "ballot": _ballot,
}
# those about rollouts, on which the ranks of a head agree; what questions there are is compared over all ranks
AGREED = frozenset(CHECKS) - {"questions", "identity", "distinct", "splits", "simulated"}
_OF_QUESTION, _OF_TEXT = ("question",), ("question", "text")
_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(CHECKS, (_OF_TEXT, ())),
    **dict.fromkeys(("pieces", "identity", "family", "reference", "responses"), (_OF_QUESTION, ())),
    "questions": (("split",), ()),
    "statistics": (("questions", "texts"), ()),
    "simulated": (("simulate",), ()),
    "distinct": (("split", "draws", "taken", "most"), ()),
    "splits": ((), ("heldout", "validation", "demonstrations", "train")),
}
