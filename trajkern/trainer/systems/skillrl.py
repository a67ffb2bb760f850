"""SkillRL: plain GRPO on prompts that show what earlier attempts taught."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from trajkern import credit
from trajkern.recipes.skillrl import SkillBank
from trajkern.trainer.systems.base import GroupSystem, Local
from trajkern.trainer.tasks.base import Question, Splits
from trajkern.trainer.tasks.capabilities import family_of

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # where a pretrained model's tokens are no text


@dataclass(frozen=True)
class SkillRL:
    """Recipe skillrl.

    Args:
        top_k: skills shown with a question; 0 trains without the bank.
        capacity: skills kept of a family.
        threshold: success rate of a family under which its failures become lessons.
    """

    top_k: int = 1
    capacity: int = 32
    threshold: float = 0.4


class SkillBased(GroupSystem):
    """The bank starts with the warm-up's demonstrations, takes in each success and, after a weak validation, lessons.

    It is saved with the checkpoint. The warm-up shows skills, too, so that the policy learns to read them.
    """

    settings_type = SkillRL
    remembers = True

    settings: SkillRL

    def __post_init__(self) -> None:
        self.bank = SkillBank(threshold=self.settings.threshold, capacity=self.settings.capacity)

    def pool(self, splits: Splits) -> list[Question]:
        shown = Counter[str]()
        for question in splits.demonstrations:
            family = family_of(self.task, question)
            shown[family] += 1
            if shown[family] <= self.settings.capacity:
                self.bank.add(question.prompt, question.answer, 1.0, family)
        return splits.train

    def prompt(self, question: Question) -> list[int]:
        skills = self.bank.retrieve(question.prompt, family_of(self.task, question), self.settings.top_k)
        prompt, text = (self.bank.render(x, skills) for x in (question.prompt, question.text))
        return self.policy.prompt(question._replace(prompt=prompt, text=text))

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"skills": float(len(self.bank))}

    def learn(self, questions: list[Question], texts: list[str], rewards: list[float]) -> None:
        for question, text, reward in zip(questions, texts, rewards, strict=True):
            if UNDECODED not in text:
                self.bank.add(question.prompt, text, reward, family_of(self.task, question))

    def validated(self, pass_at_1: float, families: dict[str, float]) -> None:
        for family, rate in (families or {self.task.name: pass_at_1}).items():
            self.bank.update(family, rate)

    def state(self) -> Any:
        return self.bank.state_dict()

    def restore(self, state: Any) -> None:
        self.bank.load_state_dict(state)
