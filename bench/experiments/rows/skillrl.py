"""A bank of skills in the prompt beside no bank, and beside a bank that shows skills of no use."""

from trajkern._bench.experiments.comparisons import Comparison, Panel, Test

TASK = "trajkern._bench.experiments.tasks.families:Families"

ROW = Comparison(
    claim="earlier successes, retrieved by the question's kind and shown before it, raise accuracy (2602.08234)",
    needs="what helps is common to a family of questions and written in none of them, there are many families, and the"
    " policy reads what it is shown: the warm-up teaches that on other families, without a skill in 40 % of its"
    " demonstrations. Skills of other families are compared whatever their likeness, so delta has no part here",
    flags=f"--task {TASK} --recipe skillrl --skillrl.top-k 1 --skillrl.capacity 2 --skillrl.delta -1"
    " --skillrl.grows-by successes --skillrl.bare 0.4 --steps 60 --prompts 64 --lr 5e-4 --eval.heldout 256"
    " --eval.validation 128 --eval.every 20 --warmup.steps 250 --warmup.check-every 250 --warmup.pass-at-1 2",
    arms={
        "skillrl": "",
        "without the bank": "--skillrl.top-k 0",
        "skills of other families": "--skillrl.search other",
    },
    tests=(Test("pass@1", "without the bank"), Test("pass@1", "skills of other families")),
    measures=("pass@1", "pass@8", "retrieved", "shown", "tokens"),
    panel=Panel("curve", ("retrieved",), label="questions shown a skill of their family"),
    lesson="A bank pays where the questions of a family share what none of them says: accuracy is the share of"
    " questions for which a skill was found. What is shown is copied, so that skills of other families leave the"
    " policy where it began: retrieval is the part to get right.",
)
