"""Every op, case and dtype against float64, forward and gradients, within the error budget."""

from __future__ import annotations

import pytest

import trajkern as tk
from trajkern.testing import errors


@pytest.mark.usefixtures("backend", "poison")
def test_within_budget(spec, case, dtype, device) -> None:
    shares = errors(spec, getattr(tk, spec.name), spec.inputs(case, dtype, device))
    over = {name: share for name, share in shares.items() if not share <= 1}
    assert not over, f"{case.name} ({case.reason}): share of the error budget {over}"


@pytest.mark.usefixtures("backend")
def test_stats_and_logprobs_agree_bitwise(device) -> None:
    """What else is asked for does not change log p."""
    import torch

    logits = torch.randn(5, 700, device=device)
    targets = torch.arange(5, device=device)
    stats = tk.token_stats(logits, targets, outputs=("entropy", "sum_sq_probs", "is_top1"))
    assert torch.equal(stats.logprobs, tk.token_logprobs(logits, targets))
