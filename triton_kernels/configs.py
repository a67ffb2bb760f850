"""Launch sizes, chosen by hand and looked up without measuring: what a call returns must not depend on a tuner."""

from __future__ import annotations

import torch

LANES = 32  # of the warps that are counted here
VECTOR_BYTES = 16  # the widest load of one thread

# the longest row, and the warps of the program that reduces it; a row's bits depend on its own length and dtype only
ROW_WARPS = ((1024, 1), (4096, 4), (32768, 8))
LONG_ROW_WARPS = 16
MAP_WARPS = 8  # at most, for a program that maps a part of a row: with more the compiler takes twice the registers
MAP_STEPS = 8  # iterations of such a program

FLAT = {"BLOCK": 512, "num_warps": 4}  # programs over the flat tokens
PIECES = {"BLOCK": 512, "num_warps": 4}  # programs over pieces of one trajectory each
MOST_PROGRAMS = 1024  # that leave a row of sums, all of which another program adds up at once
ROLLOUTS = {"ROWS": 4, "BLOCK": 128, "num_warps": 4}  # programs that walk over the tokens of a group's rollouts
STATES = {"BLOCK": 1024, "num_warps": 4}  # programs over a row's hidden state
WRITING = {"BLOCK": 128, "num_warps": 4}  # programs over the rows of a block of the head
TOKENS = {"BLOCK": 512, "num_warps": 4}  # programs that walk along the tokens of one rollout


def fitted(warps: int, lanes: int) -> tuple[int, int]:
    """(warps, threads): as many threads as so many warps of LANES have, in warps of ``lanes``."""
    warps = max(1, warps * LANES // lanes)
    return warps, warps * lanes


def lanes_of(x: torch.Tensor) -> int:
    """Threads of a warp where ``x`` is: AMD's data-centre GPUs have wavefronts of 64."""
    return LANES if torch.version.hip is None else torch.cuda.get_device_properties(x.device).warp_size


def row_warps(length: int) -> int:
    """Warps for a row of ``length`` elements."""
    return next((warps for limit, warps in ROW_WARPS if length <= limit), LONG_ROW_WARPS)
