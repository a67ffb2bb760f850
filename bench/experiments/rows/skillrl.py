"""A bank of skills in the prompt beside none."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Test

ROW = Comparison(
    claim="a bank of skills in the prompt helps (2602.08234)",
    needs="families whose secret a lesson tells",
    flags="--task chain_sum --steps 100 --recipe skillrl",
    arms={"skillrl": "", "without the bank": "--skillrl.top-k 0", "skillrl, random rewards": RANDOM},
    tests=(Test("pass@1", "without the bank"),),
    shares_warm_up=False,
)
