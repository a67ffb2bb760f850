"""A verdict and a divergence from the hinted policy together, beside each alone and beside the sampled log-ratio."""

from trajkern import credit
from trajkern._bench.experiments.comparisons import Comparison, Test

VERDICT = credit.outcome()
JSD = credit.divergence(where="failed", k=None, beta=0.5)
BOTH = VERDICT + JSD
SAMPLED = VERDICT + credit.directive(where="failed")

ROW = Comparison(
    claim="evaluative and directive signals together beat either alone (2603.10165), the directive one a divergence"
    " from a slow teacher that reads the message (2601.20802)",
    needs="a part of the answer that only messages tell, one that only verdicts do, and a policy that reads messages",
    flags="--task trajkern._bench.experiments.tasks.letters:Letters --recipe feedback --feedback.hinted 0.75"
    " --prompts 32 --steps 120 --feedback.teacher-rate 0.02 --warmup.steps 900 --warmup.lr 2e-3"
    " --warmup.check-every 900 --warmup.pass-at-1 1 --eval.heldout 256 --eval.every 20",
    arms={
        "verdict and divergence": f"--credit {__name__}:BOTH --lr 1.5e-3",
        "verdict only": f"--credit {__name__}:VERDICT --lr 1.5e-3",
        "verdict and sampled log-ratio": f"--credit {__name__}:SAMPLED --lr 5e-4",
        "divergence only": f"--credit {__name__}:JSD --lr 1.5e-3",
    },
    tests=(
        Test("pass@1", "verdict only"),
        Test("pass@1", "divergence only"),
        Test("pass@1", "verdict and sampled log-ratio"),
    ),
    measures=("pass@1", "codes", "signs", "form", "tokens", "seconds"),
    lesson="Messages make the codes likely and verdicts make them sure: together they are right after 120 steps on all"
    " seeds, where a verdict alone finds nothing to reinforce, and messages alone leave a code at four in ten and tell"
    " no sign. The log-ratio of what was sampled blames it and cannot say what to say instead; on most seeds the form"
    " goes with it.",
)
