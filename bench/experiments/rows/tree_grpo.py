"""Branches of a tree beside whole rollouts."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Test

ROW = Comparison(
    claim="comparing the branches of a tree beats comparing whole rollouts at equal tokens (2509.21240)",
    needs="rare success and few rollouts a prompt",
    flags="--task chain_sum_steps --loss.kind grpo",
    arms={
        "tree_grpo": "--recipe tree_grpo --steps 165",
        "grpo": "--recipe grpo --rollouts 6 --steps 150",
        "tree_grpo, random rewards": f"--recipe tree_grpo --steps 165 {RANDOM}",
    },
    tests=(Test("pass@1", "grpo"),),
    measures=("pass@1", "pass@8", "greedy", "tokens"),
)
