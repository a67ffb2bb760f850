"""RLCR (arXiv 2507.16806; github damanimehul/RLCR): a reward for being right and for knowing how likely that is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trajkern._checks import (
    as_number,
    check_choice,
    check_count,
    check_sequence,
    check_tensor,
    check_valued,
    describe,
    readable,
    suggesting,
)
from trajkern.ops.advantage import FLOATS, INTEGERS
from trajkern.recipes._groups import check_vector

FORMS = ("paper", "code")
MOST_BINS = 10_000
VOTES = ("weighted", "max", "majority")
TRUTHS = (torch.bool, *INTEGERS, *FLOATS)


@suggesting
def rewards(
    correct: Tensor,  # [N]
    confidence: Tensor,  # [N]
    *,
    form: str = "paper",
    well_formed: Tensor | None = None,  # [N]
) -> Tensor:
    """The reward of each answer given with a confidence; ``[N]``.

    With c = 1 for a correct answer, else 0, and q the confidence:

        paper  R = c - (q - c)^2                                        in [-1, 1]
        code   R = 0.5 format + 0.5 c + 0.5 (1 - (q - c)^2)             in [0.5, 1.5], format = 1

    so that code = 1 + paper / 2 on well-formed answers: its mean-centred advantage is half the paper's. The best q is
    the probability of being right. The authors' GRPO centres only (``scale="none"``).

    Args:
        correct: bool, integer or float ``[N]``, 0 or 1 (checked on the CPU).
        confidence: float ``[N]``, in [0, 1] where well-formed (checked on the CPU; elsewhere NaN comes out).
        form: "paper" or "code".
        well_formed: bool ``[N]``; whether answer and confidence could be read. False gives the least reward, whatever
            stands in the other two: 0 with "code", as there, and -1 with "paper", which does not speak of it (0 would
            make silence better than a wrong answer). Without it all are.

    Returns:
        float32 (float64 for float64 confidences).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    form = check_choice("form", form, FORMS)
    c, q = _checked(correct, confidence, well_formed)
    missed = (q - c).square()
    out, least = (c - missed, -1.0) if form == "paper" else (1 + 0.5 * (c - missed), 0.0)
    out = out if well_formed is None else torch.where(well_formed, out, least)
    return out if confidence.dtype == torch.float64 else out.float()


def _checked(correct: Tensor, confidence: Tensor, well_formed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """c and q in float64; q is NaN where it is out of range."""
    check_tensor("confidence", confidence, dtypes=FLOATS, ndim=1)
    count, device = confidence.shape[0], confidence.device
    check_vector("correct", correct, count, "one a confidence", device, TRUTHS, finite=False)
    c, q = correct.double(), confidence.double()
    legal = (q >= 0) & (q <= 1)
    if well_formed is not None:
        check_vector("well_formed", well_formed, count, "one flag a confidence", device, (torch.bool,))
    if readable(confidence):
        read = torch.ones_like(legal) if well_formed is None else well_formed
        for name, x, good, expected in (
            ("confidence", q, legal, "lie in [0, 1]"),
            ("correct", c, (c == 0) | (c == 1), "be 0 or 1"),
        ):
            if bool((read & ~good).any()):
                at = int((read & ~good).nonzero()[0, 0])
                raise ValueError(f"{name} must {expected}; it is {float(x[at])} at index {at}")
    return c, torch.where(legal, q, torch.nan)


class Calibration(NamedTuple):
    """How confidences agree with what came true; all float64 on the confidences' device."""

    ece: Tensor  # [] mean over answers of the gap between accuracy and confidence of their bin
    brier: Tensor  # [] mean squared gap
    auroc: Tensor  # [] how often a correct answer's confidence lies above a wrong one's; a tie counts half
    edges: Tensor  # [B+1] of the bins: the reliability diagram's axis
    size: Tensor  # [B] answers in each bin
    confidence: Tensor  # [B] their mean confidence, NaN in an empty bin
    accuracy: Tensor  # [B] the share that is correct, NaN in an empty bin


@suggesting
def calibration(
    correct: Tensor,  # [N]
    confidence: Tensor,  # [N]
    *,
    bins: int = 10,
) -> Calibration:
    """Calibration of confidences, and the reliability diagram that shows it.

        ECE = sum over bins of (n_b / N) * abs(accuracy_b - confidence_b)

    A bin holds its lower edge and not its upper, but for the last. The edges are ``numpy.linspace(0, 1, bins + 1)``, as
    the authors': its third of ten lies just above 0.3, so a float64 0.3 falls into the bin below (a float32 0.3 lies
    above both). AUROC is NaN where all answers are correct or all wrong; N = 0 gives NaN throughout.

    Args:
        correct: bool, integer or float ``[N]``, 0 or 1 (checked on the CPU).
        confidence: float ``[N]``, in [0, 1] (checked on the CPU; elsewhere NaN makes ECE and Brier NaN).
        bins: B, 1 to 10,000.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    c, q = _checked(correct, confidence)
    bins = check_count("bins", bins, low=1, high=MOST_BINS)
    place = torch.arange(bins + 1, dtype=torch.float64, device=q.device)
    edges = torch.where(place == bins, 1.0, place * (1 / bins))  # as linspace multiplies, on the device
    owner = torch.bucketize(q, edges[1:-1].contiguous(), right=True)
    member = (owner[:, None] == torch.arange(bins, device=q.device)).double()  # [N, B]
    size, sum_q, sum_c = member.sum(0), q @ member, c @ member
    ece = (sum_c - sum_q).abs().sum() / q.shape[0]
    return Calibration(ece, (q - c).square().mean(), _auroc(c, q), edges, size, sum_q / size, sum_c / size)


def _auroc(c: Tensor, q: Tensor) -> Tensor:
    ranked = q.sort().values
    below, upto = (torch.searchsorted(ranked, q, right=right).double() for right in (False, True))
    hits, misses = c.sum(), (1 - c).sum()
    return (((below + upto + 1) / 2 * c).sum() - hits * (hits + 1) / 2) / (hits * misses)


class Vote(NamedTuple):
    """What K samples of one question agree on.

    Attributes:
        place: where the answer first stands among the samples; None where none of them could be read.
        answer: that answer.
        confidence: the share of the cast votes that it won, weighted as they were; with "max" the confidence itself.
            NaN where no vote weighs anything.
    """

    place: int | None
    answer: Hashable | None
    confidence: float


@suggesting
def vote(
    answers: Sequence[Hashable],
    confidences: Tensor | Sequence[float],  # [K]
    *,
    method: str = "weighted",
) -> Vote:
    """The answer that K samples of one question give together, for evaluation.

        weighted  argmax over answers a of the sum of q_k over the samples k that say a
        max       the answer of the largest q_k
        majority  argmax over answers a of the number of samples that say a; confidences are not read

    Of equally good answers, the one that stands first.

    Args:
        answers: K answers in a form that is equal where they mean the same; None for one that could not be read, which
            casts no vote.
        confidences: float ``[K]``, or K numbers, in [0, 1]; NaN for one that was not stated, which weighs nothing.
        method: as above.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    method = check_choice("method", method, VOTES)
    answers = check_sequence("answers", answers, "answers, one a sample")
    if isinstance(confidences, Tensor):
        check_tensor("confidences", confidences, dtypes=FLOATS, ndim=1)
        check_valued("confidences", confidences)
        confidences = confidences.tolist()
    confidences = check_sequence("confidences", confidences, "numbers, one a sample")
    if len(confidences) != len(answers):
        raise ValueError(
            f"confidences must have one entry for each of the {len(answers)} answers, got {len(confidences)}"
        )
    cast: dict[Hashable, list[float]] = {}
    for at, (answer, confidence) in enumerate(zip(answers, confidences, strict=True)):
        weight = 1.0 if method == "majority" else _stated(confidence, at)
        try:
            hash(answer)
        except TypeError:
            raise TypeError(f"answers must be hashable, to be told apart; number {at} is {describe(answer)}") from None
        if answer is not None:
            cast.setdefault(answer, []).append(weight)
    if not cast:
        return Vote(None, None, float("nan"))
    # rounded once, so that the order in which equal votes were cast parts none
    votes = {answer: max(weights) if method == "max" else math.fsum(weights) for answer, weights in cast.items()}
    best = max(votes, key=lambda answer: votes[answer])  # of equal ones the first that was entered
    total = 1.0 if method == "max" else math.fsum(votes.values())
    share = votes[best] / total if votes[best] else float("nan")
    return Vote(list(answers).index(best), best, share)


def _stated(confidence: float, at: int) -> float:
    value = (
        confidence if isinstance(confidence, float) and math.isnan(confidence) else as_number("confidences", confidence)
    )
    if math.isnan(value):
        return 0.0
    if not 0 <= value <= 1:
        raise ValueError(f"confidences must lie in [0, 1]; it is {value} at index {at}")
    return float(value)
