"""Cases of the topk family: a policy's likeliest tokens from hidden states, beside torch.topk of the whole logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern._bench.case import BARE, Problem, Target, TimedCase, with_compiled
from trajkern._bench.head import GATE_ROWS, _bytes, _inputs, _products
from trajkern.testing.numerics import Outcome
from trajkern.testing.registry import Inputs


def _whole_logits(hidden: Tensor, weight: Tensor, k: int, **_) -> Outcome:
    """As a trainer without a fused head distils on policy."""
    logprobs = (hidden @ weight.t()).float().log_softmax(-1).topk(k).values
    return {"logprobs": logprobs, "tail": (-logprobs.exp().sum(-1)).log1p()}


def _of(rows: int, width: int, vocabulary: int, k: int, dtype: torch.dtype, device: str) -> Inputs:
    inputs = _inputs(rows, width, vocabulary, dtype, device)
    return {"hidden": inputs["hidden"], "weight": inputs["weight"], "k": k}


def problem(
    rows: int, width: int, vocabulary: int, k: int, dtype: torch.dtype, backward: bool
) -> Callable[[str], Problem]:
    def make(device: str) -> Problem:
        x = _of(rows, width, vocabulary, k, dtype, device)
        small = None if backward else _of(GATE_ROWS, width, vocabulary, k, dtype, device)
        upstream = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(device)
        return Problem(
            op="linear_topk",
            inputs=x,
            rivals=with_compiled(_whole_logits),
            bare=_products(x, 3 if backward else 1),
            bytes=_bytes(x, backward),
            grad=backward,
            upstream={"logprobs": upstream} if backward else {},
            small=small,
            flops=(6 if backward else 2) * rows * width * vocabulary,
        )

    return make


def _case(rows: int, width: int, vocabulary: int, k: int, dtype: torch.dtype, device: str, backward: bool) -> TimedCase:
    shape = f"{rows:,} × {width:,} × {vocabulary:,} {str(dtype)[6:]}, k = {k}"
    targets = (
        Target("times", 1.8 if backward else 1.5, BARE, (device,)),
        Target("fast", 1.0, "eager", (device,)),
    )
    work = "forward + backward" if backward else "forward"
    return TimedCase(
        "linear_topk", work, shape, problem(rows, width, vocabulary, k, dtype, backward), targets, (device,)
    )


_SMALL = (512, 1024, 32_768, 20, torch.float32)  # a backward is compared with the reference's whole one
CASES = (
    *(_case(*_SMALL, device, backward) for device in ("cpu", "cuda") for backward in (False, True)),
    _case(8192, 4096, 131_072, 20, torch.bfloat16, "cuda", False),
)
