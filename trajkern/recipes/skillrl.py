"""SkillRL (arXiv 2602.08234; github aiming-lab/SkillRL): what earlier attempts taught, shown in the prompt.

Only the prompt changes: the advantages are plain GRPO's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trajkern._checks import check_choice, check_count, check_number, describe
from trajkern.recipes.srl import similarity

KINDS = ("demonstration", "lesson")
SEARCH = ("family", "all")


class Attempt(NamedTuple):
    """A failed attempt at ``prompt``."""

    prompt: str
    response: str
    reward: float


class Skill(NamedTuple):
    """One entry of the bank.

    Attributes:
        kind: "demonstration" or "lesson".
        family: the task family it belongs to; None for a general skill.
        prompt: what the text was learned from; "" for a teacher's lesson, which is drawn from several prompts.
        text: the successful response, or the lesson.
        reward: of the demonstration; of the failed attempt; 0 for a teacher's lesson.
        number: how many skills the bank had taken in before it. The lower, the older.
    """

    kind: str
    family: str | None
    prompt: str
    text: str
    reward: float
    number: int


Teacher = Callable[[str | None, Sequence[Attempt]], Sequence[str]]


class SkillBank:
    """Successes kept as demonstrations, failures as short lessons, by task family.

    A success enters at once. Failures wait until ``update`` finds their family weak; then a teacher makes lessons of
    them. The authors fill the bank before training and let it grow by lessons only: to do so, add no success later on.

    Args:
        threshold: in [0, 1]; a family whose success rate is below it learns lessons. The authors' scripts have 0.4,
            their code's default is 0.5.
        success_above: the reward above which an attempt is a success; the authors' 0.
        capacity: skills kept per family and kind, at least 1. The paper sets no bound. Beyond it the demonstration of
            the lowest reward leaves, the oldest lesson, and of equal ones the oldest.
        failures: failed attempts that a teacher sees, the latest since the last update, at least 1; the authors' 10.
        growth: lessons added by one update, at least 1; the authors' 3.
        lines: of a failed response the first and the last ``lines`` are kept, at least 1; the authors keep 5 steps.
        lesson_length: characters of a lesson, at least 4; what is longer is cut. The paper says "concise".
        search: "family" offers a prompt its own family's skills and, after them, the general ones, as the authors'
            template mode does; "all" ranks every skill by similarity alone, as their embedding mode does.
        teacher: called with a family and its failed attempts, oldest first, it returns lessons, best first (the
            authors ask o3). None states what was tried and failed, the latest attempt first. What it raises goes
            through, and changes nothing.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.4,
        success_above: float = 0.0,
        capacity: int = 32,
        failures: int = 10,
        growth: int = 3,
        lines: int = 5,
        lesson_length: int = 400,
        search: str = "family",
        teacher: Teacher | None = None,
    ) -> None:
        self.threshold = check_number("threshold", threshold, low=0, high=1)
        self.success_above = check_number("success_above", success_above)
        self.capacity = check_count("capacity", capacity, low=1)
        self.failures = check_count("failures", failures, low=1)
        self.growth = check_count("growth", growth, low=1)
        self.lines = check_count("lines", lines, low=1)
        self.lesson_length = check_count("lesson_length", lesson_length, low=4)
        self.search = check_choice("search", search, SEARCH)
        if teacher is not None and not callable(teacher):
            raise TypeError(f"teacher must be callable or None, got {describe(teacher)}")
        self.teacher = teacher
        self._skills: list[Skill] = []  # oldest first
        self._failed: dict[str | None, list[Attempt]] = {}
        self._taken = 0

    def __len__(self) -> int:
        return len(self._skills)

    @property
    def skills(self) -> tuple[Skill, ...]:
        """All skills, the oldest first."""
        return tuple(self._skills)

    def add(self, prompt: str, response: str, reward: float, family: str | None = None) -> Skill | None:
        """Take in a finished attempt; the demonstration that it became, or None.

        A prompt has one demonstration: the one of the highest reward, of equal ones the first. A failure waits for
        ``update``. An empty response becomes neither.

        Args:
            prompt: as it was before ``render``.
            response: what the policy wrote.
            reward: finite.
            family: None for none: its skills are general.
        """
        _check_text("prompt", prompt)
        _check_text("response", response)
        reward = check_number("reward", reward)
        _check_family(family)
        if not response.strip():
            return None
        if reward <= self.success_above:
            waiting = self._failed.setdefault(family, [])
            waiting.append(Attempt(prompt, _ends(response, self.lines), float(reward)))
            del waiting[: -self.failures]
            return None
        known = [s for s in self._skills if (s.kind, s.family, s.prompt) == ("demonstration", family, prompt)]
        if known and known[0].reward >= reward:
            return None
        self._skills = [s for s in self._skills if s not in known]
        return self._enter("demonstration", family, prompt, response, float(reward))

    def update(self, family: str | None, success_rate: float) -> list[Skill]:
        """Learn lessons from a family's failures where its success rate is below the threshold; the new lessons.

        To be called at every validation. The failures are forgotten either way: the next update sees later ones.

        Args:
            family: None for the attempts without a family.
            success_rate: in [0, 1].
        """
        _check_family(family)
        success_rate = check_number("success_rate", success_rate, low=0, high=1)
        waiting = self._failed.get(family, [])
        lessons: list[tuple[str, Attempt]] = []
        if waiting and success_rate < self.threshold:
            lessons = self._lessons(family, waiting)
        self._failed.pop(family, None)
        added: list[Skill] = []
        known = {s.text for s in self._skills if s.kind == "lesson" and s.family == family}
        for text, source in lessons:
            text = _cut(" ".join(text.split()), self.lesson_length)
            if text and text not in known and len(added) < self.growth:
                known.add(text)
                entered = self._enter("lesson", family, source.prompt, text, source.reward)
                added += [entered] if entered else []
        return [skill for skill in added if skill in self._skills]

    def retrieve(self, prompt: str, family: str | None = None, k: int = 6) -> list[Skill]:
        """The ``k`` skills for a prompt, the best first: at most k, as many as there are.

        They are ranked by the similarity of the prompts, 2 M / T as ``difflib.SequenceMatcher(None, skill, prompt,
        autojunk=False)`` has it; a teacher's lesson is compared by its text. Of equal ones the older is first. What was
        learned from this very prompt is never returned: it would tell the answer.

        Args:
            prompt: as ``add`` got it.
            family: None for a prompt of no known family: general skills.
            k: at least 0; the authors' 6.
        """
        _check_text("prompt", prompt)
        _check_family(family)
        k = check_count("k", k, low=0)
        offered = [s for s in self._skills if s.prompt != prompt]
        if self.search == "family":
            offered = [s for s in offered if s.family in (family, None)]
        compared = [skill.prompt or skill.text for skill in offered]
        likeness = similarity(compared, [prompt] * len(compared), autojunk=False).tolist()

        def rank(at: int) -> tuple[bool, float, int]:
            foreign = self.search == "family" and offered[at].family != family
            return foreign, -likeness[at], offered[at].number

        return [offered[at] for at in sorted(range(len(offered)), key=rank)[:k]]

    @staticmethod
    def render(prompt: str, skills: Sequence[Skill]) -> str:
        """The prompt with the skills before it: lessons as a list, then demonstrations, the best one next to it.

        Without skills it is the prompt itself.
        """
        _check_text("prompt", prompt)
        lessons = [f"- {skill.text}\n" for skill in skills if skill.kind == "lesson"]
        shown = [f"{skill.prompt}\n{skill.text}\n\n" for skill in reversed(skills) if skill.kind == "demonstration"]
        head = f"Lessons from earlier attempts:\n{''.join(lessons)}\n" if lessons else ""
        return f"{head}{''.join(shown)}{prompt}"

    def state_dict(self) -> dict[str, Any]:
        """The bank's content as JSON data; the settings are the constructor's."""
        return {
            "skills": [skill._asdict() for skill in self._skills],
            "failures": [[family, [a._asdict() for a in attempts]] for family, attempts in self._failed.items()],
            "taken": self._taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by that of ``state``, as ``state_dict`` gave it, or after a round trip through JSON.

        Raises:
            ValueError: it is no such state, or has more than this bank's capacity; the bank is as it was.
        """
        try:
            skills = [Skill(**entry) for entry in state["skills"]]
            failed = {family: [Attempt(**entry) for entry in attempts] for family, attempts in state["failures"]}
            taken = state["taken"]
            _check_state(skills, failed, taken)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state must be what SkillBank.state_dict returned; {error!r}") from error
        for skill in skills:
            count = sum((s.kind, s.family) == (skill.kind, skill.family) for s in skills)
            if count > self.capacity:
                raise ValueError(
                    f"state must have at most {self.capacity} skills of a family and kind, the bank's capacity;"
                    f" it has {count} {skill.kind}s of family {skill.family!r}"
                )
        self._failed = {family: attempts[-self.failures :] for family, attempts in failed.items()}
        self._skills, self._taken = skills, taken

    def _lessons(self, family: str | None, waiting: list[Attempt]) -> list[tuple[str, Attempt]]:
        if self.teacher is None:
            tried = (f'"{_line(a.response)}" is no answer to "{_line(a.prompt)}"' for a in reversed(waiting))
            return list(zip(tried, reversed(waiting), strict=True))
        texts = self.teacher(family, tuple(waiting))
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"teacher must return a sequence of strings, got {describe(texts)}")
        return [(text, Attempt("", "", 0.0)) for text in texts]

    def _enter(self, kind: str, family: str | None, prompt: str, text: str, reward: float) -> Skill | None:
        """The skill, or None where it is the one that has to leave."""
        new = Skill(kind, family, prompt, text, reward, self._taken)
        self._taken += 1
        self._skills.append(new)
        peers = [s for s in self._skills if (s.kind, s.family) == (kind, family)]
        if len(peers) <= self.capacity:
            return new
        leaves = min(peers, key=lambda s: (s.reward if kind == "demonstration" else 0.0, s.number))
        self._skills.remove(leaves)
        return None if leaves is new else new


def _ends(text: str, count: int) -> str:
    """The first and the last ``count`` lines."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= 2 * count else [*lines[:count], "...", *lines[-count:]])


def _line(text: str) -> str:
    return _cut(" ".join(text.split()), 120)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {describe(value)}")


def _check_family(value: Any) -> None:
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"family must be a string or None, got {describe(value)}")


def _check_state(skills: list[Skill], failed: dict[str | None, list[Attempt]], taken: Any) -> None:
    check_count("taken", taken, low=0)
    numbers = [-1, *(skill.number for skill in skills), taken]
    if any(not isinstance(n, int) for n in numbers) or sorted(set(numbers)) != numbers:
        raise ValueError(f"the skills' numbers must ascend below taken, got {numbers[1:]}")
    for skill in skills:
        check_choice("kind", skill.kind, KINDS)
        _check_family(skill.family)
        _check_text("prompt", skill.prompt)
        _check_text("text", skill.text)
        check_number("reward", skill.reward)
    for family, attempts in failed.items():
        _check_family(family)
        for attempt in attempts:
            _check_text("prompt", attempt.prompt)
            _check_text("response", attempt.response)
            check_number("reward", attempt.reward)
