"""Specs of the topk family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern._results import TopK
from trajkern.testing.registry import Case, Inputs, OpSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _head(tokens: int, width: int, vocabulary: int, k: int, scale: float = 1.0, **options):
    """Random hidden states whose logits have about this spread; ``options`` as arguments, or functions making them."""

    def make(g: torch.Generator) -> Inputs:
        inputs = {
            "hidden": _randn(g, tokens, width),
            "weight": _randn(g, vocabulary, width) * (scale / width**0.5),
            "k": k,
        }
        for name, value in options.items():
            inputs[name] = value(g, inputs) if callable(value) else value
        return inputs

    return make


def _count(inputs: Inputs) -> int:
    return len(inputs["rows"]) if "rows" in inputs else len(inputs["hidden"])


def _mask(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.rand(_count(inputs), generator=g) > 0.4


def _none(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.zeros(_count(inputs), dtype=torch.bool)


def _temperatures(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.rand(len(inputs["hidden"]), generator=g, dtype=torch.float64) * 2 + 0.25


def _bias(g: torch.Generator, inputs: Inputs) -> Tensor:
    return _randn(g, len(inputs["weight"]))


def _rows(g: torch.Generator, inputs: Inputs) -> Tensor:
    """Some rows, in any order, some twice."""
    tokens = len(inputs["hidden"])
    return torch.randint(tokens, (tokens * 2 // 3,), generator=g)


def _targets(each: int | None) -> Callable[[torch.Generator, Inputs], Tensor]:
    """Among the likeliest or not; of several the first two are one token."""

    def make(g: torch.Generator, inputs: Inputs) -> Tensor:
        count, vocabulary = _count(inputs), len(inputs["weight"])
        if each is None:
            return torch.randint(vocabulary, (count,), generator=g)
        targets = torch.randint(vocabulary, (count, each), generator=g)
        targets[:, 1:2] = targets[:, :1]
        return targets

    return make


def _edited(make: Callable[[torch.Generator], Inputs], edit: Callable[[Inputs], None]):
    def edited(g: torch.Generator) -> Inputs:
        inputs = make(g)
        edit(inputs)
        return inputs

    return edited


def _certain(margin: float):
    """Token 5 and, half of it below, token 2 lie above all others of every row."""

    def edit(x: Inputs) -> None:
        x["hidden"].fill_(0)[:, 0] = 1
        x["weight"][:, 0] = 0
        x["weight"][5, 0], x["weight"][2, 0] = margin, margin / 2

    return edit


def _equal(x: Inputs) -> None:
    """Whole numbers, whose products are exact: many logits are equal."""
    x["hidden"], x["weight"] = (x[name].sign() for name in ("hidden", "weight"))


def _impossible(x: Inputs) -> None:
    """All but six tokens, fewer than are asked for."""
    x["bias"][:-6] = -torch.inf


def _common_offset(offset: float):
    """Numbers of so few bits that each sum of products is exact: rounded ones would stand in an order of luck."""

    def edit(x: Inputs) -> None:
        for name in ("hidden", "weight"):
            x[name] = (x[name] * 16).round() / 16
        x["hidden"][:, 0], x["weight"][:, 0] = offset / 64, 64

    return edit


def _ascending(x: Inputs) -> None:
    """Every token is likelier than all before it: each tile displaces what was the likeliest."""
    size = len(x["weight"])
    x["hidden"].fill_(1.0)
    x["weight"] = torch.linspace(-2, 2, size, dtype=torch.float64)[:, None].expand(size, x["weight"].shape[1]).clone()
    x["weight"] += torch.arange(size, dtype=torch.float64)[:, None] / size


def _masked_rubbish(x: Inputs) -> None:
    x["hidden"][~x["mask"]] = torch.nan
    x["targets"][~x["mask"]] = -100


CASES = (
    Case("typical", _head(17, 64, 257, 5), "the plain case: no size is a multiple of a tile's"),
    Case("targets", _head(9, 16, 90, 4, targets=_targets(None)), "one more token a row"),
    Case("several_targets", _head(9, 16, 40, 6, 2.0, targets=_targets(4)), "some of them among the likeliest"),
    Case("certain", _edited(_head(3, 8, 50, 2), _certain(40.0)), "a tail of e^-40, and its gradient"),
    Case("one", _head(6, 16, 65, 1), "the likeliest alone"),
    Case("all", _head(5, 16, 33, 33), "k = V: no tail"),
    Case("all_but_one", _head(5, 16, 33, 32, targets=_targets(2)), "a tail of one token"),
    Case("one_row", _head(1, 24, 257, 7, 3.0), "a product with one row takes other paths"),
    Case("no_rows", _head(0, 8, 17, 3), "T = 0"),
    Case("one_token", _head(4, 8, 1, 1), "a vocabulary of one: log p is exactly 0"),
    Case("v50257", _head(3, 64, 50257, 100, 2.0, targets=_targets(2)), "many slices of the vocabulary", large=True),
    Case("v151936", _head(2, 16, 151936, 20, 3.0), "Qwen's", large=True),
    Case("many_rows", _head(2100, 8, 40, 3), "more rows than a tile", large=True),
    Case("ascending", _edited(_head(2, 8, 40000, 9), _ascending), "each tile displaces all before it", large=True),
    Case("small_workspace", _head(70, 16, 130, 6, workspace_bytes=130 * 8 * 9), "nine rows a block", large=True),
    Case("temperature", _head(5, 16, 129, 8, 3.0, temperature=0.6), "a scalar temperature"),
    Case("temperatures", _head(6, 16, 129, 8, 3.0, temperature=_temperatures), "one temperature a row"),
    Case("softcap", _head(5, 16, 130, 8, 6.0, softcap=5.0), "logits inside the softcap's bend"),
    Case("scale_and_bias", _head(5, 16, 66, 5, bias=_bias, logit_scale=-1.7), "a scale that turns the order round"),
    Case(
        "everything",
        _head(
            9,
            16,
            70,
            5,
            3.0,
            bias=_bias,
            logit_scale=0.5,
            softcap=4.0,
            temperature=_temperatures,
            rows=_rows,
            mask=_mask,
            targets=_targets(3),
        ),
        "all transformations at once, rows named twice, targets and a mask",
    ),
    Case("mask", _head(17, 16, 65, 4, mask=_mask), "masked rows are 0 and have no gradient"),
    Case("nothing_scored", _head(6, 16, 65, 4, mask=_none), "no mask bit set"),
    Case(
        "masked_rubbish",
        _edited(_head(9, 8, 40, 3, mask=_mask, targets=_targets(None)), _masked_rubbish),
        "NaN states, targets of -100",
    ),
    Case("rows", _head(30, 16, 65, 4, rows=_rows, targets=_targets(2)), "some rows, in any order, some twice"),
    Case("equal", _edited(_head(8, 4, 60, 12), _equal), "many equal logits: the lower id goes first"),
    Case("impossible", _edited(_head(5, 16, 70, 9, bias=_bias), _impossible), "fewer possible tokens than k"),
    Case("batch_invariant", _head(5, 16, 130, 4, batch_invariant=True, bias=_bias), "blocks filled up"),
    Case(
        "very_negative",
        _edited(_head(4, 16, 300, 5), _common_offset(-1e4)),
        "all logits near -1e4, where float32 keeps three decimals",
    ),
    Case("near_fp16_limit", _head(3, 16, 64, 3, 2e4), "logits that overflow fp16"),
)


def _hidden_reversed(inputs: Inputs) -> Inputs:
    """The vocabulary reversed would change which of equal logits are among the k."""
    return inputs | {"hidden": inputs["hidden"].flip(-1), "weight": inputs["weight"].flip(1)}


def _outputs(x: TopK) -> dict[str, Tensor]:
    return {name: value for name, value in x._asdict().items() if value is not None}


LINEAR_TOPK = OpSpec(
    name="linear_topk",
    family="topk",
    outputs=_outputs,
    differentiable=("hidden", "weight", "bias"),
    typed=("hidden", "weight", "bias"),
    dtypes=DTYPES,
    triton_dtypes=DTYPES[:3],
    cases=CASES,
    orders=(_hidden_reversed,),
    own_sums=False,
)

SPECS = (LINEAR_TOPK,)
