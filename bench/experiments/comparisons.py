"""What each recipe is compared with, on which task, and the claim of its authors that this is to show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Args:
        claim: what the authors report.
        flags: of every arm, the warm-up's among them.
        arms: flags of each arm, the recipe's first.
        measures: what is compared: a held-out figure, or "val_pass@1 >= x", the first step that gets there.
        shares_warm_up: whether all arms warm up alike.
    """

    claim: str
    flags: str
    arms: dict[str, str]
    measures: tuple[str, ...] = ("pass@1", "pass@8", "greedy")
    shares_warm_up: bool = True


_STEPS = "--task chain_sum_steps --steps 150"
RANDOM = "--control random-rewards"
COMPARISONS: dict[str, Comparison] = {
    "tree_grpo": Comparison(
        "comparing the branches of a tree beats comparing whole rollouts at equal tokens (2509.21240)",
        "--task chain_sum_steps --loss.kind grpo",
        {
            "tree_grpo": "--recipe tree_grpo --steps 165",
            "grpo": "--recipe grpo --rollouts 6 --steps 150",
            "tree_grpo, random rewards": f"--recipe tree_grpo --steps 165 {RANDOM}",
        },
        ("pass@1", "pass@8", "greedy", "tokens"),
    ),
    "w_reinforce": Comparison(
        "learning from failures keeps pass@k at large k, where learning from successes alone loses it (2506.01347)",
        "--task chain_sum --steps 150 --eval.samples 32 --eval.heldout 256",
        {name: f"--recipe {name}" for name in ("w_reinforce", "nsr", "psr", "grpo")},
        ("pass@1", "pass@2", "pass@4", "pass@8", "pass@16", "pass@32"),
    ),
    "rlcr": Comparison(
        "a proper score beside the outcome calibrates confidence and costs no accuracy (2507.16806)",
        "--task chain_sum_confidence --steps 150",
        {"rlcr": "--recipe rlcr", "outcome only": "--recipe grpo", "rlcr, random rewards": f"--recipe rlcr {RANDOM}"},
        ("ece", "brier", "auroc", "pass@1"),
    ),
    "delta_belief": Comparison(
        "rewarding turns by the gain in belief wins more games in fewer turns than the outcome alone (2602.12342)",
        "--task twenty_questions --steps 60 --prompts 32 --warmup.steps 1500 --warmup.check-every 100"
        " --warmup.pass-at-1 0.35 --warmup.pass-at-k 0.6 --eval.heldout 256",
        {
            "delta_belief": "--recipe delta_belief",
            "outcome only": "--recipe delta_belief --delta-belief.scale 0",
            "grpo": "--recipe grpo",
        },
        ("pass@1", "pass@8", "turns", "fresh_questions"),
    ),
    "dro": Comparison(
        "weighing the reference's tokens by their deviation beats a uniform mean; the filter saves steps (2506.13351)",
        _STEPS,
        {
            "dro": "--recipe dro",
            "dro, a third of the prompts dropped": "--recipe dro --dro.drop-fraction 0.33",
            "uniform mean": "--recipe dro --dro.weights uniform",
            "dro, random rewards": f"--recipe dro {RANDOM}",
            "verifier (grpo)": "--recipe grpo",
        },
        ("pass@1", "greedy", "tokens", "val_pass@1 >= 0.35"),
    ),
    "srl": Comparison(
        "step-wise likeness teaches where imitation and outcomes fail (2510.25992)",
        "--task count_bits_steps --steps 100 --warmup.steps 60 --warmup.check-every 60 --warmup.pass-at-1 0.02"
        " --warmup.pass-at-k 0 --warmup.demonstrations 1000",
        {"srl": "--recipe srl", "outcome only": "--recipe grpo", "sft": "--recipe srl --control supervised"},
    ),
    "toolpo": Comparison(
        "crediting right calls to the tokens that made them beats crediting whole rollouts (2510.21618)",
        "--task tools --steps 60 --warmup.steps 320 --warmup.check-every 40 --warmup.pass-at-1 0.15"
        " --warmup.pass-at-k 0.3 --eval.heldout 256 --eval.validation 64 --eval.every 40",
        {
            "toolpo": "--recipe toolpo",
            "no attribution": "--recipe toolpo --toolpo.no-attribution",
            "outcome only": "--recipe grpo",
        },
        ("pass@1", "pass@8", "greedy", "right_calls", "calls"),
    ),
    "feedback": Comparison(
        "evaluative and directive signals together beat either alone (2603.10165)",
        "--task chain_sum_steps --steps 100 --recipe feedback --lr 1e-4 --feedback.directive-weight 0.1",
        {
            "both": "",
            "directive only": "--feedback.reward-weight 0",
            "evaluative only": "--feedback.directive-weight 0",
            "both, random verdicts": RANDOM,
        },
    ),
    "skillrl": Comparison(
        "a bank of skills in the prompt helps (2602.08234)",
        "--task chain_sum --steps 100 --recipe skillrl",
        {"skillrl": "", "without the bank": "--skillrl.top-k 0", "skillrl, random rewards": RANDOM},
        shares_warm_up=False,
    ),
}
