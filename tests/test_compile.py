"""torch.compile of the public functions: one graph, dynamic shapes, the eager result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import trajkern as tk
from trajkern import _backends
from trajkern.losses.kinds import METRICS
from trajkern.ops import span, tree
from trajkern.testing import SPECS, run

_CASES = {
    "token_logprobs": ("typical", "everything"),
    "token_stats": ("typical", "everything"),
    "group_advantages": ("grpo", "weights_gate"),
    "discounted_returns": ("discounted", "mask"),
    "gae": ("typical", "bootstrap"),
    "whiten": ("typical", "mask"),
    "linear_logprobs": ("typical", "rows"),
    "linear_token_stats": ("typical", "mask"),
    "linear_policy_loss": ("grpo", "full", "gspo", "tree_full"),
    "linear_divergence": ("typical", "mask"),
    "linear_topk": ("typical", "several_targets"),
    "subtree_reduce": tree.REDUCTIONS,
    "sibling_advantages": ("mean", "parent"),
    "branch_coefficients": ("weights",),
    "span_reduce": span.REDUCTIONS,
    "spread": ("tree", "batch", "spans"),
    "variance_weights": ("typical", "plain"),
    "reflection_rewards": (),  # the number of groups is data: see tests/test_reflection.py
    "policy_loss": ("grpo", "dapo_full", "gspo_full", "kl_cov", "branch_cispo", "tree_grpo", "tree_gspo"),
}
# graphs of more than three seconds
LONG = ("tree_gspo", "tree_grpo", "tree_full", "kl_cov", "dapo_full", "gspo_full", "gspo", "full")
_PAIRS = [(s, c) for s in SPECS for c in s.cases if c.name in _CASES[s.name]]


@pytest.mark.parametrize(
    ("op", "example"),
    [pytest.param(s, c, id=f"{s.name}-{c.name}", marks=pytest.mark.slow if c.name in LONG else ()) for s, c in _PAIRS],
)
def test_fullgraph_dynamic(op, example) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(tk, op.name), fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in (0, 1):
        inputs = op.inputs(example, torch.float32, seed=seed)
        eager, graph = run(op, getattr(tk, op.name), inputs), run(op, compiled, inputs)
        assert eager.keys() == graph.keys()
        for name, x in eager.items():
            close = dict(rtol=1e-6, atol=1e-7, equal_nan=name in METRICS)
            torch.testing.assert_close(graph[name], x, **close, msg=f"{op.name} {name}")


def test_new_lengths_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tk.token_logprobs, fullgraph=True, dynamic=True, backend=counter)
    for rows, vocabulary in ((5, 100), (9, 130), (33, 257)):
        compiled(torch.randn(rows, vocabulary), torch.zeros(rows, dtype=torch.int64))
    assert counter.frame_count == 1


def test_inductor() -> None:
    """The default backend, once, forward and backward together with ops around it."""
    torch._dynamo.reset()

    def loss(hidden, weight, targets, advantages, cu_seqlens):
        logprobs = tk.token_logprobs(hidden @ weight.T, targets)
        return tk.policy_loss(logprobs, logprobs.detach(), advantages, cu_seqlens, config=tk.PolicyLoss())[0]

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator)
    args = (weight, torch.arange(6), torch.tensor([1.0, -1.0]), torch.tensor([0, 2, 6]))
    (expected,) = torch.autograd.grad(loss(hidden, *args), hidden)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, *args), hidden)
    torch.testing.assert_close(actual, expected)


X, OLD, OTHER, THIRD = (torch.linspace(a, -0.1, 4) for a in (-2.0, -1.9, -2.2, -1.7))
BOUNDS, ADVANTAGES = torch.tensor([0, 2, 4]), torch.tensor([1.0, -0.5])
WEIGHT, TARGETS = torch.linspace(-1, 1, 33).view(11, 3), torch.arange(4)
VALUES = (0.1, 0.2, 0.3, 0.4, 0.5)


def _loss(x: torch.Tensor, config: tk.PolicyLoss, **options) -> torch.Tensor:
    tensors = {"ref_logprobs": OTHER, "sampler_logprobs": THIRD, "entropy": THIRD.abs()}
    return tk.policy_loss(x, OLD, ADVANTAGES, BOUNDS, config=config, **tensors, **options)[0]


def _head_loss(x: torch.Tensor, value: float) -> torch.Tensor:
    config = tk.PolicyLoss("dapo", kl_coef=value, clip_high=value)
    hidden, options = x[:, None] * WEIGHT[:1], {"temperature": value, "softcap": 30 * value, "logit_scale": 2 * value}
    return tk.linear_policy_loss(
        hidden, WEIGHT, TARGETS, OLD, ADVANTAGES, BOUNDS, config=config, ref_logprobs=OTHER, normalizer=value, **options
    )[0]


def _head(x: torch.Tensor, temperature) -> torch.Tensor:
    return tk.linear_logprobs(x[:, None] * WEIGHT[:1], WEIGHT, TARGETS, temperature=temperature)


CHANGING = {  # function of (x, coefficient), what a number becomes first, and how often it compiles
    "options": (lambda x, v: _loss(x, tk.PolicyLoss(kl_coef=v, entropy_coef=v, clip_low=v, clip_high=2 * v)), float, 2),
    "config": (_loss, lambda v: tk.PolicyLoss("sapo", kl_coef=v, sapo_tau_pos=v), 2),
    "config_of_tensors": (_loss, lambda v: tk.PolicyLoss(kl_coef=torch.tensor(v), clip_high=torch.tensor(v)), 2),
    "clip_cov": (_loss, lambda v: tk.PolicyLoss("clip_cov", clip_low=v, clip_high=2 * v, cov_low=v - 1), 2),
    "normalizer": (lambda x, v: _loss(x, tk.PolicyLoss(), normalizer=v), float, 2),
    "normalizers": (
        lambda x, v: _loss(
            x,
            tk.PolicyLoss(kl_coef=0.1),
            supervised_weights=X.abs(),
            supervised_normalizer=v,
            kl_weights=OTHER.abs(),
            kl_normalizer=2 * v,
        ),
        float,
        2,
    ),
    "normalizer_tensor": (lambda x, v: _loss(x, tk.PolicyLoss(), normalizer=v), torch.tensor, 1),
    "head_loss": (_head_loss, float, 2),
    "temperature": (lambda x, v: tk.token_logprobs(x[:, None] * WEIGHT[:1], TARGETS % 3, temperature=v), float, 2),
    "temperature_tensor": (_head, torch.tensor, 1),
    "eps": (lambda x, v: tk.group_advantages(x, TARGETS // 2, eps=v) + tk.whiten(x, eps=v), float, 2),
    "gamma": (lambda x, v: tk.gae(x, x * 2, BOUNDS, gamma=v, lam=v).returns, float, 2),
}


@pytest.mark.parametrize("name", CHANGING)
def test_changing_coefficients_compile_at_most_twice(name: str) -> None:
    """Once for the first value, and once for all others."""
    function, of, times = CHANGING[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value in map(of, VALUES):
        results = []
        for f in (function, compiled):
            leaf = X.clone().requires_grad_()
            out = f(leaf, value)
            results.append((out.detach(), torch.autograd.grad(out.sum(), leaf)[0]))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= times


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # the former leaves autocast on around each op
@pytest.mark.parametrize("inside", [True, False])
def test_a_graph_under_autocast_has_the_given_precision(inside: bool, backend: str) -> None:
    """Whether autocast is part of the graph or around the call."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (4, 32))

    def loss(h: torch.Tensor, w: torch.Tensor, cast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return tk.linear_token_stats(h, w, TARGETS).entropy.sum()

    def run(f: Callable[..., torch.Tensor], inside: bool, outside: bool) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            out = f(*leaves, inside)
            return out.detach(), *torch.autograd.grad(out, leaves)

    expected = run(loss, False, False)
    for f in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        torch.testing.assert_close(run(f, inside, not inside), expected, rtol=1e-6, atol=1e-6)


def test_what_a_graph_cannot_read_is_refused_or_read_beside_it() -> None:
    def loss(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _loss(x, tk.PolicyLoss(kl_coef=v))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="kl_coef must be a number in a graph"):
        torch.compile(loss, fullgraph=True, backend="eager")(X, torch.tensor(0.1))


IN_GRAPH = {
    "targets": (lambda x, t: tk.linear_logprobs(x[:, None], WEIGHT[:, :1], t), -100),
    "rows": (lambda x, t: tk.linear_logprobs(x[:, None], WEIGHT[:, :1], TARGETS, rows=t), -1),
    "sampling_support ids": (
        lambda x, t: tk.linear_logprobs(x[:, None], WEIGHT[:, :1], TARGETS, sampling_support=(t, torch.arange(5))),
        -1,
    ),
    "temperature": (lambda x, t: _head(x, t.float() + 1), -1),
}


@pytest.mark.parametrize("name", IN_GRAPH)
def test_a_graph_refuses_what_eager_does(name: str) -> None:
    function, bad = IN_GRAPH[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    good = TARGETS.clone()  # a graph tells no two inputs apart that are one tensor
    torch.testing.assert_close(compiled(X, good), function(X, good))
    wrong = TARGETS.clone()
    wrong[3] = bad
    for f in (function, compiled):
        with pytest.raises(ValueError, match=f"^{name} must"):
            f(X, wrong)


def test_a_graph_gives_nan_for_a_temperature_that_eager_refuses() -> None:
    def logprobs(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return tk.token_logprobs(x[:, None] * WEIGHT[:1], TARGETS % 3, temperature=temperature)

    torch._dynamo.reset()
    found = torch.compile(logprobs, fullgraph=True, backend="aot_eager")(X, torch.tensor([1.0, 0.0, -1.0, torch.inf]))
    assert found.isnan().tolist() == [False, True, True, True]


def test_a_graph_gives_nan_for_a_normalizer_that_eager_refuses() -> None:
    def loss(x: torch.Tensor, normalizer: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return tk.policy_loss(
            x, OLD, ADVANTAGES, BOUNDS, config=tk.PolicyLoss("dapo"), normalizer=normalizer, mask=mask
        )[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (0.0, -1.0):
        assert compiled(X, torch.tensor(value), X < 0).isnan()
        assert compiled(X, torch.tensor(value), X > 0) == 0


def test_compiled_code_heeds_the_block_that_it_is_called_in(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    calls = []
    plain = _backends.reference().token_stats
    monkeypatch.setattr(_backends.reference(), "token_stats", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 2])
    compiled = torch.compile(lambda x: tk.token_logprobs(x, targets), backend="eager")
    expected = tk.token_logprobs(logits, targets)
    for name, count in (("", 0), ("reference", 1), ("native", 1), ("", 1)):
        with tk.use_backend(name) if name else contextlib.nullcontext():
            torch.testing.assert_close(compiled(logits), expected)
        assert len(calls) == count, name


@pytest.mark.parametrize("kind", ["kl_cov", "clip_cov", "grpo"])
def test_boundaries_that_a_graph_cannot_read(kind: str) -> None:
    x, config = torch.tensor([-1.0, -2.0, -0.5, -3.0]), tk.PolicyLoss(kind)
    bounds, advantages = torch.tensor([0, -1, 4]), torch.tensor([1.0, -1.0])
    compiled = torch.compile(lambda x, c: tk.policy_loss(x, x, advantages, c, config=config)[0], backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens must never decrease"):
        compiled(x, bounds)
