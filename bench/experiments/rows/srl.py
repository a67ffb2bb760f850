"""Likeness to an expert's every step, then the outcome; beside each alone, and beside imitation of the expert."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

_SRL = "--recipe srl --srl.thought-end ~ --srl.demonstrations 300"
_THEN = "--steps 120 --then.recipe grpo --then.steps 24 --then.prompts 32"

ROW = Comparison(
    claim="likeness to an expert's every step, and then the outcome, teaches what the outcome alone, imitation and"
    " likeness alone do not (2510.25992)",
    needs="an outcome that is right once in a thousand samples; an expert whose few demonstrations show actions and no"
    " thoughts; and something left out in them: programs of six instructions, two of whose twelve opcodes they lack",
    flags="--task trajkern._bench.experiments.tasks.programs:Programs --prompts 64 --rollouts 8 --lr 1e-3"
    " --warmup.steps 320 --warmup.batch 64 --warmup.check-every 320 --warmup.pass-at-1 2 --eval.heldout 192"
    " --eval.validation 48 --eval.every 16",
    arms={
        "srl, then grpo": f"{_SRL} {_THEN}",
        "srl": f"{_SRL} --steps 192",
        "grpo": "--recipe grpo --steps 32",
        "sft": f"{_SRL} --control supervised --steps 80",
        "srl of random likeness, then grpo": f"{_SRL} {_THEN} {RANDOM} --token-limit 786000",
    },
    tests=(Test("pass@1", "srl"), Test("pass@1", "grpo"), Test("pass@1", "sft")),
    measures=("pass@1", "pass@8", "greedy", "right_methods", "right_methods_unseen", "sound_lines", "tokens"),
    lesson="Likeness to an expert's steps finds what an outcome that is never met and imitation of bare actions do not,"
    " and the outcome adds the opcodes that no expert showed: after the switch their share went from .1 to .4 up to .4"
    " to .98. On one seed of six nothing began: its warm-up had left a quarter of the arithmetic wrong, and a likeness"
    " that follows from no thought teaches none.",
    panel=Panel("curve", arms=("srl, then grpo", "srl", "grpo", "srl of random likeness, then grpo")),
)
