"""Where a credit meets what it was not written for: each gives the right number, or an error that names it."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

import trajkern as tk
from tests.credit.conftest import rollouts_of
from tests.credit.test_losses import SPECS, grown
from tests.credit.test_scored import Host, reasoned
from tests.credit.test_terms import NAN, close, of_rollouts, rollouts, spans
from trajkern import credit


@pytest.mark.parametrize("name", ("spans", "rows"))
@pytest.mark.parametrize("aggregate", ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"))
def test_a_normalizer_reaches_the_tree(name: str, aggregate: str) -> None:
    x, old = grown(4)
    config, found = tk.PolicyLoss("grpo", aggregate=aggregate, max_length=30), SPECS[name](x)
    flat = old[x.tree.flat_index]
    bounds = x.batch.cu_seqlens
    expected, _ = tk.policy_loss(flat, None, cu_seqlens=bounds, config=config, normalizer=17.0, **found.loss_inputs())
    inputs = found.tree_inputs(config, normalizer=17.0)
    loss, _ = tk.policy_loss(old, None, cu_seqlens=x.tree.node_offsets, **inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)


def test_nothing_carries_a_gradient() -> None:
    x = rollouts_of(1)
    teacher = x.teacher_logprobs.clone().requires_grad_()
    sampled = x.batch.sampler_logprobs.clone().requires_grad_()
    batch = tk.PackedBatch(
        x.batch.tokens, x.batch.cu_seqlens, x.batch.loss_mask, x.batch.group_ids, x.batch.rewards, None, None, sampled
    )
    rewards = {"reward": x.reward("reward").clone().requires_grad_()}
    found = (credit.outcome() + credit.directive()).whiten()(credit.Rollouts(batch, rewards, teacher_logprobs=teacher))
    assert not found.advantages.requires_grad and not any(y.requires_grad for y in found.metrics.values())


def test_nothing_of_the_callers_is_handed_out() -> None:
    x = rollouts(teacher_logprobs=torch.zeros(12), flags={"ok": torch.ones(4, dtype=torch.bool)})
    found = credit.directive().gate("ok")(x)
    found.mask[:], found.keep[:] = False, False
    assert x.batch.loss_mask.sum() == 8 and x.flags["ok"].all()


def test_beliefs_of_long_answers_in_16_bits() -> None:
    x, host = rollouts_of(3), Host()
    rows = [{"belief_target": "t" * 400} for _ in range(len(x))]
    known: dict[str, Any] = {"rows": rows, "rewards": x.rewards}
    exact = credit.recipe("delta_belief")(credit.Rollouts(x.batch, score=host, **known))

    def rounded(contexts: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, bounds = host(contexts, targets)
        return logprobs.half(), bounds

    found = credit.recipe("delta_belief")(credit.Rollouts(x.batch, score=rounded, **known))
    torch.testing.assert_close(found.advantages.double(), exact.advantages, rtol=1e-2, atol=1e-2)


def test_treepo_of_a_rollout_that_ends_unscored() -> None:
    tree = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 2, 2]), torch.tensor([0]))
    mask = torch.tensor([False, True, True, True, False, True, True, False])
    batch = tk.PackedBatch(
        torch.tensor([0, 1, 2, 3, 0, 1, 4, 5]),
        torch.tensor([0, 4, 8]),
        mask,
        torch.zeros(2).long(),
        torch.tensor([1.0, 0]),
    )
    found = credit.recipe("treepo")(credit.Rollouts(batch, tree=tree))
    each = torch.tensor([1.0, 1, 1, -1, -1])  # by token, of 3 and 2
    close(found.advantages[mask], (each - each.mean()) / each.std())
    none = tk.PackedBatch(batch.tokens[:0], torch.tensor([0, 0]), mask[:0], torch.zeros(1).long(), torch.ones(1))
    empty = tk.Tree(torch.tensor([-1]), torch.tensor([0]), torch.tensor([0]))
    assert credit.recipe("treepo")(credit.Rollouts(none, tree=empty)).advantages.shape == (0,)


def test_a_trees_groups_are_the_batchs() -> None:
    tree = tk.Tree(torch.tensor([-1, -1]), torch.tensor([3, 3]))
    x = rollouts((1.0, 0.0), (5, 5), tree=tree)
    assert x.tree.leaf_group.tolist() == [5, 5]
    with pytest.raises(ValueError, match="tree must have the rollouts' groups"):
        rollouts((1.0, 0.0), (5, 5), tree=tk.Tree(tree.parent, tree.node_lengths, torch.tensor([1, 2])))
    one = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([1, 2, 2]))
    with pytest.raises(ValueError, match="tree must have roots whose rollouts share a group"):
        rollouts((1.0, 0.0), (5, 6), tree=one)


def test_shared_tokens_have_one_mask() -> None:
    tree = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1]))
    mask = torch.tensor([False, True, True, False, False, True])
    batch = tk.PackedBatch(
        torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor([0, 3, 6]), mask, torch.zeros(2).long(), torch.tensor([1.0, 0])
    )
    with pytest.raises(ValueError, match="tree must share tokens only where the rollouts' loss masks agree"):
        credit.Rollouts(batch, tree=tree)


@pytest.mark.parametrize("unseen", (0.0, 100.0, NAN))
def test_a_gate_reaches_a_statistic_of_a_statistic(unseen: float) -> None:
    tree = tk.Tree(torch.tensor([-1, -1, -1]), torch.tensor([3, 3, 3]))
    x = rollouts((1.0, 0.0, unseen), (0, 0, 0), tree=tree, flags={"ok": torch.tensor([True, True, False])})
    found = credit.recipe("tree_grpo", estimator="tree_2norm").gate("ok")(x)
    close(of_rollouts(found), [math.sqrt(0.5), -math.sqrt(0.5), 0])


def test_a_gate_reaches_reflection() -> None:
    x, host, contexts = reasoned(5)
    keep = torch.arange(len(x)) % 4 != 1
    known: dict[str, Any] = {"spans": x.spans, "rows": x.rows, "score": host}
    gated = credit.Rollouts(x.batch, flags={"ok": keep}, **known)
    found = credit.outcome(credit.scored.Reflection(), scale="none").gate("ok")(gated)
    logprobs, bounds = host(contexts, [row["reference"] for row in x.rows])
    of_kept = torch.repeat_interleave(keep, bounds.diff())
    cu = torch.cat((bounds[:1], bounds.diff()[keep].cumsum(0)))
    alone = tk.reflection_rewards(logprobs[of_kept], cu, x.batch.group_ids[keep]).rewards
    expected = tk.group_advantages(alone, x.batch.group_ids[keep], scale="none")
    torch.testing.assert_close(found.rows[keep], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", (-3.0, -30.0, -100.1))
def test_deviations_of_what_hardly_deviates(mean: float) -> None:
    noise = 1e-3 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    x = rollouts(teacher_logprobs=torch.arange(12) / -10 + mean + noise)
    directed = (x.teacher_logprobs - x.batch.sampler_logprobs)[x.batch.loss_mask].double()
    assert credit.directive()(x).metrics["directive/std"].item() == pytest.approx(
        directed.std(correction=0).item(), rel=1e-3
    )


def test_what_no_term_scores_does_not_learn() -> None:
    calls = spans((1, 2), (4, 5))
    known: dict[str, Any] = {"spans": {"call": calls}, "span_rewards": {"call": torch.ones(2), "turn": torch.ones(4)}}
    x = rollouts((1.0, 0.0, 0.0, NAN), **known)
    both = (credit.outcome() + credit.spans("call"))(x)
    assert both.keep.tolist() == [True, True, True, False] and not both.mask[9:].any()
    assert credit.spans("call")(x).keep.all()  # nothing was to be scored
    late = (credit.spans("call") + credit.outcome().only("turn"))(x)
    assert late.keep.tolist() == [True, True, True, False] and not late.mask[9:].any()
    assert (credit.outcome() + credit.recipe("delta_belief", reward="turn"))(x).keep.all()  # its turns are scored


def test_nan_in_presets() -> None:
    x = rollouts({"reward": [1.0, 0, NAN, 1], "confidence": [0.9, 0.5, 0.5, NAN]})
    found = credit.recipe("rlcr")(x)
    assert found.keep.tolist() == [True, True, False, True] and found.advantages.isfinite().all()
    turns = torch.tensor([1.0, NAN, 0, 0])
    with pytest.raises(ValueError, match=r"span_rewards\['turn'\] must be finite; it is nan at index 1"):
        credit.recipe("delta_belief", reward="turn")(rollouts(span_rewards={"turn": turns}))


def test_divergences_are_asked_for() -> None:
    spec = credit.outcome() + 0.5 * credit.divergence(where="failed", k=20)
    with pytest.raises(ValueError, match="needs 'divergence'"):
        spec(rollouts())
    found = spec(rollouts(adds_divergences=True))
    ((term, weight),) = found.divergences
    assert term == credit.divergence("failed", k=20)
    close(weight, 0.5 * found.mask * torch.tensor([0, 1, 1, 1]).repeat_interleave(3))
    for bent in (spec.asymmetric(0.1), spec.clip(-1, 1), spec.whiten()):
        with pytest.raises(ValueError, match="a divergence is a term of the loss"):
            bent(rollouts(adds_divergences=True))


@pytest.mark.parametrize("name", ("tree", "score", "divergence", "flags:ok"))
def test_rewards_have_names_of_their_own(name: str) -> None:
    with pytest.raises(ValueError, match="rewards must not be called"):
        rollouts({name: [1.0, 0, 0, 0]})


@pytest.mark.parametrize("field", ("rewards", "spans", "span_rewards", "flags"))
def test_fields_are_mappings(field: str) -> None:
    x = rollouts()
    with pytest.raises(TypeError, match=f"{field} must be a mapping of names"):
        credit.Rollouts(x.batch, **{field: torch.ones(4)})


def test_a_teacher_needs_a_policy() -> None:
    x = rollouts()
    batch = tk.PackedBatch(x.batch.tokens, x.batch.cu_seqlens, x.batch.loss_mask, x.batch.group_ids, x.batch.rewards)
    with pytest.raises(ValueError, match="teacher_logprobs needs old_logprobs or sampler_logprobs"):
        credit.Rollouts(batch, teacher_logprobs=torch.zeros(12))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: credit.outcome("math:pi"), TypeError, "reward must be a function of the rollouts; at math:pi"),
        (lambda: credit.outcome(functools.partial(len, [])), None, ""),
        (lambda: credit.recipe("dro", drop_fraction=7), ValueError, "drop_fraction must be at most 1"),
        (lambda: credit.recipe("dro", top_k=-2), ValueError, "top_k must be at least 0"),
        (lambda: credit.recipe("dro", worst_fraction="x"), TypeError, "worst_fraction must be a number"),
        (lambda: credit.recipe("srl", min_std=-1), ValueError, "min_std must be at least 0"),
        (lambda: credit.recipe("srl", penalty="x"), TypeError, "penalty must be a number"),
        (lambda: credit.recipe("delta_belief", scale=-1), ValueError, "scale must be at least 0"),
        (lambda: credit.recipe("delta_belief", reward="turn", scale=1), TypeError, "scale set the policy's own"),
        (lambda: credit.divergence(k=2.5), TypeError, "k must be an int"),
        (lambda: 1e30 * (1e30 * credit.outcome()), ValueError, "factor must be of a magnitude"),
        (lambda: credit.outcome(credit.spans("call"))(_called()), ValueError, "a reward must be a value of whole"),
    ],
)
def test_settings_are_checked_when_they_are_made(make: Any, error: Any, message: str) -> None:
    if error is None:
        make()
        return
    with pytest.raises(error, match=message):
        make()


def _called() -> credit.Rollouts:
    return rollouts(spans={"call": spans((1, 2))}, span_rewards={"call": torch.ones(1)})


def test_numbers_are_kept_as_pythons() -> None:
    spec = credit.outcome(eps=np.float32(0.5), ddof=np.int64(0))
    assert repr(spec) == "credit.outcome(ddof=0, eps=0.5)"
    assert hash(credit.outcome(eps=torch.tensor(0.5), ddof=0)) == hash(spec)


def test_a_method_is_not_written_as_a_function() -> None:
    x = rollouts_of(0)
    assert "test_borders:" not in repr(credit.outcome(Host().__call__)) and len(x)


@pytest.mark.parametrize(
    "score, message",
    [
        (lambda contexts, targets: torch.zeros(3), "score must return 2 tensors"),
        (lambda contexts, targets: (torch.zeros(3), torch.tensor([0, 3])), "the cu_seqlens of score must have shape"),
        (
            lambda contexts, targets: (torch.zeros(3), torch.arange(len(targets) + 1)),
            "cu_seqlens of score must run from 0 to the 3 log-probs",
        ),
    ],
)
def test_hosts_that_score_something_else(score: Any, message: str) -> None:
    x, _, _ = reasoned(1)
    with pytest.raises((ValueError, TypeError), match=message):
        credit.outcome(credit.scored.Reflection())(credit.Rollouts(x.batch, spans=x.spans, rows=x.rows, score=score))


def test_no_rollouts() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    batch = tk.PackedBatch(
        none, torch.zeros(1, dtype=torch.int64), none.bool(), none, none.float(), None, None, none.float()
    )
    empty = tk.Spans(none, none, none, none, 0)
    x = credit.Rollouts(
        batch,
        spans={"reasoning": empty},
        rows=[],
        score=Host(),
        teacher_logprobs=none.float(),
        span_rewards={"turn": none},
    )
    for name in ("grpo", "nsr", "feedback", "dro", "delta_belief"):
        found = credit.recipe(name)(x)
        assert found.advantages.shape == found.mask.shape == found.keep.shape == (0,)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_integers_that_float32_does_not_tell_apart(dtype: torch.dtype) -> None:
    x, large = rollouts(), torch.tensor([2**24 + 1, 2**24, 0, 0], dtype=dtype)
    for make in (
        lambda: credit.Rollouts(x.batch, {"reward": large}),
        lambda: credit.Rollouts(x.batch, span_rewards={"turn": -large}),
        lambda: credit.outcome(lambda rollouts: large)(x),
    ):
        with pytest.raises(ValueError, match=r"must be integers of a magnitude of at most 2\^24"):
            make()
    exact = credit.outcome(scale="none", singleton="zero")(credit.Rollouts(x.batch, {"reward": large.double()}))
    assert exact.rows is not None and exact.rows[0] - exact.rows[1] == 1


def test_what_was_to_be_scored_by_another_leaves() -> None:
    """A call of the third and a step of the fourth have no score, and they have nothing else."""
    calls, steps = spans((1, 2), (7, 8)), spans((1, 2), (10, 11))
    scores = {"call": torch.tensor([1.0, NAN]), "step": torch.tensor([1.0, NAN])}
    x = rollouts(spans={"call": calls, "step": steps}, span_rewards=scores)
    assert (credit.spans("call") + credit.spans("step"))(x).keep.tolist() == [True, True, False, False]
    mask = x.batch.loss_mask & (torch.arange(12) < 9)  # the fourth has no turn
    silent = tk.PackedBatch(x.batch.tokens, x.batch.cu_seqlens, mask, x.batch.group_ids)
    known = {"span_rewards": {"turn": torch.ones(3)}}
    turned = credit.Rollouts(silent, {"reward": torch.tensor([1.0, 0, 0, NAN])}, **known)
    spec = credit.outcome() + credit.recipe("delta_belief", reward="turn")
    assert spec(turned).keep.tolist() == [True, True, True, False]


def test_whose_log_probs_are_read() -> None:
    """A teacher is compared with the old ones; what was unlikely is what the sampler thought so."""
    x, _ = grown(3)
    batch, old = x.batch, x.batch.sampler_logprobs - 10
    both = tk.PackedBatch(
        batch.tokens,
        batch.cu_seqlens,
        batch.loss_mask,
        batch.group_ids,
        batch.rewards,
        old,
        None,
        batch.sampler_logprobs,
    )
    known = credit.Rollouts(both, tree=x.tree, teacher_logprobs=old + 1)
    torch.testing.assert_close(credit.directive()(known).advantages, batch.loss_mask.double())
    assert torch.equal(credit.recipe("spo")(known).mask, credit.recipe("spo")(x).mask)


def test_what_could_not_be_scored_below_a_gate_on_a_tree() -> None:
    tree = tk.Tree(torch.tensor([-1] * 4), torch.tensor([3] * 4))
    ok, steps = torch.tensor([True, True, True, False]), spans((1, 2))
    known: dict[str, Any] = {"spans": {"step": steps}, "span_rewards": {"step": torch.ones(1)}}
    x = rollouts((1.0, 0.0, NAN, NAN), (0, 0, 0, 0), tree=tree, flags={"ok": ok}, **known)
    term = credit.tree_terms.OfTree(name="treerl").gate("ok")
    assert term(x).keep.tolist() == [True, True, False, False]
    assert (term + credit.spans("step"))(x).keep.tolist() == [True, True, False, True]


def test_a_divergence_stays_in_its_spans() -> None:
    x = rollouts(spans={"call": spans((1, 2), (4, 5))}, adds_divergences=True)
    ((_, weight),) = (2 * credit.divergence().on("call"))(x).divergences
    close(weight, [0, 2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])


def test_reflection_by_lengths_and_with_the_outcome() -> None:
    x, host, contexts = reasoned(6)
    logprobs, bounds = host(contexts, [row["reference"] for row in x.rows])
    reward = credit.scored.Reflection(weights="uniform", outcome_weight=0.5)
    means = torch.stack([logprobs[a:b].mean() for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    close(reward(x), means + 0.5 * x.reward("reward"))
    moved = x.to("cpu")
    assert not moved.memory and moved.names == x.names


def _of_two(*rewards: float, name: str = "reward") -> credit.Rollouts:
    mask = torch.tensor([False, True] * 2)
    batch = tk.PackedBatch(torch.arange(4), torch.tensor([0, 2, 4]), mask, torch.zeros(2, dtype=torch.int64))
    return credit.Rollouts(batch, rewards={name: torch.tensor(rewards)})


@pytest.mark.parametrize(
    "term", [credit.outcome(baseline="none", scale="none"), credit.recipe("w_reinforce")], ids=repr
)
def test_a_product_that_overflows_is_refused(term: credit.Spec) -> None:
    with pytest.raises(ValueError, match="must give advantages that float32 holds"):
        (1e10 * term)(_of_two(1e35, 1e34))


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("w_reinforce", "reward"), ("psr", "reward"), ("nsr", "reward"), ("outcome", "reward"), ("srl", "similarity")],
)
def test_an_infinite_reward_is_refused_by_its_own_name(recipe: str, name: str) -> None:
    spec = credit.outcome() if recipe == "outcome" else credit.recipe(recipe)
    with pytest.raises(ValueError, match=rf"rewards\['{name}'\] must be finite; it is inf at index 0"):
        spec(_of_two(torch.inf, 0.0, name=name))


def test_the_names_that_are_shown_are_a_copy() -> None:
    rollouts = _of_two(1.0, 0.0)
    rollouts.names.add("flags:nix")
    with pytest.raises(ValueError, match="needs 'flags:nix', which the rollouts do not have"):
        credit.outcome().gate("nix")(rollouts)


@pytest.mark.parametrize("needs", [3, {3}, None])
def test_needs_that_are_no_names(needs: object) -> None:
    def reward(rollouts: credit.Rollouts) -> torch.Tensor:
        return rollouts.reward("reward")

    reward.needs = needs  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="needs of .*reward must be a name or names"):
        credit.outcome(reward)(_of_two(1.0, 0.0))
