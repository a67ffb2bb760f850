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
    tests=(Test("pass@1", "uniform mean"), Test("mean pass@1", "as many dropped at random")),
    measures=("pass@1", "mean pass@1", "greedy", "tokens", "seconds"),
    panel=Panel(over="steps"),
    lesson="Weighed by its deviation a reference teaches nearly as well as a verifier: its curve lies above that of the"
    " mean on all six seeds, and both end near the same ceiling, so that the end does not tell them apart. Three"
    " prompts of four can go by their deviation and nothing is lost; as many gone at random cost .02 to .23.",
)
