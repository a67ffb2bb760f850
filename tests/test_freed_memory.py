"""Memory that is freed between an op's forward and its backward: an error that names the op, never a read of it.

Sharded models free their weights outside of their forward.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.testing import SPECS, OpSpec

WITHOUT = (
    "policy_loss",
    "linear_policy_loss",
    "topk_divergence",
    "spread",
)  # their backward reads nothing that is given
ROOT = Path(__file__).parent.parent / "trajkern" / "ops"


def _tensors(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, tuple):
        for i, part in enumerate(x):
            yield from _tensors(f"{name}[{i}]", part)


def _inputs(op: OpSpec) -> dict[str, Any]:
    """Of a case whose backward reads what the forward was given, with memory of their own."""
    case = next((case for case in op.cases if case.name.startswith("max")), op.cases[0])
    inputs = op.inputs(case, op.dtypes[0])
    inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return {name: x.requires_grad_() if name in op.differentiable else x for name, x in inputs.items()}


def _loss(op: OpSpec, inputs: dict[str, Any]) -> Tensor:
    outputs = op.outputs(getattr(tk, op.name)(**inputs)).values()
    return sum((x.sum() for x in outputs if x.requires_grad), torch.zeros(()))


@pytest.mark.parametrize("op", [spec for spec in SPECS if spec.differentiable], ids=lambda spec: spec.name)
@pytest.mark.parametrize("left", ["nothing", "all but a byte"])
def test_freed_before_the_backward(op: OpSpec, left: str) -> None:
    refused = 0
    for name in [name for key, x in _inputs(op).items() for name, _ in _tensors(key, x)]:
        inputs = _inputs(op)
        loss, x = _loss(op, inputs), dict(pair for key, x in inputs.items() for pair in _tensors(key, x))[name]
        memory = x.untyped_storage()
        memory.resize_(0 if left == "nothing" else memory.nbytes() - 1)
        try:
            loss.backward()  # what it needs no more, it does not miss
        except ValueError as error:
            found = rf"^what the backward of .*trajkern\.{op.name}\b.* reads must have memory; this was freed"
            assert re.match(found, str(error)), error
            refused += 1
    assert refused or op.name in WITHOUT


def test_all_that_a_backward_reads_is_asked_for() -> None:
    found = [path.name for path in ROOT.glob("*.py") if "ctx.saved_tensors" in path.read_text()]
    assert found == ["_autograd.py"]


def test_boundaries_of_numpy_that_change_before_the_backward() -> None:
    """torch sees no write into memory that is numpy's."""
    x, ids = torch.randn(4), torch.tensor([0, 0])
    grads = []
    for changed in (None, 100, -3, 2**40):
        bounds, leaf = np.array([0, 2, 4]), x.clone().requires_grad_()
        rewards = tk.reflection_rewards(leaf, torch.from_numpy(bounds), ids).rewards
        if changed is not None:
            bounds[1:] = changed
        rewards.sum().backward()
        grads.append(leaf.grad)
    assert all(torch.equal(g, grads[0]) for g in grads)


def test_rows_that_change_before_the_backward() -> None:
    rows, hidden = np.arange(4), torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    loss = tk.linear_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]), rows=torch.from_numpy(rows)).sum()
    rows[:] = 100
    with pytest.raises(RuntimeError, match="what the backward of trajkern.linear_logprobs.* must be as it was"):
        loss.backward()


@pytest.mark.parametrize(
    "call", ["tk.variance_weights(x, c, g)", "srl.similarity([a, a], [b, b], max_steps=9, beyond=0.0)"]
)
def test_memory_that_runs_out_in_a_thread_is_an_error(call: str) -> None:
    program = f"""
import resource, torch, trajkern as tk
from trajkern.recipes import srl
torch.set_num_threads(2)
x, c, g = torch.zeros(2 * 10**7), torch.tensor([0, 10**7, 2 * 10**7]), torch.tensor([0, 0])
tk.variance_weights(x[:4], torch.tensor([0, 2, 4]), g), srl.similarity(["abc"], ["abd"])
a, b = "ab" * 2 * 10**6, "ba" * 2 * 10**6
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 120 * 2**20,) * 2)
try:
    {call}
except MemoryError:
    print("none left")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "none left\n"), done.stderr
