"""The parts of a composed credit together, beside a scalar outcome and beside all but one of them."""

from torch import Tensor

from trajkern import credit
from trajkern._bench.experiments.comparisons import Comparison, Panel, Test

OUTCOME = credit.outcome()
UNEVEN = OUTCOME.asymmetric(positive=0.5, negative=1.0)
CHECKED = 0.3 * credit.outcome("action", scale="none", singleton="zero").on("call")
GATED = CHECKED.gate("well_formed")
DIRECTED = 0.5 * credit.divergence(where="failed", k=None, beta=0.5)


def every_verdict(rollouts: credit.Rollouts) -> Tensor:
    """All that is checked, added up: the outcome, and for an answer of the form its right signs, weighed as above."""
    return rollouts.reward("reward") + 0.3 * rollouts.flags["well_formed"] * rollouts.reward("action")


every_verdict.needs = frozenset({"reward", "action", "flags:well_formed"})  # type: ignore[attr-defined]

SUMMED = credit.outcome(every_verdict)
COMPOSITION = UNEVEN + GATED + DIRECTED
NOT_DENSE = UNEVEN + DIRECTED
NOT_GATED = UNEVEN + CHECKED + DIRECTED
NOT_UNEVEN = OUTCOME + GATED + DIRECTED
NOT_DIRECTED = UNEVEN + GATED

ROW = Comparison(
    claim="dense signal from the structure of a rollout, a gate that is no reward, success and failure that weigh"
    " differently, and a directive part together beat one scalar at equal tokens",
    needs="an answer with parts that different signals tell of: codes that only messages name, signs that are checked"
    " one by one, a form without which more signs can be right, and a free digit",
    flags="--task trajkern._bench.experiments.tasks.forms:Forms --recipe feedback --feedback.hinted 0.75 --prompts 32"
    " --steps 150 --lr 1.5e-3 --feedback.teacher-rate 0.02 --warmup.steps 900 --warmup.lr 2e-3 --warmup.check-every 900"
    " --warmup.pass-at-1 2 --eval.heldout 128 --eval.every 20",
    arms={
        "composition": f"--credit {__name__}:COMPOSITION",
        "scalar outcome": f"--credit {__name__}:OUTCOME",
        "all verdicts in one scalar": f"--credit {__name__}:SUMMED",
        "without the dense part": f"--credit {__name__}:NOT_DENSE",
        "without the gate": f"--credit {__name__}:NOT_GATED",
        "without asymmetry": f"--credit {__name__}:NOT_UNEVEN",
        "without the directive part": f"--credit {__name__}:NOT_DIRECTED",
    },
    tests=(Test("pass@1", "scalar outcome"), Test("pass@1", "all verdicts in one scalar")),
    measures=("pass@1", "mean pass@1", "distinct", "codes", "signs", "form", "signs_anywhere"),
    panel=Panel("curve"),
    lesson="A scalar cannot tell what only messages say, and one that adds up all that is checked learns the signs and"
    " no code. Of the parts, whose absence is shown and not tested, two decide: without messages no code is found, and"
    " without the gate the signs that the form has no room for are written instead of it. The dense part brings success"
    " forward, and asymmetry keeps more of the free digits, for a slower start.",
    seeds=(30, 31, 32, 33, 34, 35),  # 20 to 25 showed that success needs half of its weight, and the divergence no more
)
