"""Rollouts of engines, each checked against itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trajkern._checks import check_instance, describe, shown
from trajkern.integrations._engine_sampling import Sampling
from trajkern.integrations._outside import Outside, first_not, is_list

MINUS_INFINITY = -9999.0  # what vLLM's server writes for it
ROUNDING = 1e-3  # by which a log-prob in bfloat16 may exceed 0
CUT_SHORT = ("", "abort", "error")  # a finish reason of what the policy did not end


class Rollout(NamedTuple):
    """One completion after its prompt; or several turns of them, see :func:`continued`."""

    tokens: list[int]  # the prompt and all that follows
    sampled: list[bool]  # of each token, whether the engine drew it
    logprobs: list[float]  # of the sampled tokens, in their order
    support: list[list[int]] | None  # of each sampled token, the ids that it was drawn from
    finish: str  # why it ended: "stop", "length", ...


def rollout_of(
    where: str,
    prompt: Outside,
    tokens: Outside,
    logprobs: Sequence[Any],
    masks: Outside | None,
    finish: Outside | None,
    how: Sampling,
) -> Rollout:
    """What came, checked against itself."""
    drawn, asked = tokens.ids(), prompt.ids()
    ended = None if finish is None else finish.text()
    if ended is None or ended in CUT_SHORT:
        raise ValueError(f"{where} must have been ended by the policy or its length; its finish reason is {ended!r}")
    if not asked:
        raise ValueError(f"{where} must have a prompt of at least one token, which predicts the first; it has none")
    check_logprobs(where, logprobs, len(drawn))
    if how.replay and how.cuts and masks is None:
        raise ValueError(
            f"{where} must have a sampling mask, as {', '.join(how.cuts)} cut the distribution; it has none "
            "(return_sampling_mask asks the engine for it, and replay=False does without)"
        )
    support = support_of(where, masks, drawn) if how.replay and masks is not None else None
    sampled = [False] * len(asked) + [True] * len(drawn)
    return Rollout([*asked, *drawn], sampled, list(logprobs), support, ended)


def check_logprobs(where: str, logprobs: Sequence[Any], count: int, low: float = MINUS_INFINITY) -> None:
    """As many numbers above ``low``, which alone may be infinite, and at most 0."""
    if len(logprobs) != count:
        raise ValueError(f"{where} must have a log-prob a token; it has {len(logprobs)} for {count} tokens")
    if (
        i := first_not(
            lambda x: type(x) in (int, float) and (low < x or x == low == -math.inf) and x <= ROUNDING, logprobs
        )
    ) is not None:
        x = logprobs[i]
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        hint = ": are they logits?" if is_number and x > 0 else ""
        kind = ValueError if is_number or x is None else TypeError
        said = shown(x) if is_number or x is None else describe(x)
        raise kind(f"{where} must have finite log-probs; that of token {i} of {count} is {said}{hint}")


def support_of(where: str, masks: Outside, drawn: Sequence[int]) -> list[list[int]]:
    """The sampling masks ``[token][ids]``, each with the token that was drawn from it."""
    support = [x.ids() for x in masks.each()]
    if len(support) != len(drawn):
        raise ValueError(f"{where} must have a sampling mask a token; it has {len(support)} for {len(drawn)}")
    for i, (token, ids) in enumerate(zip(drawn, support, strict=True)):
        if token not in ids:
            raise ValueError(
                f"{where} must have drawn each token from its mask; token {i} is {token}, not in {ids[:8]}"
            )
        if len(set(ids)) < len(ids):
            twice = next(x for k, x in enumerate(ids) if x in ids[:k])
            raise ValueError(f"{masks.name} must hold each id once; that of sampled token {i} holds {twice} more often")
    return support


def check_rollouts(name: str, rollouts: Any) -> None:
    """Those that somebody may have made by hand: fields of their kinds that agree with one another."""
    if not is_list(rollouts):
        raise TypeError(f"{name} must be a sequence of rollouts, got {describe(rollouts)}")
    for i, x in enumerate(rollouts):
        where = f"{name}[{i}]"
        check_instance(where, x, Rollout)
        for field in ("tokens", "sampled", "logprobs"):
            if not isinstance(getattr(x, field), (list, tuple)):
                raise TypeError(f"{where}.{field} must be a list, got {describe(getattr(x, field))}")
        tokens, sampled = Outside(f"{where}.tokens", x.tokens).ids(), Outside(f"{where}.sampled", x.sampled).flags()
        written = sum(sampled)
        if len(sampled) != len(tokens) or len(x.logprobs) != written:
            raise ValueError(
                f"{where} must have a flag a token and a log-prob each sampled one; got {len(tokens)} tokens, "
                f"{len(sampled)} flags, {written} of them True, and {len(x.logprobs)} log-probs"
            )
        check_logprobs(f"{where}.logprobs", x.logprobs, written)
        if x.support is not None:
            drawn = [token for token, is_drawn in zip(tokens, sampled, strict=True) if is_drawn]
            support_of(where, Outside(f"{where}.support", x.support), drawn)
        if Outside(f"{where}.finish", x.finish).text() in CUT_SHORT:
            raise ValueError(f"{where}.finish must be what ended it, got {x.finish!r}")
