"""``batch_invariant``: a row's results and its d hidden, whatever else is in the call and wherever it stands."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.testing import compiled

WIDTH, VOCABULARY, TOKENS = 96, 20_001, 150  # more rows than two blocks, more columns than a tile


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / 4
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def _results(chosen: Tensor, dtype: torch.dtype, **options) -> tuple[Tensor, ...]:
    hidden, weight, targets = _inputs()
    hidden = hidden.detach()[chosen].to(dtype).requires_grad_()
    weight = weight.detach().to(dtype).requires_grad_()
    stats = tk.linear_token_stats(hidden, weight, targets[chosen], batch_invariant=True, **options)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    return stats.logprobs.detach(), stats.entropy.detach(), hidden.grad


def _divergence(chosen: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """From a teacher that is narrower and has more tokens, of which some do not count."""
    hidden, weight, _ = (x.to(dtype) for x in _inputs())
    states = hidden[chosen].requires_grad_()
    values = tk.linear_divergence(
        states,
        weight.requires_grad_(),
        hidden[chosen, :40],
        torch.cat((weight, weight[:7])).detach()[:, :40],
        bias=weight.detach()[:, 0],
        softcap=5.0,
        vocabulary=VOCABULARY - 3,
        beta=0.3,
        mask=mask,
        batch_invariant=True,
    )
    (values * (chosen % 5 > 0)).sum().backward()
    assert states.grad is not None
    return values.detach(), states.grad


@pytest.mark.parametrize("results", [_results, _divergence])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["one", "subset", "prefix", "reversed", "shuffled", "twice"])
def test_same_bits(name: str, dtype: torch.dtype, results: Callable[..., tuple[Tensor, ...]]) -> None:
    everything = torch.arange(TOKENS)
    chosen = {
        "one": everything[77:78],
        "subset": everything[1::3],
        "prefix": everything[:65],
        "reversed": everything.flip(0),
        "shuffled": torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3)),
        "twice": everything.repeat(2),
    }[name]
    whole, part = results(everything, dtype), results(chosen, dtype)
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x[chosen], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 5, 7, 9, 11, 12, 17, 33, 65])
def test_any_width(width: int, dtype: torch.dtype) -> None:
    """MKL adds up a product's edges by where a row stands."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, states = (
        torch.randn(rows, columns, generator=generator).to(dtype)
        for rows, columns in ((130, width), (33, width), (130, 8))
    )
    order = torch.arange(130).roll(1)
    results = []
    for rows in (torch.arange(130), order):
        h = hidden[rows].requires_grad_()
        logprobs = tk.linear_logprobs(h, weight, torch.zeros(130, dtype=torch.int64), batch_invariant=True)
        (grad,) = torch.autograd.grad(logprobs.sum(), h)
        values = tk.linear_divergence(states[rows], weight[:, :1].expand(33, 8), h, weight, batch_invariant=True)
        results.append((logprobs.detach(), grad, values))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x[order], y)


@pytest.mark.parametrize("results", [_results, _divergence])
def test_a_mask_changes_no_other_row(results: Callable[..., tuple[Tensor, ...]]) -> None:
    everything, mask = torch.arange(TOKENS), torch.arange(TOKENS) % 4 != 1
    whole, part = (results(everything, torch.float32, mask=m) for m in (None, mask))
    for x, y in zip(whole, part, strict=True):
        assert torch.equal(x[mask], y[mask]) and not y[~mask].any()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_divergence"])
def test_float16_on_a_gpu(op: str) -> None:
    """Beside a row whose gradient is a million times larger, which decides how narrow d logits would be scaled."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator).half() for rows in (2, 33))
    grads = []
    for count in (1, 2):
        states = hidden[:count].clone().requires_grad_()
        others = (hidden[:count].flip(1), weight.flip(0)) if op == "linear_divergence" else (torch.arange(count),)
        with compiled("sm_90"), tk.use_backend("triton"):
            values = getattr(tk, op)(states, weight.clone().requires_grad_(), *others, batch_invariant=True)
            (values * torch.tensor([1e-3, 1e3])[:count]).sum().backward()
        grads.append(states.grad)
    alone, beside = grads
    assert torch.equal(alone, beside[:1])


@pytest.mark.parametrize("weight_is_trained", [True, False])
def test_policy_loss(weight_is_trained: bool) -> None:
    """With a normaliser of its own a token's gradient knows no other token either."""
    hidden, weight, targets = _inputs()
    advantages = torch.arange(TOKENS).sin() * (torch.arange(TOKENS) % 5 > 0)
    config = tk.PolicyLoss("dapo", kl_coef=0.1)
    results = []
    for chosen in (torch.arange(TOKENS), torch.arange(TOKENS).flip(0)[:71]):
        h = hidden.detach()[chosen].requires_grad_()
        count, old = len(chosen), torch.full((len(chosen),), -10.0)
        loss, metrics = tk.linear_policy_loss(
            h,
            weight.detach().requires_grad_(weight_is_trained),
            targets[chosen],
            old,
            advantages[chosen],
            torch.tensor([0, count]),
            config=config,
            ref_logprobs=old,
            normalizer=100.0,
            per_token=True,
            with_logprobs=True,
            batch_invariant=True,
        )
        loss.backward()
        results.append((metrics["logprobs"], h.grad))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x.flip(0)[:71], y)


def test_bad_input() -> None:
    hidden, weight, targets = _inputs()
    with pytest.raises(ValueError, match="workspace_bytes must hold the 64 rows of a batch-invariant block"):
        tk.linear_logprobs(hidden, weight, targets, batch_invariant=True, workspace_bytes=64 * VOCABULARY * 4 - 1)
    with pytest.raises(TypeError, match="batch_invariant must be True or False, got 1"):
        tk.linear_logprobs(hidden, weight, targets, batch_invariant=1)
