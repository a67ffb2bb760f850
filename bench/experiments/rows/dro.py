"""The reference's tokens weighed by their deviation beside a uniform mean."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Test

ROW = Comparison(
    claim="weighing the reference's tokens by their deviation beats their mean; the filter saves steps (2506.13351)",
    needs="a long reference of which few tokens depend on the reasoning",
    flags="--task chain_sum_steps --steps 150",
    arms={
        "dro": "--recipe dro",
        "uniform mean": "--recipe dro --dro.weights uniform",
        "dro, a third of the prompts dropped": "--recipe dro --dro.drop-fraction 0.33",
        "dro, random rewards": f"--recipe dro {RANDOM}",
        "verifier (grpo)": "--recipe grpo",
    },
    tests=(Test("pass@1", "uniform mean"),),
    measures=("pass@1", "greedy", "tokens"),
)
