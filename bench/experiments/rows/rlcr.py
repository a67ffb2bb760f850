"""A proper score of the stated confidence beside the outcome alone."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

ROW = Comparison(
    claim="a proper score beside the outcome calibrates confidence and costs no accuracy (2507.16806)",
    needs="questions of different odds, and a warm-up whose confidence says something",
    flags="--task chain_sum_confidence --steps 150",
    arms={"rlcr": "--recipe rlcr", "outcome only": "--recipe grpo", "rlcr, random rewards": f"--recipe rlcr {RANDOM}"},
    tests=(Test("ece", "outcome only", "lower"), Test("brier", "outcome only", "lower")),
    measures=("ece", "brier", "auroc", "pass@1"),
    panel=Panel("calibration"),
)
