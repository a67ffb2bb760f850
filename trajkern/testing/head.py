"""Specs of the head family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import KINDS, METRICS
from trajkern.ops.tree_loss import Paths
from trajkern.reference import linear_logprobs
from trajkern.testing.registry import Case, Inputs, OpSpec
from trajkern.testing.tree import regular_tree

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATS = ("entropy", "sum_sq_probs", "is_top1", "mean_logit")


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _head(tokens: int, width: int, vocabulary: int, scale: float = 1.0, **options):
    """Random hidden states whose logits have about this spread; ``options`` as arguments, or functions making them."""

    def make(g: torch.Generator) -> Inputs:
        inputs = {
            "hidden": _randn(g, tokens, width),
            "weight": _randn(g, vocabulary, width) * (scale / width**0.5),
            "targets": torch.randint(vocabulary, (tokens,), generator=g),
        }
        for name, value in options.items():
            inputs[name] = value(g, inputs) if callable(value) else value
        return inputs

    return make


def _mask(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.rand(inputs["targets"].shape, generator=g) > 0.4


def _none(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.zeros(inputs["targets"].shape, dtype=torch.bool)


def _temperatures(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.rand(inputs["hidden"].shape[0], generator=g, dtype=torch.float64) * 2 + 0.25


def _bias(g: torch.Generator, inputs: Inputs) -> Tensor:
    return _randn(g, inputs["weight"].shape[0])


def _support(size: int) -> Callable[[torch.Generator, Inputs], tuple[Tensor, Tensor]]:
    """Each target and about ``size`` more tokens, fewer for every third pair."""

    def make(g: torch.Generator, inputs: Inputs) -> tuple[Tensor, Tensor]:
        vocabulary = inputs["weight"].shape[0]
        sets = []
        for i, target in enumerate(inputs["targets"].tolist()):
            others = torch.randperm(vocabulary, generator=g)[: size if i % 3 else 1]
            sets.append(torch.cat([others[others != target], torch.tensor([target])]))
        offsets = torch.tensor([0, *(len(x) for x in sets)]).cumsum(0)
        return (torch.cat(sets) if sets else torch.empty(0, dtype=torch.int64)), offsets

    return make


def _tree(g: torch.Generator, inputs: Inputs) -> Tensor:
    """Rows with none, one and several targets, not in order."""
    return torch.randint(max(1, inputs["hidden"].shape[0] // 2), inputs["targets"].shape, generator=g)


def _edited(make: Callable[[torch.Generator], Inputs], edit: Callable[[Inputs], None]):
    def edited(g: torch.Generator) -> Inputs:
        inputs = make(g)
        edit(inputs)
        return inputs

    return edited


def _few_rows_named(x: Inputs) -> None:
    count = x["targets"].shape[0]
    x["rows"] = torch.arange(count).flip(0)[: count // 3] * 2 % count
    x["targets"] = x["targets"][: count // 3]


def _same_target_twice(x: Inputs) -> None:
    x["rows"] = torch.tensor([3, 1, 3, 3, 1, 0])
    x["targets"] = torch.tensor([5, 2, 5, 9, 2, 7])
    x["weight"][5] = 4 * x["hidden"][3]  # p near 1 for a target that two pairs share


def _certain(margin: float):
    """Row i's own weight row lies ``margin`` above all others."""

    def edit(x: Inputs) -> None:
        tokens = x["hidden"].shape[0]
        x["hidden"][...] = torch.eye(*x["hidden"].shape, dtype=torch.float64)
        x["weight"][...] = 0
        x["weight"][:tokens, :tokens] = margin * torch.eye(tokens, dtype=torch.float64)
        x["targets"] = torch.arange(tokens)

    return edit


def _common_offset(offset: float):
    def edit(x: Inputs) -> None:
        x["hidden"][:, 0], x["weight"][:, 0] = offset / 64, 64

    return edit


def _masked_rubbish(x: Inputs) -> None:
    x["hidden"][~x["mask"]] = torch.nan
    x["targets"][~x["mask"]] = -100


def _masked_rows(x: Inputs) -> None:
    """No row is named twice, and the last one by a pair that counts."""
    x["mask"][-1] = True
    each = torch.arange(x["targets"].shape[0])
    x["rows"] = torch.where(x["mask"], each, torch.where(each % 2 == 0, -1 - each, 10**9 + each))


CASES = (
    Case("typical", _head(33, 64, 257), "the plain case: no size is a multiple of a tile's"),
    Case("one_row", _head(1, 96, 257), "a product with one row takes other paths"),
    Case("two_rows", _head(2, 64, 300), "fewer rows than a tile"),
    Case("no_rows", _head(0, 8, 17), "T = 0"),
    Case("one_token", _head(4, 8, 1), "a vocabulary of one: log p is exactly 0"),
    Case("v50257", _head(3, 64, 50257), "many slices of the vocabulary, the last one short", large=True),
    Case("v151936", _head(2, 16, 151936, 3.0), "Qwen's", large=True),
    Case("many_rows", _head(2100, 8, 40), "more rows than a tile", large=True),
    Case("small_workspace", _head(70, 16, 130, workspace_bytes=130 * 4 * 9), "tiles of nine rows", large=True),
    Case("temperature", _head(5, 16, 129, 3.0, temperature=0.6), "a scalar temperature"),
    Case("temperatures", _head(6, 16, 129, 3.0, temperature=_temperatures), "one temperature a row"),
    Case("softcap", _head(5, 16, 130, 20.0, softcap=5.0), "logits deep inside the softcap's bend"),
    Case("scale_and_bias", _head(5, 16, 66, bias=_bias, logit_scale=1.7), "a bias is scaled as the logits are"),
    Case(
        "everything",
        _head(9, 16, 70, 3.0, bias=_bias, logit_scale=0.5, softcap=4.0, temperature=_temperatures, mask=_mask),
        "all transformations at once, and a mask",
    ),
    Case("mask", _head(17, 16, 65, mask=_mask), "masked pairs are 0 and have no gradient"),
    Case("nothing_scored", _head(6, 16, 65, mask=_none), "no mask bit set"),
    Case("masked_rubbish", _edited(_head(9, 8, 40, mask=_mask), _masked_rubbish), "NaN states, targets of -100"),
    Case(
        "masked_rows", _edited(_head(20, 16, 65, mask=_mask), _masked_rows), "masked pairs of rows that are not there"
    ),
    Case("rows", _edited(_head(30, 16, 65), _few_rows_named), "some rows, in any order"),
    Case("shared_rows", _head(30, 16, 65, rows=_tree), "several targets a row, as where a tree branches"),
    Case("shared_rows_masked", _head(20, 16, 65, rows=_tree, mask=_mask, temperature=_temperatures), "with a mask"),
    Case("same_target_twice", _edited(_head(4, 8, 33), _same_target_twice), "pairs that agree in row and target"),
    Case("one_row_many_targets", _head(40, 8, 33, rows=lambda g, x: torch.full((40,), 7)), "every target on one row"),
    Case("support", _head(12, 16, 200, 3.0, sampling_support=_support(9)), "the softmax over each token's own set"),
    Case(
        "support_shared_rows",
        _head(12, 16, 90, rows=_tree, mask=_mask, sampling_support=_support(5)),
        "sets of their own on shared rows",
    ),
    Case(
        "support_softcap",
        _head(12, 16, 200, 3.0, sampling_support=_support(9), softcap=4.0, temperature=0.7),
        "tokens outside a set, at -inf behind the softcap, have no gradient and no NaN",
    ),
    Case("very_negative", _edited(_head(4, 16, 300), _common_offset(-1e4)), "all logits near -1e4"),
    Case("common_offset", _edited(_head(4, 16, 300), _common_offset(1e4)), "a common offset of 1e4"),
    Case("margin_17", _edited(_head(3, 8, 50), _certain(17.0)), "float32 rounds p to 1 beyond 16.6 nats"),
    Case("margin_40", _edited(_head(3, 8, 50), _certain(40.0)), "log p = -49 e^-40, and its gradient"),
    Case("near_fp16_limit", _head(3, 16, 64, 2e4), "logits that overflow fp16"),
)


def _hidden_reversed(inputs: Inputs) -> Inputs:
    return inputs | {"hidden": inputs["hidden"].flip(-1), "weight": inputs["weight"].flip(1)}


def _vocabulary_reversed(inputs: Inputs) -> Inputs:
    size = inputs["weight"].shape[0]
    turned = inputs | {"weight": inputs["weight"].flip(0), "targets": size - 1 - inputs["targets"]}
    if inputs.get("bias") is not None:
        turned["bias"] = inputs["bias"].flip(0)
    if inputs.get("sampling_support") is not None:
        ids, offsets = inputs["sampling_support"]
        turned["sampling_support"] = size - 1 - ids, offsets
    return turned


ORDERS = (_hidden_reversed, _vocabulary_reversed, lambda inputs: _hidden_reversed(_vocabulary_reversed(inputs)))


def _spec(name: str, cases: tuple[Case, ...], outputs, **more) -> OpSpec:
    return OpSpec(
        name=name,
        family="head",
        outputs=outputs,
        differentiable=("hidden", "weight", "bias"),
        typed=("hidden", "weight", "bias"),
        dtypes=DTYPES,
        triton_dtypes=DTYPES[:3],
        cases=cases,
        orders=ORDERS,
        own_sums=False,
        **more,
    )


_FEW = ("typical", "rows", "same_target_twice", "margin_40")  # for the interpreter, which has the rest of token_stats
LINEAR_LOGPROBS = _spec(
    "linear_logprobs",
    tuple(Case(c.name, c.make, c.reason, c.large or c.name not in _FEW) for c in CASES),
    lambda x: {"logprobs": x},
)
LINEAR_TOKEN_STATS = _spec(
    "linear_token_stats",
    tuple(Case(c.name, _edited(c.make, lambda x: x.setdefault("outputs", STATS)), c.reason, c.large) for c in CASES)
    + (Case("entropy_only", _head(6, 16, 90, outputs=("entropy",)), "one output of four"),),
    lambda x: {k: v for k, v in x._asdict().items() if v is not None},
    no_grad_outputs=("sum_sq_probs", "is_top1", "mean_logit"),
)


def _loss(config: PolicyLoss, tokens: int = 24, cuts: tuple[int, ...] = (0, 5, 5, 16, 24), **options):
    """A batch of trajectories whose policy has moved a little since it was sampled."""
    head = _head(tokens, 16, 65, 2.0, **options)

    def make(g: torch.Generator) -> Inputs:
        inputs = head(g)
        pairs, now = inputs["targets"].shape[0], linear_logprobs(**inputs)
        inputs |= {
            "old_logprobs": now + 0.3 * _randn(g, pairs),
            "advantages": _randn(g, len(cuts) - 1),
            "cu_seqlens": torch.tensor(cuts),
            "config": config,
        }
        if config.kl_coef:
            inputs["ref_logprobs"] = inputs["old_logprobs"] + 0.3 * _randn(g, pairs)
        if config.sampler_correction != "none":
            inputs["sampler_logprobs"] = inputs["old_logprobs"] + 0.5 * _randn(g, pairs)
        return inputs

    return make


def _tree_loss(config: PolicyLoss, **options):
    """The pairs of a packed tree, children of one node on one row."""

    def make(g: torch.Generator) -> Inputs:
        tree = regular_tree(3, 3, 2)
        pairs = tree.pairs(torch.randint(0, 65, (tree.num_tokens,), generator=g))
        cuts = tuple(pairs.cu_seqlens.tolist())
        of_tree = {"targets": lambda g, x: pairs.targets, "rows": lambda g, x: pairs.rows}
        inputs = _loss(config, tree.num_tokens, cuts, **of_tree, **options)(g)
        advantages = _randn(g, tree.num_leaves)
        advantages[:4] = 0
        return inputs | {"advantages": None, "branch": Paths(tree, advantages)}

    return make


def _streams(x: Inputs) -> None:
    """Weights on pairs of both sides of the mask."""
    g, pairs = torch.Generator().manual_seed(5), x["targets"].shape
    for name in ("supervised_weights", "kl_weights"):
        weights = torch.rand(pairs, generator=g, dtype=torch.float64) - 0.2
        x[name] = torch.where(torch.rand(pairs, generator=g) < 0.3, weights, 0)
    x["kl_normalizer"] = 5.0


def _supervised(x: Inputs) -> None:
    _half_zero(x)
    _streams(x)
    x["kl_weights"] = x["kl_normalizer"] = None


def _half_zero(x: Inputs) -> None:
    x["advantages"][::2] = 0


def _per_token(x: Inputs) -> None:
    x["advantages"] = x["old_logprobs"].sin()


def _on_policy(x: Inputs) -> None:
    x["old_logprobs"] = None


_FULL = PolicyLoss(
    "dapo", clip_high=0.28, clip_dual=3.0, kl_coef=0.1, kl="k3", entropy_coef=0.05, sampler_correction="tis"
)
_GSPO = PolicyLoss("gspo", kl_coef=0.1)
_REMOVING = dataclasses.replace(_FULL, sampler_correction="sequence_mask")
LOSS_CASES = (
    *(Case(kind, _loss(PolicyLoss(kind, max_length=16)), "the kind alone") for kind in KINDS),
    Case("full", _loss(_FULL, mask=_mask), "KL, entropy, dual clip, sampler correction and a mask"),
    Case(
        "everything",
        _loss(_FULL, mask=_mask, bias=_bias, softcap=6.0, logit_scale=1.2, temperature=_temperatures),
        "all options of the head, too",
    ),
    Case("entropy", _loss(PolicyLoss("grpo", entropy_coef=0.1)), "the entropy's gradient joins log p's"),
    Case("corrected_kl", _loss(PolicyLoss("grpo", kl_coef=0.2, kl="k3_corrected")), "a KL that reads the ratio"),
    Case("icepop", _loss(PolicyLoss("dapo", sampler_correction="icepop")), "tokens with no gradient"),
    Case("masked_rows", _edited(_loss(_FULL, mask=_mask), _masked_rows), "masked pairs of rows that are not there"),
    Case("half_zero", _edited(_loss(PolicyLoss("grpo"), mask=_mask), _half_zero), "pairs that need no backward"),
    Case("all_zero", _edited(_loss(PolicyLoss("grpo")), lambda x: x["advantages"].zero_()), "none needs one"),
    Case("per_token", _edited(_loss(PolicyLoss("dapo")), _per_token), "one advantage a token"),
    Case("small_workspace", _loss(_FULL, mask=_mask, workspace_bytes=65 * 4 * 5), "many blocks of few rows"),
    Case("normalizer", _loss(PolicyLoss("dapo"), normalizer=11.0), "an external normaliser"),
    Case("large_normalizer", _loss(_FULL, mask=_mask, normalizer=2.0**22), "gradients that fp16 has for a scaled loss"),
    Case("nothing_scored", _loss(PolicyLoss("dapo"), mask=_none), "an empty sum is 0"),
    Case("on_policy", _edited(_loss(_FULL, mask=_mask), _on_policy), "no old log-probs: every ratio is 1"),
    Case("on_policy_sequence", _edited(_loss(PolicyLoss("gspo")), _on_policy), "the same in two passes"),
    Case("with_entropy", _edited(_loss(PolicyLoss("grpo")), lambda x: x.update(with_entropy=True)), "a metric only"),
    Case("with_logprobs", _edited(_loss(_FULL, mask=_mask), lambda x: x.update(with_logprobs=True)), "one output more"),
    Case("shared_rows", _loss(_FULL, rows=_tree, mask=_mask), "several targets a row"),
    *(
        Case(f"tree_{kind}", _tree_loss(PolicyLoss(kind, max_length=16, clip_dual=3.0)), "a packed tree", mixed=True)
        for kind in ("grpo", "dapo", "dr_grpo", "bnpo", "gspo")
    ),
    Case("streams", _edited(_loss(_FULL, mask=_mask), _streams), "cross-entropy and KL of pairs outside the mask"),
    Case("streams_sequence", _edited(_loss(_GSPO, mask=_mask), _streams), "the same in two passes"),
    Case("streams_unmasked", _edited(_loss(_FULL, workspace_bytes=65 * 4 * 5), _streams), "every pair, many blocks"),
    Case("supervised", _edited(_loss(PolicyLoss("grpo"), mask=_mask), _supervised), "on pairs of advantage 0, too"),
    Case("tree_full", _tree_loss(_FULL, mask=_mask), "every term and a mask", mixed=True),
    Case("tree_mask", _tree_loss(_REMOVING), "rollouts removed", mixed=True),
    Case(
        "removed_on_policy", _edited(_loss(_REMOVING, mask=_mask, workspace_bytes=65 * 4 * 5), _on_policy), "all first"
    ),
    Case("support", _loss(PolicyLoss("grpo"), sampling_support=_support(9)), "the softmax over each token's own set"),
)
# for the interpreter; the policy loss itself has specs of its own
_FEW_LOSSES = ("grpo", "full", "shared_rows", "on_policy", "large_normalizer")
LINEAR_POLICY_LOSS = _spec(
    "linear_policy_loss",
    tuple(dataclasses.replace(c, large=c.name not in _FEW_LOSSES) for c in LOSS_CASES),
    lambda x: {"loss": x[0], **x[1]},
    no_grad_outputs=(*METRICS, "supervised_loss", "logprobs"),
    # log p is made of logits of about this size, and a ratio has log p's error
    term_scale=dict.fromkeys(
        ("loss", "approx_kl", "ratio_mean", "ratio_max", "entropy", "kl", "sampler_kl", "effective_sample_size"), 8.0
    )
    | {"supervised_loss": 8.0},
)

SPECS = (LINEAR_LOGPROBS, LINEAR_TOKEN_STATS, LINEAR_POLICY_LOSS)
