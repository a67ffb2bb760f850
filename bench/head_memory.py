"""The most that a head and its loss hold at once, forward and backward, by formula; and the longest batch that fits.

What is counted: the head's weight and its gradient, the hidden states and theirs, and what each form holds beside
them; of the body, one hidden state a layer and token, which is what it keeps under activation checkpointing. Not
counted: its weights, gradients, what its layers need for a moment, optimizer states, what an allocator wastes.
The formulas follow what each form allocates; terms in proportion to the tokens alone are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from trajkern._tiles.tiles import ROW_MULTIPLE, WORKSPACE

TRAJECTORIES = 8  # of a batch, each of the same length
GPUS = {"80 GB": 80e9, "141 GB": 141e9}
WIDE = 4  # bytes of what is kept in float32
TRL_TOKENS, TRL_COLUMNS = 4096, 32_768  # of a tile, TRL 1.16
LIGER_TOKENS, LIGER_COLUMNS = 2048, 4096  # Liger-Kernel 0.8.5


class Sizes(NamedTuple):
    """Of a batch and a head. ``host``: on a CPU, where the forms hold other temporaries."""

    tokens: int
    width: int
    vocabulary: int
    itemsize: int = 2  # of the weight and the hidden states
    host: bool = False

    @property
    def states(self) -> int:
        return self.tokens * self.width

    @property
    def weights(self) -> int:
        return self.vocabulary * self.width

    @property
    def inputs(self) -> int:
        """Bytes of the weight and the hidden states."""
        return self.itemsize * (self.states + self.weights)

    @property
    def narrow(self) -> bool:
        return self.itemsize < WIDE


def eager(s: Sizes) -> int:
    """The log-probs of all logits, their gradient and the logits'; then the two gradients."""
    logits = s.tokens * s.vocabulary
    return max(3 * WIDE * logits, s.itemsize * logits + s.inputs)


def trl(s: Sizes) -> int:
    """``ChunkedLogProbFunction``: both gradients in float32, a tile and, without Triton, its temporaries; or casts."""
    tokens, columns = min(s.tokens, TRL_TOKENS), min(s.vocabulary, TRL_COLUMNS) if s.host else TRL_COLUMNS
    tile = s.itemsize * tokens * columns
    temporaries = (7 * WIDE + 1) * tokens * min(s.vocabulary, columns) if s.host else 0
    return WIDE * (s.states + s.weights) + tile + max(temporaries, s.inputs if s.narrow else 0)


def liger(s: Sizes) -> int:
    """``LigerFusedLinearGRPOLoss``, a trajectory at a time: a float32 gradient of the weight beside the sum of them."""
    each = -(-s.tokens // TRAJECTORIES)
    tile = min(each, LIGER_TOKENS) * min(s.vocabulary, LIGER_COLUMNS)
    rows, columns = min(each, LIGER_TOKENS) * s.width, min(s.vocabulary, LIGER_COLUMNS) * s.width
    products = rows + columns if s.narrow else max(rows, columns)
    of_one = WIDE * (s.weights + each * s.width)
    cast = s.itemsize * (s.weights + each * s.width) if s.narrow else 0
    finished = s.itemsize * (s.states - each * s.width)
    during = of_one + max(WIDE * max(5 * tile, 3 * tile + products), cast) + finished
    return s.itemsize * s.weights + max(during, 2 * s.itemsize * s.states)


def trajkern(s: Sizes) -> int:
    """``linear_policy_loss``: a block of logits; the gradients, the weight's in float32 where blocks are added up."""
    rows = block_rows(s)
    direct = rows == s.tokens or not s.narrow
    block = rows * s.width
    weight = s.itemsize * s.weights if direct else WIDE * s.weights
    cast = 0 if direct else s.itemsize * s.weights
    states = (s.itemsize if not s.host else WIDE) * s.states
    return WIDE * rows * s.vocabulary + weight + states + s.itemsize * block + max(WIDE * block, cast)


def block_rows(s: Sizes) -> int:
    """Rows of a block with the default workspace, as :class:`trajkern._tiles.tiles.Tiles` has them."""
    total, row = WIDE * s.weights, WIDE * s.vocabulary
    if s.narrow and not s.host and s.tokens * row <= 2 * total:
        total *= 2
    rows = max(total, WORKSPACE[s.host]) // row
    if ROW_MULTIPLE <= rows < s.tokens:
        each = -(-s.tokens // -(-s.tokens // (rows // ROW_MULTIPLE * ROW_MULTIPLE)))
        rows = -(-each // ROW_MULTIPLE) * ROW_MULTIPLE
    return max(1, min(s.tokens, rows))


FORMS: dict[str, Callable[[Sizes], int]] = {"eager": eager, "trl": trl, "liger": liger, "trajkern": trajkern}


class Model(NamedTuple):
    """From its published configuration."""

    layers: int
    width: int
    vocabulary: int


MODELS = {
    "Qwen3-8B": Model(36, 4096, 151_936),
    "Gemma-3-4B": Model(34, 2560, 262_208),
    "gpt-oss-20b": Model(24, 2880, 201_088),
}


def whole(form: str, model: Model, tokens: int) -> int:
    """Bytes of all that is counted, in bfloat16 on a GPU."""
    s = Sizes(tokens, model.width, model.vocabulary)
    return s.inputs + FORMS[form](s) + s.itemsize * model.layers * s.states


def longest(form: str, model: Model, memory: float) -> int:
    """The most tokens of a batch that fit, in thousands of 1,024; 0 where not even those do."""
    low, high = 0, 1
    while whole(form, model, 1024 * high) <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if whole(form, model, 1024 * middle) <= memory else (low, middle)
    return 1024 * low
