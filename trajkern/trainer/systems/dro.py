"""DRO: rollouts are rewarded by how likely their reasoning makes the reference answer, most where rollouts differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import dro
from trajkern.trainer.packing import Piece
from trajkern.trainer.systems.base import SHOWS_WORK, Assigned, GroupSystem, Played
from trajkern.trainer.systems.scoring import score_pieces


@dataclass(frozen=True)
class DRO:
    """Recipe dro; a task that shows its work.

    Args:
        weights: of the reference answer's tokens: by their deviation over a group's rollouts, or equal.
        masked: whether the log-probs without any reasoning are taken off first. A group's mean does that as well.
        drop_fraction: of a step's prompts, those whose rollouts differ least on the reference.
        top_k: if above 0, a prompt is kept only if a rollout gives its reference's worst tokens a mean rank within it.
        worst_fraction: the share of the reference's tokens that are the worst.
        length_weight: of the reward for an answer as long as the reference.
        length_beta: its slope.
        outcome_weight: of the verifier's reward; the system needs none.
    """

    weights: Literal["variance", "uniform"] = "variance"
    masked: bool = False
    drop_fraction: float = 0.0
    top_k: int = 0
    worst_fraction: float = 0.25
    length_weight: float = 0.0
    length_beta: float = 1.0
    outcome_weight: float = 0.0


class Reflection(GroupSystem):
    """One scoring forward of the reference answer under each rollout's lines of work; no verifier needed.

    The reference's tokens are weighed by their deviation over the group (or equally), the prompts on which rollouts
    differ least can be dropped, as can those whose reference is out of reach.
    """

    settings_type = DRO
    requires = SHOWS_WORK
    compares_prompts = True

    settings: DRO

    def signals(self, played: Played) -> dict[str, Tensor]:
        settings, groups = self.settings, played.batch.group_ids
        scores = score_pieces(self.policy, self._reasoned(played), groups, ranks=settings.top_k > 0)
        baseline = score_pieces(self.policy, self._masked(played), groups).logprobs if settings.masked else None
        reflection = tk.reflection_rewards(scores.logprobs, scores.cu_seqlens, groups, baseline=baseline)
        rewards = reflection.rewards
        if settings.weights == "uniform":
            gain = scores.logprobs if baseline is None else scores.logprobs - baseline
            lengths = scores.cu_seqlens.diff()
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            rewards = torch.zeros_like(rewards).index_add(0, owner, gain) / lengths
        reference = torch.tensor([len(_answer(q.answer)) for q in played.questions])
        written = torch.tensor([len(_answer(text)) for text in played.texts])
        rewards = rewards + settings.length_weight * dro.length_reward(written, reference, beta=settings.length_beta)
        rewards = rewards + settings.outcome_weight * played.rewards
        keep = self._of_prompts_that_differ(groups, reflection.group_score)
        if scores.ranks is not None:
            worst: dict[str, Any] = {"worst_fraction": settings.worst_fraction, "top_k": settings.top_k}
            keep = keep & dro.rank_filter(scores.ranks, scores.cu_seqlens, groups, **worst)
        return {"rewards": rewards, "keep": keep}

    def _of_prompts_that_differ(self, groups: Tensor, group_score: Tensor) -> Tensor:  # [N], [G] -> [N] bool
        """The rollouts that are left when the prompts of all ranks with the lowest scores are dropped."""
        numbers, place = groups.unique(return_inverse=True)
        scored = self.ranks.gather(list(zip(numbers.tolist(), group_score.tolist(), strict=True)))
        stays = dro.keep_groups(torch.tensor([score for _, score in scored]), drop_fraction=self.settings.drop_fraction)
        at = {group: n for n, (group, _) in enumerate(scored)}
        return stays[torch.tensor([at[group] for group in numbers.tolist()])[place]]

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Assigned:
        rewards, keep = signals["rewards"], signals["keep"]
        advantages = tk.group_advantages(rewards, played.batch.group_ids, gate=keep)
        return Assigned(advantages, keep=keep, values={"reflection": rewards, "filtered": int((~keep).sum())})

    def _reasoned(self, played: Played) -> list[list[Piece]]:
        """Each rollout up to its last newline, then the reference answer."""
        rows = zip(played.trajectories(), played.batch.loss_mask.split(played.batch.lengths.tolist()), strict=True)
        pieces = []
        for question, (tokens, scored) in zip(played.questions, rows, strict=True):
            begin = int(scored.int().argmax())  # the completion's first token
            end = len(tokens)
            while end > begin and not self.policy.spelling(tokens[end - 1 : end]).endswith("\n"):
                end -= 1
            pieces.append([(tokens[:end], False), (self.policy.answer(_answer(question.answer)), True)])
        return pieces

    def _masked(self, played: Played) -> list[list[Piece]]:
        """The prompt, then the reference answer."""
        return [[(self.prompt(q), False), (self.policy.answer(_answer(q.answer)), True)] for q in played.questions]


def _answer(text: str) -> str:
    """Without the lines of work."""
    return text.rpartition("\n")[2]
