"""Reasoning reward models: a judge reasons about another task's responses, rewarded by its verdict alone."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes.reward_models import VERDICTS, rule_rewards, verdict
from trajkern.trainer.models import verdicts
from trajkern.trainer.models.meta import MetaModel
from trajkern.trainer.models.verdicts import HIGHEST
from trajkern.trainer.sampling import sample
from trajkern.trainer.schema import Count, check_fields
from trajkern.trainer.systems.base import GroupSystem, Played, Rater, Requirement
from trajkern.trainer.tasks.base import Answer, Question, Splits, Task
from trajkern.trainer.tasks.capabilities import CritiqueTask, ReferenceTask, ResponseTask

END = "?"  # of a short prompt, for a model of characters
MARK = "|"  # between two responses in one
META_QUESTIONS, META_SAMPLES, META_SEED = 256, 8, 20_260_102  # what a meta model is trained on


@dataclass(frozen=True)
class Judge:
    """Recipe judge; a task with responses to judge.

    Args:
        form: whether one response is scored, 10 where it is right and 0 where not, or a right one is told from a wrong
            one.
        rule: what a verdict earns, see trajkern.recipes.reward_models; that of one response goes by deepseek_grm.
        reasons: whether demonstrations reason before the verdict: by the task's critique of each response where it has
            some, else by its worked solution.
        meta_steps: of the meta model, which rates the samples of a held-out evaluation so that the better half of them
            votes: the policy as it is then, trained on its judgements of training questions; 0 for none.
        brief: whether demonstrations end with nothing but the scores or the letter, for a small model; else in the
            words that LocalJudge and LocalPairJudge ask for.
    """

    form: Literal["pointwise", "pairwise"] = "pairwise"
    rule: Literal["deepseek_grm", "rm_r1", "rrm"] = "deepseek_grm"
    reasons: bool = True
    brief: bool = False
    meta_steps: Count = 0

    def __post_init__(self) -> None:
        check_fields(self, "judge.")
        if self.form == "pointwise" and self.rule != "deepseek_grm":
            raise ValueError(f"judge.rule must be deepseek_grm for judge.form pointwise, got {self.rule}")
        if self.rule == "rm_r1" and self.brief:
            raise ValueError("judge.brief must be False for judge.rule rm_r1, which reads <answer>[[A]]</answer> only")


class Judging(Task):
    """Responses to another task's questions, one or two of each question, with the other task's verifier as the truth.

    Which responses are shown, and in which order, the seed and the question decide. A verdict is right where the rule
    rewards it.

    Raises:
        ValueError: ``settings.reasons`` and a task without critiques or worked solutions.
    """

    def __init__(self, task: Task, settings: Judge) -> None:
        super().__init__(task.name, task.seed)
        assert isinstance(task, ResponseTask)
        if settings.reasons and not isinstance(task, (CritiqueTask, ReferenceTask)):
            raise ValueError(
                "judge.reasons must be False for a task without `critique`, how a response is checked, or `reference`,"
                f" a worked solution; got {task.name!r}"
            )
        self._task, self.settings, self._responses = task, settings, task.responses
        self.fingerprint = task.fingerprint
        self.demonstrations, self.weight_decay = task.demonstrations, task.weight_decay

    def questions(self, split: int) -> Iterator[Question]:
        return map(self.posed, self._task.questions(split))

    def splits(self, *, heldout: int, validation: int, demonstrations: int | None, train: int) -> Splits:
        sizes: dict[str, Any] = {
            "heldout": heldout,
            "validation": validation,
            "demonstrations": demonstrations,
            "train": train,
        }
        splits = self._task.splits(**sizes)
        return Splits(*([self.posed(q) for q in some] for some in vars(splits).values()))

    def posed(self, question: Question) -> Question:
        """What is asked about responses to a question; its entry has the label and what the other task asked."""
        right, wrong = self._sorted(question)
        draw = random.Random(f"{self.seed} {question.prompt}")
        if self.settings.form == "pointwise":
            good = draw.random() < 0.5
            return self.about(question, [draw.choice(right if good else wrong)], int(good))
        pair = [draw.choice(right), draw.choice(wrong)]
        label = draw.randrange(2)
        return self.about(question, pair[::-1] if label else pair, label)

    def about(self, asked: Question, responses: list[str], label: int = 0) -> Question:
        """A question about these responses: ``label`` is 1 where one is right, 0 where not; of two, the better one's
        place."""
        prompt = f"{asked.prompt}{MARK.join(responses)}{END}"
        if len(responses) == 1:
            text = verdicts.question(asked.text, responses[0])
        else:
            text = verdicts.pair_question(asked.text, *responses, scores=self.settings.rule == "deepseek_grm")
        work = self._work(asked, responses) if self.settings.reasons else []
        entry = {"label": label, "responses": responses, "asked": asked.text}
        return Question(prompt, text, "\n".join([*work, self._verdict(label)]), entry)

    def read(self, question: Question, text: str) -> Answer:
        reward = self.rewards([question], [text])
        return Answer(bool(reward > 0), well_formed=self.ballot(question, text) is not None)

    def rewards(self, questions: list[Question], texts: list[str]) -> Tensor:
        """The rule's, 1 or -1 for each judgement; float32 ``[N]``."""
        rule, labels = self.settings.rule, [q.entry["label"] for q in questions]
        if rule == "rm_r1":
            return rule_rewards(texts, [VERDICTS[label] for label in labels], rule=rule)
        if rule == "rrm":
            said = [self._letter(text) for text in texts]
            preferred = torch.tensor([-1 if letter is None else VERDICTS.index(letter) for letter in said])
            return rule_rewards(preferred, torch.tensor(labels), rule=rule)
        scores = torch.tensor([self.scores(text) for text in texts])
        best = torch.tensor(labels) if scores.shape[1] > 1 else HIGHEST * torch.tensor(labels)
        return rule_rewards(scores, best, rule=rule)

    def scores(self, text: str) -> list[float]:
        """The score of each response in a judgement, NaN where it cannot be read."""
        pointwise, missing = self.settings.form == "pointwise", float("nan")
        if pointwise and not self.settings.brief:
            return [HIGHEST * verdicts.read_score(text, True)]
        found = verdicts.read_scores(text, 1 if pointwise else 2)
        return [missing] * (1 if pointwise else 2) if found is None else [float(x) for x in found]

    def _work(self, asked: Question, responses: list[str]) -> list[str]:
        """What stands before a demonstration's verdict."""
        if isinstance(self._task, CritiqueTask):
            return [self._task.critique(asked, response) for response in responses]
        assert isinstance(self._task, ReferenceTask)
        return [self._task.reference(asked)]

    def preference(self, text: str) -> float:
        """1 where a judgement finds the first of two responses better, 0 where the second, 0.5 where it scores both
        alike; NaN where it cannot be read."""
        if self.settings.rule != "deepseek_grm":
            letter = self._letter(text)
            return float("nan") if letter is None else float(letter == VERDICTS[0])
        first, second = self.scores(text)
        return first if first != first else (1 + (first > second) - (first < second)) / 2

    def ballot(self, question: Question, text: str) -> Hashable | None:
        """The letter of the better response, or the score of one; None where there is none, or two are alike."""
        if self.settings.form == "pairwise":
            return {1.0: VERDICTS[0], 0.0: VERDICTS[1]}.get(self.preference(text))
        score = self.scores(text)[0]
        return None if score != score else score

    def _letter(self, text: str) -> str | None:
        if not self.settings.brief:
            return verdict(text)
        line = text.strip().rpartition("\n")[2].strip()
        return line if line in VERDICTS else None

    def _verdict(self, label: int) -> str:
        """As a demonstration says it."""
        form, rule, brief = self.settings.form, self.settings.rule, self.settings.brief
        if rule != "deepseek_grm":
            return VERDICTS[label] if brief else f"<answer>[[{VERDICTS[label]}]]</answer>"
        if form == "pointwise":
            return f"{HIGHEST * label}" if brief else f"Score: {HIGHEST * label}"
        scores = f"{0 if label else HIGHEST},{HIGHEST if label else 0}"
        return scores if brief else f"Scores: {scores}"

    def _sorted(self, question: Question) -> tuple[list[str], list[str]]:
        """The right and the wrong responses. Raises ValueError where there are none of a kind."""
        right: list[str] = []
        wrong: list[str] = []
        for response in self._responses(question):
            (right if self._task.read(question, response).correct else wrong).append(response)
        if not right or not wrong:
            expected = f"responses of task {self.name} must hold a right and a wrong one"
            raise ValueError(f"{expected}; for {question.prompt!r} got {[*right, *wrong]}")
        return right, wrong


class ReasoningJudge(GroupSystem):
    """The task's questions become judgements of its responses, in training and in evaluation."""

    settings_type = Judge
    requires = Requirement("one with `responses` to judge", lambda task: isinstance(task, (ResponseTask, Judging)))

    settings: Judge

    def __post_init__(self) -> None:
        if self.settings.meta_steps and self.ranks.mesh:
            count = self.ranks.mesh.size()
            raise ValueError(f"the run must have one rank for judge.meta_steps, whose model is a copy; got {count}")

    @classmethod
    def posed(cls, task: Task, settings: Judge) -> Task:
        return task if isinstance(task, Judging) else Judging(task, settings)

    @classmethod
    def expression(cls, recipe: str, settings: Judge) -> credit.Spec:
        return credit.outcome()

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        assert isinstance(self.task, Judging)
        return {"reward": self.task.rewards(played.questions, played.texts)}

    def rater(self, pool: list[Question], max_new: int) -> Rater | None:
        """A meta model, trained on judgements of questions of the pool; None where all are right or all wrong."""
        if not self.settings.meta_steps:
            return None
        assert isinstance(self.task, Judging)
        asked = random.Random(META_SEED).sample(pool, min(META_QUESTIONS, len(pool)))
        generator = torch.Generator(self.ranks.device).manual_seed(META_SEED)
        drawn = sample(
            self.policy, [self.prompt(q) for q in asked], copies=META_SAMPLES, max_new=max_new, generator=generator
        )
        many = [question for question in asked for _ in range(META_SAMPLES)]
        texts = [self.policy.text(tokens) for tokens in drawn.completions()]
        right = self.task.rewards(many, texts) > 0
        if right.all() or not right.any():
            return None
        model = MetaModel(self.policy)
        model.fit(many, texts, right, steps=self.settings.meta_steps)
        return model.rate
