"""Specs of the divergence family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern.testing.registry import Case, Inputs, OpSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _heads(
    tokens: int, width: int, size: int, scale: float = 1.0, teacher: int | None = None, padding: int = 0, **options
):
    """A student and a teacher of another width, logits of about this spread; options are values or functions.

    ``padding``: more rows of the teacher's weight.
    """

    def make(g: torch.Generator) -> Inputs:
        inputs = {}
        for prefix, count, rows in (("", width, size), ("teacher_", teacher or width + 3, size + padding)):
            inputs[f"{prefix}hidden"] = _randn(g, tokens, count)
            inputs[f"{prefix}weight"] = _randn(g, rows, count) * (scale / count**0.5)
        for name, value in options.items():
            inputs[name] = value(g, inputs) if callable(value) else value
        return inputs

    return make


def _mask(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.rand(inputs["hidden"].shape[0], generator=g) > 0.4


def _none(g: torch.Generator, inputs: Inputs) -> Tensor:
    return torch.zeros(inputs["hidden"].shape[0], dtype=torch.bool)


def _biases(g: torch.Generator, inputs: Inputs) -> Tensor:
    """The student's, after the teacher's."""
    inputs["teacher_bias"] = _randn(g, inputs["teacher_weight"].shape[0])
    return _randn(g, inputs["weight"].shape[0])


def _edited(make: Callable[[torch.Generator], Inputs], edit: Callable[[Inputs], None]):
    def edited(g: torch.Generator) -> Inputs:
        inputs = make(g)
        edit(inputs)
        return inputs

    return edited


def _same(x: Inputs) -> None:
    x["teacher_hidden"], x["teacher_weight"] = x["hidden"], x["weight"]


def _close(x: Inputs) -> None:
    x["teacher_hidden"], x["teacher_weight"] = x["hidden"] * (1 + 2**-7), x["weight"]


def _certain(x: Inputs) -> None:
    """The student has all its mass on token i, where the teacher's row i has its own a little less."""
    tokens = x["hidden"].shape[0]
    for prefix, margin in (("", 20.3), ("teacher_", 16.7)):
        for name in ("hidden", "weight"):
            x[prefix + name].zero_()
        x[f"{prefix}hidden"].fill_diagonal_(1.0)
        x[f"{prefix}weight"][:tokens, :tokens] = margin * torch.eye(tokens, dtype=torch.float64)


def _opposed(x: Inputs) -> None:
    """Each is certain of a token that the other gives next to nothing."""
    _certain(x)
    x["teacher_weight"] = x["teacher_weight"].roll(1, 0)


def _common_offset(offset: float):
    def edit(x: Inputs) -> None:
        x["hidden"][:, 0], x["weight"][:, 0] = offset / 64, 64

    return edit


def _masked_rubbish(x: Inputs) -> None:
    x["hidden"][~x["mask"]] = torch.nan
    x["teacher_hidden"][~x["mask"]] = torch.inf


def _rubbish_behind(x: Inputs) -> None:
    for name in ("weight", "bias", "teacher_weight", "teacher_bias"):
        x[name][x["vocabulary"] :] = torch.nan


def _without_numbers(x: Inputs) -> None:
    x["hidden"][1, 2] = x["teacher_hidden"][3, 1] = torch.nan


def _impossible(x: Inputs) -> None:
    """Tokens that neither can sample, some that only the teacher cannot, some that only the student cannot."""
    x["bias"][20:30] = x["teacher_bias"][20:30] = -torch.inf
    if x["beta"] < 1:
        x["teacher_bias"][30:40] = -torch.inf
    if x["beta"] > 0:
        x["bias"][40:50] = -torch.inf


def _grid(name: str, make: Callable[..., Callable[[torch.Generator], Inputs]], reason: str, edit=None, large=False):
    """The case at both ends and between."""
    for kind, beta in (("", 0.0), ("_reverse", 1.0), ("_mixture", 0.3)):
        maker = make(beta=beta)
        yield Case(name + kind, _edited(maker, edit) if edit else maker, reason, large)


_BENT: dict[str, Any] = {
    "softcap": 4.0,
    "logit_scale": 0.5,
    "teacher_softcap": 3.0,
    "teacher_logit_scale": -0.8,
    "temperature": 0.7,
}
CASES = (
    *_grid("typical", lambda **o: _heads(17, 64, 257, **o), "the plain case: no size is a multiple of a tile's"),
    *_grid("one_row", lambda **o: _heads(1, 24, 257, 3.0, **o), "a product with one row takes other paths"),
    Case("no_rows", _heads(0, 8, 17), "T = 0"),
    Case("one_token", _heads(4, 8, 1, beta=0.5), "a vocabulary of one: the divergence is exactly 0"),
    *_grid("v50257", lambda **o: _heads(3, 64, 50257, 2.0, **o), "many slices of the vocabulary", large=True),
    Case("v151936", _heads(2, 16, 151936, 3.0, beta=0.7), "Qwen's", large=True),
    Case("many_rows", _heads(2100, 8, 40), "more rows than a tile", large=True),
    Case("small_workspace", _heads(70, 16, 130, workspace_bytes=130 * 8 * 9, beta=0.1), "nine a block", large=True),
    Case("narrow_teacher", _heads(9, 32, 100, teacher=4), "a teacher of fewer dimensions"),
    *_grid("temperature", lambda **o: _heads(5, 16, 129, 3.0, temperature=0.6, **o), "logits over a temperature"),
    *_grid("sharp", lambda **o: _heads(6, 16, 129, 12.0, **o), "distributions that hardly overlap"),
    Case("nearly_forward", _heads(6, 16, 129, 3.0, beta=0.001), "a mixture that is nearly the student"),
    Case("nearly_reverse", _heads(6, 16, 129, 3.0, beta=0.999), "a mixture that is nearly the teacher"),
    Case("mask", _heads(17, 16, 65, mask=_mask), "masked tokens are 0 and have no gradient"),
    Case("nothing_scored", _heads(6, 16, 65, mask=_none), "no mask bit set"),
    Case("masked_rubbish", _edited(_heads(9, 8, 40, mask=_mask, beta=0.5), _masked_rubbish), "states of NaN and inf"),
    *_grid("same", lambda **o: _heads(5, 16, 70, **o), "equal distributions: 0, and no gradient", _same),
    *_grid("close", lambda **o: _heads(5, 16, 70, **o), "a divergence of second order in a small difference", _close),
    *_grid("certain", lambda **o: _heads(3, 8, 50, teacher=8, **o), "float32 rounds both p to 1", _certain),
    *_grid("opposed", lambda **o: _heads(3, 8, 50, teacher=8, **o), "each is certain of another token", _opposed),
    *_grid(
        "everything",
        lambda **o: _heads(6, 16, 70, 3.0, padding=5, vocabulary=67, bias=_biases, mask=_mask, **_BENT, **o),
        "bias, scale and softcap on both sides, weights padded unequally, a temperature and a mask",
        _rubbish_behind,
    ),
    Case("softcap", _heads(9, 16, 257, 20.0, softcap=5.0, beta=0.3), "logits deep inside the student's bend"),
    Case("unlike", _heads(5, 16, 66, bias=_biases, logit_scale=1.7, teacher_softcap=0.5), "a softcap on one side"),
    *_grid(
        "impossible", lambda **o: _heads(5, 16, 70, bias=_biases, **o), "a bias of -inf, on both sides", _impossible
    ),
    *_grid("nan", lambda **o: _heads(5, 16, 70, **o), "a row of NaN on either side", _without_numbers),
    Case("batch_invariant", _heads(5, 16, 130, batch_invariant=True, bias=_biases), "blocks filled up"),
    Case("very_negative", _edited(_heads(4, 16, 300), _common_offset(-1e4)), "the student's logits near -1e4"),
    Case("common_offset", _edited(_heads(4, 16, 300, beta=0.5), _common_offset(1e4)), "an offset of 1e4"),
    Case("near_fp16_limit", _heads(3, 16, 64, 2e4, beta=1.0), "logits that overflow fp16"),
)


def _hidden_reversed(inputs: Inputs) -> Inputs:
    turned = {k: inputs[k].flip(-1) for k in ("hidden", "teacher_hidden")}
    return inputs | turned | {k: inputs[k].flip(1) for k in ("weight", "teacher_weight")}


def _vocabulary_reversed(inputs: Inputs) -> Inputs:
    """Without what is cut off."""
    size = inputs.get("vocabulary")
    names = [k for k in ("weight", "bias", "teacher_weight", "teacher_bias") if k in inputs]
    return inputs | {k: inputs[k][:size].flip(0) for k in names}


ORDERS = (_hidden_reversed, _vocabulary_reversed, lambda inputs: _hidden_reversed(_vocabulary_reversed(inputs)))


LINEAR_DIVERGENCE = OpSpec(
    name="linear_divergence",
    family="divergence",
    outputs=lambda x: {"divergence": x},
    differentiable=("hidden", "weight", "bias"),
    typed=("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"),
    dtypes=DTYPES,
    triton_dtypes=DTYPES[:3],
    cases=CASES,
    orders=ORDERS,
    oracle_term=400.0,  # the opposed cases: log-ratios of 20 times weights of 20, which the gradients add up
    own_sums=False,
)

SPECS = (LINEAR_DIVERGENCE,)
