"""SkillRL: plain GRPO on prompts that show what earlier attempts taught."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import trajkern as tk
from trajkern.recipes.skillrl import SkillBank
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.models.tokenizer import ALPHABET
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.systems.base import Found, Played, System
from trajkern.trainer.tasks.base import Question, Splits, Task

_READABLE = frozenset(ALPHABET)


class SkillBased(System):
    """The bank starts with the warm-up's demonstrations, takes in each success and, after a weak validation, lessons.

    It is saved with the checkpoint. The warm-up shows skills, too, so that the policy learns to read them.
    """

    remembers = True

    def __init__(self, config: TrainConfig, task: Task, policy: Policy, ranks: Ranks = ALONE) -> None:
        super().__init__(config, task, policy, ranks)
        settings = config.skillrl
        self.bank = SkillBank(threshold=settings.threshold, capacity=settings.capacity)

    def pool(self, splits: Splits) -> list[Question]:
        for question in splits.demonstrations[: self.config.skillrl.capacity]:
            self.bank.add(question.prompt, question.answer, 1.0, self.task.name)
        return splits.train

    def prompt(self, question: Question) -> list[int]:
        found = self.bank.retrieve(question.prompt, self.task.name, self.config.skillrl.top_k)
        prompt, text = (self.bank.render(x, found) for x in (question.prompt, question.text))
        return self.policy.prompt(question._replace(prompt=prompt, text=text))

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Found:
        advantages = tk.group_advantages(signals["rewards"], played.batch.group_ids)
        return Found(advantages, values={"skills": float(len(self.bank))})

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
