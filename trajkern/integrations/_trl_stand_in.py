"""How trajkern stands in for methods of TRL's trainers, one by one: nothing but a trainer itself knows that it does.

A trainer has the name of what was put in its own ``__dict__``, and a class that is derived from its own and looks there
at each call. So copies have it, other trainers do not, and a trainer that nobody wants is kept by nobody.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trajkern.integrations._adapter import Patches, held

# A method's stand-in: (trainer, the trainer's own method, which is bound to it, arguments) -> what the method returns.
StandIn = Callable[..., Any]
_KEY = "_trajkern"  # of a trainer: what was put; of a class: what its trainers get when they are made
_DERIVED = "_trajkern_derived"  # of a class that looks there
_METHODS = (
    "_calculate_rewards",
    "_compute_loss",
    "_generate_and_score_completions",
    "_save_checkpoint",
    "compute_loss",
    "log",
)
_derived: weakref.WeakValueDictionary[int, type] = weakref.WeakValueDictionary()  # id of its base, which it keeps


@dataclass(eq=False)
class Put:
    """What one call put, for one trainer or for those that are made of a class."""

    methods: dict[str, StandIn]
    crediting: Any  # what makes the advantages; None where TRL does
    of: type | None = None  # the class
    since: object = field(default_factory=object)  # since when without a break
    patches: Patches = field(default_factory=Patches)

    def __deepcopy__(self, memo: dict[int, Any]) -> Put:
        return self

    @property
    def named(self) -> str:
        return "" if self.of is None else self.of.__name__

    @property
    def stands(self) -> bool:
        """Whether it was not taken back from its class; what was put for a trainer is gone from there then."""
        now = None if self.of is None else of_class(self.of)
        return self.of is None or (now is not None and now.since is self.since)


def of_class(cls: type) -> Put | None:
    """What trainers of this class itself get when they are made."""
    found = vars(cls).get(_KEY)
    return found if isinstance(found, Put) else None


def of_trainer(trainer: Any) -> Put | None:
    """What was put for this trainer itself."""
    return next((put for put in _puts(trainer) if put.of is None), None)


def standing(trainer: Any) -> Put | None:
    """What a trainer's methods are now: its own, else that of the class furthest down that had one when it was made."""
    return next((put for put in _puts(trainer) if put.stands), None)


def of_classes(trainer: Any) -> tuple[Put, ...]:
    """What it got of its classes, that of the class furthest down first."""
    return tuple(x for x in _puts(trainer) if x.of is not None and x.stands)


def _puts(trainer: Any) -> tuple[Put, ...]:
    found: tuple[Put, ...] = vars(trainer).get(_KEY, ())
    return found


def own_class(target: Any) -> type:
    """The class that a trainer was made of, or this class."""
    cls = target if isinstance(target, type) else type(target)
    return next(x for x in cls.__mro__ if _DERIVED not in vars(x))


def give(trainer: Any, put: Put) -> None:
    """From now on this is what the trainer's methods are, until something is put before it."""
    cls, state = own_class(trainer), vars(trainer)
    for name in put.methods.keys() & state.keys():
        if not _same(state[name], trainer, name):
            raise TypeError(f"trainer_or_class must have its class's {name}; this {cls.__name__} has one of its own")
        del state[name]
    check_methods(type(trainer), put)
    own = [x for x in (put, of_trainer(trainer)) if x is not None and x.of is None]
    others = [x for x in (put, *of_classes(trainer)) if x.of is not None]
    vars(trainer)[_KEY] = (*own[:1], *dict.fromkeys(others))
    trainer.__class__ = _derived_from(type(trainer))


def _same(value: Any, trainer: Any, name: str) -> bool:
    """Whether this is the trainer's method as its class has it, which patching and restoring leaves in a trainer."""
    cls = own_class(trainer)
    kinds = (cls, _derived.get(id(cls)))
    mine = getattr(value, "__self__", None) is trainer
    return mine and any(value.__func__ is getattr(kind, name, None) for kind in kinds)


def take(trainer: Any) -> None:
    """Takes back what was put for this trainer itself."""
    if puts := of_classes(trainer):
        vars(trainer)[_KEY] = puts
    else:
        vars(trainer).pop(_KEY, None)
        trainer.__class__ = own_class(trainer)


def check_methods(cls: type, put: Put) -> None:
    """RuntimeError where the class has not what is to be replaced."""
    for name in put.methods:
        held(cls, name)


def give_class(cls: Any, put: Put, check: Callable[[Any, Put], None]) -> None:
    """From now on trainers that are made of this class get it; those that got what it had before keep that."""
    check_methods(cls, put)
    before = of_class(cls)
    if before is not None:
        put.since = before.since
        before.patches.undo()
    own = vars(cls).get("__init__")

    @functools.wraps(cls.__init__)
    def made(self: Any, *args: Any, **options: Any) -> None:
        init = functools.partial(own, self) if own else super(cls, self).__init__  # of a class that is enabled, or not
        init(*args, **options)
        if (now := of_class(cls)) is not None:
            check(self, now)
            give(self, now)

    put.patches.put(cls, "__init__", made)
    put.patches.put(cls, _KEY, put)


def take_class(cls: type) -> None:
    """Takes it back from the class and from every trainer that got it."""
    if (put := of_class(cls)) is not None:
        put.patches.undo()


def _derived_from(cls: type) -> type:
    """``cls`` with methods that look at each call at what was put."""
    if hasattr(cls, _DERIVED):
        return cls
    found = _derived.get(id(cls))
    if found is None:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _DERIVED: True}
        found = types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(body))
        for name, method in _looking(cls):
            setattr(found, name, method)
        _derived[id(cls)] = found
    return found


def _looking(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    def of(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(cls, name))
        def method(self: Any, *args: Any, **options: Any) -> Any:
            own = functools.partial(getattr(cls, name), self)
            put = standing(self)
            stand_in = None if put is None else put.methods.get(name)
            return own(*args, **options) if stand_in is None else stand_in(self, own, *args, **options)

        return method

    return ((name, of(name)) for name in _METHODS if hasattr(cls, name))
