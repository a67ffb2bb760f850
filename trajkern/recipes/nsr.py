"""Learning from successes and from failures apart (arXiv 2506.01347; github TianHongZXY/RLVR-Decomposed)."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_number, suggesting
from trajkern.ops.advantage import FLOATS, INTEGERS
from trajkern.recipes._groups import check_vector, widened

KINDS = ("psr", "nsr", "w_reinforce")
SCORES = (torch.bool, *INTEGERS, *FLOATS)


@suggesting
def advantages(
    correct: Tensor,  # [N]
    *,
    kind: str,
    positive_weight: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """The advantage of each rollout, and whether it is trained at all. No baseline, no normalisation.

        psr          +1 for a correct rollout, the others are left out
        nsr          -1 for a wrong rollout, the others are left out
        w_reinforce  +positive_weight for a correct one, -1 for a wrong one

    PSR sharpens towards what already works; NSR only takes mass from what failed and lets the model's own prior spread
    it, which keeps pass@k at large k; W-REINFORCE is NSR with a little of PSR.

    Args:
        correct: bool, integer or float ``[N]``; 1 is correct, 0 is wrong. Any other score is left out by "psr" and
            "nsr" and is its own advantage with "w_reinforce", as in the authors' code.
        kind: "psr", "nsr" or "w_reinforce".
        positive_weight: at least 0; the lambda of the last, 0.1 in the paper.

    Returns:
        (advantages ``[N]``, keep bool ``[N]``); the advantages are float32 (float64 for float64), and 0 where keep is
        False. What is left out must not count in the loss's normaliser: take ``loss_mask`` away from it too. Where keep
        is all False there is nothing to train on. (The authors besides drop rows up to a multiple of their workers.)

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("correct", correct, None, "", None, SCORES)
    kind, score = check_choice("kind", kind, KINDS), widened(correct)
    positive_weight = check_number("positive_weight", positive_weight, low=0, dtype=score.dtype)
    right, wrong = score == 1, score == 0
    if kind == "psr":
        return right.to(score.dtype), right
    if kind == "nsr":
        return torch.where(wrong, -1.0, 0.0).to(score.dtype), wrong
    out = torch.where(right, positive_weight, torch.where(wrong, -1.0, score))
    return out, torch.ones_like(right)
