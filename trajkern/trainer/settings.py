"""What the systems of recipes can be told, a table each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Gate = Literal["drop_rollout", "reject_group_if_any_fails", "reject_group_if_all_fail", "pass_rate"]


@dataclass(frozen=True)
class Compose:
    """What goes in front of any reward and behind any advantage.

    Args:
        rubric: "well_formed", or "package.module:function", called with the questions and the texts of all rollouts of
            a step and returning a flag for each (a judge's verdict, for one). Rollouts that fail it are gated out.
        gate: what becomes of those and of their groups; see trajkern.recipes.dro.gate.
        threshold: the share that "pass_rate" asks for.
        positive_weight: of positive advantages; below 1, failure teaches more than success (W-REINFORCE).
        hint_weight: of log p(with the task's hint) - log p, added to the advantage of each token.
    """

    rubric: str | None = None
    gate: Gate = "drop_rollout"
    threshold: float = 0.5
    positive_weight: float = 1.0
    hint_weight: float = 0.0


@dataclass(frozen=True)
class RLCR:
    """Recipe rlcr.

    Args:
        form: of the reward, "paper" or "code".
    """

    form: Literal["paper", "code"] = "paper"


@dataclass(frozen=True)
class DRO:
    """Recipe dro; a task that shows its work.

    Args:
        weights: of the reference answer's tokens: by their deviation over a group's rollouts, or equal.
        masked: whether the log-probs without any reasoning are taken off first. A group's mean does that as well.
        drop_fraction: of a step's prompts, those whose rollouts differ least on the reference.
        top_k: if above 0, a prompt is kept only if a rollout gives its reference's worst tokens a mean rank within it.
        worst_fraction: the share of the reference's tokens that are the worst.
        length_weight: of the reward for an answer as long as the reference.
        length_beta: its slope.
        outcome_weight: of the verifier's reward; the system needs none.
    """

    weights: Literal["variance", "uniform"] = "variance"
    masked: bool = False
    drop_fraction: float = 0.0
    top_k: int = 0
    worst_fraction: float = 0.25
    length_weight: float = 0.0
    length_beta: float = 1.0
    outcome_weight: float = 0.0


@dataclass(frozen=True)
class DeltaBelief:
    """Recipe delta_belief; a task that can be asked for its belief (twenty_questions).

    Args:
        scale: of the gain in log-probability of the hidden answer.
        clip: whether a loss of belief counts as none.
        win_reward: of every turn of a game that is won.
        turn_cost: of every turn, for each turn.
        penalties: whether invalid and repeated questions cost.
        finished: how the statistics of a turn count rollouts that had ended before it.
    """

    scale: float = 0.1
    clip: bool = True
    win_reward: float = 2.0
    turn_cost: float = 0.05
    penalties: bool = True
    finished: Literal["included", "masked"] = "included"


@dataclass(frozen=True)
class ToolPO:
    """Recipe toolpo; a task with tools.

    Args:
        call_weight: of each right call.
        attribution: whether the tool reward reaches the tokens of the calls only, or every token.
    """

    call_weight: float = 1.0
    attribution: bool = True


@dataclass(frozen=True)
class SRL:
    """Recipe srl; a task that shows its work.

    Args:
        penalty: the reward of a step that is not well-formed.
        min_std: a step's rollouts are trained on if their rewards deviate by more.
    """

    penalty: float = -1.0
    min_std: float = 1e-4


@dataclass(frozen=True)
class Feedback:
    """Recipe feedback; a task with hints.

    Args:
        reward_weight: of the verdict, 1 or -1, on the whole rollout.
        directive_weight: of log p(with the hint) - log p, on each token.
        hinted: share of the demonstrations that are shown with a hint.
    """

    reward_weight: float = 1.0
    directive_weight: float = 1.0
    hinted: float = 0.5


@dataclass(frozen=True)
class SkillRL:
    """Recipe skillrl.

    Args:
        top_k: skills shown with a question; 0 trains without the bank.
        capacity: skills kept of a family.
        threshold: success rate of a family under which its failures become lessons.
    """

    top_k: int = 1
    capacity: int = 32
    threshold: float = 0.4
