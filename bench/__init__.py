"""The benchmark: every op beside torch's forms of it, correctness first. ``python -m bench --help``."""
