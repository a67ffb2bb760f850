"""Evaluative and directive signals together beside each alone."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Test

ROW = Comparison(
    claim="evaluative and directive signals together beat either alone (2603.10165)",
    needs="a part that only the verdict tells and one that only the message does",
    flags="--task chain_sum_steps --steps 100 --recipe feedback --lr 1e-4 --feedback.directive-weight 0.1",
    arms={
        "both": "",
        "directive only": "--feedback.reward-weight 0",
        "evaluative only": "--feedback.directive-weight 0",
        "both, random verdicts": RANDOM,
    },
    tests=(Test("pass@1", "directive only"), Test("pass@1", "evaluative only")),
)
