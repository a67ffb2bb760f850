"""Branches of a tree beside whole rollouts."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

TASK = "trajkern._bench.experiments.tasks.transitions:Transitions"
TREES = "--recipe tree_grpo --tree.trees 1 --tree.expansions 2 --tree.keep 3 --steps 282"

ROW = Comparison(
    claim="comparing the branches of a tree beats comparing whole rollouts at equal tokens (2509.21240)",
    needs="success that is rare and decided step by step, and few rollouts a prompt: two whole ones seldom differ in"
    " their reward, three that share their beginnings differ in a step",
    flags=f"--task {TASK} --prompts 32 --loss.kind grpo --max-new 26 --eval.every 20 --eval.heldout 256"
    " --eval.validation 128 --warmup.steps 350 --warmup.check-every 350 --warmup.pass-at-1 2",
    arms={
        "tree_grpo": TREES,
        "grpo": "--recipe grpo --rollouts 2 --steps 300",
        "tree_grpo, random rewards": f"{TREES} {RANDOM}",
    },
    tests=(
        Test("tokens to pass@1 >= 0.3", "grpo", "lower"),
        Test("mean pass@1", "grpo"),
        Test("pass@1", "tree_grpo, random rewards"),
    ),
    # six others had not decided: where success is rare, luck says when an arm begins
    seeds=tuple(range(40, 64)),
    measures=("pass@1", "mean pass@1", "tokens", "tokens to pass@1 >= 0.3", "seconds", "seconds to pass@1 >= 0.3"),
    panel=Panel("curve", level=0.3),
    lesson="Branches needed fewer tokens to .3 on 16 seeds of 24: where success is this rare, luck decides when either"
    " begins, and six seeds did not tell. A second pass of decoding, for the branches, takes as long as the first: at"
    " equal tokens a run takes 1.35 times the processor's time, and whole rollouts came to .3 sooner in seconds on 20"
    " seeds. Where tokens are what costs, as with a large model, branch; where calls are, do not.",
)
