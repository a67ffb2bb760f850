"""DRO: rollouts are rewarded by how likely their reasoning makes the reference answer, most where rollouts differ."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from trajkern import Spans, credit
from trajkern.recipes import dro
from trajkern.trainer.systems.base import SHOWS_WORK, GroupSystem, Local, Played
from trajkern.trainer.systems.scoring import scorer
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.tasks.capabilities import ReferenceTask


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
    """Knows the reward "reflection", the flag "in_reach" and the spans "reasoning", each rollout's lines of work.

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
            score=scorer(self.policy),
            process_group=self.ranks.data,
            **self.known(played, needs),
        )
        reward = credit.scored.Reflection(
            weights=settings.weights, masked=settings.masked, outcome_weight=settings.outcome_weight
        )
        in_reach = credit.scored.InReach(reward, settings.drop_fraction, settings.top_k, settings.worst_fraction)
        reference = torch.tensor([len(self.reference(q)) for q in played.questions])
        written = torch.tensor([len(_answer(text)) for text in played.texts])
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
        return _answer(self.task.reference(question))

    def reasoning(self, played: Played) -> Spans:
        """Each completion up to its last newline."""
        batch, ranges = played.batch, []
        for n, (first, last) in enumerate(pairwise(batch.cu_seqlens.tolist())):
            begin = first + int(batch.loss_mask[first:last].int().argmax())  # the completion's first token
            tokens, stop = batch.tokens[first:last].tolist(), last
            while stop > begin and not self.policy.spelling(tokens[stop - 1 - first : stop - first]).endswith("\n"):
                stop -= 1
            if stop > begin:
                ranges.append((begin, stop, n, 0))
        start, end, owner, index = torch.tensor(ranges, dtype=torch.int64).view(-1, 4).unbind(1)
        return Spans(start, end, owner, index, batch.num_tokens)


def _answer(text: str) -> str:
    """Without the lines of work."""
    return text.rpartition("\n")[2]
