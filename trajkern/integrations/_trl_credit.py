"""What a generation of TRL's trainers is to a credit, and what the credit is to their losses."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern.credit.rollouts import RESERVED
from trajkern.credit.spec import On
from trajkern.credit.terms import OfTurns
from trajkern.credit.tree_terms import OfTree
from trajkern.integrations._trl_loss import COUNTED, note, policy_logprobs
from trajkern.integrations._trl_score import Score, batch_size, unrecorded
from trajkern.integrations._trl_stand_in import StandIn

_AT_RUN_TIME = ("flags:", "rows:")  # columns of the data set, to which a rollout function may add
_INSIDE = (On, OfTree, OfTurns, credit.terms.OfSpans, credit.Directive, credit.terms.Divergence)
_NEVER = {
    "divergence": "it needs the policy's logits, which TRL's losses do not give",
    "tree": "it needs a tree of rollouts, which TRL does not sample",
}
_silent: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers in which a batch taught nobody


class Generation(NamedTuple):
    """What a trainer made of one batch: rewards of all ranks, everything else of this one."""

    examples: list[dict[str, Any]]  # the B rows of the data set, with all of their columns
    inputs: dict[str, Any]  # what TRL hands to its loss
    scores: Tensor  # [N, K] of each reward function
    rewards: Tensor  # [N] their sum as TRL weighs it, NaN where none could score
    group_ids: Tensor  # [N]
    here: slice  # this rank's rows of them
    completion_ids: list[list[int]]
    kl: Tensor | None  # [B] log p(policy) - log p(reference), of a trainer that has it in its reward

    @property
    def written(self) -> Tensor:
        """The tokens of completions that the policy wrote, bool ``[B, L]``."""
        return self.inputs["completion_mask"] * self.inputs.get("tool_mask", 1) > 0

    @property
    def real(self) -> Tensor:
        """The tokens of prompts and completions that are no padding, bool ``[B, P + L]``."""
        return torch.cat((self.inputs["prompt_mask"], self.inputs["completion_mask"]), 1) > 0

    @property
    def one_action(self) -> bool:
        """Whether the loss reads a completion as one action, and so one advantage for it."""
        return "old_logps" in self.inputs


Crediting = Callable[[Any, Generation], dict[str, Any]]  # trainer -> entries of what TRL hands to its loss


def hooks(crediting: Crediting) -> dict[str, StandIn]:
    """The trainer's methods that score and generate, with what ``crediting`` makes of it in the place of TRL's."""

    def calculate(self: Any, own: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        ids = inspect.signature(own).bind(*args, **options).arguments["completion_ids_list"]
        scores = own(*args, **options)
        self._trajkern_scored = scores, ids
        return scores

    def credited(self: Any, own: Callable[..., dict[str, Any]], examples: list[dict[str, Any]]) -> dict[str, Any]:
        with _scored_by(self) as scored:
            generated = own(examples)
        scores, ids = vars(self).pop("_trajkern_scored")
        rewards = weighed(self, scores)
        size = self.num_generations if self.model.training else self.num_generations_eval
        count, rank = len(examples), self.accelerator.process_index
        generation = Generation(
            examples,
            generated,
            scores,
            rewards,
            torch.arange(rewards.shape[0], device=rewards.device) // size,
            slice(rank * count, (rank + 1) * count),
            ids,
            _kl(self, scored, generated["completion_mask"]),
        )
        return generated | crediting(self, generation)

    return {"_calculate_rewards": calculate, "_generate_and_score_completions": credited}


def weighed(trainer: Any, scores: Tensor) -> Tensor:  # [N, K]
    """The sum of the reward functions as the trainer weighs and bounds it, ``[N]``; NaN where none could score."""
    total = (scores * trainer.reward_weights.to(scores.device)).nansum(1)
    total = total.masked_fill(scores.isnan().all(1), torch.nan)
    bounds = getattr(trainer, "reward_clip_range", None)
    return total.clamp(*bounds) if bounds else total


def penalizes(trainer: Any) -> bool:
    """Whether the KL to the reference is in the reward and not in the loss."""
    return hasattr(trainer, "reward_clip_range") and trainer.beta != 0.0


@contextlib.contextmanager
def _scored_by(trainer: Any) -> Iterator[list[Tensor]]:
    """The log-probs ``[B, L]`` that a generation asks for, where their KL is in the reward."""
    name = "_get_per_token_logps_and_entropies"
    found: list[Tensor] = []
    if not penalizes(trainer):
        yield found
        return
    own, score = vars(trainer).get(name), getattr(trainer, name)

    def noted(*args: Any, **options: Any) -> Any:
        result = score(*args, **options)
        found.append(result[0])
        return result

    setattr(trainer, name, noted)
    try:
        yield found
    finally:
        if own is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, own)


def _kl(trainer: Any, scored: list[Tensor], mask: Tensor) -> Tensor | None:
    if not penalizes(trainer):
        return None
    if len(scored) != 2:
        raise RuntimeError(f"{type(trainer).__name__} must score with policy and reference, got {len(scored)} forwards")
    return ((scored[0] - scored[1]) * mask).sum(1)


def with_penalty(trainer: Any, generation: Generation, advantages: Tensor, keep: Tensor) -> Tensor:  # [B], [B]
    """The advantages of rollouts, with that of ``- beta KL`` by the trainer's own baseline, over those that are kept.

    The KL is no part of a reward here: a gate, a sign or a scale of rewards would read it as success.
    """
    if generation.kl is None:
        return advantages
    kl, kept = (trainer.accelerator.gather(x) for x in (generation.kl, keep))
    rule: dict[str, Any] = {"baseline": "leave_one_out", "scale": "none", "singleton": "zero"}
    penalty = tk.group_advantages(-trainer.beta * kl, generation.group_ids, gate=kept, **rule)[generation.here]
    return torch.where(keep, advantages + penalty, 0)


def check_advantages(trainer: Any) -> None:
    """ValueError where the trainer has options of its advantages, off by default, that would say nothing."""
    if getattr(trainer, "normalize_advantages", False):
        raise ValueError("normalize_advantages must be False with a credit or a recipe, whose .whiten() does it")


@dataclass(frozen=True, eq=False)
class ByCredit:
    """A credit in the place of a trainer's advantages; the rest is what feeds it."""

    spec: credit.Spec
    spans: Mapping[str, Callable[[credit.Rollouts], tk.Spans]] = field(default_factory=dict)
    span_rewards: Mapping[str, Callable[[credit.Rollouts], Tensor]] = field(default_factory=dict)
    teacher_logprobs: Callable[[credit.Rollouts], Tensor] | None = None

    def named(self) -> str:
        return f"{self.spec!r:.200}"

    def check_kind(self, kind: str) -> None:
        """ValueError for what no trainer of this kind can do."""
        for name, why in _NEVER.items():
            if name in self.spec.needs:
                node = next(x for x in _nodes(self.spec) if name in x.own_needs)
                raise ValueError(f"credit must be one that {kind} can feed; {node!r} is not: {why}")
        if kind == "RLOOTrainer" and (inside := next((x for x in _nodes(self.spec) if isinstance(x, _INSIDE)), None)):
            raise ValueError(f"credit must be one value a rollout for RLOOTrainer; {inside!r} differs inside of one")

    def check(self, trainer: Any) -> None:
        """ValueError for what this trainer cannot feed, as far as it is known before there is a batch."""
        check_advantages(trainer)
        names = list(trainer.reward_func_names)
        alone = names == ["reward"] and float(trainer.reward_weights[0]) == 1
        twice = [name for name, count in Counter([*names, *([] if alone else ["reward"])]).items() if count > 1]
        if twice:
            raise ValueError(
                f"reward_funcs must have names of their own, none of them 'reward', their sum's; got {twice[0]!r} twice"
            )
        if taken := next((name for name in names if name in RESERVED or ":" in name), None):
            raise ValueError(f"reward_funcs must not be called {', '.join(RESERVED)}, nor with a colon; got {taken!r}")
        given = {"reward", *names, "texts", "rows", "score", "sampler_logprobs", "spans:turn"}
        given |= {f"spans:{name}" for name in self.spans} | {f"span_rewards:{name}" for name in self.span_rewards}
        given |= {"teacher_logprobs"} if self.teacher_logprobs else set()
        try:
            self.spec.check(given | {name for name in self.spec.needs if name.startswith(_AT_RUN_TIME)})
        except ValueError as error:
            raise ValueError(f"credit must be one that {type(trainer).__name__} can feed: {error}") from None

    def __call__(self, trainer: Any, generation: Generation) -> dict[str, Any]:
        found = self.spec(self.rollouts(trainer, generation))
        note(trainer, {f"credit/{name}": x for name, x in found.metrics.items()})
        real, written = generation.real, generation.written
        learns = _of_completions(found.mask, real, written.shape[1])
        counted = found.keep & (learns.any(1) | ~written.any(1))  # TRL counts a completion without tokens as well
        sums = torch.stack((learns.sum(), counted.sum()))
        tokens, rows = trainer.accelerator.gather(sums[None]).sum(0)
        if trainer not in _silent and not bool(rows):
            _silent.add(trainer)
            warnings.warn("the credit keeps no rollout of a batch: its loss is 0", UserWarning, stacklevel=2)
        if found.rows is not None:
            advantages = of_rows = with_penalty(trainer, generation, found.rows.float(), found.keep)
        elif generation.one_action:
            raise ValueError(f"credit must be one value a rollout for RLOOTrainer; {self.spec!r} is not")
        else:
            advantages = _of_completions(found.advantages.float(), real, written.shape[1])
            of_rows = (advantages * learns).sum(1) / learns.sum(1).clamp(min=1)
        _tabulate(trainer, of_rows)
        made = {"advantages": advantages, COUNTED: rows}
        if generation.one_action:
            return made
        made |= {"tool_mask": learns.to(generation.inputs["completion_mask"].dtype), "num_items_in_batch": tokens}
        ratio = generation.inputs.get("importance_sampling_ratio")
        if ratio is not None and ratio.shape == learns.shape:  # 1 outside of the mask, as TRL has it
            made["importance_sampling_ratio"] = torch.where(learns, ratio, 1.0)
        return made

    def rollouts(self, trainer: Any, generation: Generation) -> credit.Rollouts:
        """The generation as a credit reads it, with what the functions of the one before make of it."""
        names, here = trainer.reward_func_names, generation.here
        scores = generation.scores[here]
        rewards = {name: scores[:, i] for i, name in enumerate(names)} | {"reward": generation.rewards[here]}
        asked = self.teacher_logprobs is not None or "sampler_logprobs" in self.spec.needs
        rollouts = credit.Rollouts(
            _packed(trainer, generation, logprobs=asked),
            rewards=rewards,
            flags=_flags(generation.examples, generation.rewards.device),
            texts=trainer.processing_class.batch_decode(generation.completion_ids, skip_special_tokens=True),
            rows=generation.examples,
            score=Score(trainer, images="pixel_values" in generation.inputs),  # type: ignore[arg-type]
            process_group=torch.distributed.group.WORLD if trainer.accelerator.num_processes > 1 else None,
        )
        if self.spans:
            rollouts = replace(rollouts, spans={**rollouts.spans, **_made(self.spans, rollouts)})
        if self.span_rewards:
            rollouts = replace(rollouts, span_rewards=_made(self.span_rewards, rollouts))
        if self.teacher_logprobs is not None:
            rollouts = replace(rollouts, teacher_logprobs=self.teacher_logprobs(rollouts))
        return rollouts


def _made(functions: Mapping[str, Callable[[credit.Rollouts], Any]], rollouts: credit.Rollouts) -> dict[str, Any]:
    return {name: function(rollouts) for name, function in functions.items()}


def _nodes(spec: credit.Spec) -> Iterator[credit.Spec]:
    """An expression and everything inside, what is furthest inside first."""
    for child in spec.inner:
        yield from _nodes(child)
    yield spec


def _flags(examples: list[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """The columns that say yes or no in every row."""
    columns = [name for name in examples[0] if all(type(row.get(name)) is bool for row in examples)]
    return {name: torch.tensor([row[name] for row in examples], device=device) for name in columns}


def _packed(trainer: Any, generation: Generation, logprobs: bool) -> tk.PackedBatch:
    """Prompts and completions end to end; with old log-probs where TRL has them, or where they are asked for."""
    inputs, real = generation.inputs, generation.real
    old, sampler = inputs.get("old_per_token_logps"), inputs.get("sampling_per_token_logps")
    if old is None and logprobs:
        with unrecorded(trainer):
            old = policy_logprobs(trainer, trainer.model, inputs, batch_size=batch_size(trainer))[0]
    if sampler is not None:  # NaN is what a sampler could not score
        sampler = torch.where(sampler.isnan(), torch.nan if old is None else old, sampler)
        sampler = None if bool(sampler[generation.written].isnan().any()) else sampler
    prompts = torch.zeros_like(inputs["prompt_ids"])

    def behind_prompts(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat((prompts.to(x.dtype), x), 1)

    return tk.PackedBatch.from_padded(
        torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1),
        real,
        loss_mask=torch.cat((prompts > 0, generation.written), 1),
        group_ids=generation.group_ids[generation.here],
        old_logprobs=behind_prompts(old),
        sampler_logprobs=behind_prompts(sampler),
    )


def _of_completions(x: Tensor, real: Tensor, length: int) -> Tensor:  # [T], [B, P + L]
    """What the pack has of completions' tokens, padded ``[B, L]``."""
    padded = torch.zeros(real.shape, dtype=x.dtype, device=x.device).masked_scatter(real, x)
    return padded[:, real.shape[1] - length :]


def _tabulate(trainer: Any, advantages: Tensor) -> None:  # [B]
    """Puts the advantages that train where TRL put its own, in the table of completions."""
    every, table = trainer.accelerator.gather(advantages).tolist(), trainer._logs["advantages"]
    for _ in range(min(len(every), len(table))):
        table.pop()
    table.extend(every)
