"""SkillRL: plain GRPO on prompts that show what earlier attempts taught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trajkern import credit
from trajkern.recipes.skillrl import SkillBank
from trajkern.trainer.models.tokenizer import ALPHABET
from trajkern.trainer.systems.base import GroupSystem, Local
from trajkern.trainer.tasks.base import Question, Splits

_READABLE = frozenset(ALPHABET)


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
        for question in splits.demonstrations[: self.settings.capacity]:
            self.bank.add(question.prompt, question.answer, 1.0, self.task.name)
        return splits.train

    def prompt(self, question: Question) -> list[int]:
        skills = self.bank.retrieve(question.prompt, self.task.name, self.settings.top_k)
        prompt, text = (self.bank.render(x, skills) for x in (question.prompt, question.text))
        return self.policy.prompt(question._replace(prompt=prompt, text=text))

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"skills": float(len(self.bank))}

    def learn(self, questions: list[Question], texts: list[str], rewards: list[float]) -> None:
        for question, text, reward in zip(questions, texts, rewards, strict=True):
            if set(text) <= _READABLE:
                self.bank.add(question.prompt, text, reward, self.task.name)

    def validated(self, pass_at_1: float) -> None:
        self.bank.update(self.task.name, pass_at_1)

    def state(self) -> Any:
        return self.bank.state_dict()

    def restore(self, state: Any) -> None:
        self.bank.load_state_dict(state)
