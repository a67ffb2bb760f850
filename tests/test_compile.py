"""torch.compile of the public functions: one graph, dynamic shapes, the eager result."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import trajkern as tk
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
    "subtree_reduce": ("mean", "max"),
    "sibling_advantages": ("mean", "parent"),
    "branch_coefficients": ("weights",),
    "span_reduce": ("mean", "max"),
    "spread": ("tree", "batch", "spans"),
    "variance_weights": ("typical", "plain"),
    "reflection_rewards": (),  # the number of groups is data: see tests/test_reflection.py
    "policy_loss": ("grpo", "dapo_full", "gspo_full", "kl_cov", "branch_cispo", "tree_grpo", "tree_gspo"),
}
_PAIRS = [(s, c) for s in SPECS for c in s.cases if c.name in _CASES[s.name]]


@pytest.mark.parametrize(("op", "example"), _PAIRS, ids=[f"{s.name}-{c.name}" for s, c in _PAIRS])
def test_fullgraph_dynamic(op, example) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(tk, op.name), fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in (0, 1):
        inputs = op.inputs(example, torch.float32, seed=seed)
        eager, graph = run(op, getattr(tk, op.name), inputs), run(op, compiled, inputs)
        assert eager.keys() == graph.keys()
        for name, x in eager.items():
            torch.testing.assert_close(graph[name], x, rtol=1e-6, atol=1e-7, msg=f"{op.name} {name}")


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
