"""Calls the native module with plain memory, in a process without torch: ``python torch_free.py _C.so``.

It prints log-probs as their bits, after holding them against the same computed in Python.
"""

from __future__ import annotations

import array
import importlib.util
import math
import sys


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("trajkern._C", path)
    assert spec and spec.loader
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    rows, vocabulary = 5, 777
    logits = array.array("f", (8 * math.sin(0.37 * n * n) for n in range(rows * vocabulary)))
    targets = array.array("q", (101 * n for n in range(rows)))
    logprobs, norm = array.array("f", bytes(4 * rows)), array.array("f", bytes(8 * rows))

    def at(memory: array.array) -> int:
        return memory.buffer_info()[0]

    problem = (at(logits), 0, vocabulary), (1, rows, vocabulary, at(targets), 1.0, 0, 0)
    assert native.token_stats(0, *problem, [at(logprobs), at(norm), 0, 0, 0]) == -1
    for row, found in enumerate(logprobs):
        z = logits[row * vocabulary : (row + 1) * vocabulary]
        most = max(z)
        expected = z[targets[row]] - most - math.log(sum(math.exp(x - most) for x in z))
        assert math.isclose(found, expected, rel_tol=1e-6), (row, found, expected)
    assert not {"torch", "numpy"} & set(sys.modules)
    print(logprobs.tobytes().hex())


if __name__ == "__main__":
    main(sys.argv[1])
