"""The rollouts of a packed tree as the policy loss reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import check_device, check_shape, check_tensor, describe, readable, resolved, suggesting
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._results import Branch
from trajkern._values import check_finite
from trajkern.layouts._leaf_weights import aggregate_weights
from trajkern.layouts._nodes import offsets_of
from trajkern.layouts.tree import Tree
from trajkern.losses.arguments import LossArguments
from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import LOG_RATIO_BOUND
from trajkern.ops import span
from trajkern.ops import tree as ops
from trajkern.ops._autograd import applied, differentiable_once, keep, kept

_SUM = ops.REDUCTIONS.index("sum")


@suggesting
@dataclass(frozen=True, eq=False, repr=False)
class Paths:
    """The rollouts of a tree, one a leaf, with their advantages: ``branch=Paths(...)`` of :func:`trajkern.policy_loss`.

    Args:
        tree: the packed tree.
        advantages: float ``[L]``, finite where the gate is True (checked on the CPU), in the order of ``tree.leaves``.
        gate: bool ``[L]``; a False rollout counts nowhere, as if it were not there; its advantage is kept as 0. None:
            all count.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    tree: Tree
    advantages: Tensor  # [L]
    gate: Tensor | None = None  # [L]

    def __post_init__(self) -> None:
        if not isinstance(self.tree, Tree):
            raise TypeError(f"tree must be a Tree, got {describe(self.tree)}")
        device, shape = self.tree.device, (self.tree.num_leaves,)
        check_tensor("advantages", self.advantages, dtypes=FLOATS, device=device)
        check_shape("advantages", self.advantages, shape, "one advantage a leaf")
        if self.gate is not None:
            check_tensor("gate", self.gate, dtypes=(torch.bool,), device=device)
            check_shape("gate", self.gate, shape, "one flag a leaf")
            object.__setattr__(self, "advantages", torch.where(self.gate, self.advantages, 0))
        if readable(self.advantages):
            check_finite("advantages", self.advantages)

    def __repr__(self) -> str:
        return f"Paths({self.tree!r}{'' if self.gate is None else ', gate'})"

    def to(self, device: torch.device | str) -> Paths:
        check_device("device", device)
        gate = None if self.gate is None else self.gate.to(device)
        return Paths(self.tree.to(device), self.advantages.to(device), gate)


class _PathSums(torch.autograd.Function):
    """The sum over the nodes from each leaf up to its root, ``[M]`` -> ``[L]``: the adjoint of the sums over leaves."""

    @staticmethod
    def forward(ctx: Any, values, leaves, tree):
        keep(ctx, *tree)
        return ops._subtree_reduce_backward(values, leaves, tree, _SUM)

    @staticmethod
    @differentiable_once("policy_loss", linear=True)
    def backward(ctx: Any, grad):
        return ops._subtree_reduce(grad.contiguous(), list(kept(ctx)), _SUM), None, None


def path_sums(
    values: Tensor,  # [P]
    offsets: Tensor,  # [M+1]
    tree: Tree,
) -> Tensor:
    """The sum of the values along each leaf's path, ``[L]``; those of node n are ``offsets[n]:offsets[n+1]``."""
    if _backends.wants_reference("tree", values):
        flat = Tree(tree.arrays[0], offsets.diff())
        leaf, index = torch.arange(tree.num_leaves, device=values.device), flat.flat_index
        leaf = torch.repeat_interleave(leaf, flat.flat_lengths, output_size=index.shape[0])
        return values.new_zeros(tree.num_leaves).index_add(0, leaf, values[index])
    sums = applied(span.SpanReduce, values, offsets[:-1], offsets[1:], "sum")
    return applied(_PathSums, sums, values.new_zeros(tree.num_leaves), tree.arrays)


def check_branch(arguments: LossArguments, logprobs: Tensor) -> None:
    """Raises where the branch cannot be read, or where its sums do not give this loss exactly."""
    config, branch = arguments.config, arguments.branch
    if not config.exact_in_tree:
        what = f"kind {config.kind!r}, ratio level {config.resolved_ratio_level!r}, kl {config.kl!r}"
        raise ValueError(
            f"branch must come with a loss that sums over the leaves give exactly; {what} needs the flat rollouts: "
            "index everything per token with tree.flat_index, and pass tree.flat_cu_seqlens and the leaves' advantages"
        )
    if isinstance(branch, Paths):
        bounds = (branch.tree.num_nodes + 1,)
        return check_shape("cu_seqlens", arguments.cu_seqlens, bounds, "the boundaries of the tree's nodes")
    if not isinstance(branch, Branch):
        raise TypeError(f"branch must be a Branch or Paths, got {describe(branch)}")
    if config.resolved_ratio_level == "sequence" or config.sampler_correction == "sequence_mask":
        raise ValueError("branch must be Paths where the ratio or the correction is a trajectory's; got a Branch")
    if config.resolved_aggregate.startswith("seq_mean"):
        raise ValueError(
            f"branch must be Paths for aggregate {config.resolved_aggregate!r}; got a Branch, whose leaf weights are "
            "tree.leaf_weights(mask, aggregate), with which the aggregate is 'token_sum'"
        )
    for name, x in branch._asdict().items():
        check_tensor(f"branch.{name}", x, dtypes=(*FLOATS, *INTEGERS), ndim=1, device=logprobs.device)
        check_shape(f"branch.{name}", x, tuple(branch.positive.shape), "like branch.positive")


def node_counts(arguments: LossArguments) -> Tensor:
    """Unmasked pairs of each node, int64 ``[M]``."""
    cu_seqlens, mask = resolved(arguments.cu_seqlens), arguments.mask
    return cu_seqlens.diff() if mask is None else offsets_of(mask)[cu_seqlens].diff()


def leaf_counts(arguments: LossArguments, gate: Tensor | None) -> Tensor:
    """Unmasked pairs on the path of each leaf that the gate lets through, else 0; int64 ``[L]``."""
    counts = arguments.branch.tree.along_paths(node_counts(arguments))
    return counts if gate is None else counts * gate


def leaf_weights(arguments: LossArguments, counts: Tensor) -> Tensor:
    """With which the sum over all (token, leaf) pairs is the aggregate; float64 ``[L]``."""
    config, normalizer = arguments.config, arguments.normalizer
    weights = aggregate_weights(counts, config.resolved_aggregate, config.max_length, normalizer)
    if config.resolved_aggregate != "token_mean":
        return weights
    return torch.where(counts > 0, weights / (counts.sum().clamp_min(1) if normalizer is None else normalizer), 0)


def remaining_rollouts(arguments: LossArguments) -> tuple[Tensor | None, Tensor | None]:
    """Those that the gate and the sampler's sequence mask leave; 1, or NaN where that mask met one."""
    config, paths = arguments.config, arguments.branch
    if config.sampler_correction != "sequence_mask":
        return paths.gate, None
    assert arguments.old_logprobs is not None and arguments.sampler_logprobs is not None
    counts = leaf_counts(arguments, None).clamp_min(1)
    log_w = scored(arguments.old_logprobs - arguments.sampler_logprobs, arguments.mask)
    log_w = log_w.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    w = (path_sums(log_w, arguments.cu_seqlens, paths.tree) / counts).exp()
    inside = ~((w < config.sampler_low) | (w > config.sampler_high))
    if paths.gate is not None:
        inside, w = inside & paths.gate, torch.where(paths.gate, w, 0)
    return inside, 1 + 0 * w.sum()


def sampler_factor(arguments: LossArguments) -> Tensor:
    """What "tis" or "icepop" multiplies a token's policy term by."""
    config = arguments.config
    assert arguments.old_logprobs is not None and arguments.sampler_logprobs is not None
    log_w = arguments.old_logprobs - arguments.sampler_logprobs
    w = log_w.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if config.sampler_correction == "tis":
        return w.clamp_max(config.sampler_high)
    if config.sampler_correction == "icepop":
        return torch.where((w < config.sampler_low) | (w > config.sampler_high), 0, w)
    raise AssertionError(f"no factor a token: {config.sampler_correction}")


def scored(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)


def summed(config: PolicyLoss) -> PolicyLoss:
    """The configuration once weights and gates are in the coefficients."""
    correction = "none" if config.sampler_correction == "sequence_mask" else config.sampler_correction
    return replace(config, aggregate="token_sum", sampler_correction=correction)


def stacked(branch: Branch, dtype: torch.dtype) -> Tensor:
    """A branch as the kernels read it, ``[6, M]`` or ``[6, P]``."""
    return torch.stack([x.detach().to(dtype) for x in branch])


def sum_in_any_order(x: Tensor) -> Tensor:
    """The sum of float64 numbers at least 0, in fixed point, so that their order changes no bit."""
    whole = (x * 2.0**20).floor()
    rest = ((x * 2.0**20 - whole) * 2.0**40).floor()
    exact = whole.long().sum().double() * 2.0**-20 + rest.long().sum().double() * 2.0**-60
    return exact + 0 * x.sum()  # NaN stays NaN


def read_branch(arguments: LossArguments, dtype: torch.dtype) -> LossArguments:
    """The arguments of the loss whose sum over tokens is the flat rollouts', a branch's rows for its advantages."""
    branch, config = arguments.branch, arguments.config
    if branch is None:
        return arguments
    if isinstance(branch, Paths):
        gate, one_or_nan = remaining_rollouts(arguments)
        weights = leaf_weights(arguments, leaf_counts(arguments, gate))
        coefficients = ops.branch_coefficients(branch.advantages.detach(), branch.tree, leaf_weights=weights)
        rows = stacked(coefficients, dtype)
        if one_or_nan is not None:
            rows = rows * one_or_nan
        return arguments._replace(advantages=rows, config=summed(config), normalizer=None)
    if config.resolved_aggregate == "token_mean" and arguments.normalizer is None:
        leaves = branch.leaf_count.detach().double()
        counted = scored(leaves, arguments.mask) if arguments.per_token else leaves * node_counts(arguments)
        total = sum_in_any_order(counted)
        arguments = arguments._replace(normalizer=torch.where(total == 0, 1, total).to(dtype))
    return arguments._replace(advantages=stacked(branch, dtype))
