"""Right calls credited to their tokens, beside whole rollouts and beside the outcome alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trajkern import credit
from trajkern._bench.experiments.comparisons import Comparison, Panel, Test
from trajkern.trainer.collect import dealt


@dataclass(frozen=True)
class Dealt:
    """A reward, dealt at random to the rollouts of its group: the batch's tokens decide to whom."""

    reward: str

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((self.reward,))

    def __call__(self, rollouts: credit.Rollouts) -> Tensor:
        batch = rollouts.batch
        generator = torch.Generator().manual_seed(int(batch.tokens.sum()))
        chances = torch.rand(len(rollouts), generator=generator)
        return rollouts.reward(self.reward)[dealt(batch.group_ids, chances)]


_CENTRED = {"scale": "none", "singleton": "zero"}
# ToolPO, but for whose calls a rollout's calls are credited
RANDOM_CALLS = credit.outcome(**_CENTRED) + credit.outcome(Dealt("action"), **_CENTRED).on("call")

ROW = Comparison(
    claim="crediting right calls to the tokens that made them beats crediting whole rollouts and the outcome alone"
    " (2510.21618)",
    needs="calls whose rewards vary for reasons of their own, and an answer that is hard even with all calls right:"
    " five lookups, of which demonstrations guess half, then a sort",
    flags="--task trajkern._bench.experiments.tasks.lookups:Lookups --steps 50 --prompts 32 --rollouts 8 --lr 1e-3"
    " --warmup.steps 400 --warmup.check-every 100 --warmup.pass-at-1 2 --eval.heldout 256 --eval.validation 96"
    " --eval.every 10",
    arms={
        "toolpo": "--recipe toolpo",
        "spread over the rollout": "--recipe toolpo --toolpo.no-attribution",
        "outcome only": "--recipe toolpo --toolpo.call-weight 0",
        "other rollouts' calls": f"--recipe toolpo --credit {__name__}:RANDOM_CALLS",
    },
    tests=(Test("pass@1", "spread over the rollout"), Test("pass@1", "outcome only")),
    measures=("pass@1", "pass@8", "greedy", "found", "all_found", "right_given_all", "mean pass@1"),
    panel=Panel("curve"),
    lesson="Where calls can be judged one by one, credit their own tokens and no others. Spread over the rollout, the"
    " same rewards blame and praise an answer that they do not depend on, and it learns two thirds as much.",
)
