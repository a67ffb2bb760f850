"""TRL (1.15 and 1.16): the fused head, the packed loss and a credit in its GRPO and RLOO trainers, by one line::

    from trajkern.integrations import trl

    trl.enable(trainer)      # or GRPOTrainer itself, before trainers are made; trl.disable(trainer) undoes it
    trl.enable(trainer, credit=credit.outcome().asymmetric(positive=0.1))

Two things are replaced, and nothing that they return changes but for rounding. The head that ``add_fused_lm_head``
gave the model computes only positions with a label, by :func:`trajkern.linear_token_stats`; it is one for the process,
so every trainer of TRL that has such a head gets it while anything is enabled. ``_compute_loss`` of the trainer or
class takes the loss and its gradient from :func:`trajkern.policy_loss` and logs what TRL logs; so does ``compute_loss``
of AsyncGRPOTrainer, of TRL 1.16, whose rows of rollouts that share prefixes are trees: :func:`tree_rollouts`.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit as credits
from trajkern._checks import check_callable, check_tensor, check_valued, describe, did_you_mean, readable, suggesting
from trajkern._dtypes import FLOATS
from trajkern._values import check_finite
from trajkern.integrations._adapted_head import embedding_count
from trajkern.integrations._adapter import Enabled, Patches, check_signature, check_version, held
from trajkern.integrations._credit_checks import spec_of
from trajkern.integrations._host_tree import TreeRollouts
from trajkern.integrations._trl_async import async_grpo_loss
from trajkern.integrations._trl_credit import ByCredit, Generation, check_advantages, hooks, with_penalty
from trajkern.integrations._trl_loss import (
    check_fit,
    checked_loss,
    clip_of,
    grpo_loss,
    loss_method,
    read_all_logged,
    read_logged,
    rloo_loss,
)
from trajkern.integrations._trl_score import asked
from trajkern.integrations._trl_stand_in import (
    Put,
    StandIn,
    give,
    give_class,
    of_class,
    of_classes,
    of_trainer,
    own_class,
    take,
    take_class,
)
from trajkern.integrations._trl_tree import tree_rollouts
from trajkern.integrations._wrapped import autocasted

__all__ = ["Recipe", "Rollouts", "TreeRollouts", "disable", "enable", "tree_rollouts"]
TESTED = ("1.15.0", "1.16.0")
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "GRPOTrainer": grpo_loss,
    "RLOOTrainer": rloo_loss,
    "AsyncGRPOTrainer": async_grpo_loss,
}
_head = Patches()
_enabled: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers and classes


class Rollouts(NamedTuple):
    """What a function sees of one generation: the rewards of all ranks, the completions of this one."""

    rewards: Tensor  # [N] over all ranks: the reward functions' sum, weighted and clipped; NaN where none could score
    group_ids: Tensor  # [N] equal for completions of one prompt
    here: slice  # this rank's rows of them
    completion_ids: Tensor  # [B, L]
    completion_mask: Tensor  # [B, L] int64, without what tools wrote
    examples: list[dict[str, Any]]  # the B rows of the dataset, with all of their columns
    inputs: dict[str, Any]  # what TRL made of them: prompts, old, reference and sampler log-probs where there are some


Recipe = Callable[[Rollouts], Tensor]  # advantages of this rank's completions, [B] or [B, L]


@suggesting
def enable(
    trainer_or_class: Any,
    recipe: str | Recipe | None = None,
    *,
    credit: credits.Spec | str | None = None,
    spans: Mapping[str, Callable[[credits.Rollouts], tk.Spans]] | None = None,
    span_rewards: Mapping[str, Callable[[credits.Rollouts], Tensor]] | None = None,
    teacher_logprobs: Callable[[credits.Rollouts], Tensor] | None = None,
    any_version: bool = False,
) -> Enabled:
    """Make a trainer, or every one of a class made from now on, use trajkern's head and loss. Twice is as once.

    A credit is computed of a whole generation. It has, by name: each reward function's own values, and "reward", their
    sum as the trainer weighs and clips it; a flag for each column of the data set that is a bool in every row; the
    rows; the completions as texts; the spans "turn", runs of what the policy wrote; and ``score`` by the policy. What
    it leaves out is in no mask and counts in no normaliser. Options that shape TRL's own advantages, ``scale_rewards``
    and ``multi_objective_aggregation``, say nothing then. RLOOTrainer takes one value a rollout, to which its KL's is
    added, by its own baseline.

    Args:
        trainer_or_class: a GRPOTrainer, RLOOTrainer or AsyncGRPOTrainer, or one of these classes or a subclass. The
            last takes no credit and no recipe: its worker process forms the advantages.
        recipe: whence the advantages come instead of from TRL: the name of a credit in ``trajkern.credit.PRESETS``, or
            a function of :class:`Rollouts`. What a function leaves out gets 0 and counts in the normaliser as in TRL.
        credit: whence the advantages come, an expression of ``trajkern.credit`` or its "package.module:name".
        spans: of a credit; name -> function of its rollouts that returns their spans of this name.
        span_rewards: of a credit; name -> function of its rollouts, with the spans, that returns ``[S]``.
        teacher_logprobs: of a credit; a function of its rollouts that returns ``[T]``.
        any_version: do not warn of a version of TRL that this was not tested with.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back. What was replaced is
        said in a line on stderr, or wherever the program's logging sends the logger "trajkern".

    Raises:
        ImportError: TRL is missing.
        RuntimeError: a version of it whose loss or head takes or reads something that these do not know.
        TypeError: something else than such a trainer, or one with a loss of its own.
        ValueError: an option of the trainer that the loss cannot honour; a recipe that does not exist, or both a recipe
            and a credit, or none of them where a class that it inherits from has one; a credit that the trainer cannot
            feed, by the term and what it lacks; a tokenizer with tokens that the model does not have. For a class it
            is raised when a trainer is made, and for columns of the data set at the first batch.
    """
    check_version("trl", TESTED, any_version)
    kind = _kind(trainer_or_class)
    crediting = _crediting(recipe, credit, {"spans": spans, "span_rewards": span_rewards}, teacher_logprobs)
    a_class = isinstance(trainer_or_class, type)
    if crediting is not None and kind == "AsyncGRPOTrainer":
        raise ValueError(
            "recipe and credit must be None for AsyncGRPOTrainer: its worker process scores rollouts, which reach the "
            "trainer one by one with their advantages, and not as groups"
        )
    if isinstance(crediting, ByCredit):
        crediting.check_kind(kind)
    if not a_class:
        _check(trainer_or_class, kind, crediting)
    if crediting is None:
        _check_inherited(trainer_or_class)
    check_head()
    methods = {loss_method(kind): _without_own(_LOSSES[kind]), "log": _reading, "_save_checkpoint": _reading}
    cls = own_class(trainer_or_class)
    put = Put(methods | ({} if crediting is None else hooks(crediting)), crediting, cls if a_class else None)
    target = cls if a_class else trainer_or_class
    if a_class:
        give_class(cls, put, _check_made)
    else:
        give(target, put)
    _enabled.add(target)
    weakref.finalize(target, _put_head).atexit = False
    _put_head()
    whose = "every one made from now on" if a_class else "this trainer"
    seen, one = weakref.ref(target), weakref.ref(put)
    return Enabled.of(
        f"TRL: trajkern stands in for {kind}.{loss_method(kind)} of {whose} and for TRL's fused head"
        + ("; advantages are TRL's" if crediting is None else f"; advantages by {crediting.named()}"),
        lambda: disable(seen()),
        lambda: one() is not None and _put(seen()) is one(),
    )


def disable(trainer_or_class: Any) -> None:
    """Takes back what :func:`enable` did to this trainer or class; where it did nothing, nothing happens.

    What a class has is taken back from the trainers that were made meanwhile, too.
    """
    read_all_logged()
    if _put(trainer_or_class) is None:
        return
    target = own_class(trainer_or_class) if isinstance(trainer_or_class, type) else trainer_or_class
    take_class(target) if isinstance(target, type) else take(target)
    _enabled.discard(target)
    _put_head()


def _put(target: Any) -> Put | None:
    """What :func:`enable` put for this trainer or class."""
    if isinstance(target, type):
        return of_class(own_class(target))
    return of_trainer(target) if hasattr(target, "__dict__") else None


def _check_inherited(target: Any) -> None:
    """ValueError where a class that it inherits from makes the advantages: they would not be TRL's, as is said."""
    cls = own_class(target)
    puts = [of_class(x) for x in cls.__mro__[1:]] if isinstance(target, type) else of_classes(target)
    for put in puts:
        if put is not None and put.crediting is not None:
            raise ValueError(
                f"recipe or credit must be given for what inherits from {put.named}, which has one, "
                f"{put.crediting.named()}: disable that first, or its credit goes on"
            )


def _kind(target: Any) -> str:
    """Which of TRL's trainers this is, or is derived from."""
    cls = own_class(target)
    for name in _LOSSES:
        base = _base(name, cls)
        if base is not None and issubclass(cls, base):
            owner = next(c for c in cls.__mro__ if loss_method(name) in vars(c))
            if owner is not base:
                raise TypeError(f"trainer_or_class must have {name}'s loss; {owner.__name__} has one of its own")
            check_fit(name, base, _LOSSES[name])
            return name
    raise TypeError(f"trainer_or_class must be one of {', '.join(_LOSSES)}, got {cls.__name__}")


def _base(name: str, cls: type) -> Any:
    """TRL's trainer of that name; where versions have it at several places, what ``cls`` is derived from, or None."""
    if name != "AsyncGRPOTrainer":
        return getattr(importlib.import_module(f"trl.trainer.{name[:4].lower()}_trainer"), name)
    return next((c for c in cls.__mro__ if c.__name__ == name and c.__module__.startswith("trl.")), None)


def _check_made(trainer: Any, put: Put) -> None:
    _check(trainer, _kind(trainer), put.crediting)


def _check(trainer: Any, kind: str, crediting: ByCredit | ByFunction | None) -> None:
    checked_loss(trainer) if kind == "GRPOTrainer" else clip_of(trainer)
    if crediting is not None:
        crediting.check(trainer)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    known = embedding_count(trainer.accelerator.unwrap_model(trainer.model))
    if known is not None and (largest := max(tokenizer.get_vocab().values(), default=0)) >= known:
        raise ValueError(f"processing_class must have tokens that the model has, {known} of them; it has id {largest}")


def _without_own(loss: Callable[..., Tensor]) -> StandIn:
    return lambda trainer, own, *args, **options: loss(trainer, *args, **options)


def _reading(trainer: Any, own: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A method that wants numbers of what the losses left on the device."""
    read_logged(trainer)
    return own(*args, **options)


# the head


class _FusedHead:
    """In the place of TRL's autograd function: the same arguments, the same five results."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [P, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [P]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = autocasted(hidden, weight, bias)
        if (wanted := asked()) is not None:
            wanted.see(hidden, weight, bias, targets)
            temperature = wanted.temperature
        names = {
            "entropy": "entropy",
            "log_sum_sq_probs": "sum_sq_probs",
            "mean_logits": "mean_logit",
            "is_top1": "is_top1",
        }
        with torch.autocast(hidden.device.type, enabled=False):
            stats = tk.linear_token_stats(
                hidden,
                weight.to(hidden.dtype),
                targets,
                outputs=tuple(names[x] for x in outputs if x in names),
                bias=None if bias is None else bias.to(hidden.dtype),
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
            )
        squares = None if stats.sum_sq_probs is None else stats.sum_sq_probs.log()
        return stats.logprobs, stats.entropy, squares, stats.mean_logit, stats.is_top1


def check_head() -> None:
    """RuntimeError where TRL's fused head takes something else than what stands in for it."""
    theirs = held(importlib.import_module("trl.trainer.utils"), "_ChunkedLogProbFunction")
    if theirs not in (None, _FusedHead):  # None where Triton is missing
        check_signature("trl's fused head", theirs.forward, _FusedHead.apply)


def _put_head() -> None:
    """The head stands while anything is enabled."""
    utils = vars(importlib.import_module("trl.trainer.utils"))
    _head.undo()
    if not list(_enabled):
        return
    _head.put(utils, "_ChunkedLogProbFunction", _FusedHead)
    if "_use_triton" in utils:  # else TRL scores the prompt and the padding, too, where it has no Triton
        _head.put(utils, "_use_triton", lambda device: True)


# advantages


@dataclass(frozen=True, eq=False)
class ByFunction:
    """A function of :class:`Rollouts` in the place of a trainer's advantages."""

    function: Recipe

    def named(self) -> str:
        return f"the function {getattr(self.function, '__qualname__', self.function)}"

    def check(self, trainer: Any) -> None:
        check_advantages(trainer)

    def __call__(self, trainer: Any, generation: Generation) -> dict[str, Any]:
        written, here = generation.written, generation.here
        mask = written.to(generation.inputs["completion_mask"].dtype)
        rewards, ids = generation.rewards, generation.inputs["completion_ids"]
        rollouts = Rollouts(rewards, generation.group_ids, here, ids, mask, generation.examples, generation.inputs)
        advantages, name = self.function(rollouts), "the result of recipe"
        check_tensor(name, advantages, dtypes=FLOATS)
        check_valued(name, advantages)
        if readable(advantages):
            check_finite(name, advantages.detach().flatten())
        shapes = [list(mask.shape[:1]), *([] if generation.one_action else [list(mask.shape)])]
        if list(advantages.shape) not in shapes:
            legal = " or ".join(map(str, shapes))
            raise ValueError(f"recipe must return advantages of shape {legal}; got {list(advantages.shape)}")
        advantages = advantages.detach().to(mask.device)
        return {"advantages": with_penalty(trainer, generation, advantages, ~rewards[here].isnan())}


def _crediting(
    recipe: str | Recipe | None,
    spec: credits.Spec | str | None,
    spans: Mapping[str, Any],
    teacher: Callable[[credits.Rollouts], Tensor] | None,
) -> ByCredit | ByFunction | None:
    """What makes the advantages; None where TRL does."""
    if recipe is not None and spec is not None:
        raise ValueError("recipe and credit must not both be given: add credit.recipe(...) to the credit")
    feeds: dict[str, Any] = {name: _functions(name, value) for name, value in spans.items() if value is not None}
    if teacher is not None:
        feeds["teacher_logprobs"] = _function("teacher_logprobs", teacher)
    if isinstance(recipe, str):
        spec = _named(recipe)
    if spec is not None:
        return ByCredit(spec_of("credit", spec), **feeds)
    if feeds:
        raise ValueError(f"{next(iter(feeds))} must be given with a credit or the name of a recipe, which read it")
    return None if recipe is None else ByFunction(_function("recipe", recipe, "a name, a function or None"))


def _named(name: str) -> credits.Spec:
    if name not in credits.PRESETS:
        legal = f"a function or one of {', '.join(credits.PRESETS)}"
        raise ValueError(f"recipe must be {legal}; got {name!r}{did_you_mean(name, credits.PRESETS)}")
    return credits.recipe(name)


def _functions(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of names to functions of rollouts, got {describe(value)}")
    return {key: _function(f"{name}[{key!r}]", function) for key, function in value.items()}


def _function(name: str, value: Any, legal: str = "a function of rollouts") -> Any:
    check_callable(name, value, legal)
    return value
