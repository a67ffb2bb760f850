"""A step of verl's own ``TrainingWorker`` with its FSDP engine on a CPU, which is made a platform of verl's here.

verl is imported by whoever imports this, in a process of its own; nothing here imports trajkern.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA

from tests.integrations.conftest import _StandIn


class CPU(PlatformCUDA):
    """What verl asks of a device, answered by a CPU."""

    device_name, vendor_name = "cpu", "none"  # type: ignore[assignment]

    @property
    def device_module(self) -> ModuleType:
        numbers = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
        return MagicMock(mem_get_info=lambda: (0, 0), **dict.fromkeys(numbers, lambda: 0))

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def communication_backend_name(self) -> str:
        return "gloo"

    def empty_cache(self) -> None: ...


class _Absent:
    """Found last: stand-ins for what serves verl's rollouts, which a training worker imports and does not use."""

    packages = ("uvicorn", "fastapi", "zmq", "cachetools", "aiohttp", "torchdata", "pynvml")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


sys.meta_path.append(_Absent())  # type: ignore[arg-type]
set_platform(CPU())
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # under which verl registers its FSDP engine

from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig  # noqa: E402
from verl.workers.config.actor import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

monkey_patch.is_trl_available = lambda: False  # verl patches a class that newer versions of TRL do not have
V = 61
PROMPTS, RESPONSES = (3, 2, 4, 2), (5, 1, 7, 3)


def share(rank: int, ranks: int) -> TensorDict:
    """A rank's rows of the batch, jagged, as verl's trainers hand them to a worker."""
    g = torch.Generator().manual_seed(1)
    rows: list[dict[str, Tensor]] = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.randint(V, (prompt + response,), generator=g)
        mask = (torch.rand(response, generator=g) < 0.8).long()
        mask[0] = 1
        old, advantages = (torch.randn(response, generator=g) for _ in range(2))
        rows.append(
            {
                "input_ids": ids,
                "position_ids": torch.arange(prompt + response),
                "prompts": ids[:prompt],
                "responses": ids[prompt:],
                "response_mask": mask,
                "loss_mask": mask,
                "old_log_probs": -3 + 0.3 * old,
                "advantages": advantages,
            }
        )
    size = len(rows) // ranks
    rows = rows[rank * size : (rank + 1) * size]
    fields = {name: torch.nested.as_nested_tensor([x[name] for x in rows], layout=torch.jagged) for name in rows[0]}
    data = TensorDict(fields, batch_size=[size])
    own = {"micro_batch_size_per_gpu": size, "use_dynamic_bsz": False, "global_batch_size": len(PROMPTS)}
    tu.assign_non_tensor(data, temperature=0.8, calculate_entropy=True, **own)
    return data


def trained(folder: str, rank: int, ranks: int, loss_mode: str, fused: bool) -> tuple[dict[str, float], list[Tensor]]:
    """Numbers of a step of plain gradient descent, as verl's worker tells them, and the parameters after it."""
    model = HFModelConfig(
        path=folder,
        load_tokenizer=False,
        use_remove_padding=False,
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"},
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype"), "fp32"),
                use_torch_compile=False,
            ),
            optimizer_config=FSDPOptimizerConfig(
                optimizer="SGD", lr=1.0, weight_decay=0.0, clip_grad=1e9, total_training_steps=1
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        entropy_coeff=0.01,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    output = worker.train_batch(share(rank, ranks))
    metrics = tu.get(output, "metrics")
    after = [x.full_tensor() for x in worker.engine.module.parameters()]
    numbers = {name: metrics[name] for name in ("loss", "grad_norm")}
    for name in ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy_loss"):
        numbers[name] = sum(float(x.aggregate()) for x in metrics[name]) / len(metrics[name])
    return numbers, after
