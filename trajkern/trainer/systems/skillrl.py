"""SkillRL: plain GRPO on prompts that show what earlier attempts taught."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from trajkern import credit
from trajkern.integrations.sentence_transformers import embeddings
from trajkern.recipes.skillrl import Sketch, Skill, SkillBank
from trajkern.trainer.packing import Piece, demonstration
from trajkern.trainer.returned import as_list, as_text, ask
from trajkern.trainer.schema import Count, Finite, Range, Share, Size, check_fields
from trajkern.trainer.systems.base import GroupSystem, Local, load_function
from trajkern.trainer.tasks.base import Question, Splits
from trajkern.trainer.tasks.capabilities import family_of

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # where a pretrained model's tokens are no text
Search = Literal["family", "all", "other"]
Grows = Literal["both", "successes", "lessons"]
Scope = Literal["family", "all"]


@dataclass(frozen=True)
class SkillRL:
    """Recipe skillrl. What is not said here is said of trajkern.recipes.skillrl.SkillBank's argument of that name.

    Args:
        top_k: task skills shown with a question at most, the paper's 6; 0 trains without the bank.
        delta: in [-1, 1]; a task skill is shown where it is more like the question than this, the paper's 0.4.
        general: general skills shown at most; by default all.
        search: whose task skills are offered: the question's own "family", "all" families, or, as a control, an
            "other" family, drawn by the prompt: as many words, of which none are of use.
        embed: how alike texts are: by the cosine of vectors from package.module:function, which maps n texts to n
            vectors, or from a model of sentence-transformers (the extra "skills"), by its name or folder; by default by
            their letters.
        grows_by: what training adds: "both", demonstrations of "successes" only, or "lessons" of failures only, as the
            authors. The bank begins with the warm-up's demonstrations in any case.
        distiller: package.module:function of a family and a success, which returns patterns; each success is kept as
            these, those of the warm-up too, and not as a demonstration.
        teacher: package.module:function of a family and its failures, which returns lessons; by default a lesson says
            what was tried.
        lessons_for: the "family" that failed, or "all" as general skills, the authors' way.
        threshold: success rate of a family under which its failures become lessons; see SkillBank.
        success_above: below 1, the reward above which an attempt is a success.
        failures: failed attempts that the teacher sees.
        growth: lessons or patterns added at once.
        lines: of a failed response, kept at its beginning and at its end.
        lesson_length: characters of a lesson or pattern.
        capacity: skills kept of a family and kind.
        bare: in [0, 1]; the share of the warm-up's demonstrations that show no skill, drawn by their prompts.
    """

    top_k: Count = 6
    delta: Annotated[float, Range(low=-1, high=1)] = 0.4
    general: Count | None = None
    search: Search = "family"
    embed: str | None = None
    grows_by: Grows = "both"
    distiller: str | None = None
    teacher: str | None = None
    lessons_for: Scope = "family"
    threshold: Share = 0.4
    success_above: Finite = 0.0
    failures: Size = 10
    growth: Size = 3
    lines: Size = 5
    lesson_length: Annotated[int, Range(low=4)] = 400
    capacity: Size = 32
    bare: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "skillrl.")
        if not self.success_above < 1:
            raise ValueError(f"skillrl.success_above must be below 1, a right answer's, got {self.success_above}")


class SkillBased(GroupSystem):
    """The bank starts with the warm-up's demonstrations, takes in each success and, after a weak validation, lessons.

    It is saved with the checkpoint. The warm-up shows skills, too, so that the policy learns to read them.
    """

    settings_type = SkillRL
    remembers = True

    settings: SkillRL

    def __post_init__(self) -> None:
        settings = self.settings
        sizes = ("threshold", "success_above", "failures", "growth", "lines", "lesson_length", "capacity")
        self._bank = SkillBank(
            search="all" if settings.search == "all" else "family",
            embed=embedding(settings.embed),
            teacher=self._once("teacher", settings.teacher),
            distiller=self._once("distiller", settings.distiller),
            **{name: getattr(settings, name) for name in sizes},
        )
        self._due: list[Question] = []  # what the bank has yet to begin with
        self._found: dict[tuple[str, str], list[Skill]] = {}  # by prompt and family, while the bank stays as it is

    def pool(self, splits: Splits) -> list[Question]:
        self._due = splits.demonstrations
        return splits.train

    @property
    def bank(self) -> SkillBank:
        """With the demonstrations, unless it was restored: to distil them again may be dear."""
        due, self._due, shown = self._due, [], Counter[str]()
        for question in due:
            family = family_of(self.task, question)
            shown[family] += 1
            if shown[family] <= self.settings.capacity:
                self._bank.add(question.prompt, question.answer, 1.0, family)
        return self._bank

    def skills(self, question: Question) -> list[Skill]:
        """Those that are shown with it."""
        family, settings = family_of(self.task, question), self.settings
        key = question.prompt, family
        if key not in self._found:
            searched = self._another(family, question.prompt) if settings.search == "other" else family
            sizes: dict[str, Any] = {"delta": settings.delta, "general": settings.general}
            self._found[key] = self.bank.retrieve(question.prompt, searched, settings.top_k, **sizes)
        return self._found[key]

    def prompt(self, question: Question) -> list[int]:
        skills = self.skills(question)
        prompt, text = (self.bank.render(x, skills) for x in (question.prompt, question.text))
        return self.policy.prompt(question._replace(prompt=prompt, text=text))

    def demonstration(self, question: Question) -> list[Piece]:
        if draw(question.prompt) < self.settings.bare:
            return [(self.policy.prompt(question), False), *demonstration(self.policy, self.task.pieces(question))]
        return super().demonstration(question)

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"skills": float(len(self.bank))}

    def statistics(self, questions: list[Question]) -> dict[str, float]:
        """Skills shown with a question, and the share of the questions that are shown one of their own family."""
        shown = [(family_of(self.task, question), self.skills(question)) for question in questions]
        own = sum(any(skill.family == family for skill in skills) for family, skills in shown)
        count = max(len(questions), 1)
        return {"shown": sum(len(skills) for _, skills in shown) / count, "retrieved": own / count}

    def learn(self, questions: list[Question], texts: list[str], rewards: list[float]) -> None:
        grows_by, above = self.settings.grows_by, self.settings.success_above
        self._found.clear()
        for question, text, reward in zip(questions, texts, rewards, strict=True):
            wanted = grows_by == "both" or (reward > above) == (grows_by == "successes")
            if wanted and UNDECODED not in text:
                self.bank.add(question.prompt, text, reward, family_of(self.task, question))

    def validated(self, pass_at_1: float, families: dict[str, float]) -> None:
        self._found.clear()
        for family, rate in (families or {self.task.name: pass_at_1}).items():
            if not 0 <= rate <= 1:
                expected = (
                    f"reward of task {self.task.name} must be in [0, 1] for the recipe skillrl, as a rate of success"
                )
                raise ValueError(f"{expected}; its mean in the family {family!r} is {rate:g}")
            self.bank.update(family, rate, general=self.settings.lessons_for == "all")

    def state(self) -> Any:
        return self.bank.state_dict()

    def restore(self, state: Any) -> None:
        if state is not None:  # as it is where another recipe's warm-up is continued
            self._due = []
            self._found.clear()
            self._bank.load_state_dict(state)

    def _another(self, family: str, prompt: str) -> str | None:
        """Another family that has skills; None where there is none."""
        others = [other for other in self.bank.families if other != family]
        return others[int(draw(prompt) * len(others))] if others else None

    def _sketches(self, name: str, value: Any) -> list[str | Sketch]:
        """What a teacher or a distiller returned, in words that a prompt can show."""
        expected, found = "a list of texts or Sketches", as_list(name, value, "a list of texts or Sketches")
        for each in found:
            for words in each if isinstance(each, Sketch) else (each,):
                as_text(name, words, expected, self.policy.alphabet, "an entry")
        return found

    def _once(self, name: str, function: str | None) -> Callable[..., Any] | None:
        """The function, called on rank 0: what it says, which may be another thing each time, is told to all."""
        if function is None:
            return None
        found = load_function(f"skillrl.{name}", function, self._sketches, ask)
        return lambda *of: self.ranks.told(found(*of) if self.ranks.number == 0 else None)


def embedding(name: str | None) -> Callable[..., Any] | None:
    """What maps texts to vectors: a function, or a model of sentence-transformers."""
    if name is None:
        return None
    return load_function("skillrl.embed", name) if ":" in name else embeddings(name)


def draw(prompt: str) -> float:
    """A number in [0, 1) that a prompt always has."""
    return random.Random(prompt).random()
