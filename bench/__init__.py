"""The benchmark: every op beside torch's forms of it, correctness first. ``trajkern bench --help``."""
