"""The algebra of credit on random rollouts: what is linear is, gates restrict, masks follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trajkern as tk
from tests.credit.conftest import rollouts_of
from trajkern import credit
from trajkern.recipes.dro import GATES

TERMS = {
    "outcome": credit.outcome(),
    "tone": credit.outcome("tone", baseline="leave_one_out", scale="none"),
    "batch": credit.outcome("tone", within="batch"),
    "calls": credit.spans("call"),
    "calls by index": credit.spans("call", within="index", singleton="zero"),
    "turns": credit.outcome("tone").on("turn"),
    "directive": credit.directive(),
    "directive where failed": credit.directive(where="failed"),
    "signs": credit.recipe("w_reinforce"),
}
FLAGS = ("ok", "fine")
seeds, terms, flags = st.integers(0, 10_000), st.sampled_from(sorted(TERMS)), st.sampled_from(FLAGS)
modes = st.sampled_from(GATES)


def sixtyfourths(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(64 * low, 64 * high).map(lambda x: x / 64)


quick = settings(max_examples=25, deadline=None)


def tokens_of(spec: credit.Spec, rollouts: credit.Rollouts) -> torch.Tensor:
    return spec(rollouts).advantages


def equal(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@quick
@given(seeds, terms, terms, sixtyfourths(-3, 3), sixtyfourths(-3, 3))
def test_linear(seed: int, one: str, other: str, a: float, b: float) -> None:
    x = rollouts_of(seed)
    together = (a * TERMS[one] + b * TERMS[other])(x)
    assert together.advantages.dtype == torch.float64
    equal(together.advantages, a * tokens_of(TERMS[one], x) + b * tokens_of(TERMS[other], x))
    parts = TERMS[one](x), TERMS[other](x)
    assert torch.equal(together.keep, parts[0].keep | parts[1].keep)
    assert torch.equal(together.mask, parts[0].mask | parts[1].mask)


@quick
@given(seeds, terms, terms, flags, modes)
def test_a_gate_distributes(seed: int, one: str, other: str, flag: str, mode: str) -> None:
    x = rollouts_of(seed)
    whole = (TERMS[one] + TERMS[other]).gate(flag, mode)(x)
    parts = (TERMS[one].gate(flag, mode) + TERMS[other].gate(flag, mode))(x)
    equal(whole.advantages, parts.advantages)
    assert torch.equal(whole.keep, parts.keep) and torch.equal(whole.mask, parts.mask)


@quick
@given(seeds, terms, modes, modes)
def test_the_order_of_gates_does_not_matter(seed: int, term: str, first: str, second: str) -> None:
    x, spec = rollouts_of(seed), TERMS[term]
    one = spec.gate("ok", first).gate("fine", second)(x)
    other = spec.gate("fine", second).gate("ok", first)(x)
    assert torch.equal(one.advantages, other.advantages) and torch.equal(one.keep, other.keep)


@quick
@given(seeds, st.sampled_from(["outcome", "tone", "batch", "calls", "calls by index"]), flags)
def test_a_gate_is_as_if_the_others_were_not_there(seed: int, term: str, flag: str) -> None:
    x = rollouts_of(seed)
    keep = x.flags[flag]
    if not bool(keep.any()):
        return
    tokens = torch.repeat_interleave(keep, x.batch.lengths)
    of_kept = TERMS[term].gate(flag)(x)
    assert torch.equal(of_kept.keep, keep)
    assert not bool(of_kept.advantages[~tokens].any()) and not bool(of_kept.mask[~tokens].any())
    equal(of_kept.advantages[tokens], TERMS[term](without(x, keep)).advantages)


def without(x: credit.Rollouts, keep: torch.Tensor) -> credit.Rollouts:
    """The rollouts that are kept, by themselves."""
    batch, calls = x.batch, x.spans["call"]
    tokens = torch.repeat_interleave(keep, batch.lengths)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), batch.lengths[keep].cumsum(0)))
    number, moved, owned = keep.cumsum(0) - 1, torch.cumsum(tokens, 0) - 1, keep[calls.trajectory]
    start = moved[calls.start[owned]]
    spans = tk.Spans(
        start, start + calls.lengths[owned], number[calls.trajectory[owned]], calls.index[owned], int(bounds[-1])
    )
    packed = tk.PackedBatch(
        batch.tokens[tokens], bounds, batch.loss_mask[tokens], batch.group_ids[keep], batch.rewards[keep]
    )
    rewards = {name: reward[keep] for name, reward in x.rewards.items()}
    return credit.Rollouts(packed, rewards, {"call": spans}, {"call": x.span_rewards["call"][owned]})


@quick
@given(seeds, terms, sixtyfourths(0, 2), sixtyfourths(0, 2))
def test_asymmetric_by_token(seed: int, term: str, positive: float, negative: float) -> None:
    x = rollouts_of(seed)
    plain = tokens_of(TERMS[term] + TERMS["calls"], x)
    bent = tokens_of((TERMS[term] + TERMS["calls"]).asymmetric(positive, negative), x)
    equal(bent, torch.where(plain > 0, positive * plain, negative * plain))


@quick
@given(seeds, terms, sixtyfourths(-1, 0), sixtyfourths(0, 1))
def test_clip_by_token(seed: int, term: str, low: float, high: float) -> None:
    x = rollouts_of(seed)
    spec = TERMS[term] + TERMS["directive"]
    equal(tokens_of(spec.clip(low, high), x), tokens_of(spec, x).clamp(low, high))


@quick
@given(seeds, terms, flags)
def test_bends_commute_with_a_gate(seed: int, term: str, flag: str) -> None:
    x, spec = rollouts_of(seed), TERMS[term]
    equal(tokens_of(spec.asymmetric(0.1).gate(flag), x), tokens_of(spec.gate(flag).asymmetric(0.1), x))
    equal(tokens_of(spec.clip(-0.5, 0.2).gate(flag), x), tokens_of(spec.gate(flag).clip(-0.5, 0.2), x))
    equal(tokens_of(spec.whiten().gate(flag), x), tokens_of(spec.gate(flag).whiten(), x))


@quick
@given(seeds, terms)
def test_whiten(seed: int, term: str) -> None:
    x = rollouts_of(seed)
    found = TERMS[term].whiten()(x)
    equal(found.advantages, tk.whiten(tokens_of(TERMS[term], x), mask=found.mask))


@quick
@given(seeds, terms)
def test_spans_restrict(seed: int, term: str) -> None:
    x, spec = rollouts_of(seed), TERMS[term]
    plain, on, only = spec(x), spec.on("call")(x), spec.only("call")(x)
    inside = x.spans["call"].token_span >= 0
    equal(on.advantages, torch.where(inside, plain.advantages, 0))
    equal(only.advantages, on.advantages)
    assert torch.equal(on.mask, plain.mask) and torch.equal(only.mask, plain.mask & inside)
    both = (spec.only("call") + TERMS["outcome"])(x)
    assert torch.equal(both.mask, x.batch.loss_mask)


@pytest.mark.parametrize("term", TERMS)
def test_written_as_python(term: str) -> None:
    spec = (2 * TERMS[term] - TERMS["outcome"]).gate("ok", "pass_rate", 0.25).asymmetric(0.1).whiten().clip(-1, 1)
    for one in (TERMS[term], spec, spec.on("call") + TERMS[term].only("turn"), -(spec + spec)):
        again = eval(repr(one), {"credit": credit})
        assert again == one and hash(again) == hash(one) and repr(again) == repr(one)


def test_masked_tokens_and_float32() -> None:
    x = rollouts_of(3, torch.float32)
    found = (TERMS["outcome"] + TERMS["calls"] + TERMS["directive"])(x)
    assert found.advantages.dtype == torch.float32
    assert not bool(found.advantages[~x.batch.loss_mask].any())


def test_a_sum_of_many() -> None:
    x = rollouts_of(4)
    equal(tokens_of(sum([TERMS["outcome"]] * 3), x), 3 * tokens_of(TERMS["outcome"], x))


def test_restrictions_of_one_call_do_not_mix() -> None:
    """Masks are remembered by which tensors they were made of, some of which nobody else holds."""
    x = rollouts_of(5)
    inside = {name: x.spans[name].token_span >= 0 for name in ("call", "turn")}
    for _ in range(20):
        spec = sum((TERMS["tone"].only(name).clip(-9, 9) for name in ("call", "turn") * 3), TERMS["calls"].only("call"))
        found = spec(x)
        tone = tokens_of(TERMS["tone"], x)
        expected = tokens_of(TERMS["calls"], x) + 3 * sum(tone * inside[name] for name in inside)
        equal(found.advantages, expected * found.mask)


def test_numbers_of_numpy_and_tensors() -> None:
    for two in (np.float32(2), np.int64(2), torch.tensor(2.0)):
        assert two * TERMS["tone"] == TERMS["tone"] * two == 2 * TERMS["tone"]
