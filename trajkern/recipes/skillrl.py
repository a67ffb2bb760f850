"""SkillRL (arXiv 2602.08234; github aiming-lab/SkillRL): what earlier attempts taught, shown in the prompt.

Only the prompt changes: the advantages are plain GRPO's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trajkern._checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_sequence,
    describe,
    suggesting,
)
from trajkern.recipes._skills import (
    Attempt,
    Embed,
    Likeness,
    Sketch,
    Skill,
    check_family,
    check_state,
    check_text,
    cut,
    ends,
    line,
    listed,
    sketches,
)

SEARCH = ("family", "all")
Teacher = Callable[[str | None, Sequence[Attempt]], Sequence[str | Sketch]]
Distiller = Callable[[str | None, Attempt], Sequence[str | Sketch]]


@suggesting
class SkillBank:
    r"""Successes kept as demonstrations or patterns, failures as short lessons, by task family.

    A success enters at once, as it is or as the patterns that a distiller finds in it. Failures wait until ``update``
    finds their family weak; then a teacher makes lessons of them. The authors fill the bank before training and let it
    grow by lessons only: to do so, add no success later on. Skills without a family are general.

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
        search: task skills are those of the prompt's own "family", as in the paper and the authors' template mode, or
            those of "all" families, as in their embedding mode.
        embed: maps n texts to n vectors, ``[n, d]``, for similarity as their cosine, as
            ``trajkern.integrations.sentence_transformers.embeddings`` does. None: 2 M / T as
            ``difflib.SequenceMatcher(None, skill, prompt, autojunk=False)`` has it.
        teacher: called with a family and its failed attempts, oldest first, it returns lessons, best first, as texts or
            :class:`Sketch`\ es (the authors ask o3). None states what was tried and failed, the latest attempt first.
            What it raises goes through, and changes nothing.
        distiller: called with a family and a successful attempt, it returns patterns in the same way, and the success
            itself is not kept; once a prompt. None keeps the success as a demonstration.

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
        embed: Embed | None = None,
        teacher: Teacher | None = None,
        distiller: Distiller | None = None,
    ) -> None:
        self.threshold = check_number("threshold", threshold, low=0, high=1)
        self.success_above = check_number("success_above", success_above)
        self.capacity = check_count("capacity", capacity, low=1)
        self.failures = check_count("failures", failures, low=1)
        self.growth = check_count("growth", growth, low=1)
        self.lines = check_count("lines", lines, low=1)
        self.lesson_length = check_count("lesson_length", lesson_length, low=4)
        self.search = check_choice("search", search, SEARCH)
        for name, function in (("embed", embed), ("teacher", teacher), ("distiller", distiller)):
            if function is not None:
                check_callable(name, function, "callable or None")
        self.teacher, self.distiller = teacher, distiller
        self._likeness = Likeness(embed)
        self._shelves: dict[str | None, list[Skill]] = {}  # of each family, oldest first
        self._failed: dict[str | None, list[Attempt]] = {}
        self._taken = 0

    def __len__(self) -> int:
        return sum(map(len, self._shelves.values()))

    @property
    def skills(self) -> tuple[Skill, ...]:
        """All skills, the oldest first."""
        every = (skill for shelf in self._shelves.values() for skill in shelf)
        return tuple(sorted(every, key=lambda skill: skill.number))

    @property
    def families(self) -> tuple[str, ...]:
        """Those that have skills, in order."""
        return tuple(sorted(family for family, shelf in self._shelves.items() if shelf and family is not None))

    def add(self, prompt: str, response: str, reward: float, family: str | None = None) -> Skill | None:
        """Take in a finished attempt; the demonstration or the first of the patterns that it became, or None.

        A prompt has one demonstration: the one of the highest reward, of equal ones the first. A failure waits for
        ``update``. An empty response becomes neither.

        Args:
            prompt: as it was before ``render``.
            response: what the policy wrote.
            reward: finite.
            family: None for none: its skills are general.
        """
        check_text("prompt", prompt)
        check_text("response", response)
        reward = check_number("reward", reward)
        check_family(family)
        if not response.strip():
            return None
        if reward <= self.success_above:
            waiting = self._failed.setdefault(family, [])
            waiting.append(Attempt(prompt, ends(response, self.lines), float(reward)))
            del waiting[: -self.failures]
            return None
        if self.distiller is not None:
            return self._distilled(prompt, response, float(reward), family)
        known = self._of_prompt("demonstration", family, prompt)
        if known and known.reward >= reward:
            return None
        if known:
            self._shelves[family].remove(known)
        return self._enter("demonstration", family, prompt, response, float(reward))

    def update(self, family: str | None, success_rate: float, *, general: bool = False) -> list[Skill]:
        """Learn lessons from a family's failures where its success rate is below the threshold; the new lessons.

        To be called at every validation. The failures are forgotten either way: the next update sees later ones.

        Args:
            family: None for the attempts without a family.
            success_rate: in [0, 1].
            general: whether the lessons are for every family, as the authors' code files them, or for this one.
        """
        check_family(family)
        success_rate = check_number("success_rate", success_rate, low=0, high=1)
        filed = None if check_flag("general", general) else family
        waiting = self._failed.get(family, [])
        lessons: list[tuple[Sketch, Attempt]] = []
        if waiting and success_rate < self.threshold:
            lessons = self._lessons(family, waiting)
        self._failed.pop(family, None)
        added = self._entered("lesson", filed, lessons)
        return [skill for skill in added if skill in self._shelves[filed]]

    def retrieve(
        self, prompt: str, family: str | None = None, k: int = 6, *, delta: float = 0.4, general: int | None = None
    ) -> list[Skill]:
        """The skills for a prompt: up to ``k`` of its task that are like it, the best first, then the general ones.

        General skills are shown always, task skills where :attr:`Skill.wording` is like the prompt by more than
        ``delta``. Of equally alike ones the older is first. What was learned from this very prompt is never returned:
        it would tell the answer.

        Args:
            prompt: as ``add`` got it.
            family: None for a prompt of no known family: general skills.
            k: at least 0; the authors' 6. 0 returns nothing at all.
            delta: in [-1, 1]; a task skill is shown where its similarity to the prompt is above this, the paper's 0.4.
                The authors' code has no such bound: -1.
            general: at most so many general skills, the most alike; None: all, as in the paper. The authors' code
                shows 6.
        """
        check_text("prompt", prompt)
        check_family(family)
        k, delta = check_count("k", k, low=0), check_number("delta", delta, low=-1, high=1)
        general = None if general is None else check_count("general", general, low=0)
        if k == 0:
            return []
        shelves = {family, None} if self.search == "family" else self._shelves.keys()
        offered = [skill for name in shelves for skill in self._shelves.get(name, ()) if skill.prompt != prompt]
        offered.sort(key=lambda skill: skill.number)
        likeness = self._likeness([skill.wording for skill in offered], prompt)
        ranked = sorted(range(len(offered)), key=lambda at: -likeness[at])
        of_task = [offered[at] for at in ranked if offered[at].family is not None and likeness[at] > delta]
        return of_task[:k] + [offered[at] for at in ranked if offered[at].family is None][:general]

    @staticmethod
    def render(prompt: str, skills: Sequence[Skill]) -> str:
        """The prompt with the skills before it: patterns, lessons, then demonstrations, the best one next to it.

        Without skills it is the prompt itself.
        """
        check_text("prompt", prompt)
        skills = check_sequence("skills", skills, "skills")
        for i, skill in enumerate(skills):
            if not isinstance(skill, Skill):
                raise TypeError(f"skills[{i}] must be a Skill, got {describe(skill)}")
        head = ""
        for kind, title in (("pattern", "What has worked before:"), ("lesson", "Lessons from earlier attempts:")):
            lines = [listed(skill) for skill in skills if skill.kind == kind]
            head += f"{title}\n{''.join(lines)}\n" if lines else ""
        shown = [f"{skill.prompt}\n{skill.text}\n\n" for skill in reversed(skills) if skill.kind == "demonstration"]
        return f"{head}{''.join(shown)}{prompt}"

    def state_dict(self) -> dict[str, Any]:
        """The bank's content as JSON data; the settings are the constructor's."""
        return {
            "skills": [skill._asdict() for skill in self.skills],
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
            check_state(skills, failed, taken)
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
        self._shelves, self._taken = {}, taken
        for skill in skills:
            self._shelves.setdefault(skill.family, []).append(skill)

    def _of_prompt(self, kind: str, family: str | None, prompt: str) -> Skill | None:
        """The first of this kind that was learned from ``prompt``."""
        shelf = self._shelves.get(family, ())
        return next((skill for skill in shelf if skill.prompt == prompt and skill.kind == kind), None)

    def _distilled(self, prompt: str, response: str, reward: float, family: str | None) -> Skill | None:
        if self._of_prompt("pattern", family, prompt):
            return None
        assert self.distiller is not None
        source = Attempt(prompt, response, reward)
        found = sketches("distiller", self.distiller(family, source))
        entered = self._entered("pattern", family, [(sketch, source) for sketch in found])
        return entered[0] if entered else None

    def _lessons(self, family: str | None, waiting: list[Attempt]) -> list[tuple[Sketch, Attempt]]:
        if self.teacher is None:
            tried = (f'"{line(a.response)}" is no answer to "{line(a.prompt)}"' for a in reversed(waiting))
            return [(Sketch("", text), a) for text, a in zip(tried, reversed(waiting), strict=True)]
        found = sketches("teacher", self.teacher(family, tuple(waiting)))
        return [(sketch, Attempt("", "", 0.0)) for sketch in found]

    def _entered(self, kind: str, family: str | None, found: Sequence[tuple[Sketch, Attempt]]) -> list[Skill]:
        """The new ones of these, at most ``growth``, as skills that the bank has taken in."""
        added: list[Skill] = []
        known = {skill.text for skill in self._shelves.get(family, ()) if skill.kind == kind}
        for sketch, source in found:
            name, text, applies = (cut(" ".join(x.split()), self.lesson_length) for x in sketch)
            if text and text not in known and len(added) < self.growth:
                known.add(text)
                entered = self._enter(kind, family, source.prompt, text, source.reward, name, applies)
                added += [entered] if entered else []
        return added

    def _enter(
        self, kind: str, family: str | None, prompt: str, text: str, reward: float, name: str = "", applies: str = ""
    ) -> Skill | None:
        """The skill, or None where it is the one that has to leave."""
        new = Skill(kind, family, prompt, text, reward, self._taken, name, applies)
        self._taken += 1
        shelf = self._shelves.setdefault(family, [])
        shelf.append(new)
        peers = [skill for skill in shelf if skill.kind == kind]
        if len(peers) <= self.capacity:
            return new
        leaves = min(peers, key=lambda s: (s.reward if kind == "demonstration" else 0.0, s.number))
        shelf.remove(leaves)
        self._likeness.forget(leaves.wording)
        return None if leaves is new else new


__all__ = ["Attempt", "Distiller", "Embed", "Sketch", "Skill", "SkillBank", "Teacher"]
