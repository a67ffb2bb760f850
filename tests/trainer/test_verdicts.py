"""How a score is read of a judge's words."""

from __future__ import annotations

import pytest

from trajkern.trainer.models.verdicts import read_score

NAN = float("nan")


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("Right.\nScore: 7", True, 0.7),
        ("Score: 0", True, 0.0),
        ("**Score: 10/10**", True, 1.0),
        ("score = 3.5.", True, 0.35),
        ("**Score:** 4 out of 10", True, 0.4),
        ("Score: 9\nOn reflection:\nScore: 2\n", True, 0.2),
        ("Score: 8\nI hope this helps!", True, 0.8),
        ("Score: 11", True, NAN),
        ("Score: -3", True, NAN),
        ("Score: 4/5", True, NAN),
        ("Score: 8-9", True, NAN),
        ("Score: k", True, NAN),
        ("I would give it a score: 5 at most", True, NAN),
        ("Score: 9\x1cy", True, NAN),
        ("Score: 6\r\nBye.\r\n", True, 0.6),
        ("seven", True, NAN),
        ("", True, NAN),
        ("Fine.\nScore: 1", False, NAN),  # the next digit may have been a 0
        ("Score: 1\nand so", False, 0.1),
    ],
)
def test_read_score(text: str, ended: bool, expected: float) -> None:
    assert read_score(text, ended) == pytest.approx(expected, nan_ok=True)
