"""Cases of the policy loss: GRPO with KL over a packed batch, and a call on tiny input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._bench.case import BARE, Function, Problem, Target, TimedCase, with_compiled
from trajkern.testing.numerics import Outcome

CONFIG = tk.PolicyLoss("grpo", kl="k3", kl_coef=0.04)
STREAMS = tk.PolicyLoss("dapo", kl="k3", kl_coef=0.04)


def _grpo_form(trajectory: Tensor, weights: Tensor) -> Function:
    """The clipped objective with k3, each token weighted by its share of the mean.

    In its favour: it is given each token's trajectory and its weight mask / (N * length), computes no metric, clamps no
    log-ratio and takes no care of what stands under the mask.
    """

    def form(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor, **_) -> Outcome:
        a = advantages[trajectory]
        ratio = (logprobs - old_logprobs).exp()
        policy = -torch.minimum(ratio * a, ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high) * a)
        d = ref_logprobs - logprobs
        kl = d.exp() - d - 1
        return {"loss": ((policy + CONFIG.kl_coef * kl) * weights).sum()}

    return form


def problem(tokens: int, trajectories: int, *, backward: bool) -> Callable[[str], Problem]:
    """Trajectories of random lengths, 70% of the tokens scored, log-probs a step away from the old policy."""

    def make(device: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        cuts = (torch.randperm(tokens - 1, generator=generator)[: trajectories - 1] + 1).sort().values.tolist()
        cu_seqlens = torch.tensor([0, *cuts, tokens])
        trajectory = torch.repeat_interleave(torch.arange(trajectories), cu_seqlens.diff())
        mask = torch.rand(tokens, generator=generator) > 0.3
        old = -torch.rand(tokens, generator=generator) * 4
        inputs: dict[str, Any] = {
            "logprobs": old + 0.1 * torch.randn(tokens, generator=generator),
            "old_logprobs": old,
            "advantages": torch.randn(trajectories, generator=generator),
            "cu_seqlens": cu_seqlens,
            "config": CONFIG,
            "mask": mask,
            "ref_logprobs": old + 0.1 * torch.randn(tokens, generator=generator),
        }
        inputs = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        return Problem(
            op="policy_loss",
            inputs=inputs,
            rivals=with_compiled(_grpo_form(trajectory.to(device), token_weights(mask, cu_seqlens).to(device))),
            bare=torch.stack([inputs["logprobs"]] * 2).clone,  # three arrays read and one written move as much
            bytes=4 * inputs["logprobs"].nbytes + mask.nbytes,
            grad=True,
            upstream={"loss": torch.ones((), device=device)} if backward else {},
        )

    return make


def _calls_of_their_own(logprobs: Tensor, mask: Tensor, kl_weights: Tensor, **inputs: Any) -> Outcome:
    """The policy's term, the cross-entropy and the KL, each a call; in its favour, the KL's weights are 0 or 1."""
    supervised, ref_logprobs = inputs["supervised_weights"], inputs["ref_logprobs"]
    old, advantages, cu_seqlens = inputs["old_logprobs"], inputs["advantages"], inputs["cu_seqlens"]
    config = tk.PolicyLoss("dapo")
    loss, _ = tk.policy_loss(logprobs, old, advantages, cu_seqlens, config=config, mask=mask)
    plain = tk.PolicyLoss("reinforce")
    demonstrated = supervised != 0
    loss = loss + tk.policy_loss(logprobs, None, supervised, cu_seqlens, config=plain, mask=demonstrated)[0]
    plain, still = tk.PolicyLoss("reinforce", kl="k3", kl_coef=STREAMS.kl_coef), torch.zeros_like(advantages)
    of_kl = {"config": plain, "mask": kl_weights != 0, "ref_logprobs": ref_logprobs}
    return {"loss": loss + tk.policy_loss(logprobs, None, still, cu_seqlens, **of_kl)[0]}


def _terms_in_torch(logprobs: Tensor, kl_weights: Tensor, **inputs: Any) -> Outcome:
    """The policy's term in a call, the others in plain torch beside it."""
    supervised, ref_logprobs = inputs.pop("supervised_weights"), inputs.pop("ref_logprobs")
    loss, _ = tk.policy_loss(logprobs, **inputs | {"config": tk.PolicyLoss("dapo")})
    loss = loss - (supervised * logprobs).sum() / (supervised != 0).sum()
    d = ref_logprobs - logprobs
    return {"loss": loss + STREAMS.kl_coef * (kl_weights * (d.exp() - d - 1)).sum() / (kl_weights != 0).sum()}


def streams(tokens: int, trajectories: int) -> Callable[[str], Problem]:
    """A fifth of the tokens demonstrated, half of them with a KL; the bare pass is the call without these terms."""

    def make(device: str) -> Problem:
        flat, generator = problem(tokens, trajectories, backward=True)("cpu").inputs, torch.Generator().manual_seed(1)
        draw = torch.rand(2, tokens, generator=generator)
        weights = {"supervised_weights": torch.where(draw[0] < 0.2, 0.5 + draw[1], 0), "kl_weights": draw[1].round()}
        inputs = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in (flat | weights).items()}
        inputs["config"] = STREAMS
        alone: dict[str, Any] = {k: x for k, x in inputs.items() if k not in (*weights, "ref_logprobs")}
        alone |= {"config": tk.PolicyLoss("dapo"), "logprobs": inputs["logprobs"].clone().requires_grad_()}
        return Problem(
            op="policy_loss",
            inputs=inputs,
            rivals={"eager": _terms_in_torch, "calls": _calls_of_their_own},
            bare=lambda: tk.policy_loss(**alone),
            bytes=6 * inputs["logprobs"].nbytes + inputs["mask"].nbytes,
            grad=True,
        )

    return make


def token_weights(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = list(pairwise(cu_seqlens.tolist()))
    counts = [mask[a:b].sum() for a, b in bounds]
    scored = sum(bool(n) for n in counts)
    return torch.cat([mask[a:b] / (n.clamp_min(1) * scored) for (a, b), n in zip(bounds, counts, strict=True)])


CASES = (
    TimedCase(
        "policy_loss",
        "forward + backward, grpo with KL",
        "1,048,576 tokens, 1,024 trajectories",
        problem(2**20, 1024, backward=True),
        targets=(Target("fast", 8, "eager"), Target("fast", 2, "torch.compile")),
    ),
    TimedCase(
        "policy_loss",
        "forward with grad, dapo with a cross-entropy and a KL of own weights; the bare pass is dapo alone",
        "32,768 tokens, 64 trajectories",
        streams(32_768, 64),
        targets=(Target("times", 1.3, BARE), Target("fast", 2, "eager")),
    ),
    TimedCase(
        "policy_loss",
        "forward with grad, grpo with KL",
        "32 tokens, 4 trajectories",
        problem(32, 4, backward=False),
        targets=(Target("seconds", 40e-6),),
        host=True,
    ),
    TimedCase(
        "policy_loss",
        "forward + backward, grpo with KL",
        "32 tokens, 4 trajectories",
        problem(32, 4, backward=True),
        host=True,
    ),
)
