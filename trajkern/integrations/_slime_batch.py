"""Micro-batches of slime and miles, which are lists of a tensor a sample, as one pack of their response tokens."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_tensor, describe, readable, renamed, shown
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._values import check_finite
from trajkern.integrations._arguments import NUMBERS, choosing
from trajkern.integrations._outside import Outside
from trajkern.integrations._slime_options import is_miles, option
from trajkern.layouts.spans import trajectories
from trajkern.losses.kinds import LOG_RATIO_BOUND

SCORERS = ("slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss_hub.logit_processors")
SPLITTERS = ("slime.backends.megatron_utils.cp_utils", "miles.backends.training_utils.cp_utils")
_held: set[Any] = set()  # the hosts' functions that were held against what is read here


class Part(NamedTuple):
    """What a context-parallel rank holds of the samples, and what it knows of them whole."""

    lengths: list[int]  # [N], of the response
    counts: Tensor  # float32 [N], the unmasked tokens of all ranks
    ranks: dist.ProcessGroup


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples, and the R tokens of their responses end to end, or this rank's of them.

    Construction checks the lists against each other by their lengths; it reads no value of a device.
    """

    total_lengths: Sequence[int]  # [N], prompt and response
    response_lengths: Sequence[int]  # [N], of all ranks
    loss_masks: Tensor  # [R], 0 or 1
    part: Part | None = None

    @classmethod
    def of(cls, total_lengths: Any, response_lengths: Any, loss_masks: Any) -> Samples:
        total_lengths = Outside("total_lengths", total_lengths).ids()
        response_lengths = Outside("response_lengths", response_lengths).ids()
        if len(total_lengths) != len(response_lengths) or not total_lengths:
            raise ValueError(
                f"total_lengths must have a number for each of the samples of response_lengths, at least 1; "
                f"got {len(total_lengths)} and {len(response_lengths)}"
            )
        for n, (total, response) in enumerate(zip(total_lengths, response_lengths, strict=True)):
            if not 0 <= response < total:
                raise ValueError(
                    "response_lengths must be from 0 to less than total_lengths, as a token of the prompt predicts the "
                    f"first of the response; sample {n} has {response} of {total}"
                )
        masks = _joined("loss_masks", loss_masks, response_lengths, " by response_lengths")
        choosing("loss_masks", masks)
        return cls(total_lengths, response_lengths, masks)

    def flat(self, name: str, parts: Any) -> Tensor:
        """A field of the host's, a tensor ``[R_n]`` a sample, as ``[R]`` without a gradient; an error names it."""
        return self.joined(name, parts).detach()

    def joined(self, name: str, parts: Any) -> Tensor:
        """Likewise with its gradient."""
        x = _joined(name, parts, self.lengths, "" if self.part is None else " that this rank holds")
        if x.shape == self.mask.shape and readable(x) and readable(self.mask):
            check_finite(name, x, self.mask)
        return x

    def split(self, x: Tensor) -> list[Tensor]:  # [R]
        """A view a sample."""
        return list(x.split(list(self.lengths)))

    @property
    def lengths(self) -> Sequence[int]:  # [N]
        return self.response_lengths if self.part is None else self.part.lengths

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """Over which the samples' tokens are split."""
        return None if self.part is None else self.part.ranks

    @cached_property
    def mask(self) -> Tensor:
        return self.loss_masks != 0

    @cached_property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], device=self.loss_masks.device)

    @cached_property
    def whole(self) -> tk.Spans:
        """Each sample's response as a span."""
        return trajectories(self.cu_seqlens, self.loss_masks.shape[0])

    @cached_property
    def counts(self) -> Tensor:
        """The unmasked tokens of each sample, of all ranks, float32 ``[N]``."""
        if self.part is not None:
            return self.part.counts
        return tk.span_reduce(self.mask.float(), self.whole, "sum")

    @cached_property
    def places(self) -> Tensor:
        """Where the response tokens stand among all tokens of the samples, int64 ``[R]``."""
        ends = accumulate(self.total_lengths)
        begins = accumulate(self.response_lengths, initial=0)
        shifts = [end - n - begin for end, n, begin in zip(ends, self.response_lengths, begins, strict=False)]
        device, count = self.loss_masks.device, self.loss_masks.shape[0]
        shift = torch.tensor(shifts, device=device).repeat_interleave(self.cu_seqlens.diff(), output_size=count)
        return shift + torch.arange(count, device=device)

    def taken(self, x: Tensor) -> Tensor:  # [R]
        """``x`` where the loss reads it, and 0 elsewhere, whatever stands there."""
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def sums(self, x: Tensor) -> Tensor:  # [R]
        """Of each sample's unmasked tokens, of all ranks, ``[N]``, without a gradient."""
        sums = tk.span_reduce(self.taken(x.detach()), self.whole, "sum")
        if self.ranks is not None:
            dist.all_reduce(sums, group=self.ranks)
        return sums

    def means(self, x: Tensor) -> Tensor:  # [R]
        """Of each sample's unmasked tokens, ``[N]``, 0 where there are none."""
        return self.sums(x) / self.counts.clamp_min(1)

    def weights(self, denominators: Tensor | None, per_token: bool) -> Tensor:  # [N]
        """What the hosts' reducer multiplies each token with before it sums, float32 ``[R]``.

        1 / max(denominator, 1) of its sample, or 1 where ``per_token``; 0 under the mask. None: the sample's own count.
        """
        if per_token:
            return self.mask.float()
        of_sample = self.counts if denominators is None else denominators
        return self.taken(tk.spread(1 / of_sample.float().clamp_min(1), self.whole))


def _joined(name: str, parts: Any, lengths: Sequence[int], whose: str = "") -> Tensor:
    parts = Outside(name, parts).tensors()
    if len(parts) != len(lengths):
        raise ValueError(f"{name} must have a tensor for each of the {len(lengths)} samples, got {len(parts)}")
    for n, (x, length) in enumerate(zip(parts, lengths, strict=True)):
        if x.shape[0] != length:
            raise ValueError(
                f"{name} must have the {length} tokens{whose} of the response of sample {n}; got {describe(x)}"
            )
    return torch.cat(parts)


def entry(data: Mapping[str, Any], name: str) -> Any:
    """A list of a batch; None where there is none or it is empty."""
    found = data.get(name)
    if found is None:
        return None
    return found if len(Outside(name, found).sequence()) else None


def samples_of(batch: Mapping[str, Any], whose: str = "the batch") -> Samples:
    """Of a micro-batch, or of a rank's whole rollout."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"{whose} must be a mapping, got {describe(batch)}")
    wanted = ("total_lengths", "response_lengths", "loss_masks")
    if missing := [name for name in wanted if batch.get(name) is None]:
        raise ValueError(f"{whose} must have {', '.join(wanted)}; it has no {', '.join(missing)}")
    return Samples.of(*(batch[name] for name in wanted))


Piece = tuple[int, int]


def this_ranks(args: Any, samples: Samples) -> Samples:
    """The samples, or where context parallelism splits sequences this rank's tokens of them.

    Raises:
        RuntimeError: neither host is loaded, whose functions say what a rank holds.
        ValueError: a group of another size than ``context_parallel_size``.
    """
    size = option(args, "context_parallel_size", 1)
    if size == 1:
        return samples
    there = [sys.modules[name] for name in SPLITTERS if name in sys.modules]
    if not there:
        raise RuntimeError(
            "context_parallel_size above 1 needs the host's get_logits_and_tokens_offset_with_cp of "
            f"{' or '.join(SPLITTERS)}; neither is loaded in this process"
        )
    host = there[0]
    ranks = host.get_parallel_state().cp.group if is_miles(args) else host.mpu.get_context_parallel_group()
    if dist.get_world_size(ranks) != size:
        raise ValueError(
            f"context_parallel_size must be the {dist.get_world_size(ranks)} ranks of the host's group, got {size}"
        )
    splitter, pieces = host.get_logits_and_tokens_offset_with_cp, []
    for total, response in zip(samples.total_lengths, samples.response_lengths, strict=True):
        *_, tokens = splitter(total, response)
        pieces.append([(begin - total + response, end - total + response) for begin, end in tokens if begin < end])
    _check_pieces(splitter, pieces, samples.response_lengths, ranks)
    whole = samples.split(samples.loss_masks)
    masks = [torch.cat([mask[:0], *(mask[b:e] for b, e in held)]) for mask, held in zip(whole, pieces, strict=True)]
    part = Part([mask.shape[0] for mask in masks], samples.counts, ranks)
    return replace(samples, loss_masks=torch.cat(masks), part=part)


def _check_pieces(splitter: Any, pieces: list[list[Piece]], lengths: Sequence[int], ranks: dist.ProcessGroup) -> None:
    """ValueError where the host's stretches lie outside of a response, or all ranks' together are not the response.

    The latter takes an exchange, once for a splitter's code.
    """
    code, once = getattr(splitter, "__code__", splitter), [pieces]
    if code not in _held:
        once = [[] for _ in range(dist.get_world_size(ranks))]
        dist.all_gather_object(once, pieces, group=ranks)
    for n, length in enumerate(lengths):
        held = sorted(piece for of_rank in once for piece in of_rank[n])
        bounds = [0, *(bound for piece in held for bound in piece), length]
        gaps = [b - a for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        if min(gaps) < 0 or (code not in _held and any(gaps)):
            raise ValueError(
                f"get_logits_and_tokens_offset_with_cp must give each of the {length} tokens of the response of sample "
                f"{n} to one rank of the context parallel group; counted from its first, it gives {held}"
            )
    _held.add(code)


def denominators_of(batch: Mapping[str, Any], samples: Samples) -> Tensor | None:
    """Of each sample, the unmasked tokens of its whole rollout, ``[N]``, where the host says them."""
    found = batch.get("rollout_mask_sums")
    if found is None:
        return None
    count = len(samples.response_lengths)
    if not isinstance(found, Tensor):
        parts = [_scalar(x, samples.loss_masks.device) for x in Outside("rollout_mask_sums", found).each()]
        found = torch.stack(parts) if parts else torch.zeros(0, dtype=torch.float32, device="cpu")
    check_tensor("rollout_mask_sums", found, dtypes=NUMBERS)
    if found.shape != (count,):
        raise ValueError(f"rollout_mask_sums must have a number for each of the {count} samples; got {describe(found)}")
    return found.to(samples.loss_masks.device)


def _scalar(x: Outside, device: torch.device) -> Tensor:
    check_tensor(x.name, x.value, dtypes=NUMBERS, ndim=0)
    if x.value.is_meta:
        check_tensor(x.name, x.value, device=device)
    return x.value


def tokens_of(batch: Mapping[str, Any], name: str) -> Tensor:
    """The tokens of all samples, ``[T]``."""
    found = entry(batch, name)
    if found is None:
        raise ValueError(f"the batch must have {name}, a tensor a sample; it has none")
    return torch.cat(Outside(name, found).tensors(INTEGERS))


def check_reducer(reducer: Callable[[Tensor], Any], samples: Samples, weights: Tensor) -> None:
    """ValueError where the host's reducer is not the sum with these weights.

    A version that normalises otherwise would get another loss in silence. Reads two numbers, once a reducer's code.
    """
    code = getattr(reducer, "__code__", reducer)
    if code in _held:
        return
    probe = 1.0 + torch.arange(weights.shape[0], device=weights.device) % 7
    theirs, ours = float(reducer(probe)), float(probe @ weights)
    if not math.isclose(theirs, ours, rel_tol=1e-3, abs_tol=1e-6):
        raise ValueError(
            "sum_of_sample_mean must divide each sample by its rollout_mask_sums (or by its own unmasked tokens where "
            f"the batch has none), or by 1 with --calculate-per-token-loss; of a probe it makes {theirs}, not {ours}"
        )
    if ours:
        _held.add(code)


def scored(args: Any, batch: Mapping[str, Any], logits: Tensor, samples: Samples, entropy: bool):
    """(log-probs, entropy or None) of the response tokens, ``[R]`` each, differentiable in the logits ``[1, T, V]``."""
    if samples.part is not None:
        return _scored_by_host(args, batch, logits, samples, entropy)
    check_tensor("logits", logits, dtypes=FLOATS)
    if logits.ndim != 3 or logits.shape[0] != 1 or logits.shape[1] < sum(samples.total_lengths):
        raise ValueError(
            f"logits must have shape [1, T, V] with T at least the {sum(samples.total_lengths)} tokens of the samples; "
            f"got {describe(logits)}"
        )
    replays = not is_miles(args) and option(args, "rollout_top_p", 1.0) != 1.0
    if replays or option(args, "tensor_model_parallel_size", 1) > 1:
        return _scored_by_host(args, batch, logits, samples, entropy)
    tokens = tokens_of(batch, "unconcat_tokens")
    if tokens.shape[0] != sum(samples.total_lengths):
        raise ValueError(
            f"unconcat_tokens must be the {sum(samples.total_lengths)} tokens of total_lengths, got {tokens.shape[0]}"
        )
    rows = samples.places - 1
    targets = tokens.new_zeros(logits.shape[1]).index_copy(0, rows, tokens[samples.places])
    mask = torch.zeros_like(targets, dtype=torch.bool).index_copy(0, rows, samples.mask)
    outputs = ("entropy",) if entropy else ()
    with renamed({"temperature": "rollout_temperature", "targets": "unconcat_tokens"}):
        stats = tk.token_stats(
            logits[0], targets, outputs=outputs, temperature=option(args, "rollout_temperature"), mask=mask
        )
    return stats.logprobs[rows], None if stats.entropy is None else stats.entropy[rows]


def _scored_by_host(args: Any, batch: Mapping[str, Any], logits: Tensor, samples: Samples, entropy: bool):
    """As :func:`scored`, by the host, which knows how vocabularies and sequences are spread and what a sampler kept."""
    there = [sys.modules[name] for name in SCORERS if name in sys.modules]
    if not there:
        raise RuntimeError(
            "tensor_model_parallel_size or context_parallel_size above 1 and rollout_top_p below 1 need the host's "
            f"get_log_probs_and_entropy of {' or '.join(SCORERS)}; neither is loaded in this process"
        )
    host = there[0]
    more = {} if is_miles(args) else host.get_rollout_top_p_logprob_kwargs(args, batch)
    if is_miles(args):
        more["entropy_requires_grad"] = option(args, "entropy_coef") != 0
    found = host.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=samples.total_lengths,
        response_lengths=samples.response_lengths,
        with_entropy=entropy,
        **more,
    )
    found = found[1] if isinstance(found, tuple) else found
    parts = (samples.joined(name, found[name]) for name in ("log_probs", "entropy")[: 1 + entropy])
    return next(parts), next(parts, None)


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp, bounded as the losses' ratios are."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def loaded(flag: str, path: str) -> Any:
    """What a host's ``module.function`` path names."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{flag} must name a module's function, got {shown(path)}: {error}") from error
