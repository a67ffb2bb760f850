"""Two ranks of gloo, each with a share of a slime batch: the advantages of each are written for the test to compare."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.integrations import slime_batches as host
from trajkern.integrations import slime

SHARES = ([0, 3, 5, 4], [2, 1])  # where each rank's samples stand in the whole batch


def rollout_data(places: list[int]) -> dict[str, Any]:
    """What slime ships to the rank of these samples, of two prompts of three samples each."""
    batch, _ = host.micro_batch(8)
    of_all = {"tokens": batch["unconcat_tokens"], "truncated": [0, 1, 0, 1, 0, 0], "rollout_ids": [4, 5, 6, 7, 8, 9]}
    of_all["teacher_log_probs"] = [torch.where(m != 0, x, 0) + 0.3 for x, m in _logprobs(batch)]
    fields = ("total_lengths", "response_lengths", "loss_masks", "log_probs", "rollout_log_probs")
    of_all |= {name: batch[name] for name in fields}
    mine: dict[str, Any] = {name: [x[place] for place in places] for name, x in of_all.items()}
    return mine | {"partition": list(places), "raw_reward": [1.0, 0.0, 0.5, -1.0, 2, True], "values": None}


def _logprobs(batch: dict[str, Any]) -> Any:
    return zip(batch["log_probs"], batch["loss_masks"], strict=True)


def options(**changed: Any) -> Namespace:
    known = {"kl_coef": 0.0, "grpo_std_normalization": True, "normalize_advantages": False}
    known |= {"n_samples_per_prompt": 3, "rollout_batch_size": 2}
    return Namespace(**(host.SLIME | known | changed))


def _rank(rank: int, folder: str, *specs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    megatron = ModuleType("megatron.core.parallel_state")
    megatron.get_data_parallel_group = lambda with_context_parallel: dist.group.WORLD  # type: ignore[attr-defined]
    sys.modules |= {"megatron": ModuleType("megatron"), "megatron.core": ModuleType("megatron.core")}
    sys.modules[megatron.__name__] = megatron
    found = {}
    for spec in specs:
        data = rollout_data(SHARES[rank])
        slime.advantages(options(trajkern_credit=spec, calculate_per_token_loss=True), data)
        found[spec] = data["advantages"], data["loss_masks"]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(_rank, args=tuple(sys.argv[1:]), nprocs=2)
