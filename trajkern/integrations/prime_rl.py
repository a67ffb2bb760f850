"""prime-rl (0.8.0, read at commit 559b447): its packed loss in one call, and every policy loss of trajkern's in it::

    # my_loss.py, where the trainer can import it
    from trajkern.integrations import prime_rl
    prime_rl.enable()                       # compute_loss in one packed call
    policy_loss = prime_rl.policy_loss      # [trainer.loss] type="custom" import_path="my_loss.policy_loss"

In the orchestrator, ``prime_rl.enable_credit(spec)`` forms the advantages of ``grpo`` by :mod:`trajkern.credit`.

prime-rl hands ``compute_loss`` whole sequences, under context parallelism too: it gathers their log-probs before. Its
own version calls the loss sequence by sequence, and reads the device for each one's metrics.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trajkern._checks import check_number, check_tensor, describe, renamed, suggesting
from trajkern.credit import Spec
from trajkern.integrations import _prime_rl_credit
from trajkern.integrations._adapter import Enabled, Patches, check_signature, check_version, credited_by, held
from trajkern.integrations._arguments import NUMBERS
from trajkern.integrations._credit_checks import spec_of
from trajkern.integrations._outside import Outside, is_list
from trajkern.integrations._prime_rl_terms import HOSTS_OWN, Metrics, Term, Tokens, ce, ref_kl, term_of

TESTED = ("0.8.0",)
LOSS = "prime_rl.trainer.rl.loss"
HOLDERS = (
    LOSS,
    "prime_rl.trainer.rl.train",
    "__main__",
)  # who holds compute_loss; torchrun -m runs the trainer as main
CONFIGS = {"default": "DefaultLossConfig", "ipo": "IPOLossConfig"}
_patches, _credits = Patches(), Patches()
_replaced: list[Callable[..., Any]] = []  # prime-rl's compute_loss, for losses that are not known here
# loss functions -> the options whose loss they have been seen to compute
_shown: WeakKeyDictionary[Callable[..., Any], dict[str, Any]] = WeakKeyDictionary()


_STREAMS = {"logprobs": "trainer_logprobs", "old_logprobs": "inference_logprobs", "kl_weights": "loss_weights"}


class LossOutputs(NamedTuple):
    """As prime-rl's of that name, which reads the two by their names."""

    loss: Tensor
    metrics: dict[str, Tensor]


@suggesting
def enable(*, any_version: bool = False) -> Enabled:
    """Puts :func:`compute_loss` in the place of prime-rl's in this process. A second call undoes the first.

    It may run while the trainer is already set up, as a custom loss is imported then.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: prime-rl is missing.
        RuntimeError: a version of it that lacks what this replaces, where that takes something else, whose losses have
            other options, do not show them, or compute something else of a probe. Another than the tested versions is
            warned of, unless ``any_version`` is True.
    """
    check_version("prime-rl", TESTED, any_version)
    disable()
    module = importlib.import_module(LOSS)
    theirs, setup = held(module, "compute_loss"), held(module, "setup_rl_loss_fn")
    check_signature("prime-rl's compute_loss", theirs, compute_loss)
    for kind, name in CONFIGS.items():
        config = held(module, name)()
        options = vars(config).keys() - {"type"}
        if options != set(HOSTS_OWN[kind]):
            known = ", ".join(HOSTS_OWN[kind])
            raise RuntimeError(
                f"prime-rl's {name} must have ({known}); this version has ({', '.join(sorted(options))})"
            )
        _check_shown(setup(config))
    ours = f"{__name__}.{policy_loss.__name__}"
    _check_shown(setup(held(module, "CustomLossConfig")(import_path=ours)))
    _replaced.append(theirs)
    for holder in HOLDERS:
        if holder in sys.modules and vars(sys.modules[holder]).get("compute_loss") is theirs:
            _patches.put(vars(sys.modules[holder]), "compute_loss", compute_loss)
    return _patches.enabled("prime-rl", disable)


def disable() -> None:
    """Takes back what :func:`enable` did; twice does nothing."""
    _patches.undo()
    _replaced.clear()


@suggesting
def enable_credit(credit: Spec | str, *, any_version: bool = False) -> Enabled:
    """Forms the advantages of prime-rl's ``grpo`` by an expression, in the orchestrator's process.

    It must run before the orchestrator does; ``docs/prime-rl.md`` has the lines. A group's traces are compared, as
    prime-rl does; environments with another ``algo.type`` (but for ``echo``, which takes grpo's advantages) keep
    theirs. What an expression leaves out has advantage 0, which prime-rl's ``filter_zero_advantages`` takes out of the
    loss and of its count. A second call undoes the first.

    Args:
        credit: an expression of :mod:`trajkern.credit`, or its "package.module:name". It finds "reward"; the scores of
            an environment's rewards, and its metrics, by their names, and flags where all of these are 0 or 1; the flag
            "truncated"; the spans "turn", a message that the policy wrote each; texts; and rows with "trace", "agent"
            and "info".
        any_version: do not warn of a prime-rl that this was not tested with.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: prime-rl is missing.
        RuntimeError: a version of it that lacks what this replaces, or where that takes something else.
        TypeError, ValueError: a credit that is none; one that needs what prime-rl does not have, or statistics over
            more than a group. At the first group: a ``length_penalty``; a credit that leaves tokens out without
            ``filter_zero_advantages``.
    """
    check_version("prime-rl", TESTED, any_version)
    spec = spec_of("credit", credit)
    disable_credit()
    _prime_rl_credit.put(_credits, spec)
    return _credits.enabled("prime-rl", disable_credit, credited_by(spec))


def disable_credit() -> None:
    """Takes back what :func:`enable_credit` did; twice does nothing."""
    _credits.undo()


def _check_shown(rl_loss_fn: Callable[..., Any]) -> None:
    options = _options_of(rl_loss_fn)
    if options is None:
        raise RuntimeError(
            "prime-rl's setup_rl_loss_fn must return a function that closes over loss_config, or over custom_fn and "
            f"kwargs; this version's closes over ({', '.join(_closed_over(rl_loss_fn))})"
        )
    if _term_of_host(rl_loss_fn) is None:
        raise RuntimeError(
            f"prime-rl's loss of kind {options.get('kind', 'default')!r} must be that of {TESTED[-1]}; this version's "
            "has another loss, gradient or metric on a probe"
        )


def _closed_over(function: Any) -> dict[str, Any]:
    cells, code = getattr(function, "__closure__", None), getattr(function, "__code__", None)
    if not cells or code is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _term_of_host(rl_loss_fn: Callable[..., Any]) -> Term | None:
    """The packed form of what prime-rl's ``setup_rl_loss_fn`` returned; None for a loss that is the user's own.

    What a function closes over says what it should compute, and a probe that it does.
    """
    options = _options_of(rl_loss_fn)
    if options is None:
        return None
    term = term_of(**options)
    if _shown.get(rl_loss_fn) != options:
        if not _computes(rl_loss_fn, options):
            return None
        _shown[rl_loss_fn] = options
    return term


def _options_of(rl_loss_fn: Callable[..., Any]) -> dict[str, Any] | None:
    """Those of :func:`policy_loss` by which the function should compute; None for a loss that is not known here."""
    match _closed_over(rl_loss_fn):
        case {"custom_fn": function, "kwargs": Mapping() as options} if function is policy_loss:
            return dict(options)
        case {"loss_config": config} if getattr(config, "type", None) in CONFIGS:
            return {"kind": config.type} | {name: x for name, x in vars(config).items() if name != "type"}
    return None


def _computes(rl_loss_fn: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether it has the loss, the gradient and the metrics of :func:`policy_loss` with these options."""
    for weighted in (False, True):
        ours, theirs = (_probed(loss, weighted) for loss in (partial(policy_loss, **options), rl_loss_fn))
        if ours.keys() != theirs.keys():
            return False
        for name, x in ours.items():
            y = theirs[name]
            if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-5, atol=1e-7, equal_nan=True):
                return False
    return True


def _probed(loss_fn: Callable[..., Any], weighted: bool) -> dict[str, Tensor]:
    """What it makes of a sequence whose tokens moved by little and by much, under advantages of every sign, float64."""
    g, size = torch.Generator().manual_seed(0), 256
    new, old, ref = (
        torch.rand(size, generator=g, dtype=torch.float64, device="cpu").clamp_min(1e-3).log() for _ in range(3)
    )
    advantages, kept = (
        torch.randn(size, generator=g, dtype=torch.float64, device="cpu"),
        torch.rand(2, size, generator=g, dtype=torch.float32, device="cpu") < 0.8,
    )
    made = getattr(sys.modules.get(LOSS), "LossInputs", SimpleNamespace)
    with torch.enable_grad():
        inputs = made(
            trainer_logprobs=new.requires_grad_(),
            inference_logprobs=old,
            ref_logprobs=ref,
            advantages=torch.where(kept[0], advantages, 0),
            loss_mask=kept[1],
            loss_weights=advantages.abs() if weighted else None,
        )
        try:
            found = loss_fn(inputs)
            (grad,) = torch.autograd.grad(found.loss, new)
        except Exception as error:  # of weights that a kind refuses, or of a function that wants something else
            return {type(error).__name__: torch.zeros((), dtype=torch.float32, device="cpu")}
    loss = found.loss.detach()
    return {"": loss.double(), " gradient": grad} | {name: x.detach().double() for name, x in found.metrics.items()}


def policy_loss(inputs: Any, kind: str = "default", **options: Any) -> LossOutputs:
    """A custom loss of prime-rl's, of one sequence: ``import_path = "trajkern.integrations.prime_rl.policy_loss"``.

    The sum over the sequence's tokens, times their weights; prime-rl divides it by the tokens of the global batch. With
    :func:`enable` the same function is computed for all sequences in one call.

    Args:
        inputs: prime-rl's ``LossInputs``: ``trainer_logprobs``, ``inference_logprobs``, ``ref_logprobs`` or None,
            ``advantages``, ``loss_mask`` (bool) and ``loss_weights`` or None, each of shape ``[L]``.
        kind: "default" or "ipo", prime-rl's own, with its options and defaults (``dppo_mask_low``, ``dppo_mask_high``,
            ``adv_tau``, ``kl_tau``; ``ipo_threshold``, ``adv_tau``, ``kl_tau``) and its metrics. Or a kind of
            :class:`trajkern.PolicyLoss`, with its options; its metrics are those of :func:`trajkern.policy_loss`, in
            the packed call over the micro-batch.
        options: ``[trainer.loss.kwargs]``.

    Raises:
        TypeError, ValueError: an option that is unknown, or that prime-rl cannot serve: an ``aggregate`` other than
            "token_sum", an ``entropy_coef`` (no entropy is given), a ``sampler_correction`` (the sampler's log-probs
            are the old ones), ``kl_cov`` and ``clip_cov`` (they rank a whole batch) and ``gmpo`` (one number a
            trajectory). A ``kl_coef`` where there are weights.
    """
    given, names = Outside("inputs", inputs), ("trainer_logprobs", "inference_logprobs", "ref_logprobs")
    found = {name: given.get(name) for name in (*names, "advantages", "loss_mask", "loss_weights")}
    found |= {name: given.at(name) for name in (*names[:2], "advantages", "loss_mask")}
    new, old, ref, advantages, mask, weights = _packs({k: None if x is None else [x.value] for k, x in found.items()})
    assert new is not None and old is not None and advantages is not None and mask is not None
    lengths = torch.tensor([new.shape[0]], device=new.device)
    tokens = Tokens(new, old, ref, advantages, mask, weights, _bounds(lengths))
    with renamed(_STREAMS):
        loss, metrics = term_of(kind, **options)(tokens, 1)
    return LossOutputs(loss, {name: x[0] for name, x in _by_sequence(metrics, lengths).items()})


def compute_loss(
    trainer_logprobs: Sequence[Tensor],  # n of [L_i]
    inference_logprobs: Sequence[Tensor],  # n of [L_i]
    ref_logprobs: Sequence[Tensor] | None,  # n of [L_i]
    advantages: Sequence[Tensor],  # n of [L_i]
    loss_mask: Sequence[Tensor],  # n of bool [L_i]
    rl_weights: Sequence[Tensor] | None,  # n of [L_i]
    ce_weights: Sequence[Tensor] | None,  # n of [L_i]
    ref_kl_weights: Sequence[Tensor] | None,  # n of [L_i]
    rl_loss_fn: Callable[..., Any],
    rl_scale: float,
    ce_scale: float,
    ref_kl_scale: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """prime-rl's function of that name: each component's loss of all sequences in one packed call.

    Loss, gradients and metrics are prime-rl's to rounding: rl on ``loss_mask & (rl_weights != 0)`` (without weights on
    the loss mask), ce on ``ce_weights != 0``, ref_kl on ``ref_kl_weights != 0``, each over its scale, and a metric a
    sequence that has tokens of its component. Different are only log-ratios beyond 20 either way, which are bounded in
    the ratio, and what stands under the masks, which is not read (prime-rl's default turns a NaN there into its loss).
    The device is read once for each component that has weights, for which sequences have tokens of it.

    ``rl_loss_fn`` of a custom loss that is not :func:`policy_loss` leaves everything to prime-rl's own function.

    Raises:
        TypeError, ValueError: naming the argument: lists of other lengths than ``trainer_logprobs``, a mask that is not
            bool, no sequence at all, a scale that is not positive, ``ref_kl_weights`` without ``ref_logprobs``, and a
            loss function that is not known while prime-rl's own is not replaced.
    """
    scales = {"rl_scale": rl_scale, "ce_scale": ce_scale, "ref_kl_scale": ref_kl_scale}
    rl = _term_of_host(rl_loss_fn)
    if rl is None:
        if not _replaced:
            raise TypeError(f"rl_loss_fn must come from prime-rl's setup_rl_loss_fn, got {rl_loss_fn!r}")
        given = (trainer_logprobs, inference_logprobs, ref_logprobs, advantages, loss_mask)
        return _replaced[-1](*given, rl_weights, ce_weights, ref_kl_weights, rl_loss_fn, *scales.values())
    for name, scale in scales.items():
        check_number(name, scale, above=0)
    streams = {
        "trainer_logprobs": trainer_logprobs,
        "inference_logprobs": inference_logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
        "loss_mask": loss_mask,
        "rl_weights": rl_weights,
        "ce_weights": ce_weights,
        "ref_kl_weights": ref_kl_weights,
    }
    new, old, ref, a, mask, *weights = _packs(streams)
    assert new is not None and old is not None and a is not None and mask is not None
    lengths = torch.tensor([x.shape[0] for x in trainer_logprobs], device=new.device)
    tokens = Tokens(new, old, ref, a, mask, None, _bounds(lengths))
    components = zip((rl, ce, ref_kl), weights, scales.values(), (True, False, False), strict=True)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for term, w, scale, always in components:
        if w is None and not always:
            continue
        own = tokens if w is None else tokens._replace(mask=mask & (w != 0) if always else w != 0, weights=w)
        loss, of_tokens = term(own, scale)
        losses.append(loss)
        metrics |= _by_sequence(of_tokens, lengths, None if w is None else own.mask)
    return sum(losses[1:], losses[0]), metrics


def _packs(streams: Mapping[str, Sequence[Tensor] | None]) -> list[Tensor | None]:
    """Each stream's sequences one after the other; the first names how many there are, and how long."""
    (first, wanted), *_ = streams.items()
    for name, sequences in streams.items():
        if sequences is not None and not is_list(sequences):
            raise TypeError(f"{name} must be a list of a tensor a sequence, got {describe(sequences)}")
    if not wanted:
        raise ValueError(f"{first} must hold at least one sequence, got {wanted!r}")
    packs: list[Tensor | None] = []
    for name, sequences in streams.items():
        if sequences is None and name not in ("inference_logprobs", "advantages", "loss_mask"):
            packs.append(None)
            continue
        if sequences is None or len(sequences) != len(wanted):
            got = None if sequences is None else len(sequences)
            raise ValueError(f"{name} must hold {len(wanted)} sequences, as {first} does; got {got}")
        for i, (x, y) in enumerate(zip(sequences, wanted, strict=True)):
            own = None if i == 0 and name == first else wanted[0].device
            check_tensor(f"{name}[{i}]", x, dtypes=NUMBERS, device=own)
            if x.ndim != 1 or x.shape != y.shape:
                raise ValueError(f"{name}[{i}] must have shape [L] = {list(y.shape)}, got {list(x.shape)}")
            if name == "loss_mask" and x.dtype != torch.bool:
                raise TypeError(f"{name}[{i}] must be bool, got {x.dtype}")
        packs.append(sequences[0] if len(sequences) == 1 else torch.cat(tuple(sequences)))
    return packs


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _by_sequence(metrics: Metrics, lengths: Tensor, member: Tensor | None = None) -> dict[str, Tensor]:
    """Each metric's mean over its tokens of each sequence, 0 where there are none; a number as one entry.

    ``member``: the tokens of a component; only sequences that have one are told of, and where none has one nothing is.
    """
    means = {name: x for name, x in metrics.items() if not isinstance(x, Tensor)}
    columns = [torch.where(where, x.detach(), 0).float() for x, where in means.values()]
    columns += [where.float() for _, where in means.values()]
    if member is not None:
        columns.append(member.float())
    sums = _segment_sums(columns, lengths)
    totals, counts = sums[: len(means)], sums[len(means) : 2 * len(means)]
    found = totals / counts.clamp_min(1)
    if member is not None:
        present = sums[-1].nonzero()[:, 0]  # the one read of the device
        if not present.shape[0]:
            return {}
        found = found[:, present]
    of_all = {name: x[None] for name, x in metrics.items() if isinstance(x, Tensor)}
    return of_all | dict(zip(means, found.unbind(), strict=True))


def _segment_sums(columns: list[Tensor], lengths: Tensor) -> Tensor:
    """The sums ``[k, n]`` of k columns ``[T]`` over n sequences."""
    if not columns:
        return lengths.new_zeros(0, lengths.shape[0], dtype=torch.float32)
    flat = torch.stack(columns).view(-1)
    sums = torch.segment_reduce(flat, "sum", lengths=lengths.repeat(len(columns)), unsafe=True, initial=0)
    return sums.view(len(columns), -1)
