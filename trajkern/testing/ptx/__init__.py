"""GPU kernels without a GPU: their PTX, as the compilers make it, executed on a CPU with numpy, and checked.

From the text up: ``parser`` (instructions), ``exact``, ``approximations`` and ``operations`` (arithmetic), ``memory``
and ``accesses`` (loads and stores), ``collectives`` (warps and barriers), ``program`` (stretches of code), ``races``,
``order`` and ``machine`` (a launch); then ``device`` (torch's tensors as its memory), ``execution``, ``by_triton`` and
``by_nvcc`` (where launches come from), and ``context``, the public one.
"""

from trajkern.testing.ptx.context import compiled
from trajkern.testing.ptx.faults import KernelFault

__all__ = ["KernelFault", "compiled"]
