"""A credit in TRL on two ranks is that on one: groups, statistics and normalisers are of all ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from tests.integrations import trl_ranks  # noqa: E402
from trajkern.integrations import trl as adapter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo as on Linux")
def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.integrations.trl_ranks", str(tmp_path), port]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in trl_ranks.RUNS.items():
        (tmp_path / "one" / name).mkdir(parents=True)
        learns, logged, weights = trl_ranks.trained(tmp_path / "one" / name, 1, **options)
        both = [torch.load(tmp_path / name / str(rank) / "trained.pt", weights_only=False) for rank in (0, 1)]
        for ours, *parts in zip(learns, both[0][0], both[1][0], strict=True):
            torch.testing.assert_close(torch.cat(parts), ours, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(logged, both[0][1], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-3)
        for key, x in weights.items():
            torch.testing.assert_close(both[0][2][key], x, rtol=1e-3, atol=1e-4)
            assert torch.equal(both[0][2][key], both[1][2][key])
        assert len(learns) > 1 and all(x.any() for x in learns)
        for target in list(adapter._enabled):
            adapter.disable(target)
