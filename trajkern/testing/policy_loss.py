"""Spec of the policy_loss family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trajkern._results import Branch
from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import AGGREGATES, KINDS, KL_ESTIMATORS
from trajkern.ops.tree_loss import Paths
from trajkern.testing.registry import Case, Inputs, OpSpec, Variant
from trajkern.testing.tree import random_tree

_LENGTHS = (9, 0, 40, 1, 23, 5)  # of which one is empty
_PER_TOKEN = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "mask")
_WEIGHTS = ("supervised_weights", "kl_weights")


def _packed(
    config: PolicyLoss,
    lengths: tuple[int, ...] = _LENGTHS,
    *,
    per_token: bool = False,
    spread: float = 0.3,
    mask: Callable[[Tensor, torch.Generator], Tensor | None] | None = None,
    **options: Any,
) -> Callable[[torch.Generator], Inputs]:
    """Random log-probs around a common policy; ``mask`` maps (random mask, generator) to the mask."""

    def make(g: torch.Generator) -> Inputs:
        total = sum(lengths)

        def noise(scale: float) -> Tensor:
            return torch.randn(total, generator=g, dtype=torch.float64) * scale

        old = -torch.rand(total, generator=g, dtype=torch.float64) * 4 - 0.01
        scored = torch.rand(total, generator=g) > 0.3
        return {
            "logprobs": (old + noise(spread)).clamp_max(-1e-3),
            "old_logprobs": old,
            "advantages": torch.randn(total if per_token else len(lengths), generator=g, dtype=torch.float64),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
            "config": config,
            "mask": scored if mask is None else mask(scored, g),
            "ref_logprobs": old + noise(0.2),
            "sampler_logprobs": old + noise(0.4),
            "entropy": noise(1.0).abs(),
        } | options

    return make


def _full(kind: str, **options: Any) -> PolicyLoss:
    """Every term switched on."""
    defaults = dict(max_length=40, clip_high=0.28, clip_dual=1.5, kl_coef=0.05, entropy_coef=0.01, cov_fraction=0.2)
    return PolicyLoss(kind, **defaults | {"cov_low": -1.0, "cov_high": 0.7} | options)


def _edited(make: Callable[[torch.Generator], Inputs], edit: Callable[[Inputs], None]):
    def edited(g: torch.Generator) -> Inputs:
        inputs = make(g)
        edit(inputs)
        return inputs

    return edited


def _rubbish(x: Inputs) -> None:
    for name in _PER_TOKEN[:-1]:
        x[name][~x["mask"]] = torch.nan


def _on_policy(x: Inputs) -> None:
    x["old_logprobs"] = x["logprobs"].clone()


def _far(x: Inputs) -> None:
    x["logprobs"][::2] = -60.0
    x["old_logprobs"][1::2] = -60.0


def _streams(x: Inputs) -> None:
    """Weights on tokens of both sides of the mask; what stands under neither is not read."""
    g = torch.Generator().manual_seed(5)
    for name in ("supervised_weights", "kl_weights"):
        weights = torch.rand(x["logprobs"].shape, generator=g, dtype=torch.float64) - 0.2
        x[name] = torch.where(torch.rand(weights.shape, generator=g) < 0.4, weights, 0)
    unread = (x["supervised_weights"] == 0) & (x["kl_weights"] == 0)
    if x["mask"] is not None:
        unread &= ~x["mask"]
        x["logprobs"][unread] = torch.nan


def _own_normalizers(x: Inputs) -> None:
    _streams(x)
    x |= {"supervised_normalizer": 3.5, "kl_normalizer": torch.tensor(12.0)}


def _supervised(x: Inputs) -> None:
    _streams(x)
    x["kl_weights"] = None


def _few(x: Inputs) -> None:
    x |= dict.fromkeys(("ref_logprobs", "sampler_logprobs", "entropy"))


def _zero_advantages(x: Inputs) -> None:
    x["advantages"] = x["advantages"].relu()


def _tree(config: PolicyLoss, nodes: int = 17, gated: bool = False, **options: Any):
    """The tokens of a packed tree, some of whose leaves have an advantage of 0."""

    def make(g: torch.Generator) -> Inputs:
        tree = random_tree(g, nodes)
        inputs = _packed(config, tuple(tree.node_lengths.tolist()), **options)(g)
        advantages = torch.randn(tree.num_leaves, generator=g, dtype=torch.float64)
        advantages[::4] = 0
        gate = torch.arange(tree.num_leaves) % 5 > 0 if gated else None
        return inputs | {"advantages": None, "branch": Paths(tree, advantages, gate)}

    return make


def _branch(config: PolicyLoss, lengths: tuple[int, ...] = _LENGTHS, **options: Any):
    """Sums over rollouts that are no tree's; a third of the nodes, or of the tokens, have none."""

    def make(g: torch.Generator) -> Inputs:
        inputs = _packed(config, lengths, **options)(g)
        size = inputs["advantages"].shape[0]
        counts = torch.randint(0, 4, (3, size), generator=g).double()
        counts[:, ::3] = 0
        sizes = torch.rand(3, size, generator=g, dtype=torch.float64) * counts
        branch = Branch(sizes[0], -sizes[1], 0.7 * counts.sum(0) + sizes[2], *counts)
        return inputs | {"advantages": None, "branch": branch}

    return make


def _tree_cases() -> Iterator[Case]:
    for kind in (name for name, kind in KINDS.items() if kind.in_tree):
        yield Case(f"tree_{kind}", _tree(_full(kind)), "a packed tree, every term on", mixed=True)
    for aggregate in AGGREGATES:
        yield Case(f"tree_{aggregate}", _tree(_full("grpo", aggregate=aggregate)), "each aggregation", mixed=True)
    for correction in ("tis", "icepop", "sequence_mask"):
        for kind in ("grpo", "gspo"):
            config = _full(kind, sampler_correction=correction, sampler_low=0.9, sampler_high=1.1)
            yield Case(f"tree_{correction}_{kind}", _tree(config, gated=True), "sampler mismatch, a gate", mixed=True)
    for kind in ("dapo", "cispo", "dppo_kl"):
        yield Case(f"branch_{kind}", _branch(_full(kind)), "sums a node")
        config = _full(kind, sampler_correction="tis", kl="k3_corrected")
        yield Case(f"branch_{kind}_per_token", _branch(config, per_token=True), "sums a token")
    yield Case("branch_normalizer", _branch(_full("grpo", aggregate="token_mean"), normalizer=5.5), "its own divisor")
    yield Case("branch_unmasked", _branch(_DAPO, mask=lambda m, g: None), "a branch, every token scored")
    yield Case("branch_rubbish", _edited(_branch(_DAPO), _rubbish), "NaN under the mask of a branch")
    yield Case("branch_no_tokens", _branch(_DAPO, (0, 0)), "a branch and T = 0")


def _cases() -> Iterator[Case]:
    for kind in KINDS:
        yield Case(kind, _packed(PolicyLoss(kind, max_length=40)), "the kind with its own aggregation")
        yield Case(f"{kind}_full", _packed(_full(kind)), "KL, entropy and dual clip on")
        yield Case(f"{kind}_per_token", _packed(_full(kind), per_token=True), "advantages per token")
    for aggregate in AGGREGATES:
        config = _full("grpo", aggregate=aggregate)
        yield Case(f"aggregate_{aggregate}", _packed(config), "each aggregation")
        yield Case(f"normalizer_{aggregate}", _packed(config, normalizer=7.5), "an external normaliser")
    for kind in ("grpo", "cispo", "sapo", "dppo_kl"):
        config = _full(kind, ratio_level="sequence", kl="k3_corrected")
        yield Case(f"{kind}_sequence", _packed(config, per_token=True), "one ratio a trajectory")
    for kl in KL_ESTIMATORS:
        yield Case(f"kl_{kl}", _packed(_full("dapo", kl=kl)), "each KL estimator")
        yield Case(f"kl_{kl}_small", _packed(_full("dapo", kl=kl), spread=1e-3), "k3 cancels near 0")
    for correction in ("tis", "icepop", "sequence_mask"):
        for kind in ("grpo", "gspo", "gmpo"):
            config = _full(kind, sampler_correction=correction, sampler_low=0.9, sampler_high=1.1)
            yield Case(f"{correction}_{kind}", _packed(config), "sampler mismatch")


_DAPO = _full("dapo")


def _stream_cases() -> Iterator[Case]:
    for kind in ("grpo", "gspo", "kl_cov"):
        yield Case(f"streams_{kind}", _edited(_packed(_full(kind)), _streams), "terms with weights of their own")
    for kl in ("k1", "k2", "k3"):
        config = _full("dapo", kl=kl, sampler_correction="sequence_mask", sampler_low=0.9, sampler_high=1.1)
        yield Case(f"streams_{kl}", _edited(_packed(config), _own_normalizers), "and normalisers")
    yield Case("supervised", _edited(_packed(_full("dapo")), _supervised), "a cross-entropy beside the mask's KL")
    yield Case("supervised_no_kl", _edited(_packed(PolicyLoss()), _streams), "kl_coef 0: weights that are not read")
    nothing = _packed(_DAPO, mask=lambda m, g: m & False)
    yield Case("only_streams", _edited(nothing, _streams), "nothing sampled is scored")
    yield Case("streams_no_tokens", _edited(_packed(_DAPO, (0, 0)), _streams), "T = 0")
    yield Case("streams_long", _edited(_packed(_DAPO, (3000,)), _own_normalizers), "longer than a row", large=True)


CASES = (
    *_cases(),
    *_tree_cases(),
    *_stream_cases(),
    Case("large_normalizer", _packed(_DAPO, normalizer=2.0**22), "gradients that fp16 has for a scaled loss"),
    Case("no_mask", _packed(_DAPO, mask=lambda m, g: None), "every token scored"),
    Case("nothing_scored", _packed(_DAPO, mask=lambda m, g: m & False), "an empty sum is 0"),
    Case("one_silent", _packed(_full("gspo"), mask=lambda m, g: m & (torch.arange(m.numel()) >= 9)), "one silent"),
    Case("masked_rubbish", _edited(_packed(_DAPO), _rubbish), "NaN under the mask"),
    Case("masked_rubbish_gmpo", _edited(_packed(_full("gmpo")), _rubbish), "NaN under the mask, trajectory means"),
    Case("on_policy", _edited(_packed(PolicyLoss()), _on_policy), "ratio exactly 1: every clip is a tie"),
    *(
        Case(f"no_room_{kind}", _edited(_packed(PolicyLoss(kind, clip_low=0, clip_high=0)), _on_policy), "on the clip")
        for kind in ("grpo", "gspo", "gmpo")
    ),
    Case("far", _edited(_packed(_DAPO), _far), "log-ratios beyond 20 are clamped, 0 * inf cannot arise"),
    Case("zero_advantages", _edited(_packed(_DAPO), _zero_advantages), "half the advantages zero"),
    Case("few_inputs", _edited(_packed(PolicyLoss()), _few), "metrics that are not computed"),
    Case("no_tokens_few_inputs", _edited(_packed(PolicyLoss(), (0, 0)), _few), "T = 0, likewise"),
    Case("no_tokens", _packed(_DAPO, (0, 0)), "T = 0"),
    Case("no_trajectories", _packed(_DAPO, ()), "N = 0"),
    Case("one_token", _packed(_DAPO, (1,), per_token=True), "N = T = 1"),
    Case("one_trajectory", _packed(_full("gspo"), (3000,)), "longer than any chunk", large=True),
    Case("large_tree", _tree(_full("dapo"), 900), "several runs of nodes", large=True, mixed=True),
    Case("many_trajectories", _packed(_full("gspo"), (3,) * 200), "shorter than any vector", large=True),
)


def _reversed_trajectories(inputs: Inputs, g: torch.Generator):
    bounds = inputs["cu_seqlens"].tolist()
    order = [torch.arange(a, b) for a, b in pairwise(bounds)][::-1]
    index = torch.cat(order) if order else torch.arange(0)
    of_tokens = (*_PER_TOKEN, *_WEIGHTS)
    turned = {k: v[index] if k in of_tokens and v is not None else v for k, v in inputs.items()}
    if isinstance(inputs.get("branch"), Paths):
        return inputs, lambda name, x: x  # a tree's nodes cannot come before their parents
    if inputs["advantages"] is None:
        per_token = inputs["branch"].positive.shape[0] != len(order)
        turned["branch"] = Branch(*(x[index] if per_token else x.flip(0) for x in inputs["branch"]))
    else:
        per_token = inputs["advantages"].shape[0] != len(order)
        turned["advantages"] = inputs["advantages"][index] if per_token else inputs["advantages"].flip(0)
    turned["cu_seqlens"] = torch.tensor([0, *map(len, order)]).cumsum(0)

    def undo(name: str, x: Tensor) -> Tensor:
        return x[torch.argsort(index)]

    return turned, undo


POLICY_LOSS = OpSpec(
    name="policy_loss",
    family="policy_loss",
    outputs=lambda x: {"loss": x[0]} | x[1],
    differentiable=("logprobs", "entropy"),
    typed=(
        *("logprobs", "old_logprobs", "advantages", "branch", "ref_logprobs", "sampler_logprobs", "entropy"),
        *_WEIGHTS,
    ),
    dtypes=(torch.float32, torch.float64, torch.bfloat16),
    triton_dtypes=(torch.float32,),
    cases=CASES,
    variants=(Variant("trajectories_reversed", _reversed_trajectories),),
    term_scale=dict.fromkeys(("loss", "clip_fraction", "clip_low", "clip_high", "approx_kl", "kl", "sampler_kl"), 1.0)
    | {"supervised_loss": 1.0},
)

SPECS = (POLICY_LOSS,)
