"""The loss kinds: the one table of what each is, what it reads, and where a tree is exact for it.

Plain data. The order of every list here is the order of the kernels' enumerations and parameters, in C++ and in Triton.
"""

from __future__ import annotations

from typing import NamedTuple

# What a configuration chooses from.
RATIO_LEVELS = ("token", "sequence")
AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_corrected")
SAMPLER_CORRECTIONS = ("none", "tis", "icepop", "sequence_mask")

LOG_RATIO_BOUND = 20.0  # of a clamped log-ratio: exp of it is finite in float32, so 0 * inf cannot arise
SAMPLER_BAND = (0.5, 2.0)  # outside of it a ratio to the sampler counts as "sampler_outside"


class Metric(NamedTuple):
    """A number that is told with the loss, of the tokens that take part, each as often as it has rollouts: n of them.

    Args:
        reduction: what it is of the tokens' values x, of REDUCTIONS; 0 where n is 0.
        needs: the argument without which it is NaN.
        of_ratio: whether the values are of the clipped ratio, so a rollout's at ratio level "sequence".
    """

    reduction: str = "mean"
    needs: str | None = None
    of_ratio: bool = False


# sum x / n; the largest x; sum x; (sum x)^2 / (n sum x^2)
REDUCTIONS = ("mean", "largest", "sum", "effective_share")
METRICS = {
    "clip_fraction": Metric(of_ratio=True),
    "clip_low": Metric(of_ratio=True),
    "clip_high": Metric(of_ratio=True),
    "approx_kl": Metric(),
    "ratio_mean": Metric(of_ratio=True),
    "ratio_max": Metric("largest", of_ratio=True),
    "entropy": Metric(needs="entropy"),
    "kl": Metric(needs="ref_logprobs"),
    "sampler_kl": Metric(needs="sampler_logprobs"),
    "sampler_outside": Metric(needs="sampler_logprobs"),
    "effective_sample_size": Metric("effective_share", needs="sampler_logprobs"),
    "num_tokens": Metric("sum"),
}


WITH_SUPERVISED = (*METRICS, "supervised_loss")  # of a loss with weights for a cross-entropy


def computed(*given: str) -> tuple[bool, ...]:
    """Of each metric, whether it is a number where ``given`` are the arguments that are not None."""
    known = {None, *given}
    return tuple(metric.needs in known for metric in METRICS.values())


# The numbers that the kernels take, named as PolicyLoss names them.
PARAMETERS = (
    "clip_low",
    "clip_high",
    "clip_dual",
    "kl_coef",
    "entropy_coef",
    "max_length",
    "sampler_low",
    "sampler_high",
    "sapo_tau_pos",
    "sapo_tau_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "cov_coef",
)
# The choices that the kernels take, before them whether advantages are per token and which gradients are wanted.
OPTIONS = ("form", "ratio_level", "kl", "aggregate", "sampler_correction", "per_token", "need_logprobs", "need_entropy")

# form, the term of a token that a kernel computes -> the parameters that it reads
FORMS = {
    "clip": ("clip_low", "clip_high", "clip_dual"),
    "cispo": ("clip_low", "clip_high"),
    "sapo": ("sapo_tau_pos", "sapo_tau_neg"),
    "reinforce": (),
    "dppo_tv": ("clip_low", "clip_high"),
    "dppo_kl": ("clip_low", "clip_high"),
    "kl_cov": ("cov_coef",),
    "gmpo": ("clip_low", "clip_high"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}


class Kind(NamedTuple):
    """A loss kind.

    Args:
        ratio_level: where the configuration names none, of RATIO_LEVELS.
        aggregate: likewise, of AGGREGATES.
        form: the term that a kernel computes, of FORMS.
        selects: the parameters by which it chooses tokens by their covariance over the whole batch; none: it does not.
        by_trajectory: whether a token's term reads its trajectory's statistics whatever the ratio level.
        in_tree: the ratio levels at which sums over the leaves below a token give the loss exactly.
    """

    ratio_level: str
    aggregate: str
    form: str
    selects: tuple[str, ...] = ()
    by_trajectory: bool = False
    in_tree: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The options of PolicyLoss that this kind has and others may not."""
        return FORMS[self.form] + self.selects


_TOKEN, _EITHER = ("token",), ("token", "sequence")
_BAND = ("cov_fraction", "cov_low", "cov_high")

KINDS = {
    "grpo": Kind("token", "seq_mean_token_mean", "clip", in_tree=_EITHER),
    "dapo": Kind("token", "token_mean", "clip", in_tree=_EITHER),
    "bnpo": Kind("token", "token_mean", "clip", in_tree=_EITHER),
    "dr_grpo": Kind("token", "seq_mean_token_sum_norm", "clip", in_tree=_EITHER),
    "gspo": Kind("sequence", "seq_mean_token_mean", "clip", in_tree=_EITHER),
    "gmpo": Kind("token", "seq_mean_token_mean", "gmpo", by_trajectory=True),
    "cispo": Kind("token", "token_mean", "cispo", in_tree=_TOKEN),
    "sapo": Kind("token", "seq_mean_token_mean", "sapo", in_tree=_EITHER),
    "luspo": Kind("sequence", "seq_mean_token_sum", "clip", in_tree=_EITHER),
    "vespo": Kind("token", "token_mean", "vespo", by_trajectory=True),
    "gpg": Kind("token", "token_mean", "reinforce", in_tree=_TOKEN),
    "reinforce": Kind("token", "token_mean", "reinforce", in_tree=_TOKEN),
    "dppo_tv": Kind("token", "token_mean", "dppo_tv", in_tree=_TOKEN),
    "dppo_kl": Kind("token", "token_mean", "dppo_kl", in_tree=_TOKEN),
    "kl_cov": Kind("token", "token_mean", "kl_cov", selects=("cov_fraction",)),
    "clip_cov": Kind("token", "token_mean", "clip", selects=_BAND),
}
