"""Likeness of every step to an expert's beside imitation and outcomes."""

from trajkern._bench.experiments.comparisons import Comparison, Test

ROW = Comparison(
    claim="step-wise likeness teaches where imitation and outcomes fail (2510.25992)",
    needs="an outcome that is never right by chance, and an expert that cannot be copied",
    flags="--task count_bits_steps --steps 100 --warmup.steps 60 --warmup.check-every 60 --warmup.pass-at-1 0.02"
    " --warmup.pass-at-k 0 --warmup.demonstrations 1000",
    arms={"srl": "--recipe srl", "outcome only": "--recipe grpo", "sft": "--recipe srl --control supervised"},
    tests=(Test("pass@1", "outcome only"), Test("pass@1", "sft")),
)
