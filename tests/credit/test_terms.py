"""Terms on small rollouts against numbers worked out by hand, and what is missing or wrong by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern import credit

NAN = math.nan
SCORED = [False, True, True]


def rollouts(rewards: Any = (1.0, 0.0, 0.0, 0.0), groups: Any = (7, 7, 7, 7), **known: Any) -> credit.Rollouts:
    """Rollouts of three tokens each, the last two scored."""
    count = len(groups)
    batch = tk.PackedBatch(
        torch.arange(3 * count),
        3 * torch.arange(count + 1),
        torch.tensor(SCORED * count),
        torch.tensor(groups),
        sampler_logprobs=torch.arange(3 * count) / -10,
    )
    named = rewards if isinstance(rewards, dict) else {"reward": rewards}
    return credit.Rollouts(batch, {name: torch.tensor(x) for name, x in named.items()}, **known)


def spans(*ranges: tuple[int, int], count: int = 4) -> tk.Spans:
    """Ranges of the pack; each rollout's are numbered from 0."""
    start, end = torch.tensor(ranges).T
    owner = start // 3
    index = torch.tensor([int((owner[:at] == n).sum()) for at, n in enumerate(owner)])
    return tk.Spans(start, end, owner, index, 3 * count)


def of_rollouts(found: credit.Credit) -> list[float]:
    """The advantage of each rollout's last token."""
    return found.advantages[2::3].tolist()


def close(x: Any, y: Any) -> None:
    assert torch.as_tensor(x).double().tolist() == pytest.approx(torch.as_tensor(y).double().tolist(), abs=5e-6)  # eps


def test_outcome() -> None:
    found = credit.outcome()(rollouts())
    close(of_rollouts(found), [1.5, -0.5, -0.5, -0.5])  # mean .25, std .5
    assert found.mask.tolist() == SCORED * 4 and found.keep.all()
    close(found.advantages[:3], [0, 1.5, 1.5])


def test_within_tree_and_batch() -> None:
    tree = tk.Tree(torch.tensor([-1, 0, 0, -1, 3, 3]), torch.tensor([2, 1, 1, 2, 1, 1]))
    batch = tk.PackedBatch(
        torch.tensor([0, 1, 2, 0, 1, 3, 0, 4, 2, 0, 4, 5]),
        3 * torch.arange(5),
        torch.tensor(SCORED * 4),
        torch.tensor([0, 0, 0, 0]),
        torch.tensor([1.0, 0, 0, 0]),
    )
    x = credit.Rollouts(batch, tree=tree)
    centred: dict[str, Any] = {"scale": "none"}
    close(of_rollouts(credit.outcome(within="tree", **centred)(x)), [0.5, -0.5, 0, 0])
    close(of_rollouts(credit.recipe("tree_grpo")(x)), [1.5 + math.sqrt(0.5), -0.5 - math.sqrt(0.5), -0.5, -0.5])
    two = rollouts((1.0, 0.0, 1.0, 1.0), (0, 0, 1, 1))
    close(of_rollouts(credit.outcome(within="batch", **centred)(two)), [0.25, -0.75, 0.25, 0.25])
    close(of_rollouts(credit.outcome(**centred)(two)), [0.5, -0.5, 0, 0])


def test_spans_are_one_pool_and_by_index() -> None:
    calls = spans((1, 2), (2, 3), (4, 5))  # two of the first rollout, one of the second
    x = rollouts(spans={"call": calls}, span_rewards={"call": torch.tensor([3.0, 0, 0])})
    pooled = credit.spans("call", scale="none")(x)
    close(pooled.advantages, [0, 2, -1, 0, -1, 0, 0, 0, 0, 0, 0, 0])
    by_index = credit.spans("call", within="index", scale="none", singleton="zero")(x)
    close(by_index.advantages, [0, 1.5, 0, 0, -1.5, 0, 0, 0, 0, 0, 0, 0])
    assert pooled.keep.all() and pooled.mask.tolist() == SCORED * 4  # those without a call learn from other terms


def test_a_masked_span_counts() -> None:
    calls = spans((0, 1), (4, 5))  # the first is a token that the policy did not write
    x = rollouts(spans={"call": calls}, span_rewards={"call": torch.tensor([2.0, 0])})
    close(credit.spans("call", scale="none")(x).advantages, [0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0])


def test_toolpo() -> None:
    """A_t = A_success + M_t A_action, each less its group's mean."""
    calls = spans((1, 2), (4, 5))
    x = rollouts({"reward": [1.0, 0, 0, 0], "action": [2.0, 0, 0, 0]}, spans={"call": calls})
    found = credit.recipe("toolpo")(x)
    close(found.advantages[:6], [0, 0.75 + 1.5, 0.75, 0, -0.25 - 0.5, -0.25])
    close(of_rollouts(found)[2:], [-0.25, -0.25])


def test_gate_then_statistic() -> None:
    x = rollouts((1.0, 0.0, 0.0, 5.0), flags={"ok": torch.tensor([True, True, True, False])})
    found = credit.outcome(scale="none").gate("ok")(x)
    close(of_rollouts(found), [2 / 3, -1 / 3, -1 / 3, 0])
    assert found.keep.tolist() == [True, True, True, False] and not found.mask[9:].any()
    group = credit.outcome(scale="none").gate("ok", mode="reject_group_if_any_fails")(x)
    assert not group.keep.any() and not group.mask.any() and not group.advantages.any()


def test_a_gate_on_a_part_gates_that_part() -> None:
    x = rollouts(
        {"reward": [1.0, 0, 0, 0], "tone": [4.0, 0, 0, 0]}, flags={"ok": torch.tensor([False, True, True, True])}
    )
    found = (credit.outcome(scale="none") + credit.outcome("tone", scale="none").gate("ok"))(x)
    close(of_rollouts(found), [0.75, -0.25, -0.25, -0.25])
    assert found.keep.all()


def test_nobody_passes() -> None:
    x = rollouts(flags={"ok": torch.zeros(4, dtype=torch.bool)})
    found = credit.outcome().gate("ok")(x)
    logprobs = torch.zeros(12, requires_grad=True)
    inputs = found.loss_inputs()
    config = tk.PolicyLoss("grpo")
    loss, _ = tk.policy_loss(logprobs, None, cu_seqlens=x.batch.cu_seqlens, config=config, **inputs)
    loss.backward()
    assert loss == 0 and not logprobs.grad.any() and found.metrics["kept"] == 0


def test_nan_abstains() -> None:
    x = rollouts({"reward": [1.0, 0, NAN, NAN], "tone": [NAN, 2.0, 0.0, NAN]})
    found = (credit.outcome(scale="none") + credit.outcome("tone", scale="none"))(x)
    close(of_rollouts(found), [0.5, -0.5 + 1, -1, 0])
    assert found.keep.tolist() == [True, True, True, False]  # nothing scores the last
    close(of_rollouts(credit.recipe("nsr")(x)), [0, -1, 0, 0])


def test_nan_of_spans() -> None:
    calls = spans((1, 2), (2, 3), (4, 5), (7, 8))
    x = rollouts(spans={"call": calls}, span_rewards={"call": torch.tensor([3.0, NAN, 1.0, NAN])})
    found = credit.spans("call", scale="none")(x)
    close(found.advantages, [0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0])
    assert found.keep.tolist() == [True, True, False, True]


def test_bool_and_integers() -> None:
    for rewards in ([True, False, False, False], [1, 0, 0, 0]):
        found = credit.outcome()(rollouts(rewards))
        assert found.advantages.dtype == torch.float32
        close(of_rollouts(found), [1.5, -0.5, -0.5, -0.5])


def test_directive() -> None:
    teacher = torch.arange(12) / -10 + torch.arange(12) / 4
    x = rollouts((1.0, 0.0, -1.0, NAN), teacher_logprobs=teacher)
    everywhere = credit.directive()(x)
    close(everywhere.advantages, torch.where(x.batch.loss_mask, torch.arange(12) / 4, 0))
    failed = credit.directive(where="failed")(x)
    close(
        failed.advantages,
        torch.where(x.batch.loss_mask, torch.arange(12) / 4, 0) * torch.tensor([0, 1, 1, 0]).repeat_interleave(3),
    )
    assert failed.keep.tolist() == [False, True, True, False]


def test_only_takes_the_others_from_the_normaliser() -> None:
    calls = spans((1, 2), (4, 5))
    x = rollouts(spans={"call": calls})
    found = credit.outcome(scale="none").only("call")(x)
    assert found.mask.nonzero().flatten().tolist() == [1, 4]
    logprobs, config = torch.zeros(12), tk.PolicyLoss("dapo")
    loss, _ = tk.policy_loss(logprobs, None, cu_seqlens=x.batch.cu_seqlens, config=config, **found.loss_inputs())
    close(loss, -(0.75 - 0.25) / 2)


def test_functions() -> None:
    calls = []

    def length(x: credit.Rollouts) -> torch.Tensor:
        calls.append(len(x))
        return x.batch.tokens[::3]

    spec = credit.outcome(length, scale="none")
    found = (spec + 2 * spec + spec.gate("ok"))(rollouts(flags={"ok": torch.ones(4, dtype=torch.bool)}))
    assert calls == [4]  # once a call, whatever it stands behind
    close(of_rollouts(found), [4 * -4.5, 4 * -1.5, 4 * 1.5, 4 * 4.5])
    assert "length" in repr(spec)
    by_name = credit.outcome("tests.credit.test_terms:twice")
    assert by_name == credit.outcome(twice) and eval(repr(by_name), {"credit": credit}) == by_name
    assert by_name.needs == {"reward"}
    close(of_rollouts(by_name(rollouts())), [1.5, -0.5, -0.5, -0.5])


def twice(x: credit.Rollouts) -> torch.Tensor:
    return 2 * x.reward("reward")


twice.needs = {"reward"}  # type: ignore[attr-defined]


def test_metrics() -> None:
    calls = spans((1, 3), (4, 5))
    x = rollouts(spans={"call": calls}, span_rewards={"call": torch.tensor([1.0, 0])})
    spec = (
        0.5 * credit.outcome(scale="none")
        + credit.outcome(within="batch", scale="none")
        + credit.spans("call", scale="none")
    )
    metrics = {name: value.item() for name, value in spec(x).metrics.items()}
    assert metrics.keys() == {
        *(f"{name}/{of}" for name in ("outcome", "outcome#2", "spans:call") for of in ("mean", "std")),
        "kept",
        "positive",
    }
    assert metrics["outcome/mean"] == metrics["outcome#2/mean"] == 0
    assert metrics["outcome/std"] == pytest.approx(math.sqrt(0.1875))
    assert metrics["spans:call/mean"] == pytest.approx((0.5 + 0.5 - 0.5) / 3)
    assert (metrics["kept"], metrics["positive"]) == (1, 0.25)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("grpo", {"reward"}),
        ("toolpo", {"reward", "action", "spans:call"}),
        ("rlcr", {"reward", "confidence"}),
        ("srl", {"similarity"}),
        ("feedback", {"reward", "teacher_logprobs"}),
        ("dro", {"score", "rows:reference", "spans:reasoning"}),
        ("delta_belief", {"score", "reward", "spans:turn", "rows:belief_target"}),
        ("treerl", {"reward", "tree"}),
        ("tree_grpo", {"reward", "tree"}),
    ],
)
def test_needs(name: str, expected: set[str]) -> None:
    assert credit.recipe(name).needs == expected


@pytest.mark.parametrize(
    "expression, name",
    [
        (credit.outcome("tone"), "'tone'"),
        (credit.spans("call"), "'span_rewards:call'"),
        (credit.outcome().on("call"), "'spans:call'"),
        (credit.outcome().gate("ok"), "'flags:ok'"),
        (credit.outcome(within="tree"), "'tree'"),
        (credit.directive(), "'teacher_logprobs'"),
        (credit.recipe("dro"), "'rows:reference'"),
    ],
)
def test_what_is_missing(expression: credit.Spec, name: str) -> None:
    with pytest.raises(ValueError, match=f"needs {name}, which the rollouts do not have; they have"):
        expression(rollouts())


def test_a_span_that_does_not_exist_is_answered_with_the_list() -> None:
    with pytest.raises(ValueError, match="they have spans:call, spans:turn"):
        credit.outcome().on("cal")(rollouts(spans={"call": spans((1, 2))}))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: credit.outcome(within="prompt"), ValueError, "within must be one of 'group', 'tree', 'batch'"),
        (lambda: credit.outcome(scale="mad"), ValueError, "scale must be one of"),
        (lambda: credit.outcome(gate="ok"), TypeError, r"outcome\(\) has no option 'gate'; it takes reward"),
        (lambda: credit.outcome(3), TypeError, "a name or a function"),
        (lambda: credit.outcome("no.such:thing"), ValueError, "package.module:name"),
        (lambda: credit.directive("wrong"), ValueError, "where must be one of 'all', 'failed'"),
        (lambda: credit.recipe("ppo"), ValueError, "recipe must be one of 'grpo'"),
        (lambda: credit.recipe("rlcr", shape="code"), TypeError, "shape"),
        (lambda: credit.outcome().gate("ok", mode="some"), ValueError, "mode must be one of"),
        (lambda: credit.outcome().gate("ok", threshold=2), ValueError, "threshold must be at most 1"),
        (lambda: credit.outcome() * NAN, ValueError, "factor must be a number, got NaN"),
        (lambda: credit.outcome() * "2", TypeError, "factor must be a number"),
        (lambda: credit.outcome() + 1, TypeError, "unsupported operand"),
        (lambda: credit.outcome().clip(0.5, 1), ValueError, "low must be at most 0"),
        (lambda: credit.outcome().asymmetric(-1), ValueError, "positive must be at least 0"),
        (lambda: credit.spans(3), TypeError, "name must be a name"),
        (lambda: credit.recipe("treerl", reward=len), TypeError, "reward must be a name"),
        (lambda: credit.recipe("nsr", positive_weight=-1), ValueError, "positive_weight must be at least 0"),
        (lambda: credit.outcome()(3), TypeError, "rollouts must be a trajkern.credit.Rollouts"),
    ],
)
def test_bad_expressions(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "known, message",
    [
        ({"rewards": {"reward": [1.0]}}, r"rewards\['reward'\] must have shape \[4\]"),
        ({"flags": {"ok": torch.ones(4)}}, r"flags\['ok'\] must have dtype bool"),
        ({"spans": {"call": spans((1, 2), count=5)}}, r"spans\['call'\] must be of 12 tokens, got 15"),
        ({"span_rewards": {"call": torch.ones(2, 2)}}, r"span_rewards\['call'\] must have 1 dimension"),
        ({"teacher_logprobs": torch.zeros(11)}, "teacher_logprobs must have shape"),
        ({"teacher_logprobs": torch.full((12,), NAN)}, "teacher_logprobs must be finite"),
        ({"texts": ["a"]}, "texts must have one entry for each of the 4 rollouts, got 1"),
        ({"tree": tk.Tree(torch.tensor([-1, 0]), torch.tensor([1, 1]))}, "tree must have the rollouts as its leaves"),
        ({"score": 3}, "score must be a function"),
    ],
)
def test_bad_rollouts(known: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        rollouts(**known)


def test_bad_results() -> None:
    x = rollouts(spans={"call": spans((1, 2))}, span_rewards={"call": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"span_rewards\['call'\] must have one reward for each of the 1 spans 'call', got 2"
    ):
        credit.spans("call")(x)
    with pytest.raises(ValueError, match=r"the result of .*<lambda> must have shape \[4\]"):
        credit.outcome(lambda x: torch.ones(3))(x)
    with pytest.raises(TypeError, match="the result of .*<lambda> must have dtype bool"):
        credit.outcome().gate(lambda x: torch.ones(4))(x)
    with pytest.raises(ValueError, match=r"rewards\['reward'\] must be finite; it is inf at index 1"):
        credit.outcome()(rollouts((1.0, math.inf, 0, 0)))


def test_groups_of_one() -> None:
    x = rollouts((1.0, 0.0, 3.0, 0.0), (0, 1, 2, 3))
    close(of_rollouts(credit.outcome(singleton="zero")(x)), [0, 0, 0, 0])
    close(of_rollouts(credit.outcome()(x)), [1, 0, 3, 0])


def test_a_gate_and_what_could_not_be_scored() -> None:
    """Who is gated out abstains from nothing, and who could not be scored is compared with nobody."""
    ok, called = torch.tensor([True, True, True, False]), spans((1, 2), (4, 5), (7, 8), (10, 11))
    rewards = {"call": torch.tensor([3.0, 1, NAN, NAN]), "step": torch.ones(1)}
    known: dict[str, Any] = {"spans": {"call": called, "step": spans((1, 2))}, "span_rewards": rewards}
    x = rollouts((1.0, 0.0, NAN, NAN), flags={"ok": ok}, **known)
    for term in (credit.outcome(scale="none"), credit.spans("call", scale="none"), credit.recipe("psr")):
        found = term.gate("ok")(x)
        close(found.advantages[1::3][2:], [0, 0])
        assert found.keep.tolist() == [True, "psr" not in repr(term), False, False]
        beside = (term.gate("ok") + credit.spans("step"))(x)
        assert beside.keep.tolist() == [True, True, False, True]  # only the third was to be scored and was not
    close(credit.outcome(scale="none").gate("ok")(x).advantages[1::3], [0.5, -0.5, 0, 0])


def test_metrics_of_what_is_gated() -> None:
    """They are of the tokens that learn, and of a span's term of those in its spans."""
    calls, ok = spans((1, 3), (4, 5), (8, 9)), torch.tensor([True, True, False, True])
    rewards = {"call": torch.tensor([3.0, 1, 8]), "turn": torch.tensor([1.0, 0, 5, 2])}
    teacher = torch.arange(12) / 5 - torch.arange(12).square() / 40
    known: dict[str, Any] = {"spans": {"call": calls}, "span_rewards": rewards, "teacher_logprobs": teacher}
    x = rollouts((1.0, 0.0, 3.0, 1.0), flags={"ok": ok}, **known)
    for name, term in {
        "outcome": credit.outcome(),
        "spans:call": credit.spans("call"),
        "delta_belief": credit.recipe("delta_belief", reward="turn"),
        "directive": credit.directive(),
        "w_reinforce": credit.recipe("w_reinforce"),
        "tokens:group": credit.tree_terms.OfTokens(),
    }.items():
        found = term.gate("ok")(x)
        within = found.mask & (calls.token_span >= 0) if name == "spans:call" else found.mask
        tokens = found.advantages[within].double()
        assert len(tokens) == (3 if name == "spans:call" else 6) and found.reached[name] == len(tokens)
        close([found.metrics[f"{name}/{of}"] for of in ("mean", "std")], [tokens.mean(), tokens.std(correction=0)])
