"""The temperature of logits: one number, or one for each row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trajkern._checks import check_number, check_shape, check_tensor, laid_out, readable
from trajkern._dtypes import FLOATS, accumulator
from trajkern._values import check_temperatures


def check_temperature(
    temperature: Any, like: Tensor, shape: tuple[int, ...], meaning: str
) -> tuple[Tensor | None, float]:
    """Raises, or returns (one for each row, as the kernels of ``like`` read them, or None; else the one number).

    A tensor without dimensions stands for all rows, and is not read on the host.
    """
    dtype = accumulator(like)
    if not isinstance(temperature, Tensor):
        return None, float(check_number("temperature", temperature, above=0, dtype=dtype))
    check_tensor("temperature", temperature, dtypes=FLOATS, device=like.device)
    if temperature.ndim == 0:
        temperature = temperature.expand(shape)
    check_shape("temperature", temperature, shape, meaning)
    if readable(temperature):
        check_temperatures(temperature, dtype)
    return laid_out(temperature.detach(), dtype), 1.0
