"""What a call does to a GPU, seen without one: its tensors are meta tensors that the ops take for a GPU's.

Launchers run, their kernels are counted and not run, and what would wait for the device to learn a value is an error
with the op's name and the line that called it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda_launches import most_launches
from trajkern import _backends, _ext

ROOT = Path(__file__).resolve().parent.parent
OURS = (ROOT / "trajkern", ROOT / "triton_kernels")
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
# the shape or the value of their result is a device's value, or they copy it to the host
READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::copy"}
# allocations, and a number that becomes a kernel's argument
NOTHING = {"aten::scalar_tensor", "aten::lift_fresh"}


class HostRead(AssertionError):
    """A call waited for the device."""


class Watch(TorchDispatchMode):
    """Counts the kernels under it: an aten op that is no view and no allocation as one, however many it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    @property
    def kernels(self) -> int:
        return sum(self.launches.values())

    @property
    def products(self) -> int:
        return sum(n for name, n in self.launches.items() if name in PRODUCTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name.startswith("trajkern::"):
            with self:
                return _launcher(name.removeprefix("trajkern::"))(*args)
        if _kind(kwargs.get("device", "cpu")) == "meta" or any(map(_on_meta, tree_leaves((args, kwargs)))):
            _check_read(name, args, kwargs)
        if name == "aten::repeat_interleave":  # meta tensors have it only by way of a read
            self.launches[name] += 1
            return args[0].new_empty(kwargs["output_size"])
        out = func(*args, **kwargs)
        if not _is_view(func) and "empty" not in name and name not in NOTHING:
            self.launches[name] += any(_on_meta(x) and x.numel() for x in tree_leaves(out))
        return out


def _launcher(op: str) -> Any:
    """The GPU's, of whichever family has the op."""
    for owner in {(_backends._PACKAGE[of["cuda"]], family) for family, of in _backends.OWNERS.items()}:
        if function := getattr(importlib.import_module(".".join(owner)), op, None):
            return function
    raise LookupError(f"no family has a launcher for {op}")


def _is_view(func: Any) -> bool:
    return any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)


def _check_read(name: str, args: Any, kwargs: Any) -> None:
    if name in READS or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        raise HostRead(f"{name} {called_from()}")
    if name in COPIES:
        devices = {x.device.type for x in args if isinstance(x, Tensor)} | {_kind(kwargs.get("device", "meta"))}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            raise HostRead(f"{name} between host and device, {called_from()}")
    if name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        raise HostRead(f"{name} by a boolean, {called_from()}")


def _on_meta(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta


def _kind(device: Any) -> str:
    return torch.device("meta" if device is None else device).type


def called_from() -> str:
    """The innermost line outside torch and this file."""
    torchs = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != Path(__file__) and torchs not in path.parents:
            return f"{path}:{frame.lineno}: {frame.line}"
    return "unknown line"


class _CountedModule:
    """In the place of trajkern._C_cuda: its functions launch what their source says, and find nothing illegal."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __getattr__(self, name: str) -> Any:
        def function(*args: Any) -> int:
            if name.endswith("_scratch"):
                return 64
            self.watch.launches[f"cuda::{name}"] += most_launches(name)
            return -1  # true where a kernel tells whether its input was legal, no index where it tells which was not

        return function


def _refuse_host_values(patch: pytest.MonkeyPatch) -> None:
    """Tensors made of Python's values, and numbers put to places: copies from the host that wait for the device."""
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        original = getattr(owner, name)

        def checked(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Tensor:
            data, device = args[-1], kwargs.get("device")
            on_meta = args[0].is_meta if _name == "new_tensor" and device is None else _kind(device or "cpu") == "meta"
            if on_meta and not isinstance(data, Tensor):
                raise HostRead(f"{_name} of a host's values, {called_from()}")
            return _original(*args, **kwargs)

        patch.setattr(owner, name, checked)
    put = Tensor.__setitem__

    def set_item(x: Tensor, index: Any, value: Any) -> None:
        indices = index if isinstance(index, tuple) else (index,)
        number = x.is_meta and not isinstance(value, Tensor)
        if number and isinstance(index, Tensor) and index.dtype == torch.bool:
            x.masked_fill_(index, value)  # as a GPU's does it
        elif number and any(isinstance(i, (Tensor, list)) for i in indices):
            raise HostRead(f"index_put_ of a number, which is copied from the host, {called_from()}")
        else:
            put(x, index, value)

    patch.setattr(Tensor, "__setitem__", set_item)


def _as_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Tables by device have for meta what they have for cuda."""
    for module in [m for name, m in sys.modules.items() if name.startswith("trajkern")]:
        for value in list(vars(module).values()):
            for table in (value, *(value.values() if isinstance(value, dict) else ())):
                if isinstance(table, dict) and {"cpu", "cuda"} <= table.keys():
                    patch.setitem(table, "meta", table["cuda"])
    for name in ("device", "device_of"):
        patch.setattr(torch.cuda, name, lambda x: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda *x: SimpleNamespace(cuda_stream=0))
    patch.setattr(torch, "is_autocast_enabled", lambda *device: False)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Raises :class:`HostRead` at the first wait, and counts what is launched."""
    import triton

    for family, owners in _backends.OWNERS.items():
        importlib.import_module(f"{_backends._PACKAGE[owners['cuda']]}.{family}")
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        _as_a_gpu(patch)
        _refuse_host_values(patch)
        module = _CountedModule(watch)
        patch.setattr(_ext, "cuda", lambda: module)
        patch.setattr(_ext, "problem", lambda name: None)

        def run(kernel: Any, *args: Any, **options: Any) -> None:
            watch.launches[f"triton::{kernel.__name__}"] += 1

        patch.setattr(triton.JITFunction, "run", run)
        with watch:
            yield watch


def on_meta(x: Any) -> Any:
    """Arguments as a GPU has them, nothing in them: tensors, tuples of them, and layouts."""
    if isinstance(x, tuple):
        parts = map(on_meta, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not hasattr(x, "to"):
        return x
    moved = x.to("meta")
    for name in ("flat_index", "path_nodes"):  # of a tree: read once a batch
        if hasattr(x, name):
            vars(moved)[name] = on_meta(getattr(x, name))
    return moved
