"""A packed tree is trained exactly as its flat, duplicated rollouts: loss, every gradient, metrics."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trajkern as tk
from trajkern.losses.kinds import AGGREGATES, KINDS
from trajkern.testing.tree import random_tree, regular_tree

EXACT = tuple(name for name, kind in KINDS.items() if kind.in_tree)
REFUSED = tuple(name for name, kind in KINDS.items() if not kind.in_tree)

configs = st.builds(
    tk.PolicyLoss,
    kind=st.sampled_from(EXACT),
    clip_low=st.sampled_from([0.0, 0.1, 0.2]),
    clip_high=st.sampled_from([0.1, 0.28]),
    clip_dual=st.sampled_from([None, 1.2, 3.0]),
    kl=st.sampled_from(["k1", "k2", "k3"]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
    aggregate=st.sampled_from([None, *AGGREGATES]),
    max_length=st.just(9),
    sampler_correction=st.sampled_from(["none", "tis", "icepop", "sequence_mask"]),
    sampler_low=st.just(0.8),
    sampler_high=st.just(1.2),
)


class _Rollouts:
    """A random tree of rollouts and everything a loss reads of it, per token."""

    def __init__(self, seed: int, nodes: int, moved: float) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tree = random_tree(g, nodes, roots=2)
        count, leaves = self.tree.num_tokens, self.tree.num_leaves

        def noise(scale: float) -> Tensor:
            return scale * torch.randn(count, generator=g, dtype=torch.float64)

        old = -noise(1.0).abs() - 1e-3
        self.logprobs, self.entropy = (old + noise(moved)).clamp_max(-1e-4), noise(1.0).abs()
        self.arguments = {"old_logprobs": old, "ref_logprobs": old + noise(0.3), "sampler_logprobs": old + noise(0.3)}
        self.mask = torch.rand(count, generator=g) > 0.3
        self.advantages = torch.randn(leaves, generator=g, dtype=torch.float64)
        self.advantages[torch.rand(leaves, generator=g) < 0.2] = 0
        self.gate = torch.rand(leaves, generator=g) > 0.2

    def loss(self, config: tk.PolicyLoss, flat: bool, backward: bool = True, **options: Any) -> dict[str, Tensor]:
        logprobs, entropy = self.logprobs.clone().requires_grad_(), self.entropy.clone().requires_grad_()
        arguments: dict[str, Any] = {"logprobs": logprobs, "entropy": entropy, "mask": self.mask, **self.arguments}
        if flat:
            arguments = {name: x[self.tree.flat_index] for name, x in arguments.items()}
            arguments["mask"] &= torch.repeat_interleave(self.gate, self.tree.flat_lengths)
            arguments |= {"advantages": self.advantages, "cu_seqlens": self.tree.flat_cu_seqlens, "per_token": False}
        else:
            paths = tk.Paths(self.tree, self.advantages, self.gate)
            arguments |= {"advantages": None, "cu_seqlens": self.tree.node_offsets, "branch": paths}
        loss, metrics = tk.policy_loss(**arguments, config=config, **options)
        if backward:
            loss.backward()
        grads = {
            f"grad_{i}": torch.zeros_like(x) if x.grad is None else x.grad for i, x in enumerate((logprobs, entropy))
        }
        return {"loss": loss.detach(), **metrics, **grads}


@settings(max_examples=300, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 30),
    moved=st.sampled_from([0.0, 0.1, 0.5, 30.0]),
    normalizer=st.sampled_from([None, 3.5]),
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_equals_the_flat_rollouts(backend, config, seed, nodes, moved, normalizer) -> None:
    """Against the flat rollouts of the other implementation, which knows nothing of trees."""
    rollouts = _Rollouts(seed, nodes, moved)
    with tk.use_backend("reference"):
        flat = rollouts.loss(config, flat=True, normalizer=normalizer)
    with tk.use_backend(backend):
        packed = rollouts.loss(config, flat=False, normalizer=normalizer)
    for name, x in flat.items():
        close = dict(rtol=1e-9, atol=1e-9, equal_nan=name == "kl" and config.kl_coef == 0)
        torch.testing.assert_close(packed[name], x, **close, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("correction", ["none", "sequence_mask"])
@pytest.mark.parametrize("kind", EXACT)
def test_head_equals_the_flat_rollouts(kind, correction, on_policy) -> None:
    g = torch.Generator().manual_seed(0)
    tree = regular_tree(4, 2, 3)
    hidden = torch.randn(tree.num_tokens, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(19, 8, generator=g, dtype=torch.float64) / 3
    pairs = tree.pairs(torch.randint(0, 19, (tree.num_tokens,), generator=g))
    advantages = torch.randn(tree.num_leaves, generator=g, dtype=torch.float64)
    config = tk.PolicyLoss(kind, max_length=5, kl_coef=0.1, entropy_coef=0.1, sampler_correction=correction)
    now = tk.linear_logprobs(hidden, weight, pairs.targets, rows=pairs.rows)
    arguments = {"ref_logprobs": now + 0.2 * torch.randn(now.shape, generator=g, dtype=torch.float64)}
    arguments["sampler_logprobs"] = now + 0.5 * torch.randn(now.shape, generator=g, dtype=torch.float64)
    arguments["old_logprobs"] = (
        None if on_policy else now + 0.2 * torch.randn(now.shape, generator=g, dtype=torch.float64)
    )

    flat_tree = tk.Tree(tree.parent, pairs.cu_seqlens.diff())  # of the pairs
    index, results = flat_tree.flat_index, []
    for flat in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        part = {k: x[index] if flat and x is not None else x for k, x in arguments.items()}
        loss, metrics = tk.linear_policy_loss(
            h,
            w,
            pairs.targets[index] if flat else pairs.targets,
            rows=pairs.rows[index] if flat else pairs.rows,
            advantages=advantages if flat else None,
            cu_seqlens=flat_tree.flat_cu_seqlens if flat else pairs.cu_seqlens,
            branch=None if flat else tk.Paths(tree, advantages),
            config=config,
            **part,
        )
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad, *metrics.values()))
    for packed, flat in zip(*results, strict=True):
        torch.testing.assert_close(packed, flat, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("correction", ["tis", "icepop", "sequence_mask"])
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_a_samplers_nan_reaches_the_loss(kind, correction, aggregate) -> None:
    rollouts = _Rollouts(0, 12, 0.1)
    rollouts.gate[:], rollouts.mask[:] = True, True
    rollouts.arguments["sampler_logprobs"][3] = torch.nan
    config = tk.PolicyLoss(kind, aggregate=aggregate, sampler_correction=correction)
    for flat in (True, False):
        assert rollouts.loss(config, flat=flat, backward=False)["loss"].isnan(), flat
        rollouts.mask[3] = False
        assert rollouts.loss(config, flat=flat)["loss"].isfinite(), flat
        rollouts.mask[3] = True


def test_node_advantages_are_a_branch() -> None:
    """A value a node, as the tree recipes make them, equals the same value on each of its copies."""
    g = torch.Generator().manual_seed(0)
    tree = regular_tree(3, 3, 2)
    a, count = torch.randn(tree.num_nodes, generator=g, dtype=torch.float64), tree.leaf_count.double()
    a[4] = 0
    branch = tk.Branch(count * a.relu(), -count * (-a).relu(), count, *(count * s for s in (a > 0, a < 0, a == 0)))
    old = -torch.rand(tree.num_tokens, generator=g, dtype=torch.float64) - 0.1
    new = old + 0.3 * torch.randn(tree.num_tokens, generator=g, dtype=torch.float64).clamp_max(0.3)
    config, index = tk.PolicyLoss("dapo", clip_dual=2.0), tree.flat_index
    flat = tk.policy_loss(new[index], old[index], a[tree.token_node][index], tree.flat_cu_seqlens, config=config)
    for sums in (branch, tk.spread(branch, tree)):
        packed = tk.policy_loss(new, old, None, tree.node_offsets, config=config, branch=sums)
        torch.testing.assert_close(packed, flat, equal_nan=True)  # neither KL nor entropy is there


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_exact_is_refused(kind) -> None:
    tree = regular_tree(2, 2)
    x = torch.zeros(tree.num_tokens)
    with pytest.raises(ValueError, match=r"flat_index"):
        paths = tk.Paths(tree, torch.ones(2))
        tk.policy_loss(x, x, None, tree.node_offsets, config=tk.PolicyLoss(kind), branch=paths)


class TestBadInput:
    TREE = regular_tree(2, 2, 1)
    X = torch.zeros(3)
    A = torch.ones(2)

    def _loss(self, **changed: Any) -> Any:
        arguments: dict[str, Any] = {"logprobs": self.X, "old_logprobs": self.X, "advantages": None}
        arguments |= {
            "cu_seqlens": self.TREE.node_offsets,
            "config": tk.PolicyLoss(),
            "branch": tk.Paths(self.TREE, self.A),
        }
        return tk.policy_loss(**arguments | changed)

    def test_advantages_and_branch(self) -> None:
        with pytest.raises(ValueError, match="advantages must be None where branch is given; got float32"):
            self._loss(advantages=self.A)
        with pytest.raises(TypeError, match="advantages must be a tensor, got None"):
            self._loss(branch=None)

    def test_bounds_of_another_tree(self) -> None:
        with pytest.raises(
            ValueError, match=r"cu_seqlens must have shape \[4\] \(the boundaries of the tree's nodes\)"
        ):
            self._loss(cu_seqlens=torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the 3 tokens"):
            self._loss(cu_seqlens=torch.tensor([0, 1, 2, 4]))

    def test_paths(self) -> None:
        with pytest.raises(TypeError, match="tree must be a Tree, got 3"):
            tk.Paths(3, self.A)
        with pytest.raises(ValueError, match=r"advantages must have shape \[2\] \(one advantage a leaf\)"):
            tk.Paths(self.TREE, torch.ones(3))
        with pytest.raises(ValueError, match="advantages must be finite; it is nan at index 1"):
            tk.Paths(self.TREE, torch.tensor([1.0, torch.nan]))
        with pytest.raises(TypeError, match="gate must have dtype bool"):
            tk.Paths(self.TREE, self.A, self.A)

    def test_branch_without_its_leaves(self) -> None:
        branch = tk.branch_coefficients(self.A, self.TREE)
        cases = {
            "aggregate 'seq_mean_token_mean'": tk.PolicyLoss("grpo"),
            "ratio or the correction is a trajectory's": tk.PolicyLoss("gspo"),
        }
        for message, config in cases.items():
            with pytest.raises(ValueError, match=message):
                self._loss(branch=branch, config=config)
        with pytest.raises(TypeError, match="branch must be a Branch or Paths, got 1.0"):
            self._loss(branch=1.0)
        with pytest.raises(ValueError, match=r"branch.negative must have shape \[3\]"):
            self._loss(branch=branch._replace(negative=self.A), config=tk.PolicyLoss("dapo"))

    def test_corrected_kl_of_a_trajectory_ratio(self) -> None:
        config = tk.PolicyLoss("gspo", kl_coef=0.1, kl="k3_corrected")
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(ValueError, match="flat_index"))
            self._loss(config=config, ref_logprobs=self.X)
        self._loss(config=replace(config, kl="k3"), ref_logprobs=self.X)
