"""Bad input: the error names the argument, says what was expected and what came. Nothing gets through in silence."""

from __future__ import annotations

import contextlib
import math
import re

import pytest
import torch

import trajkern as tk

NAN, INF = math.nan, math.inf
META = torch.device("meta")
LIMITS = torch.iinfo(torch.int64)


@pytest.fixture(params=["owner", "reference"])
def route(request: pytest.FixtureRequest):
    """The CPU's own kernels, and the plain torch expression: the same checks in front of both."""
    with tk.use_backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield request.param


def good(function: str) -> dict:
    """Arguments that each function takes: trajectories of 2, 0 and 2 tokens."""
    cu_seqlens, x = torch.tensor([0, 2, 2, 4]), torch.tensor([-1.0, -2.0, -0.5, -3.0])
    if function in ("token_logprobs", "token_stats"):
        return {"logits": torch.arange(10.0).view(2, 5), "targets": torch.tensor([0, 4])}
    if function == "group_advantages":
        return {"rewards": torch.tensor([1.0, 0.0, 2.0]), "group_ids": torch.tensor([5, 5, 9])}
    if function == "discounted_returns":
        return {"rewards": x, "cu_seqlens": cu_seqlens}
    if function == "gae":
        return {"rewards": x, "values": x, "cu_seqlens": cu_seqlens}
    if function == "whiten":
        return {"x": x}
    advantages = torch.tensor([1.0, 5.0, -1.0])
    return {
        "logprobs": x,
        "old_logprobs": x,
        "advantages": advantages,
        "cu_seqlens": cu_seqlens,
        "config": tk.PolicyLoss(),
    }


FLOATS, INTEGERS = r"dtype float32, .*; got ", r"dtype int64, int32; got "
LOGITS = [
    ("logits", [1.0, 2.0], TypeError, r"a tensor, got \[1.0, 2.0\] \(list\)"),
    ("logits", torch.ones(2, 5).long(), TypeError, FLOATS + r"int64\[2, 5\]"),
    ("logits", torch.tensor(1.0), ValueError, r"a last dimension V of at least 1; got float32\[\]"),
    ("logits", torch.ones(2, 0), ValueError, r"a last dimension V of at least 1; got float32\[2, 0\]"),
    ("targets", torch.tensor([0.0, 1.0]), TypeError, INTEGERS + r"float32\[2\]"),
    ("targets", torch.tensor([0, 1, 2]), ValueError, r"shape \[2\] \(the leading shape of logits\); got int64\[3\]"),
    ("targets", torch.tensor([[0, 1]]), ValueError, r"shape \[2\] .*; got int64\[1, 2\]"),
    ("targets", torch.tensor([0, 1], device=META), ValueError, r"on cpu .*; got int64\[2\] on meta"),
    ("targets", torch.tensor([0, 5]), ValueError, r"lie in \[0, 5\) .*5 at row 1"),
    ("targets", torch.tensor([-1, 4]), ValueError, r"lie in \[0, 5\) .*-1 at row 0"),
    ("targets", torch.tensor([0, -100]), ValueError, r"lie in \[0, 5\) .*-100 at row 1"),
    ("targets", torch.tensor([LIMITS.max, 0]), ValueError, rf"lie in \[0, 5\) .*{LIMITS.max} at row 0"),
    ("mask", torch.tensor([1, 0]), TypeError, r"dtype bool; got int64\[2\]"),
    ("mask", torch.tensor([True]), ValueError, r"shape \[2\] .*; got bool\[1\]"),
    ("mask", torch.ones(2, device=META).bool(), ValueError, r"on cpu .*; got bool\[2\] on meta"),
    ("temperature", 0, ValueError, r"greater than 0, got 0"),
    ("temperature", -0.5, ValueError, r"greater than 0, got -0.5"),
    ("temperature", NAN, ValueError, r"greater than 0, got nan"),
    ("temperature", INF, ValueError, r"finite.* inf"),
    ("temperature", None, TypeError, r"a number, got None"),
    ("temperature", "hot", TypeError, r"a number, got 'hot' \(str\)"),
    ("temperature", torch.tensor([1.0, -2.0]), ValueError, r"positive; .* -2.0"),
    ("temperature", torch.tensor([1.0, 0.0]), ValueError, r"positive; .* 0.0"),
    ("temperature", torch.tensor([1.0, NAN]), ValueError, r"nan"),
    ("temperature", torch.tensor([1.0, INF]), ValueError, r"finite.* inf"),
    ("temperature", torch.tensor([1, 2]), TypeError, FLOATS + r"int64\[2\]"),
    ("temperature", torch.ones(3), ValueError, r"shape \[2\] .*; got float32\[3\]"),
    ("temperature", torch.ones(2, device=META), ValueError, r"on cpu .*; got float32\[2\] on meta"),
]
CU_SEQLENS = [
    ("cu_seqlens", torch.tensor([0, 3, 2, 4]), ValueError, r"never decrease; it goes from 3 to 2 at index 2"),
    ("cu_seqlens", torch.tensor([1, 2, 2, 4]), ValueError, r"from 0 to the 4 tokens; it runs from 1 to 4"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 3]), ValueError, r"from 0 to the 4 tokens; it runs from 0 to 3"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 400]), ValueError, r"from 0 to the 4 tokens; it runs from 0 to 400"),
    ("cu_seqlens", torch.tensor([[0, 2, 2, 4]]), ValueError, r"1 dimension; got int64\[1, 4\]"),
    ("cu_seqlens", torch.tensor([0.0, 2, 2, 4]), TypeError, INTEGERS + r"float32\[4\]"),
    ("cu_seqlens", [0, 2, 2, 4], TypeError, r"a tensor, got \[0, 2, 2, 4\] \(list\)"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 4], device=META), ValueError, r"on cpu .*; got int64\[4\] on meta"),
]
GAMMA = [
    ("gamma", -0.1, ValueError, r"at least 0, got -0.1"),
    ("gamma", 1.5, ValueError, r"at most 1, got 1.5"),
    ("gamma", NAN, ValueError, r"at least 0, got nan"),
    ("gamma", "1", TypeError, r"a number, got '1' \(str\)"),
]
TOKEN_MASK = [
    ("mask", torch.ones(4), TypeError, r"dtype bool; got float32\[4\]"),
    ("mask", torch.ones(3).bool(), ValueError, r"shape \[4\] .*; got bool\[3\]"),
    ("mask", torch.ones(4, device=META).bool(), ValueError, r"on cpu .*; got bool\[4\] on meta"),
]
DDOF = [
    ("ddof", 2, ValueError, r"one of 0, 1; got 2"),
    ("ddof", -1, ValueError, r"one of 0, 1; got -1"),
    ("ddof", 0.5, ValueError, r"one of 0, 1; got 0.5"),
    ("ddof", True, ValueError, r"one of 0, 1; got True"),
]
GROUPS = [
    ("rewards", torch.tensor([1, 0, 1]), TypeError, FLOATS + r"int64\[3\]"),
    ("rewards", torch.tensor([[1.0, 0.0, 1.0]]), ValueError, r"1 dimension; got float32\[1, 3\]"),
    ("rewards", torch.tensor([1.0, NAN, 1.0]), ValueError, r"finite; it is nan at index 1"),
    ("rewards", torch.tensor([1.0, 0.0, -INF]), ValueError, r"finite; it is -inf at index 2"),
    ("group_ids", torch.tensor([1.0, 1.0, 2.0]), TypeError, INTEGERS + r"float32\[3\]"),
    ("group_ids", torch.tensor([1, 1]), ValueError, r"shape \[3\] \(one id a reward\); got int64\[2\]"),
    ("group_ids", torch.tensor([1, 1, 1], device=META), ValueError, r"on cpu .*; got int64\[3\] on meta"),
    ("baseline", "median", ValueError, r"one of 'mean', 'leave_one_out', 'none'; got 'median'"),
    ("scale", None, ValueError, r"one of 'std', 'none'; got None"),
    ("singleton", "keep", ValueError, r"one of 'raw', 'zero'; got 'keep'"),
    ("eps", -1e-6, ValueError, r"at least 0, got -1e-06"),
    ("eps", NAN, ValueError, r"at least 0, got nan"),
    ("eps", torch.tensor([1e-6]), TypeError, r"a number, got float32\[1\]"),
    (
        "eps",
        torch.tensor(1e-6, device=META),
        TypeError,
        r"lie on the CPU: to read it would wait; got float32\[\] on meta",
    ),
    ("eps", torch.tensor(1e-6, requires_grad=True), TypeError, r"not require a gradient, which it would not get"),
    ("gate", torch.tensor([1, 1, 0]), TypeError, r"dtype bool; got int64\[3\]"),
    ("gate", torch.tensor([True]), ValueError, r"shape \[3\] \(one flag a reward\); got bool\[1\]"),
    ("weights", torch.tensor([1.0, -0.5, 1.0]), ValueError, r"at least 0; the smallest is -0.5"),
    ("weights", torch.tensor([1.0, NAN, 1.0]), ValueError, r"finite; it is nan at index 1"),
    ("weights", torch.tensor([INF, 1.0, 1.0]), ValueError, r"finite; it is inf at index 0"),
    ("weights", torch.tensor([True, True, False]), TypeError, FLOATS + r"bool\[3\]"),
    ("weights", torch.ones(2), ValueError, r"shape \[3\] \(one weight a reward\); got float32\[2\]"),
    ("weights", torch.ones(3, device=META), ValueError, r"on cpu .*; got float32\[3\] on meta"),
    *DDOF,
]
RETURNS = [
    ("rewards", torch.ones(4).long(), TypeError, FLOATS + r"int64\[4\]"),
    ("rewards", torch.ones(2, 2), ValueError, r"1 dimension; got float32\[2, 2\]"),
    *CU_SEQLENS,
    *GAMMA,
    *TOKEN_MASK,
]
GAE = [
    ("values", torch.ones(3), ValueError, r"shape \[4\] \(one value a token\); got float32\[3\]"),
    ("values", torch.ones(4).int(), TypeError, FLOATS + r"int32\[4\]"),
    ("values", torch.ones(4, device=META), ValueError, r"on cpu .*; got float32\[4\] on meta"),
    ("bootstrap", torch.ones(4), ValueError, r"shape \[3\] \(one value a trajectory\); got float32\[4\]"),
    ("bootstrap", 0.0, TypeError, r"a tensor, got 0.0 \(float\)"),
    ("lam", 1.01, ValueError, r"at most 1, got 1.01"),
    ("lam", -1, ValueError, r"at least 0, got -1"),
    *RETURNS,
]
WHITEN = [
    ("x", torch.ones(4).long(), TypeError, FLOATS + r"int64\[4\]"),
    ("x", torch.ones(2, 2), ValueError, r"1 dimension; got float32\[2, 2\]"),
    ("eps", 0.0, ValueError, r"greater than 0, got 0.0"),
    *DDOF,
    *TOKEN_MASK,
]
LOSS = [
    ("logprobs", torch.ones(4).long(), TypeError, FLOATS + r"int64\[4\]"),
    ("logprobs", torch.ones(2, 2), ValueError, r"1 dimension; got float32\[2, 2\]"),
    ("old_logprobs", torch.ones(3), ValueError, r"shape \[4\] \(one value a token\); got float32\[3\]"),
    ("old_logprobs", torch.ones(4, device=META), ValueError, r"on cpu .*; got float32\[4\] on meta"),
    ("advantages", torch.ones(2), ValueError, r"length 3 \(one a trajectory\) or 4 \(one a token\); got float32\[2\]"),
    ("advantages", torch.ones(3).long(), TypeError, FLOATS + r"int64\[3\]"),
    ("advantages", torch.ones(1, 4), ValueError, r"1 dimension; got float32\[1, 4\]"),
    ("advantages", None, TypeError, r"a tensor, got None"),
    ("advantages", torch.ones(3, device=META), ValueError, r"on cpu .*; got float32\[3\] on meta"),
    ("config", {"kind": "grpo"}, TypeError, r"trajkern.PolicyLoss, got \{'kind': 'grpo'\} \(dict\)"),
    ("config", "grpo", TypeError, r"trajkern.PolicyLoss, got 'grpo' \(str\)"),
    ("ref_logprobs", torch.ones(5), ValueError, r"shape \[4\] .*; got float32\[5\]"),
    ("sampler_logprobs", torch.ones(4).int(), TypeError, FLOATS + r"int32\[4\]"),
    ("entropy", torch.ones(4, 1), ValueError, r"shape \[4\] .*; got float32\[4, 1\]"),
    ("normalizer", 0, ValueError, r"greater than 0, got 0"),
    ("normalizer", -3.0, ValueError, r"greater than 0, got -3.0"),
    ("normalizer", "4", TypeError, r"a number, got '4' \(str\)"),
    ("normalizer", torch.tensor(1j), TypeError, r"dtype float32, .*; got complex64\[\]"),
    ("normalizer", torch.ones(2), ValueError, r"one element; got float32\[2\]"),
    ("normalizer", torch.ones(1, device=META), ValueError, r"on cpu .*; got float32\[1\] on meta"),
    ("normalizer", torch.tensor(0.0), ValueError, r"greater than 0.* 0.0"),
    ("normalizer", torch.tensor(-1.0), ValueError, r"greater than 0.* -1.0"),
    ("normalizer", torch.tensor(NAN), ValueError, r"nan"),
    *CU_SEQLENS,
    *TOKEN_MASK,
]
TABLES = {
    "token_logprobs": LOGITS,
    "token_stats": LOGITS
    + [
        ("outputs", ("entropy", "top1"), ValueError, r"one of 'entropy', 'sum_sq_probs', 'is_top1'; got 'top1'"),
        ("outputs", 3, TypeError, r"3"),
    ],
    "group_advantages": GROUPS,
    "discounted_returns": RETURNS,
    "gae": GAE,
    "whiten": WHITEN,
    "policy_loss": LOSS,
}


def readable(function: str, name: str, text: str) -> str:
    return f"{function}-{name}-" + re.sub(r"[^a-z0-9.-]+", "_", text.lower()).strip("_")


CALLS = [pytest.param(f, *row, id=readable(f, row[0], row[3])) for f, rows in TABLES.items() for row in rows]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("function", "name", "value", "error", "text"), CALLS)
def test_call(function: str, name: str, value, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{name} must .*{text}"):
        getattr(tk, function)(**good(function) | {name: value})


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("function", TABLES)
def test_the_good_call_is_good(function: str) -> None:
    """Else the table above would prove nothing."""
    getattr(tk, function)(**good(function))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ref_logprobs", {"kl_coef": 0.1}),
        ("entropy", {"entropy_coef": 0.01}),
        ("sampler_logprobs", {"sampler_correction": "tis"}),
        ("sampler_logprobs", {"sampler_correction": "icepop"}),
        ("sampler_logprobs", {"sampler_correction": "sequence_mask"}),
    ],
)
def test_what_a_configuration_needs(name: str, options: dict) -> None:
    config = tk.PolicyLoss("dapo", **options)
    with pytest.raises(ValueError, match=f"^{name} must be given .*'dapo'.*, got None"):
        tk.policy_loss(**good("policy_loss") | {"config": config})


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("function", ["discounted_returns", "gae", "policy_loss"])
def test_boundaries_that_only_overflow_makes_ascend(function: str) -> None:
    """Every difference is positive once it has wrapped."""
    changes = {"cu_seqlens": torch.tensor([0, LIMITS.max, LIMITS.min, -1, 4])}
    if function == "policy_loss":
        changes["advantages"] = torch.ones(4)
    with pytest.raises(ValueError, match=f"^cu_seqlens must never decrease; it goes from {LIMITS.max} to {LIMITS.min}"):
        getattr(tk, function)(**good(function) | changes)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("kind", ["kl_cov", "clip_cov"])
@pytest.mark.parametrize("last", [3, 5])
def test_boundaries_are_checked_before_tokens_are_ranked(kind: str, last: int) -> None:
    changes = {"config": tk.PolicyLoss(kind), "cu_seqlens": torch.tensor([0, 2, 2, last])}
    with pytest.raises(ValueError, match=f"^cu_seqlens must run from 0 to the 4 tokens; it runs from 0 to {last}"):
        tk.policy_loss(**good("policy_loss") | changes)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("per_token", "length"), [(True, 3), (False, 4)])
def test_advantages_of_the_other_kind(per_token: bool, length: int) -> None:
    with pytest.raises(ValueError, match=rf"^advantages must have length .*; got float32\[{length}\]"):
        tk.policy_loss(**good("policy_loss") | {"advantages": torch.ones(length), "per_token": per_token})


KINDS = ", ".join(map(repr, tk.policy_loss_kinds))
CONFIGURATIONS = [
    ("kind", {"kind": "ppo"}, ValueError, rf"one of {re.escape(KINDS)}; got 'ppo'"),
    ("kind", {"kind": None}, ValueError, r"one of 'grpo', .*; got None"),
    ("ratio_level", {"ratio_level": "turn"}, ValueError, r"one of None, 'token', 'sequence'; got 'turn'"),
    ("aggregate", {"aggregate": "mean"}, ValueError, r"one of None, 'token_mean', .*'seq_mean_token_mean'; got 'mean'"),
    ("kl", {"kl": "k4"}, ValueError, r"one of 'k1', 'k2', 'k3', 'k3_corrected'; got 'k4'"),
    ("sampler_correction", {"sampler_correction": "is"}, ValueError, r"one of 'none', 'tis', .*; got 'is'"),
    ("clip_low", {"clip_low": -0.1}, ValueError, r"at least 0, got -0.1"),
    ("clip_high", {"clip_high": NAN}, ValueError, r"at least 0, got nan"),
    ("clip_high", {"clip_high": "0.2"}, TypeError, r"a number, got '0.2' \(str\)"),
    ("clip_high", {"clip_high": True}, TypeError, r"a number, got True \(bool\)"),
    ("clip_dual", {"clip_dual": 1.0}, ValueError, r"greater than 1, got 1.0"),
    ("kl_coef", {"kl_coef": NAN}, ValueError, r"a number, got NaN"),
    ("entropy_coef", {"entropy_coef": None}, TypeError, r"a number, got None"),
    ("max_length", {"kind": "dr_grpo"}, ValueError, r"given .*seq_mean_token_sum_norm.*'dr_grpo'.*, got None"),
    ("max_length", {"aggregate": "seq_mean_token_sum_norm"}, ValueError, r"given .*, got None"),
    ("max_length", {"kind": "dr_grpo", "max_length": 0}, ValueError, r"at least 1, got 0"),
    ("max_length", {"kind": "dr_grpo", "max_length": 2.5}, ValueError, r"a whole number of tokens, got 2.5"),
    ("sampler_low", {"sampler_low": -1.0}, ValueError, r"at least 0, got -1.0"),
    ("sampler_low", {"sampler_low": 3.0, "sampler_high": 2.0}, ValueError, r"at most .*2.0.* 3.0"),
    ("cov_low", {"cov_low": 3.0, "cov_high": 2.0}, ValueError, r"at most .*2.0.* 3.0"),
    ("cov_fraction", {"cov_fraction": 1.5}, ValueError, r"at most 1, got 1.5"),
    ("sapo_tau_neg", {"sapo_tau_neg": 0}, ValueError, r"greater than 0, got 0"),
    ("vespo_lambda_pos", {"vespo_lambda_pos": -1}, ValueError, r"greater than 0, got -1"),
    ("ratio_level", {"kind": "kl_cov", "ratio_level": "sequence"}, ValueError, r"'token' .*'kl_cov'.*; got 'sequence'"),
    (
        "sampler_correction",
        {"kind": "clip_cov", "sampler_correction": "sequence_mask"},
        ValueError,
        r"not be 'sequence_mask' for kind 'clip_cov'",
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [pytest.param(*row, id=readable("PolicyLoss", row[0], row[3][-40:])) for row in CONFIGURATIONS],
)
def test_configuration(name: str, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{name} must .*{text}"):
        tk.PolicyLoss(**options)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("target", [-100, -1, 5, LIMITS.max, LIMITS.min])
def test_a_masked_target_may_be_anything(target: int) -> None:
    arguments, mask = good("token_stats"), torch.tensor([True, False])
    clean = tk.token_stats(**arguments, mask=mask)
    stats = tk.token_stats(**arguments | {"targets": torch.tensor([0, target])}, mask=mask)
    assert torch.equal(stats.logprobs, clean.logprobs) and torch.equal(stats.entropy, clean.entropy)
    assert stats.logprobs[1] == 0


def check_nan_is_not_swallowed(name: str, config: tk.PolicyLoss, advantage: float) -> None:
    """A NaN on a scored token is an error or a NaN loss; no comparison may make it a clipped or a dropped token."""
    token = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    arguments = {x: token.clone() for x in ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy")}
    arguments |= {"advantages": torch.full((2,), advantage), "cu_seqlens": torch.tensor([0, 2, 4]), "config": config}
    arguments[name][1] = NAN
    try:
        loss, _ = tk.policy_loss(**arguments)
    except ValueError as error:
        assert str(error).startswith(name)
    else:
        assert loss.isnan(), f"{name}: {loss}"


READ = [  # what the loss of each kind reads
    (kind, name)
    for kind in tk.policy_loss_kinds
    for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy")
    if not (name == "old_logprobs" and kind in ("gpg", "reinforce"))
]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("kind", "name"), READ)
def test_no_kind_swallows_a_nan(kind: str, name: str) -> None:
    config = tk.PolicyLoss(kind, max_length=4, clip_dual=2.0, kl_coef=0.1, entropy_coef=0.1)
    for advantage in (1.0, -1.0):
        check_nan_is_not_swallowed(name, config, advantage)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("correction", ["tis", "icepop", "sequence_mask"])
@pytest.mark.parametrize("name", ["old_logprobs", "sampler_logprobs"])
def test_no_correction_swallows_a_nan(correction: str, name: str) -> None:
    check_nan_is_not_swallowed(name, tk.PolicyLoss("dapo", sampler_correction=correction), 1.0)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("function", ["discounted_returns", "gae", "whiten"])
def test_no_scan_swallows_a_nan(function: str) -> None:
    """It stays inside its trajectory."""
    arguments = good(function)
    name = "x" if function == "whiten" else "rewards"
    arguments[name] = torch.tensor([-1.0, NAN, -0.5, -3.0])
    try:
        out = getattr(tk, function)(**arguments)
    except ValueError as error:
        assert str(error).startswith(name)
    else:
        out = out[0] if function == "gae" else out
        assert out.isnan().tolist() == [True, True] + [function == "whiten"] * 2
