"""Checks of the arguments that the head's ops share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from trajkern import _backends
from trajkern._checks import (
    check_choice,
    check_flag,
    check_number,
    check_process_group,
    check_shape,
    check_tensor,
    describe,
    laid_out,
    readable,
    shown,
)
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._tiles.arguments import Head
from trajkern._tiles.shards import Shard, laid, shard
from trajkern._tiles.tiles import FIXED_ROWS
from trajkern._values import check_pairs
from trajkern.ops._agreement import agreed
from trajkern.ops._temperature import check_temperature

MOST_SOFTCAP = {torch.float32: 2.0**100, torch.float64: 2.0**960}


class HeadArguments(NamedTuple):
    """The arguments that the head's ops share, under their public names and with their defaults."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [P]
    rows: Tensor | None = None  # [P]
    bias: Tensor | None = None  # [V]
    temperature: float | Tensor = 1.0  # [T]
    softcap: float | None = None
    logit_scale: float = 1.0
    mask: Tensor | None = None  # [P]
    sampling_support: tuple[Tensor, Tensor] | None = None  # [E], [P+1]
    logits_dtype: torch.dtype = torch.float32
    workspace_bytes: int | None = None
    process_group: Any = None
    batch_invariant: bool = False


_SHARED = (
    *("targets", "rows", "temperature", "softcap", "logit_scale", "mask", "sampling_support", "logits_dtype"),
    *("workspace_bytes", "batch_invariant"),  # which say how many blocks there are, each added up over the ranks
)


def check_head(arguments: HeadArguments, function: str, **others: Any) -> Head:
    """Raises, or returns the arguments as the kernels read them.

    ``others``: what ``function`` reads besides, alike on the ranks that share a vocabulary.
    """
    hidden, weight, targets, rows, mask = (
        arguments.hidden,
        arguments.weight,
        arguments.targets,
        arguments.rows,
        arguments.mask,
    )
    _check_tensors(arguments)
    temperatures, scales = _check_scales(arguments)
    logits_dtype = check_choice("logits_dtype", arguments.logits_dtype, {torch.float32, hidden.dtype})
    check_process_group("process_group", arguments.process_group)
    group = "" if arguments.process_group is None else arguments.process_group.group_name
    of = _shard(arguments, function, others)
    invariant = check_flag("batch_invariant", arguments.batch_invariant)
    workspace = _check_workspace(arguments, invariant, of.widest)
    support = _check_support(arguments.sampling_support, targets)
    ids, offsets = support or (None, None)
    if readable(hidden):
        check_pairs(targets, of.vocabulary, rows, hidden.shape[0], mask, support)
    return Head(
        *of_aligned_width(hidden, weight, invariant),
        arguments.bias,
        laid_out(targets, torch.int64),
        laid_out(rows, torch.int64),
        laid_out(mask, torch.bool),
        temperatures,
        ids,
        offsets,
        scales,
        [int(logits_dtype != torch.float32), workspace, int(invariant), int(torch.compiler.is_compiling())],
        group,
    )


def _shard(arguments: HeadArguments, function: str, others: dict[str, Any]) -> Shard:
    """This rank's of the vocabulary, where all ranks make the same call."""
    ranks, hidden, weight = arguments.process_group, arguments.hidden, arguments.weight
    if ranks is None or torch.compiler.is_compiling():  # a graph cannot ask the other ranks
        return shard("", weight)
    shared = {"the number of rows of hidden": hidden.shape[0], "the dtype of hidden": hidden.dtype}
    shared |= {name: getattr(arguments, name) for name in _SHARED} | others
    shared["bias"] = None if arguments.bias is None else "a shard"
    shared["requires_grad of hidden"] = torch.is_grad_enabled() and hidden.requires_grad  # whether d hidden travels
    shared["use_backend"] = "reference" if _backends.wants_reference("head", hidden) else "the kernels"
    shapes = agreed(function, ranks, "process_group", shared, weight.shape, device=weight.device)
    return Shard(*laid(shapes, dist.get_rank(ranks)), ranks)


ALIGNED = 16  # numbers


def of_aligned_width(hidden: Tensor, weight: Tensor, invariant: bool) -> tuple[Tensor, Tensor]:
    """Both filled up with zeros where MKL, at the edge that another width leaves, adds up by where a row stands."""
    missing = -hidden.shape[1] % ALIGNED if invariant and hidden.is_cpu else 0
    return (pad(hidden, (0, missing)), pad(weight, (0, missing))) if missing else (hidden, weight)


def reference_arguments(arguments: HeadArguments, head: Head) -> dict[str, Any]:
    """Checked arguments as the reference reads them."""
    temperature, softcap, logit_scale = head.scales
    each = temperature if head.temperatures is None else head.temperatures
    numbers = {"temperature": each, "softcap": softcap or None, "logit_scale": logit_scale}
    return arguments._asdict() | numbers


def _check_tensors(arguments: HeadArguments) -> None:
    hidden, weight, targets, rows, bias, *_ = arguments
    check_projection(hidden, weight, bias)
    device, tokens = hidden.device, hidden.shape[0]
    check_tensor("targets", targets, dtypes=INTEGERS, ndim=1, device=device)
    pairs = tuple(targets.shape)
    if rows is not None:
        check_tensor("rows", rows, dtypes=INTEGERS, device=device)
        check_shape("rows", rows, pairs, "one hidden state a target")
    elif pairs != (tokens,):
        raise ValueError(f"targets must have one entry a row of hidden, {tokens}, where rows is None; got {pairs[0]}")
    if arguments.mask is not None:
        check_tensor("mask", arguments.mask, dtypes=(torch.bool,), device=device)
        check_shape("mask", arguments.mask, pairs, "one flag a target")


def check_projection(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    *,
    prefix: str = "",
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """What logits are made from, under names that begin with ``prefix``; hidden states of one of ``dtypes``."""
    check_tensor(f"{prefix}hidden", hidden, dtypes=dtypes, ndim=2, device=device)
    name, width = f"{prefix}weight", hidden.shape[1]
    check_tensor(name, weight, dtypes=(hidden.dtype,), ndim=2, device=hidden.device)
    if weight.shape[1] != width or 0 in weight.shape:
        raise ValueError(f"{name} must have shape [V, {width}] with V at least 1; got {describe(weight)}")
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, dtypes=(hidden.dtype,), device=hidden.device)
        check_shape(f"{prefix}bias", bias, tuple(weight.shape[:1]), f"one number a row of {name}")


def check_logit_scales(softcap: float | None, logit_scale: float, dtype: torch.dtype, prefix: str = "") -> list[float]:
    """[softcap, or 0 for none, logit_scale], numbers that ``dtype`` holds."""
    logit_scale = check_number(f"{prefix}logit_scale", logit_scale, dtype=dtype)
    if softcap is None:
        return [0.0, float(logit_scale)]
    softcap, most = check_number(f"{prefix}softcap", softcap, above=0, dtype=dtype), MOST_SOFTCAP[dtype]
    largest = most * min(1.0, abs(logit_scale) or 1.0)  # what is divided by a larger one loses digits
    if not 1 / most <= softcap <= largest:
        raise ValueError(
            f"{prefix}softcap must be in [{1 / most:.3g}, {largest:.3g}] for a {prefix}logit_scale of {logit_scale:g}, "
            f"got {shown(softcap)}"
        )
    return [float(softcap), float(logit_scale)]


def _check_scales(arguments: HeadArguments) -> tuple[Tensor | None, list[float]]:
    hidden = arguments.hidden
    rows = tuple(hidden.shape[:1])
    temperatures, temperature = check_temperature(arguments.temperature, hidden, rows, "one a row of hidden")
    scales = check_logit_scales(arguments.softcap, arguments.logit_scale, accumulator(hidden))
    return temperatures, [temperature, *scales]


def _check_workspace(arguments: HeadArguments, invariant: bool, vocabulary: int) -> int:
    hidden = arguments.hidden
    if arguments.workspace_bytes is None:
        return 0
    dtype = arguments.logits_dtype if hidden.dtype != torch.float64 else torch.float64
    rows = FIXED_ROWS[hidden.is_cpu] if invariant else 1
    return checked_workspace(arguments.workspace_bytes, rows * vocabulary * dtype.itemsize, rows, "logits")


def checked_workspace(given: Any, least: int, rows: int, what: str) -> int:
    """The bytes that an operator is told, which holds no more than 64 bits of them."""
    workspace = check_number("workspace_bytes", given)
    if workspace < least:
        block = "one row" if rows == 1 else f"the {rows} rows of a batch-invariant block"
        raise ValueError(f"workspace_bytes must hold {block} of {what}, {least} bytes; got {workspace}")
    return int(min(workspace, 2**62))


def _check_support(support: Any, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    if support is None:
        return None
    if not isinstance(support, tuple) or len(support) != 2:
        raise TypeError(f"sampling_support must be a tuple (ids, offsets), got {describe(support)}")
    ids, offsets = support
    check_tensor("sampling_support ids", ids, dtypes=INTEGERS, ndim=1, device=targets.device)
    check_tensor("sampling_support offsets", offsets, dtypes=INTEGERS, device=targets.device)
    check_shape("sampling_support offsets", offsets, (targets.shape[0] + 1,), "one a target, and the end")
    return laid_out(ids, torch.int64), laid_out(offsets, torch.int64)
