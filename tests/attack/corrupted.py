"""Files of safetensors of which a byte, the header or the length lies, where arguments or a checkpoint are expected."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.attack.case import Case
from tests.attack.command import run
from tests.attack.process import run as run_apart

FLIPS = 60
DATA = bytes(range(24))
GOOD: dict[str, Any] = {"x": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
HEADERS: dict[str, Any] = {
    "a list": [],
    "a number": 3,
    "a tensor that is none": {"x": 3},
    "no fields": {"x": {}},
    "a field too many": {"x": GOOD["x"] | {"y": 1}},
    "huge": {"x": GOOD["x"] | {"shape": [2**62]}},
    "huge and empty": {"x": GOOD["x"] | {"shape": [2**62, 0], "data_offsets": [0, 0]}},
    "a product that overflows": {"x": GOOD["x"] | {"shape": [2**32, 2**32, 6]}},
    "a negative size": {"x": GOOD["x"] | {"shape": [-6]}},
    "a size that is none": {"x": GOOD["x"] | {"shape": ["6"]}},
    "no number": {"x": GOOD["x"] | {"shape": [float("nan")]}},
    "many dimensions": {"x": GOOD["x"] | {"shape": [1] * 5000 + [6]}},
    "another dtype": {"x": GOOD["x"] | {"dtype": "Q9"}},
    "a narrower dtype": {"x": GOOD["x"] | {"dtype": "F16"}},
    "booleans": {"x": GOOD["x"] | {"dtype": "BOOL", "shape": [24]}},
    "offsets behind the end": {"x": GOOD["x"] | {"data_offsets": [0, 2**40]}},
    "offsets backwards": {"x": GOOD["x"] | {"data_offsets": [24, 0]}},
    "negative offsets": {"x": GOOD["x"] | {"data_offsets": [-24, 0]}},
    "one offset": {"x": GOOD["x"] | {"data_offsets": [0]}},
    "overlapping": GOOD | {"y": GOOD["x"]},
    "a hole": {"x": GOOD["x"] | {"data_offsets": [4, 24], "shape": [5]}},
    "no name": {"": GOOD["x"]},
    "a name of a part": {"tree.": GOOD["x"]},
    "a name with a NUL": {"x\0": GOOD["x"]},
    "metadata that are none": GOOD | {"__metadata__": 3},
    "metadata of numbers": GOOD | {"__metadata__": {"ddof": 1}},
    "metadata that nest": GOOD | {"__metadata__": {"ddof": "[" * 100_000}},
    "many digits": GOOD | {"__metadata__": {"ddof": "9" * 10_000}},
    "a config that is a list": GOOD | {"__metadata__": {"config": "[]"}},
    "an argument twice": GOOD | {"__metadata__": {"x": "1"}},
}


@cache
def contents() -> dict[str, bytes]:
    """What a file holds, by what is wrong with it."""
    good = _file(json.dumps(GOOD).encode())
    found = {f"header: {name}": _file(json.dumps(header).encode()) for name, header in HEADERS.items()}
    texts = {"no JSON": b"{", "no UTF-8": b'{"\xff": 1}', "nested": b'{"x":' * 50_000, "a key twice": b'{"x":1,"x":2}'}
    found |= {f"header: {name}": _file(text) for name, text in texts.items()}
    lengths = (0, 1, 2, len(good), 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
    found |= {f"a length of {n}": n.to_bytes(8, "little") + good[8:] for n in lengths}
    found |= {f"cut to {n} bytes": good[:n] for n in range(0, len(good), 7)}
    draw = random.Random(0)
    for at in sorted(draw.sample(range(len(good)), FLIPS)):
        found[f"byte {at} flipped"] = good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :]
    return found | {"bytes too many": good + b"\0"}


def _file(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + DATA


def cases() -> Iterator[Case]:
    for name, content in contents().items():
        passes = name.startswith("byte") or "a field too many" in name  # of the data; the library reads no other
        inputs = partial(_with, content, "validate", "--op", "whiten", "--inputs")
        yield Case("trajkern validate", f"--inputs: {name}", inputs, ("--inputs",), may_pass=passes, heavy=passes)
        resumed = partial(_with, content, "train", "--resume")
        yield Case("trajkern train", f"--resume: {name}", resumed, ("checkpoint",), heavy=True)


def _with(content: bytes, *argv: str) -> str:
    descriptor, name = tempfile.mkstemp(prefix="attack-", suffix=".safetensors")
    try:
        os.write(descriptor, content)
        return run([*argv, name]) if argv[0] == "validate" else run_apart((*argv, name))
    finally:
        os.close(descriptor)
        Path(name).unlink()
