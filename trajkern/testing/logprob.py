"""Specs of the logprob family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern.testing.registry import Case, Inputs, OpSpec, Variant

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _rows(rows: int | tuple[int, ...], vocabulary: int, scale: float = 3.0, offset: float = 0.0, **options):
    """Random logits; ``options`` holds extra arguments, or functions of (generator, leading shape) making them."""
    shape = (rows,) if isinstance(rows, int) else rows

    def make(g: torch.Generator) -> Inputs:
        inputs = {
            "logits": _randn(g, *shape, vocabulary) * scale + offset,
            "targets": torch.randint(vocabulary, shape, generator=g),
        }
        return inputs | {k: v(g, shape) if callable(v) else v for k, v in options.items()}

    return make


def _mask(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=g) > 0.4


def _none_scored(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def _temperatures(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64) * 2 + 0.25


def _edited(make: Callable[[torch.Generator], Inputs], edit: Callable[[Inputs], None]):
    def edited(g: torch.Generator) -> Inputs:
        inputs = make(g)
        edit(inputs)
        return inputs

    return edited


def _certain(margin: float):
    def edit(x: Inputs) -> None:
        x["logits"][...] = 0
        x["logits"].scatter_(-1, x["targets"][..., None], margin)

    return edit


def _banned(x: Inputs) -> None:
    x["logits"][..., ::3] = -torch.inf
    x["targets"] = x["targets"] // 3 * 3 + 1


def _masked_rubbish(x: Inputs) -> None:
    x["logits"][~x["mask"]] = torch.nan
    x["targets"][~x["mask"]] = -100


def _shifted_slice(g: torch.Generator) -> Inputs:
    logits = _randn(g, 3, 6, 37)
    return {"logits": logits[:, :-1], "targets": torch.randint(37, (3, 5), generator=g)}


def _transposed(g: torch.Generator) -> Inputs:
    return {"logits": _randn(g, 19, 5).T, "targets": torch.randint(19, (5,), generator=g)}


CASES = (
    Case("typical", _rows(5, 1000), "the plain case"),
    Case("one_row", _rows(1, 257), "K = 1 takes other paths in many kernels"),
    Case("no_rows", _rows(0, 17), "T = 0"),
    Case("v1", _rows(4, 1), "one token: log p is exactly 0"),
    Case("v2", _rows(4, 2), "below every vector width"),
    Case("v7", _rows((2, 3), 7), "below every vector width, two leading dimensions"),
    Case("v4097", _rows(8, 4097), "one more than a block"),
    Case("v50257", _rows(3, 50257), "GPT-2's, no multiple of any tile", large=True),
    Case("v151936", _rows(2, 151936, 2.0), "Qwen's: sums of 150,000 terms", large=True),
    Case("many_rows", _rows(257, 33), "rows no multiple of a tile, more rows than threads", large=True),
    Case("four_dimensions", _rows((2, 2, 1, 3), 11), "any leading shape"),
    Case("temperature", _rows(4, 129, temperature=0.6), "a scalar temperature"),
    Case("temperatures", _rows(6, 129, temperature=_temperatures), "one temperature a row"),
    Case("mask", _rows((3, 4), 65, mask=_mask), "masked rows are 0 and have no gradient"),
    Case("nothing_scored", _rows(4, 65, mask=_none_scored), "no mask bit set"),
    Case("masked_rubbish", _edited(_rows(6, 40, mask=_mask), _masked_rubbish), "NaN logits and -100 under the mask"),
    Case("everything", _rows((2, 3), 77, mask=_mask, temperature=_temperatures), "mask and temperatures together"),
    Case("very_negative", _rows(4, 300, 1.0, -1e4), "all logits near -1e4: a maximum that starts at 0 loses the row"),
    Case("common_offset", _rows(4, 300, 1.0, 1e4), "a common offset cancels only if it is taken off first"),
    Case("margin_17", _edited(_rows(3, 50), _certain(17.0)), "float32 rounds p to 1 beyond a margin of 16.6 nats"),
    Case("margin_40", _edited(_rows(3, 50), _certain(40.0)), "log p = -49 e^-40, not 0"),
    Case("near_fp16_limit", _rows(3, 64, 1e4), "sums of fp16 logits overflow fp16"),
    Case("banned_tokens", _edited(_rows(3, 66), _banned), "-inf logits: p = 0, and 0 * -inf must be 0"),
    Case("ties", _edited(_rows(3, 16), lambda x: x["logits"].zero_()), "uniform: entropy log V, every token top-1"),
    Case("shifted_slice", _shifted_slice, "logits[:, :-1]: rows that no single stride reaches"),
    Case("transposed", _transposed, "the vocabulary is not the contiguous dimension"),
)


def _one_at_a_time(inputs: Inputs, g: torch.Generator):
    """Only the last row, alone."""
    last = {k: v.flatten(0, -2)[-1:] if k == "logits" else v for k, v in inputs.items()}
    for k in ("targets", "mask", "temperature"):
        if isinstance(inputs.get(k), Tensor):
            last[k] = inputs[k].flatten()[-1:]

    def pick(name: str, x: Tensor) -> Tensor:
        return x.flatten(0, -2)[-1:] if name == "grad_logits" else x.flatten()[-1:]

    return last, pick


def _reversed(inputs: Inputs, g: torch.Generator):
    def flip(name: str, x: Tensor) -> Tensor:
        return x.flip(0)

    return {k: v.flip(0) if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}, flip


def _vocabulary_reversed(inputs: Inputs) -> Inputs:
    logits = inputs["logits"]
    return inputs | {"logits": logits.flip(-1), "targets": logits.shape[-1] - 1 - inputs["targets"]}


VARIANTS = (Variant("last_row_alone", _one_at_a_time), Variant("rows_reversed", _reversed))

TOKEN_LOGPROBS = OpSpec(
    name="token_logprobs",
    family="logprob",
    outputs=lambda x: {"logprobs": x},
    differentiable=("logits",),
    typed=("logits",),
    dtypes=DTYPES,
    triton_dtypes=DTYPES[:3],
    cases=CASES,
    variants=VARIANTS,
)

_ALL = ("entropy", "sum_sq_probs", "is_top1")

TOKEN_STATS = OpSpec(
    name="token_stats",
    family="logprob",
    outputs=lambda x: {k: v for k, v in x._asdict().items() if v is not None},
    differentiable=("logits",),
    typed=("logits",),
    dtypes=DTYPES,
    triton_dtypes=DTYPES[:3],
    cases=tuple(
        Case(c.name, _edited(c.make, lambda x: x.setdefault("outputs", _ALL)), c.reason, c.large) for c in CASES
    )
    + (
        Case("entropy_only", _rows(4, 90, outputs=("entropy",)), "one output of three"),
        Case("no_entropy", _rows(4, 90, outputs=("sum_sq_probs", "is_top1")), "no gradient beside log p's"),
    ),
    variants=VARIANTS,
    no_grad_outputs=("sum_sq_probs", "is_top1"),
    orders=(_vocabulary_reversed,),
)

SPECS = (TOKEN_LOGPROBS, TOKEN_STATS)
