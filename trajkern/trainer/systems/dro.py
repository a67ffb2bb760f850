"""DRO: rollouts are rewarded by how likely their reasoning makes the reference answer, most where rollouts differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trajkern import Spans, credit
from trajkern.recipes import dro
from trajkern.trainer.systems.actions import tokens_within
from trajkern.trainer.systems.base import SHOWS_WORK, GroupSystem, Local, Played
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.tasks.capabilities import ReferenceTask, reasoning_of


@dataclass(frozen=True)
class DRO:
    """Recipe dro; a task with worked solutions.

    Args:
        weights: of the reference answer's tokens: by their deviation over a group's rollouts, or equal.
        masked: whether the log-probs without any reasoning are taken off first. A group's mean does that as well.
        drop_fraction: of a step's prompts, those whose rollouts differ least on the reference.
        top_k: if above 0, a prompt is kept only if a rollout gives its reference's worst tokens a mean rank within it.
        worst_fraction: the share of the reference's tokens that are the worst.
        length_weight: of the reward for an answer as long as the reference.
        length_beta: its slope.
        outcome_weight: of the verifier's reward; the system needs none.
        learns: the tokens that are trained: the reasoning's (the reward does not depend on the answer that was sampled
            after it), or all.
    """

    weights: Literal["variance", "uniform"] = "variance"
    masked: bool = False
    drop_fraction: float = 0.0
    top_k: int = 0
    worst_fraction: float = 0.25
    length_weight: float = 0.0
    length_beta: float = 1.0
    outcome_weight: float = 0.0
    learns: Literal["reasoning", "all"] = "reasoning"


class Reflection(GroupSystem):
    """Knows the reward "reflection", the flag "in_reach" and the spans "reasoning", of which a rollout has one or none.

    One scoring forward of the reference answer under the reasoning; no verifier needed.
    """

    settings_type = DRO
    requires = SHOWS_WORK
    splits_groups = False  # what reads alike scores alike to the bit only in one forward
    knows = frozenset({"reflection", "flags:in_reach", "spans:reasoning"})

    settings: DRO

    @classmethod
    def expression(cls, recipe: str, settings: DRO) -> credit.Spec:
        spec = credit.outcome("reflection").gate("in_reach")
        return spec.only("reasoning") if settings.learns == "reasoning" else spec

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        return {"spans": {"reasoning": self.reasoning(played)}}

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        if not needs & {"reflection", "flags:in_reach"}:
            return {"reward": played.rewards}
        settings = self.settings
        rollouts = credit.Rollouts(
            played.batch,
            rows=[{"reference": self.policy.answer(self.reference(q))} for q in played.questions],
            score=self.score,
            process_group=self.ranks.data,
            **self.known(played, needs),
        )
        reward = credit.scored.Reflection(
            weights=settings.weights, masked=settings.masked, outcome_weight=settings.outcome_weight
        )
        in_reach = credit.scored.InReach(reward, settings.drop_fraction, settings.top_k, settings.worst_fraction)
        reference = torch.tensor([len(self.reference(q)) for q in played.questions])
        written = torch.tensor(
            [len(self.answer(q, text)) for q, text in zip(played.questions, played.texts, strict=True)]
        )
        of_length = dro.length_reward(written, reference, beta=settings.length_beta)
        rewards = reward(rollouts) + settings.length_weight * of_length
        return {"reward": played.rewards, "reflection": rewards, "in_reach": in_reach(rollouts)}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        if "in_reach" not in rollouts.flags:
            return {}
        filtered = int((~rollouts.flags["in_reach"]).sum())
        return {"reflection": rollouts.reward("reflection"), "filtered": filtered}

    def reference(self, question: Question) -> str:
        """The answer that ends the task's own solution."""
        assert isinstance(self.task, ReferenceTask)
        return self.answer(question, self.task.reference(question))

    def answer(self, question: Question, text: str) -> str:
        """Without the reasoning."""
        return text[reasoning_of(self.task, question, text)[1] :]

    def reasoning(self, played: Played) -> Spans:
        """The tokens of each completion that lie wholly in its reasoning."""
        batch, rows = played.batch, []
        bounds = batch.cu_seqlens.tolist()
        for n, (question, text) in enumerate(zip(played.questions, played.texts, strict=True)):
            begin = bounds[n] + int(batch.loss_mask[bounds[n] : bounds[n + 1]].int().argmax())  # after the prompt
            tokens = batch.tokens[begin : bounds[n + 1]].tolist()
            first, end = tokens_within(self.policy, tokens, *reasoning_of(self.task, question, text))
            if first < end:
                rows.append((begin + first, begin + end, n, 0))
        start, stop, owner, index = torch.tensor(rows, dtype=torch.int64).view(-1, 4).unbind(1)
        return Spans(start, stop, owner, index, batch.num_tokens)
