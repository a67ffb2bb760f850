"""Numbers, counts and flags: Python's, numpy's or tensors without dimensions, in a range that the kernels have."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import dro, nsr, reward_models, rlcr, spo, srl, toolpo
from trajkern.recipes.skillrl import SkillBank

NAN, INF = math.nan, math.inf
CU_SEQLENS = torch.tensor([0, 2, 2, 4])


@pytest.fixture(params=["owner", "reference"])
def route(request: pytest.FixtureRequest):
    """The CPU's own kernels, and plain torch."""
    with tk.use_backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield request.param


X = torch.tensor([-1.0, -2.0, -0.5, -3.0])
HEAD = {"hidden": torch.ones(2, 3), "weight": torch.arange(12.0).view(4, 3) / 6, "targets": torch.tensor([1, 3])}
LOGITS = {"logits": torch.arange(10.0).view(2, 5) / 3, "targets": torch.tensor([0, 4])}
LOSS = {"logprobs": X, "old_logprobs": X + 0.1, "advantages": torch.tensor([1.0, 5.0, -1.0]), "cu_seqlens": CU_SEQLENS}
GROUPS = {"rewards": torch.tensor([1.0, 0.0, 2.0]), "group_ids": torch.tensor([5, 5, 9])}
TREE = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([1, 2, 1]))
COEFFICIENTS = [  # function, its other arguments, a coefficient's name, a legal value, whether float32 holds it
    (tk.token_logprobs, LOGITS, "temperature", 2, True),
    (tk.token_stats, LOGITS, "temperature", 2, True),
    *((tk.linear_logprobs, HEAD, name, 2, True) for name in ("temperature", "softcap", "logit_scale")),
    (tk.linear_token_stats, HEAD, "softcap", 2, True),
    (tk.linear_logprobs, HEAD, "workspace_bytes", 4096, False),
    (tk.policy_loss, LOSS | {"config": tk.PolicyLoss()}, "normalizer", 3, True),
    (tk.group_advantages, GROUPS, "eps", 1, True),
    (tk.whiten, {"x": X}, "eps", 1, True),
    (tk.sibling_advantages, {"node_values": X[:3], "tree": TREE}, "eps", 1, True),
    (tk.discounted_returns, {"rewards": X, "cu_seqlens": CU_SEQLENS}, "gamma", 1, False),
    (tk.gae, {"rewards": X, "values": X, "cu_seqlens": CU_SEQLENS}, "lam", 1, False),
    (nsr.advantages, {"correct": torch.tensor([1, 0]), "kind": "w_reinforce"}, "positive_weight", 2, True),
    (dro.length_reward, {"lengths": X.abs(), "reference_lengths": X.abs() + 1}, "beta", 2, True),
    (
        dro.propagated,
        {"logprobs": -X.abs(), "cu_seqlens": CU_SEQLENS, "std": X.abs(), "fraction": 1.0},
        "gamma",
        1,
        True,
    ),
    (dro.keep_groups, {"group_score": X}, "drop_fraction", 0.5, False),
    (spo.low_probability, {"old_logprobs": X}, "threshold", 0.5, True),
    (srl.rewards, {"similarity": X, "well_formed": X > -1}, "penalty", -2, True),
    (toolpo.action_rewards, {"correct_calls": X.abs(), "preference": X}, "call_weight", 2, True),
    (toolpo.action_rewards, {"correct_calls": X.abs(), "preference": X}, "preference_weight", 2, True),
    (reward_models.elo, {"wins": torch.tensor([[0, 2], [1, 0]])}, "k", 16, False),
]
KINDS = {"sapo": "sapo", "vespo": "vespo", "cov": "kl_cov"}  # by the first part of an option's name
READ = tk.losses.kinds.PARAMETERS
FULL = {"ref_logprobs": X - 0.2, "sampler_logprobs": X + 0.3, "entropy": X.abs()}


def _loss_of(kind: str, **options: Any) -> Tensor:
    options = {"sampler_correction": "tis"} | options if kind != "kl_cov" else options
    return tk.policy_loss(**LOSS, **FULL, config=tk.PolicyLoss(kind, **options))[0]


OPTIONS = [
    (partial(_loss_of, KINDS.get(name.split("_")[0], "dapo")), {}, name, 2, True)
    for name in READ
    if name != "max_length"
]
COEFFICIENTS += OPTIONS + [
    (partial(_loss_of, "dr_grpo"), {}, "max_length", 4, True),
    (partial(_loss_of, "clip_cov", sampler_correction="none"), {}, "cov_low", -1, False),
    (partial(_loss_of, "clip_cov", sampler_correction="none"), {}, "cov_fraction", 0.5, False),
]
COEFFICIENT_NAMES = [f"{getattr(f, '__name__', 'loss').strip('<>')}-{name}" for f, _, name, *_ in COEFFICIENTS]


def _assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("function", "others", "name", "value", "narrow"), COEFFICIENTS, ids=COEFFICIENT_NAMES)
def test_numbers_of_any_kind(function, others, name: str, value: float, narrow: bool) -> None:
    expected = function(**others, **{name: float(value)})
    kinds = [np.float32, np.float64, np.float16, np.array, lambda x: torch.tensor(float(x)), Fraction]
    if value == int(value):
        kinds += [np.int64, np.int32, int]
    for kind in kinds:
        _assert_same(function(**others, **{name: kind(value)}), expected)
    for wrong in (np.bool_(True), np.array([1.0]), np.str_("1"), 1j):
        with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
            function(**others, **{name: wrong})


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    ("function", "others", "name"),
    [pytest.param(*row[:3], id=i) for row, i in zip(COEFFICIENTS, COEFFICIENT_NAMES, strict=True) if row[4]],
)
@pytest.mark.parametrize("value", [1e-46, 1e-40, 1e39, 10**400])
def test_what_the_kernels_dtype_cannot_hold(function, others, name: str, value: float) -> None:
    """It would be 0 or infinite there, or its reciprocal."""
    with pytest.raises(ValueError, match=f"^{name} must be (of a magnitude between|finite|greater than 1|at least 1)"):
        function(**others, **{name: value})


def test_float64_holds_more() -> None:
    wide = LOGITS | {"logits": LOGITS["logits"].double() * 1e-46}
    plain = tk.token_logprobs(LOGITS["logits"].double(), LOGITS["targets"])
    torch.testing.assert_close(tk.token_logprobs(**wide, temperature=1e-46), plain)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("value", [INF, NAN, 0.0, -1.0, 1e-46, 1e38])
@pytest.mark.parametrize("function", ["token_logprobs", "linear_logprobs"])
def test_temperatures_of_rows(function: str, value: float) -> None:
    temperature = torch.tensor([1.0, value], dtype=torch.float64)
    with pytest.raises(ValueError, match="^temperature must be"):
        getattr(tk, function)(**LOGITS if function == "token_logprobs" else HEAD, temperature=temperature)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("function", ["token_logprobs", "linear_logprobs"])
def test_one_temperature_tensor_for_all_rows(function: str) -> None:
    arguments = LOGITS if function == "token_logprobs" else HEAD
    one, number = (getattr(tk, function)(**arguments, temperature=t) for t in (torch.tensor(0.5), 0.5))
    torch.testing.assert_close(one, number)


def test_counts_and_flags_of_numpy() -> None:
    assert tk.Spans(*torch.tensor([[0], [2], [0], [0]]), num_tokens=np.int64(2)).num_tokens == 2
    x, ids = torch.randn(4), torch.tensor([0, 0])
    rewards = [
        tk.reflection_rewards(x, torch.tensor([0, 2, 4]), ids, num_groups=n, normalize=flag, ddof=n)
        for n, flag in ((1, True), (np.int64(1), np.bool_(True)))
    ]
    _assert_same(*rewards)
    flags = [tk.linear_logprobs(**HEAD, batch_invariant=flag) for flag in (True, np.bool_(True))]
    _assert_same(*flags)
    assert rlcr.calibration(torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), bins=np.int32(2)).size.shape == (2,)
    assert reward_models.meta_vote(torch.ones(2, 3), torch.tensor([1.0, 2.0]), keep=np.int64(1)).shape == (3,)
    assert reward_models.knockout(lambda a, b: np.bool_(a > b), [1, 3, 2], seed=0) == 3
    assert SkillBank(capacity=np.int64(3)).capacity == 3
    for wrong in (2.0, True, np.float32(2)):
        with pytest.raises(TypeError, match="^capacity must be an int, got"):
            SkillBank(capacity=wrong)
    for wrong in (np.bool_(True), torch.tensor(1), np.array([1])):
        with pytest.raises(ValueError, match="^ddof must be one of 0, 1; got"):
            tk.whiten(X, ddof=wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts_are_integers(dtype: torch.dtype) -> None:
    counts = torch.tensor([3, 0, 2], dtype=dtype)
    pairs = [
        (toolpo.action_rewards(x, torch.ones(3)), toolpo.fold_preference(x, x + 1)) for x in (counts, counts.float())
    ]
    _assert_same(*pairs)
    _assert_same(*(tk.group_advantages(**GROUPS, weights=x) for x in (counts, counts.float())))
    _assert_same(*(tk.branch_coefficients(torch.ones(2), TREE, leaf_weights=x[:2]) for x in (counts, counts.float())))
