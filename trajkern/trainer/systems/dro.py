"""DRO: rollouts are rewarded by how likely their reasoning makes the reference answer, most where rollouts differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import dro
from trajkern.trainer.packing import Piece
from trajkern.trainer.systems.base import Found, Played, System
from trajkern.trainer.systems.scoring import score_pieces


class Reflection(System):
    """One scoring forward of the reference answer under each rollout's lines of work; no verifier needed.

    The reference's tokens are weighed by their deviation over the group (or equally), the prompts on which rollouts
    differ least can be dropped, as can those whose reference is out of reach.
    """

    def signals(self, played: Played) -> dict[str, Tensor]:
        settings, groups = self.config.dro, played.batch.group_ids
        scores = score_pieces(self.policy, self._reasoned(played), groups, ranks=settings.top_k > 0)
        baseline = score_pieces(self.policy, self._masked(played), groups).logprobs if settings.masked else None
        found = tk.reflection_rewards(scores.logprobs, scores.cu_seqlens, groups, baseline=baseline)
        rewards = found.rewards
        if settings.weights == "uniform":
            gain = scores.logprobs if baseline is None else scores.logprobs - baseline
            lengths = scores.cu_seqlens.diff()
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            rewards = torch.zeros_like(rewards).index_add(0, owner, gain) / lengths
        reference = torch.tensor([len(_answer(q.answer)) for q in played.questions])
        written = torch.tensor([len(_answer(text)) for text in played.texts])
        rewards = rewards + settings.length_weight * dro.length_reward(written, reference, beta=settings.length_beta)
        rewards = rewards + settings.outcome_weight * played.rewards
        own, place = groups.unique(return_inverse=True)
        every = self.ranks.gather(list(zip(own.tolist(), found.group_score.tolist(), strict=True)))
        kept = dro.keep_groups(torch.tensor([score for _, score in every]), drop_fraction=settings.drop_fraction)
        number = {group: n for n, (group, _) in enumerate(every)}
        keep = kept[torch.tensor([number[group] for group in own.tolist()])[place]]
        if scores.ranks is not None:
            worst: dict[str, Any] = {"worst_fraction": settings.worst_fraction, "top_k": settings.top_k}
            keep = keep & dro.rank_filter(scores.ranks, scores.cu_seqlens, groups, **worst)
        return {"rewards": rewards, "keep": keep}

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Found:
        rewards, keep = signals["rewards"], signals["keep"]
        advantages = tk.group_advantages(rewards, played.batch.group_ids, gate=keep)
        return Found(advantages, keep=keep, values={"reflection": rewards, "filtered": int((~keep).sum())})

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
