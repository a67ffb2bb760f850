"""verl's setup module: trajkern's estimators, losses, head and a credit, in every process that imports verl.

verl looks functions up in its driver and in its Ray workers, and imports the modules of ``VERL_USE_EXTERNAL_MODULES``
wherever it is imported. So this file is all there is to install, from the folder that it lies in::

    PYTHONPATH=. VERL_USE_EXTERNAL_MODULES=verl_setup \\
    python -m verl.trainer.main_ppo algorithm.adv_estimator=trajkern_credit \\
        actor_rollout_ref.actor.policy_loss.loss_mode=trajkern_vanilla actor_rollout_ref.model.use_fused_kernels=True

with your data and model behind it. ``python examples/verl_setup.py`` imports verl in that way, without a cluster or a
GPU, and holds what verl's look-ups now give beside verl's own functions, on one batch of 256 answers of 512 tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern import credit

# Each prompt's answers against each other, and half of what each of their turns was worth (verl's turn_scores).
SPEC = credit.outcome() + 0.5 * credit.spans("turn")
PROMPTS, ANSWERS, LENGTH = 32, 8, 512


def register() -> None:
    from trajkern.integrations import verl

    verl.register(credit=SPEC)
    verl.enable_head()


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    """The first value that is returned, and the milliseconds of the fastest of ten calls."""
    took = []
    for _ in range(10):
        start = time.perf_counter()
        values = function(*args, **kwargs)
        took.append(time.perf_counter() - start)
    return values[0], 1000 * min(took)


def show() -> dict[str, float]:
    """The largest difference of each function's values, as a share of the largest value."""
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_setup"  # before the first import of verl
    try:
        from verl.trainer.ppo import core_algos as verl
        from verl.workers.config.actor import ActorConfig, PolicyLossConfig
    except ModuleNotFoundError as error:
        raise SystemExit(f"this example needs {error.name}: pip install verl") from None

    names = [name for name in verl.ADV_ESTIMATOR_REGISTRY if name.startswith("trajkern_")]
    losses = [name for name in verl.POLICY_LOSS_REGISTRY if name.startswith("trajkern_")]
    print(f"verl knows {len(names)} estimators and {len(losses)} losses of trajkern, trajkern_credit among them")

    rows, g = PROMPTS * ANSWERS, torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.randint(LENGTH // 4, LENGTH, (rows, 1), generator=g)
    rewards = torch.zeros(rows, LENGTH)
    rewards[torch.arange(rows), mask.sum(1) - 1] = torch.randint(2, (rows,), generator=g).float()  # at the last token
    prompt = torch.arange(PROMPTS).repeat_interleave(ANSWERS).numpy()
    old = -torch.rand(rows, LENGTH, generator=g)
    new = old + 0.1 * torch.randn(rows, LENGTH, generator=g)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig())

    def loss(name: str) -> tuple[Tensor, float]:
        return timed(verl.get_policy_loss_fn(name), old, new, advantages, mask, "token-mean", config)

    def estimate(name: str) -> tuple[Tensor, float]:
        return timed(verl.get_adv_estimator_fn(name), rewards, mask, index=prompt)

    advantages, apart = estimate("grpo")[0], {}
    for name, call in (("grpo", estimate), ("rloo", estimate), ("vanilla", loss), ("gspo", loss)):
        (theirs, slow), (ours, fast) = call(name), call(f"trajkern_{name}")
        apart[name] = float((ours - theirs).abs().max() / theirs.abs().max())
        print(
            f"{name:<8} verl {slow:7.2f} ms   trajkern {fast:7.2f} ms   apart by {apart[name]:.0e} of the largest value"
        )
    return apart


if __name__ == "__main__":
    show()
else:
    register()
