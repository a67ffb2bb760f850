"""Checkpoints: one safetensors file with weights, optimiser moments, generator state and the run's place as JSON.

Its metadata hold the place, a checksum of each tensor, and one of those two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from trajkern._files import PARTIAL, is_file, remove, sync
from trajkern._no_memory import ran_out
from trajkern.trainer.optional import require
from trajkern.trainer.place import Phase, Place, read_place
from trajkern.trainer.ranks import full, shard_like

CHECKPOINT = "checkpoint.safetensors"  # where a run stands, in its folder of results
WARM = "warmup.safetensors"  # the end of the warm-up
_KEY, _CHECKSUM = "trajkern.trainer", "trajkern.trainer.sha256"
FORMAT = 4  # of the metadata, and of the configuration in them
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside its step


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
    """Write a checkpoint; a reader sees the old file or the new one, never a part, also after a power cut.

    Args:
        path: file to replace; None on the ranks that only bring their shards.
        models: modules by name, "policy" among them; shared parameters are stored once.
        optimizer, generator: their whole state is stored; that of AdamW by the number of the policy's parameter.
        place: JSON data to find again in :attr:`Checkpoint.place`; see :class:`trajkern.trainer.place.Place`.
    """
    tensors = {"generator": generator.get_state()}
    for name, model in models.items():
        tensors |= {f"{name}.{k}": full(v.detach()).contiguous() for k, v in model.named_parameters()}
    for index, parameter in enumerate(models["policy"].parameters()):
        state = optimizer.state.get(parameter) or (_untouched(parameter) if optimizer.state else {})
        tensors |= {f"optimizer.{index}.{k}": full(torch.as_tensor(v)) for k, v in state.items()}
    if path is None:
        return
    read_place(place)
    checksums = {name: checksum(x) for name, x in tensors.items()}
    stored = json.dumps({"format": FORMAT, "place": place, "tensors": checksums})
    metadata = {_KEY: stored, _CHECKSUM: hashlib.sha256(stored.encode()).hexdigest()}
    folder = path.with_name(path.name + PARTIAL)  # what a kill leaves behind, the library's files too, lies in it
    remove(folder)
    folder.mkdir()
    try:
        partial, plain = folder / path.name, folder / "plain"
        _write(tensors, partial, metadata)
        plain.touch()
        partial.chmod(plain.stat().st_mode)  # the library makes files that nobody else may read
        sync(partial)
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(path.parent)


def clear(folder: Path) -> None:
    """Remove what a killed :func:`save` left in a folder of results."""
    for left in folder.glob(f"*.safetensors{PARTIAL}"):
        remove(left)


def checksum(x: Tensor) -> str:
    """Of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(_described(x).encode())
    digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint whole, and check it.

    Raises:
        ValueError: no such file, or one that cannot be read; a file that is truncated or has changed since it was
            saved, with the tensor that has; one that this version of the trainer did not write; a place that is not of
            the schema.
    """
    tensors = dict[str, Tensor]()
    found = _read(path, tensors)
    sums = found["tensors"]
    for name in sorted(sums.keys() | tensors.keys()):
        if name not in tensors:
            raise _damaged(path, f"the tensor {name} is missing")
        if name not in sums or checksum(tensors[name]) != sums[name]:
            raise _damaged(path, f"the tensor {name} is not what was saved")
    _place_in(path, found)
    return Checkpoint(path, tensors, found["place"])


def newest(folder: Path) -> Path | None:
    """The checkpoint in a folder of results that is furthest by what the files say: copies have other times.

    Raises:
        ValueError: one of them cannot be read, as :func:`load` says it.
    """
    stands = [path for name in (CHECKPOINT, WARM) if os.path.lexists(path := folder / name)]
    return max(stands, key=_steps_behind, default=None)


def _steps_behind(path: Path) -> tuple[int, int]:
    """The phase and the steps taken in it."""
    place = _place_in(path, _read(path))
    return get_args(Phase).index(place.phase), place.step


def _read(path: Path, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """What :func:`save` has written of the run; and, where they are asked for, the tensors."""
    safetensors = require("safetensors")
    if not is_file(path):
        raise ValueError(f"checkpoint must be an existing file; got {path}")
    try:
        with open(path, "rb") as file:  # the library has other words for the system's
            file.read(1)
    except OSError as error:
        raise ValueError(f"checkpoint must be a file that can be read; {path}: {error}") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if tensors is not None:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:  # the last one is torch's
        if ran_out(error):
            raise MemoryError(str(error)) from None
        raise _damaged(path, str(error)) from None
    if _KEY not in metadata:
        raise ValueError(f"checkpoint must be one of this trainer's; {path} is some other safetensors file")
    return _read_metadata(path, metadata)


def _place_in(path: Path, found: dict[str, Any]) -> Place:
    try:
        return read_place(found["place"])
    except ValueError as error:
        raise ValueError(f"checkpoint must hold where its run stands; {path} does not: {error}") from None


def _read_metadata(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata[_KEY]
    changed = hashlib.sha256(text.encode()).hexdigest() != metadata.get(_CHECKSUM)
    try:
        found = json.loads(text)
        version = found.get("format")
    except (ValueError, AttributeError):
        raise _damaged(path, "its metadata are not what was saved") from None
    if version != FORMAT and (_CHECKSUM not in metadata or not changed):
        raise ValueError(f"checkpoint must have format {FORMAT}; {path} has {version}, of another version of trajkern")
    whole = isinstance(found.get("tensors"), dict) and "place" in found
    if changed or not whole:
        raise _damaged(path, "its metadata are not what was saved")
    return dict(found)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"checkpoint must be a whole safetensors file; {path} is damaged ({why})")


def restore_model(checkpoint: Checkpoint, name: str, model: nn.Module) -> None:
    """Copy the weights stored under ``name`` into ``model``; on a mismatch raise ValueError and change nothing."""
    stored, parameters = checkpoint.under(f"{name}."), dict(model.named_parameters())
    _check(checkpoint, "model", f"{name}.", {key: _described(x) for key, x in parameters.items()})
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(shard_like(stored[key], parameter))


def restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, policy: nn.Module) -> None:
    """The inverse of what ``save`` did with the AdamW of this ``policy``; on a mismatch raise ValueError and change
    nothing. Either every parameter has its moments or, before a first step, none has."""
    stored, parameters = checkpoint.under("optimizer."), list(policy.parameters())
    state = {n: _untouched(parameter) for n, parameter in enumerate(parameters)} if stored else {}
    expected = {f"{n}.{field}": _described(x) for n, fields in state.items() for field, x in fields.items()}
    _check(checkpoint, "model and optimizer", "optimizer.", expected)
    number = {p: n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    loaded = {
        number[parameters[n]]: {field: shard_like(stored[f"{n}.{field}"], parameters[n]) for field in fields}
        for n, fields in state.items()
    }
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_generator(checkpoint: Checkpoint, generator: torch.Generator) -> None:
    """Give a generator its state back; on a mismatch raise ValueError and change nothing."""
    _check(checkpoint, "device", "generator", {"": _described(generator.get_state())})
    try:
        generator.set_state(checkpoint.tensors["generator"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint must hold a generator's state; {checkpoint.path} does not: {error}") from None


def _untouched(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW has of a parameter that it has never moved."""
    moments = {name: torch.zeros(parameter.shape, dtype=parameter.dtype) for name in _MOMENTS}
    return {"step": torch.zeros((), dtype=torch.float32), **moments}


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _check(checkpoint: Checkpoint, same: str, prefix: str, expected: Mapping[str, str]) -> None:
    """Raise ValueError where what is stored under ``prefix`` is not of these dtypes and shapes, no more and no less."""
    stored = {key: _described(x) for key, x in checkpoint.under(prefix).items()}
    for key in sorted(stored.keys() | expected.keys()):
        came, wanted = stored.get(key, "nothing"), expected.get(key, "nothing")
        if came != wanted:
            raise ValueError(
                f"checkpoint must be of the same {same}; {checkpoint.path} has {came} as {prefix}{key}, not {wanted}"
            )


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Raises OSError where the disk is full: the library has an error of its own."""
    try:
        require("safetensors.torch").save_file(tensors, path, metadata=metadata)
    except require("safetensors").SafetensorError as error:
        raise OSError(f"{path.parent.parent / path.name} could not be written: {error}") from None
