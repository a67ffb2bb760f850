"""Learning from failures beside learning from successes, at equal accuracy."""

from trajkern._bench.experiments.comparisons import Comparison, Panel, Test

ROW = Comparison(
    claim="learning from failures keeps diversity, and with it pass@k at large k; learning from successes loses it"
    " (2506.01347)",
    needs="many right answers to a question, a start at which most samples are right, several updates a batch, and"
    " batches so large that noise, which costs diversity too, stays small: three digits that complete a sum",
    flags="--task trajkern._bench.experiments.tasks.puzzle:Puzzle --steps 100 --prompts 96"
    " --rollouts 8 --updates 8 --lr 5e-4 --warmup.steps 1500 --warmup.check-every 50 --warmup.pass-at-1 0.7"
    " --warmup.pass-at-k 0.9 --eval.samples 64 --eval.heldout 96 --eval.validation 96 --eval.every 10",
    arms={name: f"--recipe {name}" for name in ("nsr", "w_reinforce", "psr", "grpo")},
    tests=(Test("distinct at equal pass@1", "psr"),),
    lesson="At the highest accuracy that both runs reach, .96 to .98, learning from failures leaves 7.9 different right"
    " answers in 64 samples for 4.2 that learning from successes leaves, more on seven seeds of eight. Before that they"
    " are level, and what learns from both keeps about as many as failures alone. Every pass@k is near 1 here and tells"
    " nothing. Successes are quicker: stop them early, or weigh failures.",
    # chosen on twelve others: at a fixed level of .97, where noise is as large as the difference, they did not decide
    seeds=tuple(range(32, 40)),
    measures=("distinct", *(f"pass@{2**i}" for i in range(7)), "greedy"),
    panel=Panel("curve", ("distinct",), over="pass@1", label="distinct right answers in 64 samples"),
)
