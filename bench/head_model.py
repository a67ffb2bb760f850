"""What a policy loss inside the head should cost on a GPU: products at their rate, passes at the memory's, launches.

A product takes the longer of its FLOP and its bytes; what stands between products is bound by the memory. None of it is
measured here but the rates of an H200, of large products and long copies elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Rates(NamedTuple):
    """What large products and long passes reach, in FLOP and bytes a second, and what a launch adds, in seconds."""

    product: float
    memory: float
    launch: float = 3e-6


H200 = Rates(790e12, 4.3e12)
LIGER_4096 = 18.3e-3  # seconds at 4,096 rows on an H200, by the authors (linkedin/Liger-Kernel, pull request 1369)


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

    @property
    def flops(self) -> int:
        return 3 * 2 * self.rows * self.width * self.vocabulary

    def _products(self, is_first: bool) -> tuple[int, int, int]:
        """Bytes that a block's three products move: the logits', d hidden's, d weight's."""
        logits, states = self.block * self.vocabulary, self.block * self.width
        written = self.weight_bytes
        if self.sums_weight:
            written = 2 * self.weight_bytes * (1 if is_first else 2)
        return (
            2 * states + self.weight_bytes + self.logit_bytes * logits,
            2 * logits + self.weight_bytes + 4 * states,
            2 * logits + 2 * states + written,
        )

    @property
    def _passes(self) -> int:
        """Bytes of a block between its products: logits folded, and turned into d logits; states in and out."""
        logits, states = self.block * self.vocabulary, self.block * self.width
        return 2 * self.logit_bytes * logits + 2 * logits + 10 * states

    @property
    def _narrowed_last(self) -> int:
        return 3 * self.weight_bytes if self.sums_weight else 0

    @property
    def moved(self) -> int:
        """Bytes of all launches."""
        products = sum(sum(self._products(number == 0)) for number in range(self.blocks))
        return products + self.blocks * self._passes + self._narrowed_last

    def bare(self, rates: Rates) -> float:
        """Seconds of the three products alone, each over all rows."""
        return self.flops / rates.product

    def seconds(self, rates: Rates) -> float:
        flops = 2 * self.block * self.vocabulary * self.width
        total = self._narrowed_last / rates.memory
        for number in range(self.blocks):
            total += sum(max(flops / rates.product, x / rates.memory) for x in self._products(number == 0))
            total += self._passes / rates.memory + (self.launches + 3) * rates.launch
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


def small_blocks(rows: int, width: int, vocabulary: int) -> HeadStep:
    """Blocks of 256 MiB, d logits apart, and some fifty launches of torch's around the products."""
    return HeadStep(rows, width, vocabulary, 4, 2**28 // (4 * vocabulary), narrows_apart=True, launches=57)


def lines(width: int = 4096, vocabulary: int = 131_072) -> Iterator[str]:
    """For a terminal of 80 columns."""
    yield f"linear_policy_loss, forward + backward, {width:,} × {vocabulary:,} bfloat16, on an H200"
    yield "whose products reach 790 TFLOP/s and its memory 4.3 TB/s: predicted time, in"
    yield "times of three bare products, and memory beyond the inputs"
    yield f"  {'rows':>6}  {'':<23}{'a block':>8}{'ms':>8}{'×':>6}{'GiB':>7}"
    for rows in (4096, 8192, 16_384):
        steps = {
            "blocks of 256 MiB": small_blocks(rows, width, vocabulary),
            "default": default_step(rows, width, vocabulary),
            "default, 16-bit logits": default_step(rows, width, vocabulary, 2),
        }
        for name, step in steps.items():
            ratio = step.seconds(H200) / step.bare(H200)
            cost = f"{step.seconds(H200) * 1e3:>8.1f}{ratio:>6.2f}{step.peak() / 2**30:>7.2f}"
            yield f"  {rows:>6,}  {name:<23}{step.block:>8,}{cost}"
    yield f"  Liger-Kernel's own figure at 4,096 rows: {LIGER_4096 * 1e3} ms"
