"""The reference's tokens weighed by their deviation beside their mean; its filter beside as many dropped at random."""

from trajkern import credit
from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

VERIFIER = credit.outcome().only("reasoning")
FILTERED = "--recipe dro --dro.drop-fraction 0.75"

ROW = Comparison(
    claim="weighing the reference's tokens by their deviation beats their mean, and dropping the prompts of least"
    " deviation trains as well for less (2506.13351)",
    needs="answers that follow from the work, in long references of which few tokens do; other tokens that differ"
    " between rollouts for another reason; some right rollouts; and prompts that teach nothing, for the filter",
    flags="--task trajkern._bench.experiments.tasks.chains:Chains --max-new 13 --steps 20 --prompts 24 --lr 1e-3"
    " --warmup.steps 400 --warmup.batch 32 --warmup.check-every 400 --warmup.pass-at-1 1"
    " --eval.heldout 256 --eval.every 5",
    arms={
        "dro": FILTERED,
        "uniform mean": f"{FILTERED} --dro.weights uniform",
        "no filter": "--recipe dro --dro.drop-fraction 0",  # as the others resume the first arm's flags
        "verifier": f"--recipe dro --credit {__name__}:VERIFIER",
        "as many dropped at random": f"{FILTERED} --control random-drop",
        "random rewards": f"{FILTERED} {RANDOM}",
    },
    tests=(Test("mean pass@1", "uniform mean"), Test("mean pass@1", "as many dropped at random")),
    measures=("pass@1", "mean pass@1", "greedy", "tokens", "seconds"),
    panel=Panel(over="steps"),
    # on six other seeds the ends stood at one ceiling, which says nothing of the way there: hence the curve's mean
    seeds=tuple(range(30, 42)),
    lesson="Weighed by its deviation a reference teaches nearly as well as a verifier (.84 for .88 at the end; the mean"
    " .68), its curve above the mean's on all twelve seeds, by much only where the mean is slow to begin. Three prompts"
    " of four can go by their deviation for .03 of the curve's mean; as many gone at random cost .13.",
)
