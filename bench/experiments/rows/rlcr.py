"""A proper score of the stated confidence beside the outcome alone."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

ROW = Comparison(
    claim="a proper score beside the outcome calibrates confidence and costs no accuracy (2507.16806)",
    needs="questions of different odds, and a warm-up whose confidence is too high but says something, since what is"
    " never sampled cannot be rewarded",
    flags="--task trajkern._bench.experiments.tasks.odds:Odds --prompts 96 --steps 80 --warmup.steps 250"
    " --warmup.check-every 250 --warmup.pass-at-1 1 --eval.every 20",
    arms={"rlcr": "--recipe rlcr", "outcome only": "--recipe grpo", "rlcr, random rewards": f"--recipe rlcr {RANDOM}"},
    tests=(
        Test("ece", "outcome only", "lower"),
        Test("brier", "outcome only", "lower"),
        Test("auroc", "outcome only"),
    ),
    measures=(
        "ece",
        "brier",
        "ideal_brier",
        "auroc",
        "ideal_auroc",
        "pass@1",
        "vote@8",
        "weighted_vote@8",
        "well_formed",
    ),
    panel=Panel("calibration"),
    lesson="A proper score halves the calibration error at an accuracy within .01 of the outcome's, and does so only"
    " where the confidence says something before training. The vote gains nothing by it here: samples of one question"
    " state much the same confidence.",
)
