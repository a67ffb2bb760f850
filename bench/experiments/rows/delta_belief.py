"""The gain in belief of every turn beside the outcome alone, and the control that deals the gains to other rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trajkern import credit
from trajkern._bench.experiments.comparisons import Comparison, Test


@dataclass(frozen=True)
class DealtGains:
    """The recipe's reward of each turn, but for the gain in belief, which is that of the next rollout of its group.

    Rollouts of a group are drawn alike: the gains are as large and as many as the recipe's, and say nothing of the turn
    that is credited with them. The last rollout of a group has the first one's; a turn that the other has not, none.
    """

    scale: float = 0.1
    win_reward: float = 2.0
    needs = frozenset({"reward", "spans:turn", "span_rewards:gain", "span_rewards:penalty"})

    def __call__(self, rollouts: credit.Rollouts) -> Tensor:
        turns, gain = rollouts.spans["turn"], rollouts.span_rewards["gain"]
        owner, index = turns.trajectory.long(), turns.index.long()
        width = int(index.max()) + 1 if len(index) else 0
        gains = gain.new_zeros(len(rollouts), width).index_put((owner, index), gain.nan_to_num().relu())
        won = self.win_reward * (rollouts.reward("reward") > 0)
        dealt = gains[next_of_group(rollouts.batch.group_ids)[owner], index]
        return won[owner] + self.scale * dealt + rollouts.span_rewards["penalty"]


def next_of_group(groups: Tensor) -> Tensor:  # [N]
    """The rollout that follows each in its group, the first one after the last, ``[N]``."""
    order = groups.argsort(stable=True)
    first = torch.searchsorted(groups[order], groups[order])
    after = torch.arange(1, len(groups) + 1)
    ends = torch.searchsorted(groups[order], groups[order], right=True) == after
    return torch.empty_like(order).scatter(0, order, order[torch.where(ends, first, after)])


DEALT = credit.recipe("delta_belief", reward=DealtGains())
OUTCOME = "--recipe delta_belief --delta-belief.scale 0"

ROW = Comparison(
    claim="rewarding turns by the gain in belief wins more games than the outcome alone (2602.12342)",
    needs="beliefs that can be read off after any turn, since demonstrations name the code after any number of replies;"
    " and wins so rare that an outcome seldom differs within a group",
    flags="--task trajkern._bench.experiments.tasks.codes:Codes --prompts 16 --lr 1e-3 --delta-belief.turn-cost 0"
    " --warmup.steps 300 --warmup.check-every 300 --warmup.pass-at-1 1 --eval.heldout 256 --eval.every 15",
    arms={
        "delta_belief": "--recipe delta_belief --steps 60",
        "outcome only": f"{OUTCOME} --steps 60",
        # six beliefs of five tokens a rollout are scored, beside twelve tokens sampled
        "outcome only, as many tokens": f"{OUTCOME} --steps 210",
        "gains of another rollout": f"--recipe delta_belief --credit {__name__}:DEALT --steps 60",
    },
    tests=(
        Test("pass@1", "outcome only"),
        Test("mean pass@1", "outcome only, as many tokens"),
        Test("pass@1", "gains of another rollout"),
    ),
    measures=("pass@1", "mean pass@1", "pass@8", "useful_questions", "turns", "tokens", "steps", "seconds"),
    lesson="The gain in belief tells a policy which question to ask long before it wins: at equal steps it asks 3.5"
    " useful questions of 5 where the outcome alone asks 1. Scoring the beliefs costs two and a half times the tokens"
    " sampled; at as many tokens the outcome alone follows behind. Gains dealt to other rollouts teach nothing.",
)
