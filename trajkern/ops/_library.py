"""The ``torch.ops.trajkern`` namespace."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from trajkern import _backends
from trajkern._checks import PLAIN, refuse_unknown
from trajkern.ops._autograd import is_autocasting, is_transformed, uncast

Function = TypeVar("Function", bound=Callable[..., Any])
LIBRARY = torch.library.Library("trajkern", "DEF")
_dispatch_modes, _transforms_active = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
_profiler_enabled = torch.autograd._profiler_enabled
_is_traced = torch._C._is_tracing


def define(family: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Define an op with its fake implementation and its launchers; returns what calls it.

    The op itself is not differentiable: its autograd.Function stands outside it, next to the public function. A plain
    tensor goes straight to the launcher: torch's dispatcher takes longer than a small kernel, and is needed only by who
    traces, profiles or overrides ops.
    """
    name = schema[: schema.index("(")]
    launchers = {device: _backends.launcher(family, device, name) for device in ("cpu", "cuda")}
    op = _defined(schema, fake, launchers)
    written = [i for i, x in enumerate(op._schema.arguments) if x.alias_info is not None and x.alias_info.is_write]
    if written:
        _count_writes(name, op, written)
    places = [i for i, kind in enumerate(_kinds(op)) if kind in ("Tensor", "Optional[Tensor]")]
    tensors_of = itemgetter(*places, places[0])  # a tuple also of one
    in_graphs = _of_packed_numbers(op, fake, launchers)

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return in_graphs(*args)
        x = args[0]
        if type(x) is not Tensor or _is_watched() or x.is_meta:
            return op(*args)
        for y in tensors_of(args):
            if y is not None and (type(y) not in PLAIN or y.is_neg()):  # a sign that is a bit of the view is resolved
                return op(*args)
        if written:
            _increment_versions(args, written)
        return launchers["cpu" if x.is_cpu else x.device.type](*args)

    return call


def _defined(schema: str, fake: Callable[..., Any], launchers: dict[str, Callable[..., Any]]) -> Any:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    torch.library.register_fake(f"trajkern::{name}", fake, lib=LIBRARY)
    for device, launch in launchers.items():
        LIBRARY.impl(name, _uncast(launch), device.upper())
    return getattr(torch.ops.trajkern, name).default


def _uncast(launch: Callable[..., Any]) -> Callable[..., Any]:
    """For graphs, of which each op meets the autocast that surrounds the call."""

    def call(*args: Any) -> Any:
        with uncast() if is_autocasting() else contextlib.nullcontext():
            return launch(*args)

    return call


def _kinds(op: Any) -> list[str]:
    """The types of an op's arguments."""
    return [str(argument.type) for argument in op._schema.arguments]


def _of_packed_numbers(op: Any, fake: Callable[..., Any], launchers: dict[str, Callable[..., Any]]) -> Any:
    """``op`` for graphs: its floats travel in one tensor, since a graph is compiled again for each value of a float."""
    places = [i for i, kind in enumerate(_kinds(op)) if kind in ("float", "List[float]")]
    if not places:
        return op
    head, _, tail = str(op._schema).removeprefix("trajkern::").partition("(")
    arguments, _, results = tail.rpartition(" -> ")
    kept = [x for i, x in enumerate(_split(arguments.removesuffix(")"))) if i not in places]
    schema = f"{head}_in_graph({', '.join(kept)}, Tensor numbers, int[] sizes) -> {results}"

    def unpacked(args: tuple[Any, ...], numbers: list[float]) -> list[Any]:
        *given, sizes = args
        for place, size in zip(places, sizes, strict=True):
            value = numbers[0] if size < 0 else numbers[:size]
            numbers = numbers[abs(size) :]
            given.insert(place, value)
        return given

    def launch_on(device: str) -> Callable[..., Any]:
        return lambda *args: launchers[device](*unpacked((*args[:-2], args[-1]), args[-2].tolist()))

    def fake_of(*args: Any) -> Any:
        return fake(*unpacked((*args[:-2], args[-1]), [1.0] * args[-2].shape[0]))

    packed = _defined(schema, fake_of, {device: launch_on(device) for device in launchers})

    def call(*args: Any) -> Any:
        floats = [args[i] for i in places]
        sizes = [len(x) if isinstance(x, list) else -1 for x in floats]
        flat = [y for x in floats for y in (x if isinstance(x, list) else [x])]
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        numbers = torch.cat([one * y for y in flat])  # a product: torch.tensor would fix the value in the graph
        return packed(*(x for i, x in enumerate(args) if i not in places), numbers, sizes)

    return call


def _split(arguments: str) -> list[str]:
    """A schema's arguments; a comma inside of brackets parts none."""
    return re.split(r", (?![^(\[]*[)\]])", arguments)


def _increment_versions(args: tuple[Any, ...], written: list[int]) -> None:
    """Tells autograd that these arguments change, so that whoever saved one of them for a backward raises."""
    for i in written:
        if args[i] is not None:
            increment_version(args[i])


def _count_writes(name: str, op: Any, written: list[int]) -> None:
    """The same for calls through torch's dispatcher, which leaves it to the op."""

    def counted(keyset: Any, *args: Any) -> Any:
        _increment_versions(args, written)
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(name, counted, "ADInplaceOrView", with_keyset=True)


def _is_watched() -> bool:
    """Whether a dispatch mode, a function transform or a profiler wants to see the op."""
    return _dispatch_modes() > 0 or _transforms_active() or _profiler_enabled()


def recorded(function: Function) -> Function:
    """What every public function has around it: a name for profilers, for misspelt options, and for what torch cannot
    do with its kernels.

    The name is shown to a running profiler, and as an NVTX range under ``emit_nvtx``.
    """
    name = f"trajkern.{function.__name__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        if _is_traced():  # the trace would hold the memory of the results, and not what wrote it
            raise RuntimeError(f"{name} cannot be recorded by torch.jit.trace; torch.compile and torch.export can")
        if is_autocasting():
            with uncast():
                return call(*args, **kwargs)
        try:
            if is_transformed():
                return _transformed(name, function, args, kwargs)
            if not _profiler_enabled():
                return function(*args, **kwargs)
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)
        except TypeError:
            refuse_unknown(f"{function.__name__}()", function, kwargs)
            raise

    return call  # type: ignore[return-value]


def _transformed(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Inside transforms of torch.func and levels of forward-mode AD plain torch runs, and kernels raise."""
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:  # torch's, which says nothing of the op
        why = "runs in no transform of torch.func (grad, vmap, jvp, ...) and has no forward-mode derivative"
        raise RuntimeError(f"{name} {why}; torch.autograd differentiates it once") from error
