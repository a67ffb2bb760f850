"""The reference policy loss on single tokens worked by hand, its gradients, and its edges."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from trajkern import PolicyLoss, policy_loss_kinds, reference

F64 = torch.float64
LOG_2 = math.log(2)
STOPPED = ("cispo", "vespo", "dppo_tv", "dppo_kl")  # the weight of log p has no gradient
SMOOTH = [k for k in policy_loss_kinds if k not in (*STOPPED, "kl_cov", "clip_cov")]


def tensor(x) -> Tensor:
    return torch.tensor(x, dtype=F64)


def single(config: PolicyLoss, new: float, old: float, a: float, **extra: float) -> tuple[float, float]:
    """Loss of a batch of one token, and its slope in the log-prob."""
    logprobs = tensor([new]).requires_grad_()
    loss, _ = reference.policy_loss(
        logprobs,
        tensor([old]),
        tensor([a]),
        torch.tensor([0, 1]),
        config=config,
        **{k: tensor([v]) for k, v in extra.items()},
    )
    loss.backward()
    return loss.item(), logprobs.grad.item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CLIP = dict(clip_low=0.2, clip_high=0.28)
TOKEN = [  # (configuration, ratio, advantage, loss, slope); the new log-prob is -1 where the loss needs it
    pytest.param(dict(kind="grpo"), 1.0, 2.0, -2.0, -2.0, id="grpo_on_policy"),
    pytest.param(dict(kind="grpo"), 1.0, -2.0, 2.0, 2.0, id="grpo_on_policy_negative"),
    pytest.param(dict(kind="grpo"), 1.1, 2.0, -2.2, -2.2, id="grpo_inside"),
    pytest.param(dict(kind="grpo"), 1.5, 1.0, -1.28, 0.0, id="grpo_clipped_above"),
    pytest.param(dict(kind="grpo"), 1.5, -1.0, 1.5, 1.5, id="grpo_above_negative"),
    pytest.param(dict(kind="grpo"), 0.5, 1.0, -0.5, -0.5, id="grpo_below"),
    pytest.param(dict(kind="grpo"), 0.5, -1.0, 0.8, 0.0, id="grpo_clipped_below"),
    pytest.param(dict(kind="grpo"), 4.0, 0.0, 0.0, 0.0, id="grpo_no_advantage"),
    pytest.param(dict(kind="grpo", clip_dual=3.0), 4.0, -1.0, 3.0, 0.0, id="dual_clipped"),
    pytest.param(dict(kind="grpo", clip_dual=3.0), 2.9, -1.0, 2.9, 2.9, id="dual_inside"),
    pytest.param(dict(kind="grpo", clip_dual=3.0), 4.0, 1.0, -1.28, 0.0, id="dual_not_for_positive"),
    pytest.param(dict(kind="dapo"), 1.5, 1.0, -1.28, 0.0, id="dapo"),
    pytest.param(dict(kind="bnpo"), 0.5, -1.0, 0.8, 0.0, id="bnpo"),
    pytest.param(dict(kind="dr_grpo", max_length=4), 1.1, 2.0, -0.55, -0.55, id="dr_grpo_over_max_length"),
    pytest.param(dict(kind="gspo"), 1.5, 1.0, -1.28, 0.0, id="gspo"),
    pytest.param(dict(kind="luspo"), 1.1, 2.0, -2.2, -2.2, id="luspo"),
    pytest.param(dict(kind="gmpo", clip_low=0.4, clip_high=0.4), 1.25, 1.0, -1.25, -1.25, id="gmpo_inside"),
    pytest.param(dict(kind="gmpo", clip_low=0.4, clip_high=0.4), 2.0, 1.0, -math.exp(0.4), 0.0, id="gmpo_clipped"),
    pytest.param(dict(kind="gmpo", clip_low=0.3, clip_high=0.4), 0.5, -1.0, math.exp(-0.3), 0.0, id="gmpo_below"),
    pytest.param(dict(kind="gmpo", clip_low=0.3, clip_high=0.4), 2.0, -1.0, 2.0, 2.0, id="gmpo_negative_above"),
    pytest.param(dict(kind="cispo"), 1.5, 1.0, 1.28, -1.28, id="cispo_above"),
    pytest.param(dict(kind="cispo"), 0.5, -1.0, -0.8, 0.8, id="cispo_below"),
    pytest.param(dict(kind="cispo"), 1.1, 2.0, 2.2, -2.2, id="cispo_inside"),
    pytest.param(dict(kind="cispo", clip_low=1.0, clip_high=4.0), 0.5, 1.0, 0.5, -0.5, id="cispo_no_lower_clamp"),
    pytest.param(dict(kind="sapo"), 1.0, 1.0, -2.0, -1.0, id="sapo_on_policy"),
    pytest.param(dict(kind="sapo"), 1.0, -1.0, 2 / 1.05, 1.0, id="sapo_on_policy_negative"),
    pytest.param(dict(kind="sapo"), 2.0, 1.0, -2.9242343145200195, -1.5728954659318548, id="sapo_above"),
    pytest.param(
        dict(kind="sapo", sapo_tau_neg=2.0), 2.0, -1.0, 2 * sigmoid(2), 8 * sigmoid(2) * sigmoid(-2), id="sapo_below"
    ),
    pytest.param(dict(kind="vespo"), 1.0, 1.0, 1.0, -1.0, id="vespo_on_policy"),
    pytest.param(dict(kind="vespo"), 1.0, -1.0, -1.0, 1.0, id="vespo_on_policy_negative"),
    pytest.param(dict(kind="vespo"), 2.0, 1.0, 4 * math.exp(-3), -4 * math.exp(-3), id="vespo_up"),
    pytest.param(dict(kind="vespo"), 2.0, -1.0, -8 * math.exp(-2), 8 * math.exp(-2), id="vespo_down"),
    pytest.param(dict(kind="gpg"), 1.5, 2.0, 2.0, -2.0, id="gpg"),
    pytest.param(dict(kind="reinforce"), 0.1, -2.0, -2.0, 2.0, id="reinforce"),
    pytest.param(dict(kind="kl_cov", cov_coef=0.5), 2.0, 1.0, -2 + 0.5 * LOG_2, -1.5, id="kl_cov_one_token_is_chosen"),
    pytest.param(dict(kind="kl_cov", cov_coef=0.5), 0.5, 1.0, -0.5 + 0.5 * LOG_2, -1.0, id="kl_cov_below"),
    pytest.param(dict(kind="clip_cov", cov_low=-1.0, cov_high=1.0), 1.1, 1.0, 0.0, 0.0, id="clip_cov_drops"),
    pytest.param(dict(kind="clip_cov", cov_low=0.0, cov_high=1.0), 1.1, 1.0, -1.1, -1.1, id="clip_cov_strict_band"),
    pytest.param(dict(kind="clip_cov", cov_low=-1.0, cov_high=1.0), 1.5, 1.0, -1.28, 0.0, id="clip_cov_clipped_stays"),
]


@pytest.mark.parametrize(("options", "ratio", "a", "loss", "slope"), TOKEN)
def test_one_token(options: dict, ratio: float, a: float, loss: float, slope: float) -> None:
    config = PolicyLoss(**CLIP | options)
    assert single(config, -1.0, -1.0 - math.log(ratio), a) == pytest.approx((loss, slope), rel=1e-14, abs=1e-15)


@pytest.mark.parametrize(
    ("kind", "p", "q", "a", "valid"),
    [
        pytest.param("dppo_tv", 0.7, 0.5, 1.0, True, id="tv_up_inside"),
        pytest.param("dppo_tv", 0.8, 0.5, 1.0, False, id="tv_up_outside"),
        pytest.param("dppo_tv", 0.8, 0.5, -1.0, True, id="tv_up_but_pushed_down"),
        pytest.param("dppo_tv", 0.35, 0.5, -1.0, True, id="tv_down_inside"),
        pytest.param("dppo_tv", 0.25, 0.5, -1.0, False, id="tv_down_outside"),
        pytest.param("dppo_tv", 0.25, 0.5, 1.0, True, id="tv_down_but_pushed_up"),
        pytest.param("dppo_kl", 0.8, 0.5, 1.0, True, id="kl_0.2231_up_inside"),
        pytest.param("dppo_kl", 0.9, 0.5, 1.0, False, id="kl_0.5108_up_outside"),
        pytest.param("dppo_kl", 0.9, 0.5, -1.0, True, id="kl_up_but_pushed_down"),
        pytest.param("dppo_kl", 0.25, 0.5, -1.0, True, id="kl_0.1438_down_inside"),
        pytest.param("dppo_kl", 0.2, 0.5, -1.0, False, id="kl_0.2231_down_outside"),
        pytest.param("dppo_kl", 0.1, 0.5, 1.0, True, id="kl_down_but_pushed_up"),
    ],
)
def test_dppo(kind: str, p: float, q: float, a: float, valid: bool) -> None:
    """TV of two-outcome distributions is |p - q|; KL(q || p) = log(1/2) - log(p (1 - p))/2 at q = 1/2."""
    loss, slope = single(PolicyLoss(kind, **CLIP), math.log(p), math.log(q), a)
    assert (loss, slope) == pytest.approx((-a * p / q * math.log(p) * valid, -a * p / q * valid), rel=1e-14)


def test_dppo_truncates_the_ratio_at_20() -> None:
    loss, slope = single(PolicyLoss("dppo_tv", clip_high=1.0), math.log(0.5), math.log(0.001), 1.0)
    assert (loss, slope) == pytest.approx((20 * LOG_2, -20.0))


@pytest.mark.parametrize("delta", [1.28, 1.5, 3.0])
@pytest.mark.parametrize("a", [1.5, -1.5])
def test_clip_dual_is_the_two_sided_delta(delta: float, a: float) -> None:
    """TRL: -min(min(r, delta) A, clip(r) A) with delta at least 1 + clip_high."""
    config = PolicyLoss("grpo", clip_dual=delta, **CLIP)
    for ratio in (0.1, 0.79, 1.0, 1.27, 1.4, 2.9, 40.0):
        two_sided = -min(min(ratio, delta) * a, min(max(ratio, 0.8), 1.28) * a)
        assert single(config, math.log(ratio), 0.0, a)[0] == pytest.approx(two_sided, rel=1e-14)


KL = [  # (estimator, value, slope) at d = log 2 and ratio 3/2
    ("k1", LOG_2, 1.0),
    ("k2", LOG_2**2 / 2, LOG_2),
    ("k3", LOG_2 - 0.5, 0.5),
    ("k3_corrected", 1.5 * (LOG_2 - 0.5), 1.5 * (LOG_2 - 0.5) + 1.5 * 0.5),
]


@pytest.mark.parametrize(("kl", "value", "slope"), KL, ids=[x[0] for x in KL])
def test_kl_of_one_token(kl: str, value: float, slope: float) -> None:
    config = PolicyLoss("reinforce", kl=kl, kl_coef=2.0)
    loss, gradient = single(config, -1.0, -1.0 - math.log(1.5), 0.0, ref_logprobs=-1.0 - LOG_2)
    assert (loss, gradient) == pytest.approx((2 * value, 2 * slope), rel=1e-14)


@pytest.mark.parametrize("d", [1e-2, 1e-4, -1e-4, 1e-6])
def test_k3_near_zero(d: float) -> None:
    """exp(-d) + d - 1 loses 1e-16 of a number of d^2/2; expm1(-d) + d only d times that."""
    loss, slope = single(PolicyLoss("reinforce", kl_coef=1.0), d, d, 0.0, ref_logprobs=0.0)
    exact = Decimal(-d).exp() + Decimal(d) - 1
    assert loss == pytest.approx(float(exact), abs=2e-16 * abs(d), rel=0)
    assert slope == pytest.approx(-math.expm1(-d), rel=1e-14)


@pytest.mark.parametrize(
    ("correction", "w", "weight"),
    [
        ("tis", 1.5, 1.5),
        ("tis", 3.0, 2.0),
        ("tis", 0.1, 0.1),
        ("icepop", 1.5, 1.5),
        ("icepop", 3.0, 0.0),
        ("icepop", 0.1, 0.0),
        ("sequence_mask", 1.5, 1.0),
        ("sequence_mask", 3.0, 0.0),
        ("sequence_mask", 0.1, 0.0),
    ],
)
def test_sampler_correction_of_one_token(correction: str, w: float, weight: float) -> None:
    """Band [0.5, 2]. It multiplies the policy term alone: the KL of a kept token stays as it is."""
    config = PolicyLoss("reinforce", sampler_correction=correction, kl="k1", kl_coef=1.0)
    loss, slope = single(config, -1.0, -2.0, 4.0, sampler_logprobs=-2.0 - math.log(w), ref_logprobs=-1.5)
    removed = correction == "sequence_mask" and weight == 0
    assert (loss, slope) == pytest.approx((4 * weight, -4 * weight) if removed else (4 * weight + 0.5, 1 - 4 * weight))


class TestTrajectories:
    """Trajectories of 3, 0, 1 and 2 tokens; the single token is masked; advantages 1, -, 100, -2."""

    CU, MASK = torch.tensor([0, 3, 3, 4, 6]), torch.tensor([True, True, True, False, True, True])
    NEW, ADVANTAGES = tensor([-1.0, -2, -3, math.nan, -4, -5]), tensor([1, 50, 100, -2])

    def loss(self, config: PolicyLoss, old: Tensor, **others: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return reference.policy_loss(self.NEW, old, self.ADVANTAGES, self.CU, config=config, mask=self.MASK, **others)

    @pytest.mark.parametrize(
        ("aggregate", "expected"),
        [
            ("token_sum", 6 - 18),
            ("token_mean", (6 - 18) / 5),
            ("seq_mean_token_sum", (6 - 18) / 2),
            ("seq_mean_token_sum_norm", (6 - 18) / 2 / 10),
            ("seq_mean_token_mean", (2 - 9) / 2),
        ],
    )
    def test_aggregate(self, aggregate: str, expected: float) -> None:
        config = PolicyLoss("reinforce", aggregate=aggregate, max_length=10)
        new = self.NEW.clone().requires_grad_()
        loss, metrics = reference.policy_loss(new, self.NEW, self.ADVANTAGES, self.CU, config=config, mask=self.MASK)
        loss.backward()
        assert loss.item() == pytest.approx(expected) and metrics["num_tokens"] == 5
        assert new.grad[3] == 0 and (new.grad * tensor([1, 2, 3, 0, 4, 5])).sum().item() == pytest.approx(-expected)

    def test_sequence_ratios(self) -> None:
        """gspo: log-ratios (.3, .1, -.1) have mean .1, (-.6, .2) mean -.2; luspo weighs each by its length."""
        old = self.NEW - tensor([0.3, 0.1, -0.1, 9, -0.6, 0.2])
        first, second = -math.exp(0.1), 2 * math.exp(-0.2)
        for kind, expected in (("gspo", (first + second) / 2), ("luspo", (3 * first + 2 * second) / 2)):
            config = PolicyLoss(kind, clip_low=0.2, clip_high=0.2)
            loss, metrics = self.loss(config, old)
            assert loss.item() == pytest.approx(expected, rel=1e-14) and metrics["clip_fraction"] == 0
            assert metrics["ratio_max"].item() == pytest.approx(math.exp(0.1))

    def test_geometric_mean(self) -> None:
        """gmpo: (.3, .1, -.5) against an upper bound of .2, (-.6, .2) against a lower one of -.4."""
        old = self.NEW - tensor([0.3, 0.1, -0.5, 9, -0.6, 0.2])
        config = PolicyLoss("gmpo", clip_low=0.4, clip_high=0.2)
        loss, metrics = self.loss(config, old)
        expected = (-math.exp((0.2 + 0.1 - 0.5) / 3) + 2 * math.exp((-0.4 + 0.2) / 2)) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-14)
        assert metrics["clip_fraction"].item() == pytest.approx(2 / 5)

    def test_sides_of_the_clip(self) -> None:
        """Of five, A = 1 above at ratio 2, A = -2 below at 1/2 and, on neither side, at the dual clip at ratio 4."""
        old = self.NEW - tensor([2, 1, 0.5, 9, 0.5, 4]).log()
        metrics = self.loss(PolicyLoss("dapo", clip_dual=3), old)[1]
        sides = [metrics[name].item() for name in ("clip_fraction", "clip_low", "clip_high")]
        assert sides == pytest.approx([3 / 5, 1 / 5, 1 / 5])

    def test_mismatch_with_the_sampler(self) -> None:
        """w = 0.8, 1.25, 1, 4, 1/4 on the five tokens: two outside of [1/2, 2]; sums 7.3 and 19.265 of squares."""
        sampler = self.NEW - tensor([0.8, 1.25, 1, math.nan, 4, 0.25]).log()
        metrics = self.loss(PolicyLoss("dapo"), self.NEW, sampler_logprobs=sampler)[1]
        assert metrics["sampler_kl"].item() == pytest.approx((7.3 - 5) / 5)  # the logs add up to 0
        assert metrics["sampler_outside"].item() == pytest.approx(2 / 5)
        assert metrics["effective_sample_size"].item() == pytest.approx(7.3**2 / (5 * 19.265))

    def test_as_many_tokens_as_trajectories(self) -> None:
        """N = T = 2, the second trajectory empty: per trajectory unless asked otherwise."""
        args = (tensor([-1, -1]), tensor([-1, -1]), tensor([3, 7]), torch.tensor([0, 2, 2]))
        for per_token, expected in ((None, 6), (False, 6), (True, 10)):
            loss, _ = reference.policy_loss(
                *args, config=PolicyLoss("reinforce", aggregate="token_sum"), per_token=per_token
            )
            assert loss.item() == expected

    @pytest.mark.parametrize("kind", policy_loss_kinds)
    @pytest.mark.parametrize("what", ["no_tokens", "no_trajectories", "all_masked"])
    def test_an_empty_sum_is_zero(self, kind: str, what: str) -> None:
        lengths = {"no_tokens": [0, 0], "no_trajectories": [], "all_masked": [2, 1]}[what]
        total = sum(lengths)
        new = torch.full((total,), math.nan, requires_grad=True)
        config = PolicyLoss(kind, max_length=3, kl_coef=0.1, entropy_coef=0.1, clip_dual=2.0)
        loss, metrics = reference.policy_loss(
            new,
            new.detach(),
            torch.ones(len(lengths)),
            torch.tensor([0, *lengths]).cumsum(0),
            config=config,
            mask=torch.zeros(total, dtype=torch.bool),
            ref_logprobs=new.detach(),
            sampler_logprobs=new.detach(),
            entropy=new.detach(),
        )
        loss.backward()
        assert loss == 0 and new.grad.eq(0).all() and all(x == 0 for x in metrics.values())

    @pytest.mark.parametrize("kind", policy_loss_kinds)
    @pytest.mark.parametrize("correction", ["none", "tis", "icepop"])
    def test_what_is_masked_is_not_read(self, kind: str, correction: str) -> None:
        config = PolicyLoss(
            kind,
            max_length=5,
            kl="k3_corrected",
            kl_coef=0.1,
            entropy_coef=0.2,
            clip_dual=1.5,
            sampler_correction=correction,
        )
        outcomes = []
        for under_the_mask in (-0.5, math.nan):
            scored = [-(1 + i + torch.arange(6, dtype=F64)) / 7 for i in range(6)]
            new, old, per_token, ref, sampler, entropy = (torch.where(self.MASK, x, under_the_mask) for x in scored)
            new.requires_grad_(), entropy.requires_grad_()
            loss, metrics = reference.policy_loss(
                new,
                old,
                per_token,
                self.CU,
                config=config,
                mask=self.MASK,
                ref_logprobs=ref,
                sampler_logprobs=sampler,
                entropy=entropy,
            )
            loss.backward()
            outcomes.append(torch.cat([new.grad, entropy.grad, loss.detach()[None], torch.stack([*metrics.values()])]))
            assert new.grad[3] == 0 and entropy.grad[3] == 0
        assert torch.equal(*outcomes)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
    def test_dtype(self, dtype: torch.dtype) -> None:
        new = self.NEW.to(dtype).requires_grad_()
        loss, metrics = reference.policy_loss(
            new, self.NEW.to(dtype), self.ADVANTAGES.to(dtype), self.CU.int(), config=PolicyLoss(), mask=self.MASK
        )
        loss.backward()
        wide = F64 if dtype == F64 else torch.float32
        assert {x.dtype for x in (loss, *metrics.values())} == {wide} and new.grad.dtype == dtype
        assert loss.item() == pytest.approx(0.5, rel=1e-6)


class TestGradients:
    """Loss of 9 tokens in trajectories of 4, 0 and 5, no ratio near a bound."""

    CU, MASK = torch.tensor([0, 4, 4, 9]), torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1]).bool()
    OLD = tensor([-0.5, -1.5, -2.0, -0.9, -3.0, -1.1, -0.4, -0.7, -2.2])
    MOVE = tensor([0.05, 0.5, 0.1, -0.4, 0.11, -0.6, -0.1, 0.2, 0.45])
    ADVANTAGES = tensor([1.2, -0.7, 0.4, 0.9, -1.3, -0.8, 0.6, 1.1, -0.5])
    OTHERS = dict(ref_logprobs=OLD + 0.3, sampler_logprobs=OLD + MOVE.flip(0), entropy=OLD.abs())

    def loss(self, config: PolicyLoss, new: Tensor, entropy: Tensor | None = None) -> Tensor:
        others = self.OTHERS if entropy is None else self.OTHERS | {"entropy": entropy}
        return reference.policy_loss(new, self.OLD, self.ADVANTAGES, self.CU, config=config, mask=self.MASK, **others)[
            0
        ]

    @pytest.mark.parametrize(
        ("kind", "level", "kl"),
        [(k, level, "k3_corrected") for k in SMOOTH for level in ("token", "sequence")]
        + [(k, "token", "k3_corrected") for k in ("kl_cov", "clip_cov")]
        + [(k, None, kl) for k in ("dapo", "gspo") for kl in ("k1", "k2", "k3")],
    )
    def test_gradcheck(self, kind: str, level: str | None, kl: str) -> None:
        config = PolicyLoss(
            kind,
            ratio_level=level,
            kl=kl,
            kl_coef=0.3,
            entropy_coef=0.2,
            clip_dual=1.4,
            max_length=6,
            sampler_correction="tis",
            cov_fraction=0.3,
            cov_low=-1.0,
            cov_high=1.0,
        )

        def function(new: Tensor, entropy: Tensor) -> Tensor:
            return self.loss(config, new, entropy)

        inputs = ((self.OLD + self.MOVE).requires_grad_(), self.OTHERS["entropy"].clone().requires_grad_())
        assert torch.autograd.gradcheck(function, inputs)

    @pytest.mark.parametrize("kind", STOPPED)
    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_stopped_weights(self, kind: str, level: str) -> None:
        """The gradient is that of a constant times log p, the constant being loss / log p; k3 adds 1 - exp(-d)."""
        options = dict(aggregate="token_sum", ratio_level=level, clip_low=0.1, clip_high=0.1)
        new = (self.OLD + self.MOVE).requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(PolicyLoss(kind, kl_coef=0.5, **options), new), new)
        for t in range(9):
            only = torch.arange(9) == t
            advantages = torch.where(only, self.ADVANTAGES, 0)  # the other tokens still shape the sequence's ratio
            loss, _ = reference.policy_loss(
                new.detach(), self.OLD, advantages, self.CU, config=PolicyLoss(kind, **options), mask=self.MASK
            )
            d = new[t].item() - self.OTHERS["ref_logprobs"][t].item()
            expected = loss.item() / new[t].item() + 0.5 * (1 - math.exp(-d)) if self.MASK[t] else 0.0
            assert gradient[t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)

    @pytest.mark.parametrize("coefficient", [0.0, 0.25])
    def test_entropy(self, coefficient: float) -> None:
        entropy = self.OTHERS["entropy"].clone().requires_grad_()
        config = PolicyLoss("dapo", entropy_coef=coefficient)
        (gradient,) = torch.autograd.grad(self.loss(config, self.OLD, entropy), entropy)
        assert gradient.tolist() == pytest.approx([-coefficient / 7 * m for m in self.MASK.tolist()])
