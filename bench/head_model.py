"""What a policy loss inside the head should cost on a GPU: products at their rate, passes at the memory's, launches.

A product takes the longer of its FLOP and its bytes; what stands between products is bound by the memory. Nothing here
was measured but the two rates, see ``Rates``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Rates(NamedTuple):
    """What large products and long passes reach, in FLOP and bytes a second, and what a launch adds, in seconds."""

    product: float
    memory: float
    launch: float = 3e-6


SHARE_OF_RATE, SHARE_OF_BANDWIDTH = 0.80, 0.90  # of a data sheet's; an H200 runs such products at 790 TFLOP/s


@dataclass(frozen=True)
class HeadStep:
    """One forward and backward of ``linear_policy_loss`` with a bfloat16 weight on one GPU."""

    rows: int
    width: int
    vocabulary: int
    logit_bytes: int  # 4, or 2 where logits keep the inputs' dtype
    block: int  # rows of a block
    narrows_apart: bool = False  # d logits in memory of their own, beside the logits
    launches: int = 8  # of a block, beside its products

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)

    @property
    def weight_bytes(self) -> int:
        return 2 * self.vocabulary * self.width

    @property
    def sums_weight(self) -> bool:
        """Whether d weight is added up over blocks, in float32."""
        return self.blocks > 1 or self.narrows_apart

    def bare(self, rates: Rates) -> float:
        """Seconds of the three products alone, each over all rows."""
        return 3 * 2 * self.rows * self.width * self.vocabulary / rates.product

    def seconds(self, rates: Rates) -> float:
        logits, states = self.block * self.vocabulary, self.block * self.width
        flops = 2 * logits * self.width
        d_logits = 2 * logits

        def product(moved: float) -> float:
            return max(flops / rates.product, moved / rates.memory)

        total = 0.0
        for number in range(self.blocks):
            written = self.weight_bytes
            if self.sums_weight:
                written = 2 * self.weight_bytes * (1 if number == 0 else 2)
            total += product(2 * states + self.weight_bytes + self.logit_bytes * logits)
            total += product(d_logits + self.weight_bytes + 4 * states)
            total += product(d_logits + 2 * states + written)
            passes = 2 * self.logit_bytes * logits + d_logits + 10 * states  # folded, and turned into d logits
            total += passes / rates.memory + (self.launches + 3) * rates.launch
        if self.sums_weight:
            total += 3 * self.weight_bytes / rates.memory  # to 16 bits
        return total

    def peak(self) -> int:
        """Bytes beyond the inputs, d weight and d hidden included."""
        logits = self.block * self.vocabulary * (self.logit_bytes + 2 * self.narrows_apart)
        sums = 2 * self.weight_bytes if self.sums_weight else 0
        return logits + sums + self.weight_bytes + (2 + 4) * self.block * self.width + 2 * self.rows * self.width


def default_step(rows: int, width: int, vocabulary: int, logit_bytes: int = 4) -> HeadStep:
    """With the default workspace, see ``trajkern.linear_policy_loss``."""
    total = 4 * vocabulary * width
    block = rows if rows * vocabulary * logit_bytes <= 2 * total else total // (vocabulary * logit_bytes)
    return HeadStep(rows, width, vocabulary, logit_bytes, block)


def blocks_of_256_mib(rows: int, width: int, vocabulary: int) -> HeadStep:
    """As it was before a block could be large: some fifty launches of torch's around the products."""
    return HeadStep(rows, width, vocabulary, 4, 2**28 // (4 * vocabulary), narrows_apart=True, launches=57)
