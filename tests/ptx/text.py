"""Kernels written as PTX, and a launch of one on tensors."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trajkern.testing.ptx.device import Watch
from trajkern.testing.ptx.execution import Execution
from trajkern.testing.ptx.parser import parse
from trajkern.testing.ptx.program import decode

REGISTERS = """
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<99>;
    .reg .f32 %f<99>;
    .reg .b64 %d<99>;
    .reg .f64 %e<99>;
"""
# %d1 to %d4: the tensors' addresses; %r1: the thread's number among all
PROLOGUE = """
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r1, %r2, %r3, %r4;
"""


def module(body: str, tensors: int, shared: int = 0) -> str:
    """A kernel named ``written`` of as many pointers; ``body`` may use ``tile``, that many bytes of shared memory."""
    parameters = ", ".join(f".param .u64 p{k}" for k in range(tensors))
    loads = "".join(f"    ld.param.u64 %d{k + 1}, [p{k}];\n" for k in range(tensors))
    head = '.version 8.7\n.target sm_90\n.address_size 64\n.file 1 "/sources/written.py"\n'
    tile = f".shared .align 16 .b8 tile[{shared}];\n" if shared else ""
    return f"{head}{tile}.visible .entry written({parameters})\n{{{REGISTERS}{loads}{PROLOGUE}{body}\n    ret;\n}}\n"


def launch(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    order: str = "lowest",
    seed: int | None = None,
    fresh: tuple[int, ...] = (),
) -> Execution:
    """Run the body; ``fresh``: which of the tensors hold no values yet."""
    (kernel,) = parse(module(body, len(tensors), shared)).values()
    execution, given = Execution(order, seed), {}
    for k, x in enumerate(tensors):
        if k in fresh:
            execution.device.allocated(x)
        address = np.uint64(execution.address(x, f"x{k}"))
        given[f"p{k}"] = np.frombuffer(address.tobytes(), np.uint8)
    with Watch(execution.device):
        execution.execute(decode(kernel), (blocks, 1, 1), (threads, 1, 1), 0, given, False)
    return execution
