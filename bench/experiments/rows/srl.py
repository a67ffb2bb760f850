"""Likeness to an expert's every step, then the outcome; beside each alone, and beside imitation of the expert."""

from trajkern._bench.experiments.comparisons import RANDOM, Comparison, Panel, Test

_SRL = "--recipe srl --srl.thought-end ~ --srl.demonstrations 300"
_THEN = "--steps 104 --then.recipe grpo --then.steps 24 --then.prompts 32"

ROW = Comparison(
    claim="likeness to an expert's every step, and then the outcome, teaches what the outcome alone, imitation and"
    " likeness alone do not (2510.25992)",
    needs="an outcome that is right once in a thousand samples; an expert whose few demonstrations show actions and no"
    " thoughts; and something left out in them: programs of six instructions, two of whose twelve opcodes they lack",
    flags="--task trajkern._bench.experiments.tasks.programs:Programs --prompts 128 --rollouts 8 --lr 1e-3"
    " --warmup.steps 800 --warmup.batch 64 --warmup.check-every 800 --warmup.pass-at-1 2 --eval.heldout 192"
    " --eval.validation 48 --eval.every 16",
    arms={
        "srl, then grpo": f"{_SRL} {_THEN}",
        "srl": f"{_SRL} --steps 140",
        "grpo": "--recipe grpo --prompts 64 --steps 47",
        "sft": f"{_SRL} --control supervised --prompts 64 --steps 90",
        "srl of random likeness, then grpo": f"{_SRL} {_THEN} {RANDOM} --token-limit 1147000",
    },
    tests=(Test("pass@1", "srl"), Test("pass@1", "grpo"), Test("pass@1", "sft")),
    measures=("pass@1", "pass@8", "greedy", "right_methods", "right_methods_unseen", "sound_lines", "tokens"),
    lesson="Likeness to an expert's steps finds what an outcome that is never met and imitation of bare actions do not,"
    " and the outcome adds the opcodes that no expert showed: .61 to .97 of the steps that need one have it in the end,"
    " for .10 to .52 by likeness alone at equal tokens. Likeness has to come so far that the outcome is met at all: on"
    " one seed it was right in .04 of the samples at the switch, and that seed ended lowest.",
    # on others a warm-up of 320 or 440 steps once left a quarter of the arithmetic wrong
    seeds=(40, 41, 42, 43, 44, 45),
    panel=Panel("curve", arms=("srl, then grpo", "srl", "grpo", "srl of random likeness, then grpo")),
)
