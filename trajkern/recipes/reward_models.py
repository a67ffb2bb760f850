"""Reasoning reward models: how they are rewarded in training, and how their verdicts are put together in use.

DeepSeek-GRM (arXiv 2504.02495), RM-R1 (arXiv 2505.02387; github RM-R1-UIUC/RM-R1), RRM (arXiv 2505.14674).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from trajkern._checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_sequence,
    check_shape,
    check_tensor,
    check_valued,
    describe,
    readable,
    suggesting,
)
from trajkern._values import check_finite, check_values
from trajkern.ops.advantage import FLOATS, INTEGERS
from trajkern.recipes._groups import check_index, check_vector, widened

RULES = ("deepseek_grm", "rm_r1", "rrm")
VERDICTS = ("A", "B")
SCORES = (*FLOATS, *INTEGERS)
JUDGE = "a function of the firsts and the seconds of pairs"
LEAST_CHANCE = 300.0  # in powers of ten, of which a float has 308
TAIL = 80  # characters at the end of a judgement in which its verdict must stand
Candidate = TypeVar("Candidate")
Prefer = Callable[[Sequence[Candidate], Sequence[Candidate]], Tensor]


@suggesting
def rule_rewards(judgements: Tensor | Sequence[str], labels: Tensor | Sequence[str], *, rule: str) -> Tensor:
    """+1 for a judgement that agrees with the label, -1 for every other; ``[N]`` float32.

        deepseek_grm  judgements: scores ``[N, C]``. With C at least 2, labels int ``[N]`` is the place of the best
                      response, whose score must be strictly the highest. With C = 1, labels ``[N]`` is the right score.
        rm_r1         judgements: N texts, labels: N of "A" or "B". ``<answer>[[label]]</answer>`` must stand in the
                      last 80 characters, and the other verdict must not.
        rrm           judgements: int ``[N]``, the response preferred, or -1 where none could be read; labels int
                      ``[N]``.

    None of the three rewards the format.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    rule = check_choice("rule", rule, RULES)
    if rule == "rm_r1":
        return _verdict_rewards(judgements, labels)
    check_tensor("judgements", judgements, dtypes=SCORES if rule == "deepseek_grm" else INTEGERS)
    assert isinstance(judgements, Tensor)
    if rule == "rrm":
        check_vector("judgements", judgements, None, "", None, INTEGERS)
        check_vector("labels", labels, judgements.shape[0], "one a judgement", judgements.device, INTEGERS)
        assert isinstance(labels, Tensor)
        right = (judgements == labels) & (labels >= 0)
    else:
        right = _best(judgements, labels)
    return 2 * right.float() - 1


def _best(scores: Tensor, labels: Tensor | Sequence[str]) -> Tensor:
    check_tensor("judgements", scores, ndim=2)
    count, responses = scores.shape
    if responses == 0:
        raise ValueError(f"judgements must score at least one response; got {describe(scores)}")
    if responses == 1:
        check_vector("labels", labels, count, "one a judgement", scores.device, SCORES)
        assert isinstance(labels, Tensor)
        return _equal(scores[:, 0], labels)
    check_index("labels", labels, count, "one a judgement", scores.device, responses, "responses")
    assert isinstance(labels, Tensor)
    place = labels.long().clamp(0, responses - 1)  # of an illegal label, where it could not be read
    best = scores.gather(1, place[:, None])
    other = torch.arange(responses, device=scores.device) != labels[:, None]
    return ((scores < best) | ~other).all(1)  # which no place is for an illegal label: it agrees with nothing


def _equal(x: Tensor, y: Tensor) -> Tensor:
    """Of equal numbers, not of what is equal once an integer is rounded to a float's precision."""
    if x.is_floating_point() and not y.is_floating_point():
        x, y = y, x
    if x.is_floating_point() or not y.is_floating_point():
        return x == y if x.dtype == y.dtype or not x.is_floating_point() else x.double() == y.double()
    wide = y.double()
    whole = (wide == wide.floor()) & (wide.abs() < 2.0**63)
    return whole & (x == torch.where(whole, wide, 0).long())


def _verdict_rewards(texts: Tensor | Sequence[str], labels: Tensor | Sequence[str]) -> Tensor:
    for name, x in (("judgements", texts), ("labels", labels)):
        if not isinstance(x, Sequence) or isinstance(x, str) or not all(isinstance(text, str) for text in x):
            raise TypeError(f"{name} must be a sequence of strings for rule 'rm_r1', got {describe(x)}")
    if len(texts) != len(labels):
        raise ValueError(f"labels must have one entry for each of the {len(texts)} judgements, got {len(labels)}")
    rewards = []
    for text, label in zip(texts, labels, strict=True):
        check_choice("labels", label, VERDICTS)
        rewards.append(1.0 if verdict(text) == label else -1.0)
    return torch.tensor(rewards, dtype=torch.float32, device="cpu")


def verdict(text: str) -> str | None:
    """ "A" or "B" where ``<answer>[[A]]</answer>``, or that of B, stands in the text's last 80 characters; None where
    neither does, or both do."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a text, got {describe(text)}")
    said = [x for x in VERDICTS if f"<answer>[[{x}]]</answer>" in text[-TAIL:]]
    return said[0] if len(said) == 1 else None


@suggesting
def meta_loss(
    logits: Tensor,  # [N]
    right: Tensor,  # [N]
    *,
    weights: Tensor | None = None,  # [N]
) -> Tensor:
    """Binary cross-entropy of a meta reward model: mean of -log sigmoid(z) where right, of -log sigmoid(-z) elsewhere.

    A meta model reads a judgement and says how likely it is right; its ratings choose in :func:`meta_vote`. What is
    right says the rule that rewards the judge: ``rule_rewards(judgements, labels, rule="deepseek_grm") > 0``.

    Args:
        logits: float ``[N]``, finite (checked on the CPU): the meta model's rating of each judgement.
        right: bool ``[N]``.
        weights: float ``[N]``, finite and at least 0 (checked on the CPU), such as to balance the two kinds; the mean
            is then the weighted one, 0 where nothing weighs.

    Returns:
        A scalar, float32 (float64 for float64 logits), differentiable in the logits. Without judgements it is 0.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("logits", logits, None, "", None)
    check_vector("right", right, logits.shape[0], "one flag a judgement", logits.device, (torch.bool,))
    loss = -torch.nn.functional.logsigmoid((2 * right.float() - 1) * widened(logits))
    if weights is None:
        return (loss.double().sum() / max(logits.shape[0], 1)).to(loss.dtype)
    check_vector("weights", weights, logits.shape[0], "one a judgement", logits.device)
    if readable(weights):
        check_values("weights", weights, 0)
    share = weights.detach().double()
    if share.numel():  # the largest becomes 1, so that their sum neither vanishes nor overflows
        share = share / torch.where(share.amax() > 0, share.amax(), 1)
    total = share.sum()
    return ((share * loss).sum() / torch.where(total == 0, 1, total)).to(loss.dtype)


def vote(scores: Tensor) -> Tensor:  # [K, N]
    """The sum of K samples' scores for each of N responses; ``[N]`` float32 (float64 for float64).

    K scores of 1 to 10 tell 9 K + 1 levels apart. The authors shuffle the responses for every sample (undo that before)
    and again before they take the argmax, so that a tie is broken by chance.

    Args:
        scores: float or integer ``[K, N]``, finite (checked on the CPU): a failed sample must be left out, for it is no
            score.
    """
    check_tensor("scores", scores, dtypes=SCORES, ndim=2)
    if readable(scores):
        check_finite("scores", scores.flatten())
    return scores.double().sum(0).to(widened(scores).dtype)


@suggesting
def meta_vote(
    scores: Tensor,  # [K, N]
    meta: Tensor,  # [K]
    *,
    keep: int,
) -> Tensor:
    """The vote of the ``keep`` samples that a meta reward model rates highest; ``[N]``.

    Args:
        scores: float or integer ``[K, N]``, finite (checked on the CPU).
        meta: float ``[K]``, finite (checked on the CPU): the meta model's rating of each sample. Of equal ratings the
            first are kept.
        keep: 1 to K; the authors report 1, 8 and 16 of 32.
    """
    check_tensor("scores", scores, dtypes=SCORES, ndim=2)
    check_vector("meta", meta, scores.shape[0], "one a sample", scores.device)
    keep = check_count("keep", keep, low=1)
    if keep > scores.shape[0]:
        raise ValueError(f"keep must be at most the {scores.shape[0]} samples, got {keep}")
    best = meta.argsort(descending=True, stable=True)[:keep].sort().values
    return vote(scores[best])


@suggesting
def elo(
    wins: Tensor,  # [C, C]
    *,
    k: float = 32.0,
    base: float = 1000.0,
) -> Tensor:
    """Elo ratings from a round robin; float64 ``[C]`` on the CPU.

    The pairs i < j are played in ascending order, each once, with the score s = the share of their games that i won:

        e = 1 / (1 + 10^((R_j - R_i) / 400))        R_i += k (s - e)        R_j -= k (s - e)

    Ratings depend on that order. The paper gives neither order nor constants: the order is the simplest that is the
    same on every run, the constants are chess's usual ones.

    Args:
        wins: float or integer ``[C, C]``, at least 0: ``wins[i, j]`` games of i against j that i won, 0.5 for a draw; 0
            on the diagonal. A pair without a game is passed over.
        k: the largest change by one game, above 0.
        base: everyone's first rating.
    """
    check_tensor("wins", wins, dtypes=SCORES, ndim=2)
    check_valued("wins", wins)
    if wins.shape[0] != wins.shape[1]:
        raise ValueError(f"wins must be square; got {describe(wins)}")
    k, base = check_number("k", k, above=0), check_number("base", base)
    won = wins.double().cpu()
    check_values("wins", won.flatten(), 0)
    if bool(won.diagonal().any()):
        raise ValueError(f"wins must be 0 on the diagonal; it is {won.diagonal().tolist()}")
    table, rating = won.tolist(), [float(base)] * won.shape[0]
    for i in range(len(rating)):
        for j in range(i + 1, len(rating)):
            if most := max(table[i][j], table[j][i]):
                share = (table[i][j] / most) / (table[i][j] / most + table[j][i] / most)
                expected = 1 / (1 + 10 ** min((rating[j] - rating[i]) / 400, LEAST_CHANCE))
                change = k * (share - expected)
                rating[i] += change
                rating[j] -= change
    return torch.tensor(rating, dtype=torch.float64, device="cpu")


@suggesting
def knockout(
    compare: Callable[[Candidate, Candidate], bool],
    candidates: Sequence[Candidate],
    *,
    seed: int,
) -> Candidate:
    """The winner of a knockout: n - 1 comparisons in ceil(log2 n) rounds. An odd one out goes on to the next round.

    Args:
        compare: whether the first of two candidates is the better one; a majority of several verdicts, as the authors
            take it, makes it steadier. It must answer True or False: a failed call has to raise.
        candidates: at least one.
        seed: of the draw, made anew every round.
    """
    check_callable("compare", compare, "a function of two candidates")
    candidates = check_sequence("candidates", candidates, "candidates")
    seed = check_count("seed", seed)
    if len(candidates) == 0:
        raise ValueError("candidates must hold at least one, got none")
    draw, left = random.Random(seed), list(candidates)
    while len(left) > 1:
        draw.shuffle(left)
        winners = left[len(left) // 2 * 2 :]
        for first, second in zip(left[::2], left[1::2], strict=False):
            verdict: object = compare(first, second)
            try:
                first_wins = check_flag("compare", verdict)
            except TypeError:
                raise TypeError(f"compare must return True or False, got {describe(verdict)}") from None
            winners.append(first if first_wins else second)
        left = winners
    return left[0]


@suggesting
def round_robin(prefer: Prefer[Candidate], candidates: Sequence[Candidate], *, both_orders: bool = True) -> Tensor:
    """What a judge of pairs says of every two candidates, for :func:`elo`; float64 ``[C, C]`` on the CPU.

    ``wins[i, j]`` is the sum of the votes for i against j; a missing vote is no game.

    Args:
        prefer: called once, with the firsts and the seconds of P pairs, it returns float ``[K, P]``, K votes on each: 1
            where the first is better, 0 where the second is, 0.5 for a draw, NaN for a missing vote.
        candidates: C of them.
        both_orders: whether every pair is asked in either order, so that a liking for the first place cancels; else the
            earlier candidate is always the first.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_callable("prefer", prefer, JUDGE)
    candidates = check_sequence("candidates", candidates, "candidates")
    both_orders = check_flag("both_orders", both_orders)
    count = len(candidates)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if both_orders:
        pairs += [(j, i) for i, j in pairs]
    wins = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    if pairs:
        votes = _votes(prefer, [candidates[i] for i, _ in pairs], [candidates[j] for _, j in pairs])
        first, second = torch.tensor(pairs, device="cpu").unbind(1)
        wins = wins.index_put((first, second), votes.nansum(0), accumulate=True)
        wins = wins.index_put((second, first), (1 - votes).nansum(0), accumulate=True)
    return wins


@suggesting
def majority(prefer: Prefer[Candidate], *, both_orders: bool = False) -> Callable[[Candidate, Candidate], bool]:
    """A comparison for :func:`knockout`: whether most votes are for the first of two.

    A tie goes to the first, which the knockout's draw has put there.

    Args:
        prefer: as for :func:`round_robin`, called with one pair, or two.
        both_orders: whether the pair is asked in either order.

    Returns:
        A function that raises ValueError where every vote is missing: that is no comparison.
    """
    check_callable("prefer", prefer, JUDGE)
    both_orders = check_flag("both_orders", both_orders)

    def compare(first: Candidate, second: Candidate) -> bool:
        firsts, seconds = [first, second], [second, first]
        votes = _votes(prefer, firsts, seconds) if both_orders else _votes(prefer, firsts[:1], seconds[:1])
        if both_orders:
            votes = torch.cat((votes[:, :1], 1 - votes[:, 1:]))
        if bool(votes.isnan().all()):
            raise ValueError("prefer must return a vote that is not missing; all are NaN")
        return float(votes.nanmean()) >= 0.5

    return compare


def _votes(prefer: Prefer[Candidate], firsts: list[Candidate], seconds: list[Candidate]) -> Tensor:
    """float64 ``[K, P]`` on the CPU."""
    votes: object = prefer(firsts, seconds)
    check_tensor("the result of prefer", votes, dtypes=FLOATS, ndim=2)
    assert isinstance(votes, Tensor)
    check_shape("the result of prefer", votes, (votes.shape[0], len(firsts)), "a column for each pair")
    wide = votes.detach().double().cpu()
    legal = wide.isnan() | ((wide >= 0) & (wide <= 1))
    if not bool(legal.all()):
        k, p = (~legal).nonzero()[0].tolist()
        raise ValueError(f"the result of prefer must lie in [0, 1], or be NaN; it is {float(wide[k, p])} at [{k}, {p}]")
    return wide
