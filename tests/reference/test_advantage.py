"""The reference advantages against literal numbers, and against fractions summed in plain loops."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from trajkern import reference

F64 = torch.float64


def tensor(x: Sequence[float]) -> Tensor:
    return torch.tensor(x, dtype=F64)


def rows_of_group(rows: list[Fraction], me: int, baseline: str, scale: str, ddof: int, eps: float, singleton: str):
    """Advantage of row ``me`` of one group whose rows all count once."""
    n, r = len(rows), rows[me]
    if baseline == scale == "none":
        return float(r)
    if n == 1 or (scale == "std" and n <= ddof):
        raw = float(r) / (1 + eps) if scale == "std" else float(r)
        return raw if singleton == "raw" else 0.0
    mean = sum(rows) / n
    others = (sum(rows) - r) / (n - 1)
    centred = r - {"mean": mean, "leave_one_out": others, "none": 0}[baseline]
    if scale == "none":
        return float(centred)
    std = math.sqrt(sum((x - mean) ** 2 for x in rows) / (n - ddof))
    return float(centred) / (std + eps) if std + eps else float(centred)


def expected(rewards, ids, gate=None, copies=None, **options) -> list[float]:
    """By the definition: row i stands ``copies[i]`` times in its group, or not at all."""
    rewards = [Fraction(x) for x in rewards]
    gate, copies = gate or [True] * len(rewards), copies or [1] * len(rewards)
    groups, place = defaultdict(list), {}
    for i, (r, g) in enumerate(zip(rewards, ids, strict=True)):
        for _ in range(copies[i] if gate[i] else 0):
            place[i] = len(groups[g])
            groups[g].append(r)
    return [rows_of_group(groups[g], place[i], **options) if i in place else 0.0 for i, g in enumerate(ids)]


REWARDS = [0.5, -1.25, 3.0, 0.1, 2.0, 0.5, 7.5, -0.3, 0.25, 0.25, 1.0, 4.0, -2.0]
IDS = [9, -4, 9, 2, 9, 9, -4, 2, 5, 5, 10**15, 2, 9]  # 9 five times, 2 thrice, -4 twice, 5 constant, one alone
GATE = [True, True, False, True, True, True, False, True, True, True, True, True, True]  # leaves -4 with one row
COPIES = [1, 2, 0, 3, 1, 2, 1, 1, 2, 0, 1, 1, 4]

OPTIONS = [
    dict(zip(("baseline", "scale", "ddof", "eps", "singleton"), x, strict=True))
    for x in itertools.product(("mean", "leave_one_out", "none"), ("std", "none"), (0, 1), (1e-6, 0.0), ("raw", "zero"))
]


def option_id(options: dict) -> str:
    return "-".join(map(str, options.values()))


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("rows", ["all", "gate", "copies", "gate_and_copies"])
def test_every_option(options: dict, rows: str) -> None:
    gate = GATE if "gate" in rows else None
    copies = COPIES if "copies" in rows else None
    actual = reference.group_advantages(
        tensor(REWARDS),
        torch.tensor(IDS),
        **options,
        gate=gate and torch.tensor(gate),
        weights=copies and tensor(copies),
    )
    assert actual.tolist() == pytest.approx(expected(REWARDS, IDS, gate, copies, **options), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_integer_weights_are_duplicated_rows(options: dict) -> None:
    index = torch.repeat_interleave(torch.arange(len(IDS)), torch.tensor(COPIES))
    rewards, ids = tensor(REWARDS), torch.tensor(IDS)
    weighted = reference.group_advantages(rewards, ids, weights=tensor(COPIES), **options)
    repeated = reference.group_advantages(rewards[index], ids[index], **options)
    torch.testing.assert_close(weighted[index], repeated, rtol=1e-13, atol=1e-15)


class TestLiterals:
    """Four rollouts, two of them right, and other small tables worked by hand."""

    WIN = tensor([1.0, 0.0, 0.0, 1.0])
    ONE = torch.zeros(4, dtype=torch.int64)

    @pytest.mark.parametrize(
        ("options", "first", "second"),
        [
            pytest.param({}, 0.8660239038, -0.8660239038, id="verl_ddof1_eps1e-6"),
            pytest.param({"eps": 1e-4}, 0.8658754298, -0.8658754298, id="trl_ddof1_eps1e-4"),
            pytest.param({"ddof": 0, "eps": 1e-6}, 0.9999980000, -0.9999980000, id="population"),
            pytest.param({"scale": "none"}, 0.5, -0.5, id="dr_grpo"),
            pytest.param({"baseline": "leave_one_out", "scale": "none"}, 2 / 3, -2 / 3, id="rloo"),
            pytest.param({"baseline": "none", "eps": 0.0}, 1.7320508076, 0.0, id="std_alone"),
            pytest.param({"baseline": "none", "scale": "none"}, 1.0, 0.0, id="raw"),
        ],
    )
    def test_two_of_four_right(self, options: dict, first: float, second: float) -> None:
        """mean 1/2; unbiased std sqrt(1/3) = 0.5773502692; population's 1/2."""
        actual = reference.group_advantages(self.WIN, self.ONE, **options)
        assert actual.tolist() == pytest.approx([first, second, second, first], rel=1e-9)

    def test_fractional_weights(self) -> None:
        """W = 2, mean = (0.5*1 + 1.5*3)/2 = 2.5, sum w d^2 = 0.5*2.25 + 1.5*0.25 = 1.5, var = 1.5/(2 - 1)."""
        weights = tensor([0.5, 1.5])
        actual = reference.group_advantages(tensor([1, 3]), self.ONE[:2], weights=weights, eps=0.0)
        assert actual.tolist() == pytest.approx([-1.5 / math.sqrt(1.5), 0.5 / math.sqrt(1.5)], rel=1e-14)
        population = reference.group_advantages(tensor([1, 3]), self.ONE[:2], weights=weights, eps=0.0, ddof=0)
        assert population.tolist() == pytest.approx([-1.5 / math.sqrt(0.75), 0.5 / math.sqrt(0.75)], rel=1e-14)

    def test_fractional_weights_leave_one_out(self) -> None:
        """W = 3: the others of the first row are (0.5*3 + 2.5*4 - 3)/2 = 4.25, of the second 3.75."""
        actual = reference.group_advantages(
            tensor([3, 4]), self.ONE[:2], weights=tensor([0.5, 2.5]), baseline="leave_one_out", scale="none"
        )
        assert actual.tolist() == pytest.approx([3 - 4.25, 4 - 3.75], rel=1e-14)

    @pytest.mark.parametrize(("weights", "alone"), [([0.5, 0.5], True), ([0.5, 0.75], False)], ids=str)
    def test_a_total_weight_of_one_is_alone(self, weights: list[float], alone: bool) -> None:
        actual = reference.group_advantages(tensor([2, 5]), self.ONE[:2], weights=tensor(weights), singleton="zero")
        assert (actual == 0).all().item() is alone

    @pytest.mark.parametrize("singleton", ["raw", "zero"])
    @pytest.mark.parametrize("scale", ["std", "none"])
    def test_alone(self, scale: str, singleton: str) -> None:
        actual = reference.group_advantages(
            tensor([3.0, 5.0]), torch.tensor([4, -4]), scale=scale, singleton=singleton, eps=0.5
        )
        raw = [3 / 1.5, 5 / 1.5] if scale == "std" else [3.0, 5.0]
        assert actual.tolist() == pytest.approx(raw if singleton == "raw" else [0, 0])

    def test_gate_comes_before_the_singleton_rule(self) -> None:
        actual = reference.group_advantages(tensor([3.0, 5.0]), self.ONE[:2], gate=torch.tensor([True, False]), eps=0.5)
        assert actual.tolist() == [2.0, 0.0]

    def test_gated_and_weightless_rewards_are_not_read(self) -> None:
        rewards = tensor([1.0, math.nan, 3.0, math.inf]).requires_grad_()
        actual = reference.group_advantages(
            rewards, self.ONE, gate=torch.tensor([True, False, True, True]), weights=tensor([1, 1, 1, 0]), eps=0.0
        )
        assert actual.tolist() == pytest.approx([-math.sqrt(0.5), 0, math.sqrt(0.5), 0], rel=1e-14)

    @pytest.mark.parametrize("options", OPTIONS, ids=option_id)
    def test_gated_and_weightless_rewards_have_no_gradient(self, options: dict) -> None:
        rewards = tensor([1.0, math.nan, 3.0, math.inf]).requires_grad_()
        actual = reference.group_advantages(
            rewards, self.ONE, gate=torch.tensor([True, False, True, True]), weights=tensor([1, 1, 1, 0]), **options
        )
        (actual * tensor([1, 2, 3, 4])).sum().backward()
        assert rewards.grad.isfinite().all() and rewards.grad[[1, 3]].tolist() == [0, 0]


class TestNumerics:
    @pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
    @pytest.mark.parametrize("scale", ["std", "none"])
    @pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, -2.3, 1e4 + 0.1, 1e-30, 3e38])
    def test_a_constant_group_is_exactly_zero(self, baseline: str, scale: str, value: float) -> None:
        """A mean of equal float32 numbers need not equal them: the std is then noise, and dividing by it a spike."""
        for size in (2, 3, 7, 8, 17, 1000):
            for dtype in (torch.float32, F64):
                rewards = torch.full((size,), value, dtype=dtype)
                ids = torch.zeros(size, dtype=torch.int64)
                out = reference.group_advantages(rewards, ids, baseline=baseline, scale=scale, eps=0.0)
                assert out.dtype == dtype and out.eq(0).all()

    def test_a_constant_group_has_a_finite_gradient(self) -> None:
        """Its std counts as constant: the gradient of the sum of u_i A_i is (u_j - mean u) / eps."""
        rewards, upstream = tensor([0.1] * 4).requires_grad_(), tensor([1, 2, 3, 6])
        out = reference.group_advantages(rewards, torch.zeros(4, dtype=torch.int64), eps=0.25)
        (out * upstream).sum().backward()
        assert rewards.grad.tolist() == pytest.approx([-8, -4, 0, 12], rel=1e-12)

    def test_noise_of_one_rounding_stays_below_eps(self) -> None:
        """0.1 + 0.2 against 0.3 in float32: one ulp apart, which eps, and not the std, must scale."""
        rewards = torch.tensor([0.3, 0.3, 0.3, 0.30000001192092896 + 2**-25])
        assert rewards.unique().numel() == 2
        for baseline in ("mean", "leave_one_out"):
            out = reference.group_advantages(rewards, torch.zeros(4, dtype=torch.int64), baseline=baseline)
            assert 0 < out.abs().max() < 0.05

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
    def test_ten_thousand_plus_minus_one(self, dtype: torch.dtype, baseline: str) -> None:
        """In float32 a one-pass variance of these is off by more than its value."""
        rewards = torch.tensor([9999.0, 10001.0, 10000.0] * 5, dtype=dtype)
        ids = torch.zeros(15, dtype=torch.int64)
        out = reference.group_advantages(rewards, ids, baseline=baseline, ddof=0, eps=0.0)
        step = math.sqrt(1.5) * (15 / 14 if baseline == "leave_one_out" else 1)
        rounding = 3e-7 if dtype == torch.float32 else 1e-14
        assert out.tolist() == pytest.approx([-step, step, 0] * 5, rel=rounding, abs=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_rewards_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        out = reference.group_advantages(
            torch.tensor([1.0, 0.0, 0.0], dtype=dtype), torch.zeros(3, dtype=torch.int64), scale="none"
        )
        assert out.dtype == torch.float32 and out.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-7)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    def test_ids_are_only_names(self, dtype: torch.dtype) -> None:
        rewards, limits = tensor(REWARDS[:6]), torch.iinfo(dtype)
        plain = torch.tensor([0, 1, 0, 2, 1, 0], dtype=dtype)
        names = torch.tensor([limits.max, limits.min, -1], dtype=dtype)
        renamed = reference.group_advantages(rewards, names[plain])
        assert torch.equal(renamed, reference.group_advantages(rewards, plain))

    def test_nothing(self) -> None:
        rewards = torch.empty(0, requires_grad=True)
        out = reference.group_advantages(rewards, torch.empty(0, dtype=torch.int64))
        out.sum().backward()
        assert out.shape == (0,) and rewards.grad.shape == (0,)

    @pytest.mark.parametrize("options", [o for o in OPTIONS if o["eps"] and o["singleton"] == "raw"], ids=option_id)
    @pytest.mark.parametrize("rows", ["all", "gate_and_copies"])
    def test_gradcheck(self, options: dict, rows: str) -> None:
        keep = [i for i, g in enumerate(IDS) if g != 5]  # the std of a constant group has no derivative
        pick = torch.tensor(keep)
        extra = {}
        if rows != "all":
            extra = {"gate": torch.tensor(GATE)[pick], "weights": tensor(COPIES)[pick]}

        def function(rewards: Tensor) -> Tensor:
            return reference.group_advantages(rewards, torch.tensor(IDS)[pick], **options, **extra)

        assert torch.autograd.gradcheck(function, (tensor(REWARDS)[pick].requires_grad_(),))


class TestScans:
    CU = torch.tensor([0, 3, 3, 5])

    def test_returns_literal(self) -> None:
        out = reference.discounted_returns(tensor([1, 2, 3, 10, 20]), self.CU, gamma=0.5)
        assert out.tolist() == [2.75, 3.5, 3.0, 20.0, 20.0]

    def test_undiscounted_and_no_future(self) -> None:
        rewards = tensor([1, 2, 3, 10, 20])
        assert reference.discounted_returns(rewards, self.CU).tolist() == [6, 5, 3, 30, 20]
        assert reference.discounted_returns(rewards, self.CU, gamma=0.0).tolist() == rewards.tolist()

    def test_the_discount_passes_over_masked_tokens(self) -> None:
        """As if the observations were not there, whatever reward stands on them."""
        rewards = tensor([1, math.nan, 3, 10, math.inf]).requires_grad_()
        mask = torch.tensor([True, False, True, True, False])
        out = reference.discounted_returns(rewards, self.CU, gamma=0.5, mask=mask)
        assert out.tolist() == [2.5, 0, 3, 10, 0]
        out.sum().backward()
        assert rewards.grad.tolist() == [1, 0, 1.5, 1, 0]

    def test_gae_literal(self) -> None:
        """gamma 1/2, lambda 1/2; deltas 1+2-1, 2+1-4 | 0+4-2, each with half the value behind it."""
        rewards, values = tensor([1, 2, 0]), tensor([1, 4, 2])
        out = reference.gae(rewards, values, torch.tensor([0, 2, 3]), gamma=0.5, lam=0.5, bootstrap=tensor([2, 8]))
        assert out.advantages.tolist() == [2 - 0.25 * 1, -1, 2]
        assert out.returns.tolist() == [2.75, 3, 4]

    @pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
    @pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
    @pytest.mark.parametrize("bootstrapped", [False, True], ids=["ends", "truncated"])
    @pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
    def test_gae_is_the_decayed_sum_of_td_errors(self, gamma, lam, bootstrapped, masked) -> None:
        g = torch.Generator().manual_seed(5)
        lengths = [4, 0, 7, 1, 3]
        cu = [0, *itertools.accumulate(lengths)]
        r, v = (torch.randn(cu[-1], generator=g, dtype=F64) for _ in range(2))
        last = torch.randn(len(lengths), generator=g, dtype=F64) if bootstrapped else None
        mask = torch.rand(cu[-1], generator=g) > 0.4 if masked else None
        out = reference.gae(r, v, torch.tensor(cu), gamma=gamma, lam=lam, bootstrap=last, mask=mask)
        want, decay = [Fraction(0)] * cu[-1], Fraction(gamma) * Fraction(lam)
        for n, (a, b) in enumerate(itertools.pairwise(cu)):
            acting = [t for t in range(a, b) if mask is None or mask[t]]
            ahead = [Fraction(float(v[t])) for t in acting[1:]] + [Fraction(float(last[n]) if bootstrapped else 0)]
            deltas = [
                Fraction(float(r[t])) + Fraction(gamma) * x - Fraction(float(v[t]))
                for t, x in zip(acting, ahead, strict=False)
            ]
            for i, t in enumerate(acting):
                want[t] = sum(decay**k * d for k, d in enumerate(deltas[i:]))
        assert out.advantages.tolist() == pytest.approx([float(x) for x in want], rel=1e-12, abs=1e-13)
        acting = [mask is None or bool(mask[t]) for t in range(cu[-1])]
        returns = [float(x + Fraction(float(y))) if k else 0.0 for x, y, k in zip(want, v, acting, strict=True)]
        assert out.returns.tolist() == pytest.approx(returns, rel=1e-12, abs=1e-13)

    def test_masked_values_are_not_read(self) -> None:
        values = tensor([1, math.nan, 2])
        out = reference.gae(
            tensor([1, 1, 1]),
            values,
            torch.tensor([0, 3]),
            gamma=1.0,
            lam=1.0,
            mask=torch.tensor([True, False, True]),
        )
        assert out.advantages.tolist() == [1, 0, -1] and out.returns.tolist() == [2, 0, 1]

    @pytest.mark.parametrize("cu", [[0], [0, 0, 0]], ids=["no_trajectories", "empty_trajectories"])
    def test_nothing(self, cu: list[int]) -> None:
        empty, last = torch.empty(0), torch.ones(len(cu) - 1)
        out = reference.gae(empty, empty, torch.tensor(cu), bootstrap=last)
        assert out.advantages.shape == out.returns.shape == (0,)
        assert reference.discounted_returns(empty, torch.tensor(cu)).shape == (0,)

    def test_dtypes(self) -> None:
        ones = torch.ones(5, dtype=torch.bfloat16)
        assert reference.discounted_returns(ones, self.CU.int()).dtype == torch.float32
        assert reference.gae(ones.double(), ones, self.CU).advantages.dtype == F64

    @pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
    def test_gradcheck(self, masked: bool) -> None:
        g = torch.Generator().manual_seed(6)
        rewards, values = (torch.randn(5, generator=g, dtype=F64, requires_grad=True) for _ in range(2))
        last = torch.randn(3, generator=g, dtype=F64, requires_grad=True)
        mask = torch.tensor([True, False, True, True, True]) if masked else None

        def both(r: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            out = reference.gae(r, v, self.CU, gamma=0.9, lam=0.8, bootstrap=b, mask=mask)
            return *out, reference.discounted_returns(r, self.CU, gamma=0.9, mask=mask)

        assert torch.autograd.gradcheck(both, (rewards, values, last))


class TestWhiten:
    X = [2.0, -1.0, 0.5, 4.0]

    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("shift_mean", [True, False])
    @pytest.mark.parametrize("mask", [None, [True, False, True, True]], ids=["all", "masked"])
    def test_definition(self, ddof: int, shift_mean: bool, mask: list[bool] | None) -> None:
        counted = [Fraction(x) for x, k in zip(self.X, mask or [True] * 4, strict=True) if k]
        mean = sum(counted) / len(counted)
        std = math.sqrt(sum((x - mean) ** 2 for x in counted) / (len(counted) - ddof) + Fraction("1e-8"))
        whitened = iter([float(x - mean) / std + (0 if shift_mean else float(mean)) for x in counted])
        expected = [next(whitened) if k else 0 for k in mask or [True] * 4]
        actual = reference.whiten(tensor(self.X), mask=mask and torch.tensor(mask), shift_mean=shift_mean, ddof=ddof)
        assert actual.tolist() == pytest.approx(expected, rel=1e-13)

    def test_literal(self) -> None:
        """mean 2, unbiased variance 4; eps 5 makes the divisor 3."""
        x = tensor([0, 2, 4])
        assert reference.whiten(x, eps=5.0).tolist() == pytest.approx([-2 / 3, 0, 2 / 3])
        assert reference.whiten(x, eps=5.0, shift_mean=False).tolist() == pytest.approx([4 / 3, 2, 8 / 3])

    @pytest.mark.parametrize("shift_mean", [True, False])
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_one_value_and_nothing(self, ddof: int, shift_mean: bool) -> None:
        one = reference.whiten(tensor([3.0]), ddof=ddof, shift_mean=shift_mean)
        assert one.tolist() == [0.0 if shift_mean else 3.0]
        assert reference.whiten(torch.empty(0), ddof=ddof, shift_mean=shift_mean).shape == (0,)
        silent = reference.whiten(tensor([math.nan, 1]), mask=torch.tensor([False, False]), shift_mean=shift_mean)
        assert silent.tolist() == [0, 0]

    def test_large_mean_in_float32(self) -> None:
        out = reference.whiten(torch.tensor([9999.0, 10000.0, 10001.0]))
        assert out.tolist() == pytest.approx([-1, 0, 1], rel=1e-6)

    @pytest.mark.parametrize("shift_mean", [True, False])
    def test_gradcheck(self, shift_mean: bool) -> None:
        mask = torch.tensor([True, True, False, True])

        def function(x: Tensor) -> Tensor:
            return reference.whiten(x, mask=mask, shift_mean=shift_mean, ddof=0)

        assert torch.autograd.gradcheck(function, (tensor(self.X).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_magnitudes_whose_sums_and_squares_overflow(dtype: torch.dtype) -> None:
    largest, group = torch.finfo(dtype).max / 4.1, torch.zeros(6, dtype=torch.int64)
    rewards = torch.tensor([largest, -largest, 0.0] * 2, dtype=dtype)
    centred = torch.tensor([1.0, -1.0, 0.0] * 2, dtype=dtype)
    found = reference.group_advantages(rewards, group)
    torch.testing.assert_close(found, centred * 1.25**0.5, rtol=1e-6, atol=1e-6)
    found = reference.group_advantages(rewards, group, scale="none")
    torch.testing.assert_close(found / largest, centred, rtol=1e-6, atol=1e-6)


def test_whitened_equals_have_the_slope_of_eps() -> None:
    for size in (1.0, 1e19, 1e30):
        x = torch.full((2,), size, requires_grad=True)
        found = reference.whiten(x, eps=1e-8)
        found[0].backward()
        assert found.tolist() == [0, 0] and x.grad is not None
        torch.testing.assert_close(x.grad, torch.tensor([5e3, -5e3]))
