"""The gain in belief of every turn beside the outcome alone."""

from trajkern._bench.experiments.comparisons import Comparison, Test

ROW = Comparison(
    claim="rewarding turns by the gain in belief wins more games in fewer turns than the outcome alone (2602.12342)",
    needs="a belief that can be read after any turn",
    flags="--task twenty_questions --steps 60 --prompts 32 --warmup.steps 1500 --warmup.check-every 100"
    " --warmup.pass-at-1 0.35 --warmup.pass-at-k 0.6 --eval.heldout 256",
    arms={
        "delta_belief": "--recipe delta_belief",
        "outcome only": "--recipe delta_belief --delta-belief.scale 0",
        "grpo": "--recipe grpo",
    },
    tests=(Test("pass@1", "outcome only"), Test("pass@1", "grpo")),
    measures=("pass@1", "pass@8", "turns", "fresh_questions"),
)
