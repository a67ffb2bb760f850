"""Models that ranks share, changed after they were measured: on all of them, or on one alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from tests.integrations.wrapped_ranks import RANKS, own, packed, tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    """What each rank got, by case: log-probs, or the words of an error."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.integrations.agreement_ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def check_right(results: list[Any], rank: int) -> None:
    expected = own(tiny(), packed(rank))[0]
    for actual in results:
        assert not isinstance(actual, str), actual
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["both", "replicas"])
def test_what_every_rank_changes_is_measured_again(found: list[dict[str, list[Any]]], name: str) -> None:
    for rank in range(RANKS):
        assert len(found[rank][name]) >= 2
        check_right(found[rank][name], rank)


@pytest.mark.parametrize("name", ["one", "one, resharded", "one, fsdp1"])
def test_what_one_rank_changes_alone_is_refused_before_it_runs(found: list[dict[str, list[Any]]], name: str) -> None:
    first, *refused, again, together = found[0][name]
    check_right([first, again, together], 0)
    check_right(found[1][name], 1)
    assert len(refused) == 2 and len(found[1][name]) == 3
    for words in refused:
        assert words.startswith("model must be changed on all the ranks [0, 1] that share it, or on none: on rank 0")
        assert "hooks, adapters, attention, dtype or autocast of " in words and "[1] did not" in words


def test_ranks_that_find_different_heads_are_refused(found: list[dict[str, list[Any]]]) -> None:
    for rank in range(RANKS):
        first, refused, again = found[rank]["unlike"]
        check_right([first, again], rank)
        assert refused.startswith("model must be the same on all the ranks [0, 1] that share it; of ")
        assert "found True" in refused and "found False" in refused
