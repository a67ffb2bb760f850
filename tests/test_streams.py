"""Terms of the policy loss with weights and normalisers of their own: one call for what separate calls compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trajkern as tk

BOUNDS = torch.tensor([0, 4, 9, 12])
MASK = torch.arange(12) % 3 > 0


def _tokens(seed: int = 0, **others: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(12, generator=g, dtype=torch.float64) - 0.1
    new, ref = (old + 0.3 * torch.randn(12, generator=g, dtype=torch.float64) for _ in range(2))
    return {
        "logprobs": new.requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.randn(3, generator=g, dtype=torch.float64),
        "cu_seqlens": BOUNDS,
        "mask": MASK,
        "ref_logprobs": ref,
    } | others


def _result(x: dict[str, Any], config: tk.PolicyLoss, **options: Any) -> tuple[torch.Tensor, torch.Tensor, dict]:
    loss, metrics = tk.policy_loss(**x, config=config, **options)
    (grad,) = torch.autograd.grad(loss, x["logprobs"])
    return loss.detach(), grad, metrics


@pytest.mark.parametrize("kind", ["grpo", "gspo", "clip_cov"])
def test_equals_a_call_for_each_term(kind: str) -> None:
    x, places = _tokens(), torch.arange(12)
    demonstrated, referred = places >= 7, places % 2 == 0
    weights = torch.where(demonstrated, 0.5 + places / 12, 0)
    joint = _result(
        x,
        tk.PolicyLoss(kind, kl_coef=0.3),
        supervised_weights=weights,
        supervised_normalizer=40,
        kl_weights=2.0 * referred,
        kl_normalizer=torch.tensor(5),
    )
    policy = _result(x, tk.PolicyLoss(kind))
    sampled = {"old_logprobs": None, "advantages": weights, "mask": demonstrated, "per_token": True}
    supervised = _result(x | sampled, tk.PolicyLoss("reinforce"), normalizer=40)
    still = {"old_logprobs": None, "advantages": torch.zeros(3), "mask": referred}
    kl = _result(x | still, tk.PolicyLoss("reinforce", kl_coef=0.6), normalizer=5)
    for got, *parts in zip(joint[:2], policy, supervised, kl, strict=False):
        torch.testing.assert_close(got, sum(parts), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(joint[2]["supervised_loss"], supervised[0])
    torch.testing.assert_close(joint[2]["kl"], kl[0] / 0.3)
    assert joint[2]["num_tokens"] == MASK.sum() and "supervised_loss" not in policy[2]


def test_a_normalizer_is_the_number_of_tokens_with_a_weight() -> None:
    x, weights = _tokens(), torch.tensor([3.0, -1.0, 0.0, 0.0] * 3)
    own = _result(x, tk.PolicyLoss(), supervised_weights=weights)
    given = _result(x, tk.PolicyLoss(), supervised_weights=weights, supervised_normalizer=6)
    torch.testing.assert_close(own, given, equal_nan=True)
    expected = -(weights * x["logprobs"].detach()).sum() / 6
    torch.testing.assert_close(own[2]["supervised_loss"], expected)


def test_nothing_under_a_weight_of_0_is_read() -> None:
    x = _tokens(ref_logprobs=torch.full((12,), math.nan))
    zeros = torch.zeros(12)
    loss, grad, metrics = _result(
        x, tk.PolicyLoss(kl_coef=0.1), supervised_weights=zeros, supervised_normalizer=0, kl_weights=zeros
    )
    plain, its_grad, _ = _result(x | {"ref_logprobs": None}, tk.PolicyLoss())
    assert loss == plain and torch.equal(grad, its_grad) and metrics["supervised_loss"] == metrics["kl"] == 0


def test_a_nan_reaches_the_loss() -> None:
    x, weights = _tokens(), torch.zeros(12)
    weights[3] = math.nan
    assert _result(x, tk.PolicyLoss(), supervised_weights=weights, supervised_normalizer=2)[0].isnan()


ONES = torch.ones(12)
BAD = [
    ({"supervised_weights": ONES[1:]}, r"^supervised_weights must have shape \[12\] \(one weight a token\)"),
    ({"kl_weights": ONES.bool()}, r"^kl_weights must have dtype .*; got bool"),
    ({"supervised_normalizer": 3}, r"^supervised_normalizer must come with supervised_weights; got 3"),
    ({"kl_normalizer": 3}, r"^kl_normalizer must come with kl_weights; got 3"),
    ({"kl_weights": ONES, "kl_normalizer": 0}, r"^kl_normalizer must be greater than 0, got 0"),
    ({"supervised_weights": ONES, "supervised_normalizer": -1}, r"^supervised_normalizer must be greater than 0"),
    ({"kl_weights": ONES, "config": tk.PolicyLoss(kl="k3_corrected", kl_coef=1.0)}, r"^kl_weights must be None for kl"),
    ({"kl_weights": ONES, "ref_logprobs": None}, r"^ref_logprobs must be given"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tk.policy_loss(**_tokens() | {"config": tk.PolicyLoss(kl_coef=0.1)} | changes)


def test_a_tree_is_refused() -> None:
    tree = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([4, 5, 3]))
    paths = tk.Paths(tree, torch.ones(2))
    with pytest.raises(ValueError, match=r"supervised_weights must be None where branch is given.*tree\.flat_index"):
        tk.policy_loss(
            **_tokens(advantages=None, branch=paths), config=tk.PolicyLoss(), supervised_weights=torch.ones(12)
        )
