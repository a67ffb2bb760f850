"""verl's Ray workers: they find trajkern by ``VERL_USE_EXTERNAL_MODULES``, and compute the bits of this process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SETUP = "from trajkern.integrations import verl\n\nverl.register()\nverl.enable_head()\n"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver and two workers computed; one Ray is started."""
    for package in ("ray", "verl", "orjson"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; verl's Ray workers need ray, verl and orjson")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "setup_trajkern.py").write_text(SETUP)
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"VERL_USE_EXTERNAL_MODULES": "setup_trajkern", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.integrations.verl_ray", str(folder / "found.pt")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return torch.load(folder / "found.pt")


@pytest.mark.slow  # a Ray, whose workers import verl
def test_workers_compute_the_same_bits(found: dict[str, Any]) -> None:
    names, values = found["here"]
    assert len(found["workers"]) == 2 and all(name.startswith("trajkern.") for name in names)
    for of_worker, computed in found["workers"]:
        assert of_worker == names and len(computed) == len(values)
        for x, y in zip(computed, values, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert sum(float(x.abs().sum()) > 0 for x in values) == len(values)


@pytest.mark.slow
def test_sharded_workers_take_one_processs_step(found: dict[str, Any]) -> None:
    """FSDP2 over gloo: the mean of the ranks' losses, and every gradient."""
    loss, grads = found["whole"]
    losses, of_ranks = zip(*found["sharded"], strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    for mine in of_ranks:
        torch.testing.assert_close(mine, grads, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_verls_training_worker_takes_the_same_step(found: dict[str, Any], tied: bool) -> None:
    """Its FSDP2 engine's, by trajkern's loss and head as by verl's loss on logits; an untied head is a shard there."""
    theirs, ours = found["steps"][tied, False], found["steps"][tied, True]
    assert len(theirs) == len(ours) == 2
    for (their_numbers, their_weights), (numbers, weights) in zip(theirs, ours, strict=True):
        assert numbers == pytest.approx(their_numbers, rel=1e-5, abs=1e-7)
        assert numbers["grad_norm"] > 0.1 and 0 < numbers["actor/pg_clipfrac"] < 1
        torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-6)
