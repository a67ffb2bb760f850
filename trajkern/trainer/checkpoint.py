"""Checkpoints: one safetensors file with weights, optimiser moments, generator state and the run's place as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trajkern.trainer.optional import require
from trajkern.trainer.ranks import full, shard_like

_KEY = "trajkern.trainer"
FORMAT = 2  # of the place and of the configuration in it


class Checkpoint(NamedTuple):
    """A checkpoint read whole: ``tensors`` by name, and what ``save`` was given as ``place``."""

    path: Path
    tensors: dict[str, Tensor]
    place: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def save(
    path: Path | None,
    *,
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    place: dict[str, Any],
) -> None:
    """Write a checkpoint; a reader sees the old file or the new one, never a part.

    Args:
        path: file to replace; None on the ranks that only bring their shards.
        models: modules by name, "policy" among them; shared parameters are stored once.
        optimizer, generator: their whole state is stored; the optimizer's by the number of the policy's parameter.
        place: JSON data to find again in :attr:`Checkpoint.place`.
    """
    tensors = {"generator": generator.get_state()}
    for name, model in models.items():
        tensors |= {f"{name}.{k}": full(v.detach()).contiguous() for k, v in model.named_parameters()}
    for index, parameter in enumerate(models["policy"].parameters()):
        state = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{index}.{k}": full(torch.as_tensor(v)) for k, v in state.items()}
    if path is None:
        return
    partial, stored = path.with_name(path.name + ".part"), {"format": FORMAT, **place}
    try:
        require("safetensors.torch").save_file(tensors, partial, metadata={_KEY: json.dumps(stored)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint whole.

    Raises:
        ValueError: no such file, a truncated file, or one that this version of the trainer did not write.
    """
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            place = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"checkpoint must be an existing file; got {path}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint must be a whole safetensors file; {path} is damaged ({error})") from None
    if place is None:
        raise ValueError(f"checkpoint must be one of this trainer's; {path} is some other safetensors file")
    found = json.loads(place)
    version = found.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"checkpoint must have format {FORMAT}; {path} has {version}, of another version of trajkern")
    return Checkpoint(path, tensors, found)


def restore_model(checkpoint: Checkpoint, name: str, model: nn.Module) -> None:
    """Copy the weights stored under ``name`` into ``model``; on a mismatch raise ValueError and change nothing."""
    stored = checkpoint.under(f"{name}.")
    parameters = dict(model.named_parameters())
    for key in sorted(stored.keys() | parameters.keys()):
        expected, shape = (list(x[key].shape) if key in x else "nothing" for x in (parameters, stored))
        if expected != shape:
            raise ValueError(
                f"checkpoint must be of the same model; {checkpoint.path} has {shape} as {name}.{key}, not {expected}"
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(shard_like(stored[key], parameter))


def restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, policy: nn.Module) -> None:
    """The inverse of what ``save`` did with the optimizer of this ``policy``."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = list(policy.parameters())
    number = {p: n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for key, value in checkpoint.under("optimizer.").items():
        index, _, field = key.partition(".")
        parameter = parameters[int(index)]
        state.setdefault(number[parameter], {})[field] = shard_like(value, parameter)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
