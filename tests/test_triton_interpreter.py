"""The Triton kernels on a machine without a GPU: the registry's tests again, in a process that interprets them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


NOVEL = """
import torch, trajkern as tk
from trajkern.losses import kinds
kinds.FORMS["novel"] = ()
kinds.KINDS["novel"] = kinds.Kind("token", "token_mean", "novel")
x = torch.zeros(3)
with tk.use_backend("triton"):
    tk.policy_loss(x, x, x, torch.tensor([0, 3]), config=tk.PolicyLoss("novel"))
"""


SHARED = """
import torch, trajkern as tk
from trajkern._triton import policy_loss
from trajkern.testing import SPECS, errors
policy_loss.MOST_PROGRAMS = 2
spec = next(s for s in SPECS if s.name == "policy_loss")
for name in ("grpo_full", "dapo", "gspo_full", "gmpo", "sequence_mask_gspo"):
    case = next(c for c in spec.cases if c.name == name)
    with tk.use_backend("triton"):
        shares = errors(spec, tk.policy_loss, spec.inputs(case, torch.float32))
    assert max(shares.values()) <= 1, (name, shares)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("module", "chosen", "one_in"),
    [
        pytest.param("test_numerics.py", "test", 48, id="sample"),
        pytest.param("test_numerics.py", "test", 1, id="numerics", marks=pytest.mark.slow),
        # programs run in order, so twice is the same; variance_weights is an output of reflection_rewards' kernel
        pytest.param(
            "test_invariance.py", "not twice and not variance_weights", 1, id="invariance", marks=pytest.mark.slow
        ),
    ],
)
def test_in_the_interpreter(module: str, chosen: str, one_in: int) -> None:
    """Numerics and same bits; NaN-poisoned memory is on there as it is here."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / module), "-k", chosen]
    command += ["--backend", "triton", "--device", "cpu", "--one-in", str(one_in)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_form_without_code_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOVEL],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 1 and "no form novel" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_programs_share_many_pieces() -> None:
    """As they do beyond MOST_PROGRAMS pieces, which takes minutes here."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SHARED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
