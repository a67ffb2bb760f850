"""verl's worker group on a local Ray: what its workers compute by trajkern's names is written for the test to compare.

Nothing here imports trajkern: driver and workers know it by the module that ``VERL_USE_EXTERNAL_MODULES`` names.
"""

from __future__ import annotations

import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import ray
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

ESTIMATORS = ("grpo", "rloo", "opo")
LOSSES = ("vanilla", "gspo", "cispo", "kl_cov")
ROWS, LENGTH, WIDTH, V, RANKS = 6, 11, 16, 61, 2


def batch() -> SimpleNamespace:
    """Ragged rows of two prompts, the rewards at their ends."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([11, 3, 7, 1, 9, 5])
    mask = torch.arange(LENGTH) < lengths[:, None]
    rewards = torch.zeros(ROWS, LENGTH)
    rewards[torch.arange(ROWS), lengths - 1] = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.0])
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    old = -draw(ROWS, LENGTH).abs()
    return SimpleNamespace(
        mask=mask,
        rewards=rewards,
        old=old,
        new=old + 0.2 * draw(ROWS, LENGTH),
        advantages=draw(ROWS, LENGTH),
        uid=["x", "y", "x", "y", "x", "y"],
        ids=torch.randint(V, (ROWS, LENGTH + 1), generator=g),
    )


def config(**changed: Any) -> ActorConfig:
    policy = PolicyLossConfig()
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **changed)


def save_model(folder: str, tied: bool) -> None:
    """A Qwen2 of two small layers, as verl loads it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 64}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=tied))
    for x in model.parameters():
        x.data.mul_(3).add_(0.01 * torch.randn(x.shape))  # no softmax is nearly flat
    model.save_pretrained(folder)


class Tiny(torch.nn.Module):
    """A body of one layer, whose head is the one that verl calls where ``use_fused_kernels`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(V, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, V, bias=False)
        g = torch.Generator().manual_seed(1)
        for x in self.parameters():
            x.data = torch.randn(x.shape, generator=g) / 3

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # [B, L+1]
        hidden = torch.tanh(self.layer(self.embedding(ids[:, :-1])))
        return FusedLinearForPPO()(hidden, self.lm_head.weight, ids[:, 1:], temperature=0.8)


def computed() -> tuple[list[str], list[Tensor]]:
    """Who stands behind the names, and what estimators, losses and head give, with their gradients."""
    b, found = batch(), []
    names = [get_adv_estimator_fn(f"trajkern_{x}").__module__ for x in ESTIMATORS]
    names += [get_policy_loss_fn(f"trajkern_{x}").__module__ for x in LOSSES] + [FusedLinearForPPO.__module__]
    given = {"token_level_rewards": b.rewards, "response_mask": b.mask, "index": b.uid}
    for name in ESTIMATORS:
        found += get_adv_estimator_fn(f"trajkern_{name}")(**given)
    for name in LOSSES:
        new = b.new.clone().requires_grad_()
        loss, _ = get_policy_loss_fn(f"trajkern_{name}")(b.old, new, b.advantages, b.mask, "token-mean", config())
        loss.backward()
        found += [loss.detach(), new.grad]
    model = Tiny()
    logprobs, entropy = model(b.ids)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    found += [logprobs.detach(), entropy.detach(), *(x.grad for x in model.parameters())]
    return names, found


def step(model: torch.nn.Module, rows: slice, ranks: int) -> Tensor:
    """verl's loss of a rank's rows and its gradients; FSDP takes the mean of ranks, verl's counts are of all rows."""
    b = batch()
    logprobs, _ = model(b.ids[rows])
    of_all = {"dp_size": ranks, "batch_num_tokens": int(b.mask.sum()), "global_batch_size": ROWS}
    of_rank = config(global_batch_info=of_all)
    loss, _ = get_policy_loss_fn("trajkern_vanilla")(
        logprobs.detach() - 0.1, logprobs, b.advantages[rows], b.mask[rows], "token-mean", of_rank
    )
    loss.backward()
    return loss.detach()


class Policy(Worker):
    """A worker as verl's own are: a rank of a process group, whose methods the driver calls on all."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=self.rank, world_size=self.world_size)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def computed(self) -> tuple[list[str], list[Tensor]]:
        return computed()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sharded_step(self) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of a sharded model, each rank with rows of its own."""
        model = Tiny()
        fully_shard(model.layer)
        fully_shard(model)
        share = ROWS // self.world_size
        loss = step(model, slice(self.rank * share, (self.rank + 1) * share), self.world_size)
        grads = [x.grad for x in model.parameters()]
        return loss, [x.full_tensor() if isinstance(x, DTensor) else x for x in grads]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def trained(self, folder: str, loss_mode: str, fused: bool) -> tuple[dict[str, float], list[Tensor]]:
        """A step of verl's own training worker, this process being its rank."""
        from tests.integrations import verl_engine

        return verl_engine.trained(folder, self.rank, self.world_size, loss_mode, fused)


def main(path: str) -> None:
    torch.set_num_threads(1)
    models = {tied: f"{path}.tied.{tied}" for tied in (True, False)}
    for tied, folder in models.items():
        save_model(folder, tied)
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=RANKS, num_gpus=0, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=folder)
        try:
            pool = RayResourcePool([RANKS], use_gpu=False, max_colocate_count=1)
            group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=RayClassWithInitArgs(ray.remote(Policy)))
            workers, sharded = group.computed(), group.sharded_step()
            steps = {}
            for ours in (False, True):  # in this order, as verl's fused forward replaces that of the model's class
                mode = "trajkern_vanilla" if ours else "vanilla"
                steps |= {(tied, ours): group.trained(folder, mode, ours) for tied, folder in models.items()}
        finally:
            ray.shutdown()
    model = Tiny()
    loss = step(model, slice(None), 1)
    whole = loss, [x.grad for x in model.parameters()]
    found = {"here": computed(), "workers": workers, "sharded": sharded, "whole": whole, "steps": steps}
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
