"""Learning from failures beside learning from successes."""

from trajkern._bench.experiments.comparisons import Comparison, Panel, Test

ROW = Comparison(
    claim="learning from failures keeps pass@k at large k, where learning from successes alone loses it (2506.01347)",
    needs="many right answers to a question, several updates a batch",
    flags="--task chain_sum --steps 150 --eval.samples 32 --eval.heldout 256",
    arms={name: f"--recipe {name}" for name in ("w_reinforce", "nsr", "psr", "grpo")},
    tests=(Test("pass@32", "psr"), Test("pass@32", "grpo")),
    measures=("pass@1", "pass@2", "pass@4", "pass@8", "pass@16", "pass@32"),
    panel=Panel("pass@k"),
)
