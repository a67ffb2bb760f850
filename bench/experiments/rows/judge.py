"""A judge that works a claim out before its verdict beside one that says it at once."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

ROW = Comparison(
    claim="a judge that reasons, trained by rules on its verdicts alone, judges better than one that does not"
    " (2505.02387), and better still by vote (2504.02495)",
    needs="claims that look alike until they are worked out, here check digits; verdicts that follow from the work; a"
    " warm-up that ends while the work still slips, so that there is something to learn and samples differ",
    flags="--task trajkern._bench.experiments.tasks.claims:Claims --recipe judge --judge.form pointwise --judge.brief"
    " --lr 1e-3 --steps 1000 --token-limit 500000 --warmup.pass-at-1 0.75 --warmup.pass-at-k 0 --eval.heldout 256",
    arms={
        "judge": "--warmup.check-every 5 --eval.every 40",
        "verdict at once": "--judge.no-reasons --warmup.check-every 100 --eval.every 40",
        "judge, random rewards": f"{RANDOM} --warmup.check-every 5 --eval.every 40",
    },
    tests=(
        Test("pass@1", "verdict at once"),
        Test("vote@8", "verdict at once"),
        Test("pass@1", "judge, random rewards"),
    ),
    measures=("pass@1", "vote@2", "vote@4", "vote@8", "greedy"),
    panel=Panel("bars", measures=("pass@1", "vote@2", "vote@4", "vote@8")),
    lesson="Rules on verdicts alone take a judge that works its claims out from .76 to .90, where one that says its"
    " verdict at once stays at chance for as many tokens; eight votes add .02. The work has to be mostly right when the"
    " rules take over, and random rewards undo what it was.",
    shares_warm_up=False,
    seeds=(30, 31, 32, 33, 34, 35),  # 20 to 25 showed that at a start of .6 most seeds take more tokens than these
)
