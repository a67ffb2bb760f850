"""The Triton kernels of trajkern, installed as ``trajkern._triton``: a file per family, kernels before launchers.

A launcher bears its op's name and takes what the op's schema says. The kernels run on CPU tensors under Triton's
interpreter, where bfloat16 arithmetic is wrong: every load of a low-precision value is upcast at once.
"""
