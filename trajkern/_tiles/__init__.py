"""Loops over tiles of logits, which the CPU's and the GPU's launchers share: torch's products, a backend's kernels."""
