"""DRO: rollouts are rewarded by how likely their reasoning makes the reference answer, most where rollouts differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trajkern import Spans, credit
from trajkern.recipes import dro
from trajkern.trainer.lagging import SCORER, Lag
from trajkern.trainer.schema import Count, Finite, NotNegative, PartOf, Share, Size, check_fields
from trajkern.trainer.systems.actions import tokens_within
from trajkern.trainer.systems.base import SHOWS_WORK, GroupSystem, Local, Played, Rounds
from trajkern.trainer.tasks.base import Question, Splits
from trajkern.trainer.tasks.capabilities import ReferenceTask, reasoning_of


@dataclass(frozen=True)
class DRO:
    """Recipe dro; a task with worked solutions.

    Args:
        weights: of the reference answer's tokens: by their deviation over a group's rollouts, or equal.
        masked: whether the log-probs without any reasoning are taken off first. A group's mean does that as well.
        propagation: if above 0, how fast the doubt in a reflective token of the reference fades over those behind it.
        reflective: the share of the reference's tokens that pass on a doubt.
        drop_fraction: of a step's prompts, those whose rollouts differ least on the reference.
        top_k: if above 0, a prompt is kept only if a rollout gives its reference's worst tokens a mean rank within it.
        worst_fraction: the share of the reference's tokens that are the worst.
        round_steps: if above 0, the filter judges candidates at the beginning of every so many steps and these train on
            what it keeps; else it judges each step's own prompts.
        candidates: prompts that are played for a round.
        carry: of a round's prompts, those that the next one trains on again.
        length_weight: of the reward for an answer as long as the reference.
        length_beta: its slope.
        outcome_weight: of the verifier's reward; the system needs none.
        reward_policy: what scores the reference: the policy itself; "lagged", a copy that follows it; "static", the
            policy that the main loop began with.
        lag_rate: of the way to the policy, what a lagged copy goes at once: 1 copies it, less averages over its past.
        lag_every: steps between that.
        learns: the tokens that are trained: the reasoning's (the reward does not depend on the answer that was sampled
            after it), or all.
    """

    weights: Literal["variance", "uniform"] = "variance"
    masked: bool = False
    propagation: NotNegative = 0.0
    reflective: PartOf = 0.1
    drop_fraction: Share = 0.0
    top_k: Count = 0
    worst_fraction: PartOf = 0.25
    round_steps: Count = 0
    candidates: Size = 256
    carry: Share = 0.1
    length_weight: Finite = 0.0
    length_beta: NotNegative = 1.0
    outcome_weight: Finite = 0.0
    reward_policy: Literal["policy", "lagged", "static"] = "policy"
    lag_rate: Share = 1.0
    lag_every: Size = 10
    learns: Literal["reasoning", "all"] = "reasoning"

    def __post_init__(self) -> None:
        check_fields(self, "dro.")


class Reflection(GroupSystem):
    """Knows the reward "reflection", the flag "in_reach" and the spans "reasoning", of which a rollout has one or none.

    One scoring forward of the reference answer under the reasoning; no verifier needed.
    """

    settings_type = DRO
    requires = SHOWS_WORK
    gate = "pass_rate"
    splits_groups = False  # what reads alike scores alike to the bit only in one forward
    knows = frozenset({"reflection", "flags:in_reach", "spans:reasoning"})

    settings: DRO

    def __post_init__(self) -> None:
        settings = self.settings
        names = ("weights", "masked", "outcome_weight", "propagation", "reflective")
        reward = credit.scored.Reflection(**{name: getattr(settings, name) for name in names})
        self.filter = credit.scored.InReach(reward, settings.drop_fraction, settings.top_k, settings.worst_fraction)
        self.curriculum = dro.Curriculum[int](carry=settings.carry)

    @classmethod
    def expression(cls, recipe: str, settings: DRO) -> credit.Spec:
        spec = credit.outcome("reflection").gate("in_reach")
        return spec.only("reasoning") if settings.learns == "reasoning" else spec

    def lags(self) -> dict[str, Lag]:
        settings = self.settings
        rates = {"lagged": Lag(settings.lag_rate, settings.lag_every), "static": Lag()}
        return {SCORER: rates[settings.reward_policy]} if settings.reward_policy != "policy" else {}

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        return {"spans": {"reasoning": self.reasoning(played)}}

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        if not needs & {"reflection", "flags:in_reach"}:
            return {"reward": played.rewards}
        settings, rollouts = self.settings, self.asked(played)
        kept = torch.ones(len(rollouts), dtype=torch.bool) if self.rounds else self.filter(rollouts)
        reference = torch.tensor([len(text) for text in self.references(played)])
        written = torch.tensor(
            [len(self.answer(q, text)) for q, text in zip(played.questions, played.texts, strict=True)]
        )
        of_length = dro.length_reward(written, reference, beta=settings.length_beta)
        rewards = self.filter.reward(rollouts) + settings.length_weight * of_length
        return {"reward": played.rewards, "reflection": rewards, "in_reach": kept}

    def asked(self, played: Played) -> credit.Rollouts:
        """The rollouts with their references and who scores these."""
        return credit.Rollouts(
            played.batch,
            rows=[{"reference": self.policy.answer(text)} for text in self.references(played)],
            score=self.score,
            process_group=self.ranks.data,
            spans={"reasoning": self.reasoning(played)},
        )

    @property
    def rounds(self) -> Rounds | None:
        settings = self.settings
        return Rounds(settings.round_steps, settings.candidates) if settings.round_steps else None

    def pool(self, splits: Splits) -> list[Question]:
        least, most, candidates = self.ranks.parts, len(splits.train), self.settings.candidates
        if self.rounds and not least <= candidates <= most:
            raise ValueError(f"dro.candidates must be from {least} (the ranks) to {most} (the pool), got {candidates}")
        return splits.train

    def keeps(self, played: Played) -> Tensor:
        return self.filter(self.asked(played))

    def next_round(self, numbers: list[int], keep: Tensor) -> None:
        self.curriculum.next_round(numbers, keep)

    def round_prompts(self) -> Sequence[int]:
        return self.curriculum.last

    def state(self) -> Any:
        return self.curriculum.state_dict() if self.rounds else None

    def restore(self, state: Any) -> None:
        if state is not None:
            self.curriculum.load_state_dict(state)

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        if "in_reach" not in rollouts.flags:
            return {}
        reflection, right, ids = rollouts.reward("reflection"), rollouts.reward("reward") > 0, rollouts.batch.group_ids
        groups = [ids == group for group in ids.unique()]
        gaps = torch.stack([dro.right_minus_wrong(reflection[at], right[at], ids[at]) for at in groups])
        filtered = int((~rollouts.flags["in_reach"]).sum())
        in_round = {"round_prompts": float(len(self.curriculum.last))} if self.rounds else {}
        return {**in_round, "reflection": reflection, "filtered": filtered, "right_minus_wrong": gaps[~gaps.isnan()]}

    def references(self, played: Played) -> list[str]:
        """What each rollout is to lead to, the same for all of a question: a task may say it in more ways than one."""
        found = {id(question): question for question in played.questions}
        texts = {key: self.reference(question) for key, question in found.items()}
        if (bare := next((key for key, text in texts.items() if not text), None)) is not None:
            expected = f"reference of task {self.task.name} must have an answer behind its reasoning"
            raise ValueError(f"{expected}; that of {found[bare].prompt!r:.200} has none")
        return [texts[id(question)] for question in played.questions]

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
