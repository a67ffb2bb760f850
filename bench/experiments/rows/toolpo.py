"""Right calls credited to their tokens beside whole rollouts."""

from trajkern._bench.experiments.comparisons import Comparison, Test

ROW = Comparison(
    claim="crediting right calls to the tokens that made them beats crediting whole rollouts (2510.21618)",
    needs="several calls a rollout, few rollouts with all of them right",
    flags="--task tools --steps 60 --warmup.steps 320 --warmup.check-every 40 --warmup.pass-at-1 0.15"
    " --warmup.pass-at-k 0.3 --eval.heldout 256 --eval.validation 64 --eval.every 40",
    arms={
        "toolpo": "--recipe toolpo",
        "no attribution": "--recipe toolpo --toolpo.no-attribution",
        "outcome only": "--recipe grpo",
    },
    tests=(Test("pass@1", "no attribution"), Test("pass@1", "outcome only")),
    measures=("pass@1", "pass@8", "greedy", "right_calls", "calls"),
)
