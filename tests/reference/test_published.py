"""The clip ranges that papers publish, as literal numbers."""

from __future__ import annotations

import re

import pytest

import trajkern as tk
from trajkern.losses.kinds import KINDS
from trajkern.losses.published import PUBLISHED

NUMBERS = {
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "bnpo": {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 10},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2},
    "gspo": {"clip_low": 0.0003, "clip_high": 0.0004},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "luspo": {"clip_low": 0.002, "clip_high": 0.0025},
    "sapo": {"sapo_tau_pos": 1, "sapo_tau_neg": 1.05},
    "vespo": {"vespo_k_pos": 2, "vespo_lambda_pos": 3, "vespo_k_neg": 3, "vespo_lambda_neg": 2},
    "dppo_tv": {"clip_low": 0.15, "clip_high": 0.15},
    "dppo_kl": {"clip_low": 0.05, "clip_high": 0.05},
    "kl_cov": {"cov_fraction": 0.002, "cov_coef": 1},
    "clip_cov": {
        "clip_low": 1,
        "clip_high": 1,
        "clip_dual": 10,
        "cov_fraction": 0.0002,
        "cov_low": 1,
        "cov_high": 5,
    },
    "gpg": {},
    "reinforce": {},
}
NEEDED = {"dr_grpo": {"max_length": 3000}}  # beside what is published
NOT_PUBLISHED = {"grpo", "cispo"}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers(kind: str) -> None:
    needed = NEEDED.get(kind, {})
    assert tk.PolicyLoss.published(kind, **needed) == tk.PolicyLoss(kind, **NUMBERS[kind], **needed)
    assert set(NUMBERS[kind]) <= {*KINDS[kind].reads, "clip_low", "clip_high", "clip_dual"}


def test_every_kind_is_published_or_said_not_to_be() -> None:
    assert set(PUBLISHED) == set(tk.policy_loss_kinds) == {*NUMBERS, *NOT_PUBLISHED}
    text = re.sub(r"\s+", " ", tk.PolicyLoss.published.__doc__ or "")
    for kind in NUMBERS:
        assert re.search(rf"\b{kind}\b", text), kind
    for source in (x.source.partition(",")[0].removeprefix("arXiv ") for x in PUBLISHED.values()):
        assert source.partition(";")[0] in text or source.startswith("github"), source


@pytest.mark.parametrize("kind", sorted(NOT_PUBLISHED))
def test_what_was_not_published_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"kind must be one whose clip range was published; of '{kind}' "):
        tk.PolicyLoss.published(kind)


def test_options_stand_in_place_and_beside() -> None:
    config = tk.PolicyLoss.published("dapo", clip_high=0.3, kl_coef=0.1)
    assert (config.clip_low, config.clip_high, config.kl_coef) == (0.2, 0.3, 0.1)
    with pytest.raises(TypeError, match=r"PolicyLoss\(\) has no option 'clip_hig'; did you mean 'clip_high'"):
        tk.PolicyLoss.published("dapo", clip_hig=0.3)
    with pytest.raises(ValueError, match="did you mean 'dapo'"):
        tk.PolicyLoss.published("dap")
