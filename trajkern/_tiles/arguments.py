"""What the head's launchers are called with, as one value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._dtypes import accumulator


class Head(NamedTuple):
    """The arguments that every op of the family begins with."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H], of a shard's own tokens
    bias: Tensor | None  # [V]
    targets: Tensor  # [P]
    rows: Tensor | None  # [P]
    mask: Tensor | None  # [P]
    temperatures: Tensor | None  # [T]
    support_ids: Tensor | None  # [E]
    support_offsets: Tensor | None  # [P+1]
    scales: list[float]  # temperature, softcap (0: none), logit_scale
    options: list[int]  # whether logits keep the inputs' 16 bits, bytes of the workspace or 0, batch_invariant,
    #                   whether a graph calls, in front of which no value was checked
    group: str

    @classmethod
    def of_states(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scales: list[float],
        options: list[int],
    ) -> Head:
        """Of an op without targets, about the whole softmax of every hidden state; ``mask`` [T]."""
        none = hidden.new_empty(0, dtype=torch.int64)
        return cls(hidden, weight, bias, none, None, mask, None, None, None, scales, options, "")

    @property
    def keys(self) -> int:
        """What the rows of ``norm`` stand for: hidden states, or pairs where each has a support of its own."""
        return self.hidden.shape[0] if self.support_ids is None else self.targets.shape[0]

    @property
    def accumulator(self) -> torch.dtype:
        return accumulator(self.hidden)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """No property: torch 2.10 traces none of a named tuple's."""
        return self[:9]

    def numbers(self) -> tuple[Any, ...]:
        return self[9:]

    @classmethod
    def split(cls, arguments: tuple[Any, ...]) -> tuple[Head, tuple[Any, ...]]:
        """The head that an op's arguments begin with, and the others."""
        size = len(cls._fields)
        return cls(*arguments[:size]), arguments[size:]
