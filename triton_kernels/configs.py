"""Launch sizes, chosen by hand and looked up without measuring: what a call returns must not depend on a tuner."""

from __future__ import annotations

VECTOR_BYTES = 16  # the widest load of one thread

# the longest row, and the warps of the program that reduces it; a row's bits depend on its own length and dtype only
ROW_WARPS = ((1024, 1), (4096, 4), (32768, 8))
LONG_ROW_WARPS = 16
MAP_WARPS = 8  # at most, for a program that maps a part of a row: with more the compiler takes twice the registers
MAP_STEPS = 8  # iterations of such a program

TOKEN_BLOCK, TOKEN_WARPS = 1024, 4  # programs over the flat tokens
TRAJECTORY_BLOCK, TRAJECTORY_WARPS = 2048, 8  # programs that walk along one trajectory
SINGLE_BLOCK, SINGLE_WARPS = 1024, 8  # the one program that combines per-trajectory or per-program numbers


def row_warps(length: int) -> int:
    """Warps for a row of ``length`` elements."""
    return next((warps for limit, warps in ROW_WARPS if length <= limit), LONG_ROW_WARPS)
