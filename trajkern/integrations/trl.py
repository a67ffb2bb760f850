"""TRL (1.15 and 1.16): the fused head and the packed loss in GRPOTrainer and RLOOTrainer, by one line.

    from trajkern.integrations import trl

    trl.enable(trainer)      # or GRPOTrainer itself, before trainers are made; trl.disable(trainer) undoes it

Two things are replaced, and nothing that they return changes but for rounding. The head that ``add_fused_lm_head``
gave the model computes only positions with a label, by :func:`trajkern.linear_token_stats`; it is one for the process,
so every trainer of TRL that has such a head gets it while anything is enabled. ``_compute_loss`` of the trainer or
class takes the loss and its gradient from :func:`trajkern.policy_loss` and logs what TRL logs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import recipes
from trajkern.integrations._adapted_head import embedding_count
from trajkern.integrations._adapter import Patches, check_signature, check_version, held
from trajkern.integrations._trl_loss import check_fit, check_loss, grpo_loss, read_all_logged, read_logged, rloo_loss
from trajkern.integrations._wrapped import autocasted

TESTED = ("1.15.0", "1.16.0")
_LOSSES = {"GRPOTrainer": grpo_loss, "RLOOTrainer": rloo_loss}
_MISSING = object()
_head = Patches()
_enabled: dict[int, tuple[Any, dict[str, Any]]] = {}  # id of a target -> it, and what it had itself before


class Rollouts(NamedTuple):
    """What a recipe sees of one generation: the rewards of all ranks, the completions of this one."""

    rewards: Tensor  # [N] over all ranks: the weighted sum of the reward functions, NaN where none could score
    group_ids: Tensor  # [N] equal for completions of one prompt
    here: slice  # this rank's rows of them
    completion_ids: Tensor  # [B, L]
    completion_mask: Tensor  # [B, L] int64, without what tools wrote
    examples: list[dict[str, Any]]  # the B rows of the dataset, with all of their columns
    inputs: dict[str, Any]  # what TRL made of them: prompts, old, reference and sampler log-probs where there are some


Recipe = Callable[[Rollouts], Tensor]  # advantages of this rank's completions, [B] or [B, L]


def enable(trainer_or_class: Any, recipe: str | Recipe | None = None, *, any_version: bool = False) -> None:
    """Make a trainer, or every one of a class made from now on, use trajkern's head and loss. Twice is as once.

    Args:
        trainer_or_class: a GRPOTrainer or RLOOTrainer, or one of these classes or a subclass.
        recipe: whence the advantages come instead of from TRL: a function of :class:`Rollouts`, or the name of one in
            ``trajkern.recipes.RECIPES``. What a recipe leaves out gets the advantage 0 here, and counts in the
            normaliser as TRL's own does.
        any_version: do not warn of a version of TRL that this was not tested with.

    Raises:
        ImportError: TRL is missing.
        RuntimeError: a version of it whose loss or head takes or reads something that these do not know.
        TypeError: something else than such a trainer, or one with a loss of its own.
        ValueError: an option of the trainer that the loss cannot honour, a recipe that does not exist, or a tokenizer
            with tokens that the model does not have. For a class it is raised when a trainer is made.
    """
    check_version("trl", TESTED, any_version)
    kind = _kind(trainer_or_class)
    chosen = _named(recipe) if isinstance(recipe, str) else recipe
    if chosen is not None and not callable(chosen):
        raise TypeError(f"recipe must be a name, a function or None, got {type(recipe).__name__}")
    a_class = isinstance(trainer_or_class, type)
    if not a_class:
        _check(trainer_or_class, kind)
    check_head()
    disable(trainer_or_class)
    put: dict[str, Any] = {"_compute_loss": _LOSSES[kind]} | _reading(trainer_or_class)
    if chosen is not None:
        put |= _credited(trainer_or_class, chosen)
    if a_class:
        put["__init__"] = _checked(trainer_or_class.__init__, kind)
    _enabled[id(trainer_or_class)] = trainer_or_class, {k: vars(trainer_or_class).get(k, _MISSING) for k in put}
    for name, function in put.items():
        setattr(trainer_or_class, name, function if a_class else functools.partial(function, trainer_or_class))
    _put_head()


def disable(trainer_or_class: Any) -> None:
    """Takes back what :func:`enable` did to this trainer or class; where it did nothing, nothing happens."""
    read_all_logged()
    _, before = _enabled.pop(id(trainer_or_class), (None, {}))
    for name, value in before.items():
        if value is _MISSING:
            delattr(trainer_or_class, name)
        else:
            setattr(trainer_or_class, name, value)
    if not _enabled:
        _head.undo()


def _kind(target: Any) -> str:
    """Which of TRL's trainers this is, or is derived from."""
    cls = target if isinstance(target, type) else type(target)
    for name in _LOSSES:
        base = getattr(importlib.import_module(f"trl.trainer.{name[:4].lower()}_trainer"), name)
        if issubclass(cls, base):
            owner = next(c for c in cls.__mro__ if "_compute_loss" in vars(c))
            if owner is not base and id(owner) not in _enabled:
                raise TypeError(f"trainer_or_class must have {name}'s loss; {owner.__name__} has one of its own")
            check_fit(name, base, _LOSSES[name])
            return name
    raise TypeError(f"trainer_or_class must be a GRPOTrainer or an RLOOTrainer, got {cls.__name__}")


def _checked(init: Callable[..., None], kind: str) -> Callable[..., None]:
    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        _check(self, kind)

    return checked_init


def _check(trainer: Any, kind: str) -> None:
    if kind == "GRPOTrainer":
        check_loss(trainer)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    known = embedding_count(trainer.accelerator.unwrap_model(trainer.model))
    if known is not None and (largest := max(tokenizer.get_vocab().values(), default=0)) >= known:
        raise ValueError(f"processing_class must have tokens that the model has, {known} of them; it has id {largest}")


def _reading(target: Any) -> dict[str, Callable[..., Any]]:
    """The trainer's methods that want numbers of what the losses left on the device: they read it first."""
    cls: Any = target if isinstance(target, type) else type(target)

    def after_reading(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def read_first(self: Any, *args: Any, **options: Any) -> Any:
            read_logged(self)
            return method(self, *args, **options)

        return read_first

    return {name: after_reading(getattr(cls, name)) for name in ("log", "_save_checkpoint")}


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
    utils = vars(importlib.import_module("trl.trainer.utils"))
    _head.undo()
    _head.put(utils, "_ChunkedLogProbFunction", _FusedHead)
    if "_use_triton" in utils:  # else TRL scores the prompt and the padding, too, where it has no Triton
        _head.put(utils, "_use_triton", lambda device: True)


# advantages


def _named(name: str) -> Recipe:
    if name not in recipes.RECIPES:
        raise ValueError(f"recipe must be a function or one of {', '.join(recipes.RECIPES)}; got {name!r}")

    def advantages(rollouts: Rollouts) -> Tensor:
        count, device = rollouts.rewards.shape[0], rollouts.rewards.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        empty = torch.zeros(count + 1, dtype=torch.int64, device=device)
        # recipes read groups and rewards; a completion that could not be scored is alone, and learns nothing
        unscored, alone = rollouts.rewards.isnan(), count + torch.arange(count, device=device)
        groups = torch.where(unscored, alone, rollouts.group_ids)
        batch = tk.PackedBatch(none, empty, none.bool(), groups, rollouts.rewards.nan_to_num())
        credit = recipes.RECIPES[name](batch)
        of_all = torch.where(credit[1], credit[0], 0) if isinstance(credit, tuple) else credit
        return torch.where(unscored, 0, of_all)[rollouts.here]

    return advantages


def _credited(target: Any, recipe: Recipe) -> dict[str, Callable[..., Any]]:
    """The trainer's methods that score and credit, with the recipe's advantages in the place of TRL's."""
    cls: Any = target if isinstance(target, type) else type(target)
    score, generate = held(cls, "_calculate_rewards"), held(cls, "_generate_and_score_completions")

    @functools.wraps(score)
    def calculate(self: Any, *args: Any, **options: Any) -> Tensor:
        self._trajkern_scores = score(self, *args, **options)
        return self._trajkern_scores

    @functools.wraps(generate)
    def credited(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
        generated = generate(self, examples)
        scores = self._trajkern_scores
        unscored = scores.isnan().all(1)
        rewards = (scores * self.reward_weights.to(scores.device)).nansum(1).masked_fill(unscored, torch.nan)
        size = self.num_generations if self.model.training else self.num_generations_eval
        count, rank = len(examples), self.accelerator.process_index
        mask = generated["completion_mask"]
        if "tool_mask" in generated:
            mask = mask * generated["tool_mask"]
        rollouts = Rollouts(
            rewards,
            torch.arange(rewards.shape[0], device=rewards.device) // size,
            slice(rank * count, (rank + 1) * count),
            generated["completion_ids"],
            mask,
            examples,
            generated,
        )
        advantages = recipe(rollouts)
        if tuple(advantages.shape) not in ((count,), tuple(mask.shape)):
            raise ValueError(
                f"recipe must return advantages of shape [{count}] or {list(mask.shape)}; got {list(advantages.shape)}"
            )
        return generated | {"advantages": advantages.to(mask.device)}

    return {"_calculate_rewards": calculate, "_generate_and_score_completions": credited}
