"""Micro-batches as slime and miles hand them out, and what their own functions compute of them, in plain torch.

The formulas were read from slime's slime/backends/megatron_utils/loss.py and slime/utils/ppo_utils.py at commit
624b824a898ab0ec1fcb4d373004c7f3852bf515 (0.3.1), and from miles/backends/training_utils/loss_hub/ at commit
31f1ca961a94cb860cec3b2dea34ec332bfa8f76 (0.1.0), and are written anew: a sample at a time, in float64.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

TOTALS, RESPONSES, ROLLOUTS = [7, 5, 9, 4, 6, 3], [4, 2, 6, 0, 3, 2], [0, 0, 1, 2, 3, 4]
FULLY_MASKED = 5
SLIME = {
    "advantage_estimator": "grpo",
    "calculate_per_token_loss": False,
    "context_parallel_size": 1,
    "custom_pg_loss_reducer_function_path": None,
    "custom_tis_function_path": None,
    "entropy_coef": 0.0,
    "eps_clip": 0.1,
    "eps_clip_c": None,
    "eps_clip_high": 0.2,
    "get_mismatch_metrics": False,
    "kl_loss_coef": 0.3,
    "kl_loss_type": "k1",
    "opsm_delta": 0.02,
    "rollout_temperature": 0.8,
    "rollout_top_p": 1.0,
    "tensor_model_parallel_size": 1,
    "tis_clip": 1.2,
    "tis_clip_low": 0.8,
    "use_kl_loss": False,
    "use_opsm": False,
    "use_rollout_logprobs": False,
    "use_tis": False,
    "use_unbiased_kl": False,
}
MILES = SLIME | {
    "observe_training_entropy": False,
    "qkv_format": "thd",
    "skip_actor_forward_only": False,
    "true_on_policy_mode": False,
}


def micro_batch(seed: int, vocabulary: int = 11) -> tuple[dict[str, Any], Tensor]:
    """(batch, logits ``[1, T, V]``): ragged samples, two of one rollout, one without a response, one all masked."""
    g = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(n, generator=g) < 0.75).int() for n in RESPONSES]
    masks[FULLY_MASKED].zero_()
    masks[0][0] = 1
    sums = torch.tensor(
        [float(sum(int(m.sum()) for m, r in zip(masks, ROLLOUTS, strict=True) if r == x)) for x in ROLLOUTS]
    )
    tokens = [torch.randint(vocabulary, (n,), generator=g) for n in TOTALS]
    logits = torch.randn(1, sum(TOTALS) + 3, vocabulary, generator=g)

    def around(scale: float) -> list[Tensor]:
        near = log_probs({"unconcat_tokens": tokens}, logits.double(), 0.8)
        return [(x + scale * torch.randn(x.shape, generator=g)).float().clamp(max=-1e-3) for x in near]

    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": list(TOTALS),
        "response_lengths": list(RESPONSES),
        "loss_masks": masks,
        "rollout_mask_sums": list(sums),
        "advantages": [torch.randn(n, generator=g) for n in RESPONSES],
        "log_probs": around(0.2),
        "ref_log_probs": around(0.4),
        "rollout_log_probs": around(0.3),
        "opd_reverse_kl": None,
    }
    for name in ("advantages", "log_probs", "ref_log_probs", "rollout_log_probs"):  # nobody reads what is masked
        batch[name] = [torch.where(m != 0, x, torch.nan) for x, m in zip(batch[name], masks, strict=True)]
    return batch, logits


def log_probs(batch: dict[str, Any], logits: Tensor, temperature: float, entropy: bool = False) -> list[Tensor]:
    found, end = [], 0
    for tokens, total, response in zip(batch["unconcat_tokens"], TOTALS, RESPONSES, strict=True):
        end += total
        logp = (logits[0, end - response - 1 : end - 1] / temperature).log_softmax(-1)
        last = tokens[total - response :]
        found.append(-(logp.exp() * logp).sum(-1) if entropy else logp.gather(-1, last[:, None])[:, 0])
    return found


def reducer(batch: dict[str, Any], per_token: bool, masks: list[Tensor] | None = None):
    """The hosts' ``sum_of_sample_mean``."""

    def summed(x: Tensor) -> Tensor:
        parts = []
        own = batch["loss_masks"] if masks is None else masks
        for x_n, mask, of_rollout in zip(x.split(RESPONSES), own, batch["rollout_mask_sums"], strict=True):
            total = torch.where(mask != 0, x_n, 0).sum()
            parts.append(total if per_token else total / max(float(of_rollout), 1))
        return sum(parts)

    return summed


def joined(batch: dict[str, Any], name: str) -> Tensor:
    """A field ``[R]`` in float64, 0 under the mask."""
    parts = zip(batch[name], batch["loss_masks"], strict=True)
    return torch.cat([torch.where(m != 0, x, 0) for x, m in parts]).double()


def kl_of(kind: str, d: Tensor) -> Tensor:
    return {"k1": d, "k2": d**2 / 2}.get(kind, (-d).exp() - 1 + d)


def sample_means(batch: dict[str, Any], x: Tensor) -> list[Tensor]:
    parts = zip(x.split(RESPONSES), batch["loss_masks"], strict=True)
    return [(x_n * m).sum() / max(int(m.sum()), 1) for x_n, m in parts]


def corrected(args: Namespace, batch: dict[str, Any], w: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """(factor, masks, changed) of the correction that the options name."""
    kind = (args.custom_tis_function_path or "tis").rpartition(".")[2]
    low, high, masks = args.tis_clip_low, args.tis_clip, batch["loss_masks"]
    if kind == "sequence_mask":
        inside = [bool(low <= x.exp() <= high) for x in sample_means(batch, w.log())]
        dropped = torch.cat([torch.full((n,), float(not keep)) for n, keep in zip(RESPONSES, inside, strict=True)])
        return torch.ones_like(w), [m * keep for m, keep in zip(masks, inside, strict=True)], dropped.double()
    factor = w.clamp(low, high) if kind in ("tis", "vanilla_tis_function") else w * ((w >= low) & (w <= high))
    return factor, masks, (factor != w).double()


def policy_term(args: Namespace, ratio: Tensor, advantages: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, whether it is clipped) of each token, ``compute_policy_loss`` and ``compute_cispo_loss``."""
    low, high = 1 - args.eps_clip, 1 + args.eps_clip_high
    if args.advantage_estimator == "cispo":
        loss = -ratio.clamp(low, high).detach() * advantages * new
        return loss, (ratio.clamp(low, high) != ratio).double()
    plain, bounded = -ratio * advantages, -ratio.clamp(low, high) * advantages
    loss = torch.maximum(plain, bounded)
    if args.eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(-args.eps_clip_c * advantages, loss), loss)
    return loss, (bounded > plain).double()


def expected(args: Namespace, batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of ``policy_loss_function``, of logits in float64."""
    miles, per_token = hasattr(args, "qkv_format"), args.calculate_per_token_loss
    new, advantages = torch.cat(log_probs(batch, logits, args.rollout_temperature)), joined(batch, "advantages")
    fresh = args.skip_actor_forward_only if miles else not batch["log_probs"]
    train = new.detach() if fresh else joined(batch, "log_probs")
    old = joined(batch, "rollout_log_probs") if args.use_rollout_logprobs else train
    mean = first = reducer(batch, per_token)
    masks = torch.cat(batch["loss_masks"])
    old, train = (torch.where(masks != 0, x, new.detach()) for x in (old, train))
    kl = old - new
    means = sample_means(batch, kl)
    if args.advantage_estimator == "gspo":
        kl = torch.cat([x.expand(n) for x, n in zip(means, RESPONSES, strict=True)])
    ratio = (-kl).exp()
    loss, clip = policy_term(args, ratio, advantages, new)
    metrics = {}
    if args.use_opsm:
        parts = zip(advantages.split(RESPONSES), means, batch["loss_masks"], strict=True)
        out = [((a < 0) & (x > args.opsm_delta)).double() for a, x, _ in parts]
        loss = loss * (1 - torch.cat(out))
        metrics["opsm_clipfrac"] = sum(
            x.sum() / max(int(m.sum()), 1) for x, m in zip(out, batch["loss_masks"], strict=True)
        )
    if args.use_tis or args.get_mismatch_metrics:
        rollout = torch.where(masks != 0, joined(batch, "rollout_log_probs"), train)
        w = (train - rollout).exp()
        factor, narrowed, changed = corrected(args, batch, w)
        loss, mean = loss * factor, reducer(batch, per_token, narrowed)
        metrics |= {
            "tis": first(w),
            "tis_clipfrac": first(changed),
            "tis_abs": first((w - 1).abs()),
            "ois": first(ratio),
        }
    entropy = mean(torch.cat(log_probs(batch, logits, args.rollout_temperature, entropy=True)))
    metrics |= {"pg_loss": mean(loss), "pg_clipfrac": mean(clip), "ppo_kl": mean(kl)}
    metrics["entropy_loss"] = entropy if args.entropy_coef or not miles else torch.zeros(())
    total = metrics["pg_loss"] - args.entropy_coef * entropy
    if args.use_kl_loss:
        d = torch.where(masks != 0, new - joined(batch, "ref_log_probs"), 0)
        to_ref = kl_of(args.kl_loss_type, d) * ((new - old).exp() if args.use_unbiased_kl else 1)
        metrics["kl_loss"] = mean(to_ref.clamp(-10, 10) if args.kl_loss_type == "low_var_kl" else to_ref)
        total = total + args.kl_loss_coef * metrics["kl_loss"]
    if batch["rollout_log_probs"]:
        base = new if args.use_rollout_logprobs and not miles else old
        metrics["train_rollout_logprob_abs_diff"] = mean((base - joined(batch, "rollout_log_probs")).abs())
        if miles:
            metrics["train_rollout_kl"] = mean(kl_of("k3", joined(batch, "rollout_log_probs") - old).clamp(-10, 10))
    if miles:
        shares = []
        for r, m in zip(ratio.split(RESPONSES), batch["loss_masks"], strict=True):
            n, r = max(int(m.sum()), 1), r * m
            shares.append(r.sum() ** 2 / (n * (r**2).sum().clamp_min(1e-8)) * (n if per_token else 1))
        metrics["ess_ratio"] = sum(shares)
    return total, {"loss": total.detach(), **{name: x.detach() for name, x in metrics.items()}}
