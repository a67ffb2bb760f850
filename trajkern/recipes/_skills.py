"""What SkillRL's bank keeps, and how like a prompt it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_count, check_number, check_tensor, describe
from trajkern.recipes.srl import similarity

KINDS = ("demonstration", "pattern", "lesson")
Embed = Callable[[Sequence[str]], Any]


class Attempt(NamedTuple):
    """An attempt at ``prompt``."""

    prompt: str
    response: str
    reward: float


class Sketch(NamedTuple):
    """A skill as a teacher words it: a short name, the principle in a sentence or two, and when to apply it."""

    name: str
    principle: str
    applies: str = ""


class Skill(NamedTuple):
    """One entry of the bank.

    Attributes:
        kind: "demonstration", a success as it was; "pattern", what made a success one; "lesson", of failures.
        family: the task family it belongs to; None for a general skill.
        prompt: what the text was learned from; "" for a teacher's lesson, which is drawn from several prompts.
        text: the successful response; or the principle of the pattern or the lesson.
        reward: of the success; of the failed attempt; 0 for a teacher's lesson.
        number: how many skills the bank had taken in before it. The lower, the older.
        name, applies: of a pattern or a lesson, where its teacher gave them: what it is called, and when to apply it.
    """

    kind: str
    family: str | None
    prompt: str
    text: str
    reward: float
    number: int
    name: str = ""
    applies: str = ""

    @property
    def wording(self) -> str:
        """What a prompt is compared with: name, principle and applicability; without a name, what it was learned
        from, or else its text."""
        parts = (self.name, self.text, self.applies)
        return ". ".join(part for part in parts if part) if self.name else self.prompt or self.text


class Likeness:
    """How like texts are: the cosine of their vectors, which are kept; without ``embed`` what difflib says."""

    def __init__(self, embed: Embed | None) -> None:
        self.embed = embed
        self._vectors: dict[str, Tensor] = {}  # of skills' wordings, of length 1

    def __call__(self, wordings: Sequence[str], prompt: str) -> list[float]:
        if self.embed is None:
            return similarity(wordings, [prompt] * len(wordings), autojunk=False).tolist()
        if not wordings:
            return []
        new = [text for text in dict.fromkeys((*wordings, prompt)) if text not in self._vectors]
        unit = self._embedded(new) if new else ()
        vectors = self._vectors | dict(zip(new, unit, strict=True))
        self._vectors |= {text: vectors[text] for text in wordings}  # prompts pass by, skills stay
        return [float(vectors[text] @ vectors[prompt]) for text in wordings]

    def _embedded(self, texts: list[str]) -> Tensor:  # [n, d]
        """Vectors of length 1, float64."""
        assert self.embed is not None
        returned = self.embed(list(texts))
        try:
            found = torch.as_tensor(returned, device="cpu")
            check_tensor("the result of embed", found)
        except Exception:  # whatever torch says of what it cannot read
            raise TypeError(f"embed must return {len(texts)} vectors, one a text; got {describe(returned)}") from None
        legal = found.ndim == 2 and len(found) == len(texts) and not found.is_complex()
        if not legal or not bool(found.double().norm(dim=1).isfinite().all()):
            raise ValueError(f"embed must return {len(texts)} finite vectors, one a text; got {describe(found)}")
        for known in self._vectors.values():
            if found.shape[1] != len(known):
                raise ValueError(f"embed must return vectors of {len(known)} numbers, as before; got {describe(found)}")
            break
        return torch.nn.functional.normalize(found.detach().double().cpu(), dim=1)

    def forget(self, wording: str) -> None:
        """A skill has left."""
        self._vectors.pop(wording, None)


def sketches(name: str, found: Any) -> list[Sketch]:
    if isinstance(found, (str, Sketch)) or not isinstance(found, Sequence):
        raise TypeError(f"{name} must return a sequence of strings or Sketches, got {describe(found)}")
    for x in found:
        parts = x if isinstance(x, Sketch) else (x,)
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(f"{name} must return a sequence of strings or Sketches, got {describe(x)} in it")
    return [x if isinstance(x, Sketch) else Sketch("", x) for x in found]


def listed(skill: Skill) -> str:
    named = f"{skill.name}: {skill.text}" if skill.name else skill.text
    return f"- {named} Apply when: {skill.applies}\n" if skill.applies else f"- {named}\n"


def ends(text: str, count: int) -> str:
    """The first and the last ``count`` lines."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= 2 * count else [*lines[:count], "...", *lines[-count:]])


def line(text: str) -> str:
    return cut(" ".join(text.split()), 120)


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {describe(value)}")


def check_family(value: Any) -> None:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"family must be a string or None, got {describe(value)}")


def check_state(skills: list[Skill], failed: dict[str | None, list[Attempt]], taken: Any) -> None:
    taken = check_count("taken", taken, low=0)
    numbers = [-1, *(skill.number for skill in skills), taken]
    if any(not isinstance(n, int) for n in numbers) or sorted(set(numbers)) != numbers:
        raise ValueError(f"the skills' numbers must ascend below taken, got {numbers[1:]}")
    for skill in skills:
        check_choice("kind", skill.kind, KINDS)
        check_family(skill.family)
        check_text("prompt", skill.prompt)
        check_text("text", skill.text)
        check_text("name", skill.name)
        check_text("applies", skill.applies)
        check_number("reward", skill.reward)
    for family, attempts in failed.items():
        check_family(family)
        for attempt in attempts:
            check_text("prompt", attempt.prompt)
            check_text("response", attempt.response)
            check_number("reward", attempt.reward)
