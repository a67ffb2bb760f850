"""Optimiser steps of the policy loss on a forest of rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.divergence import divergence_term
from trajkern.trainer.forest import Forest, Lesson
from trajkern.trainer.models.blocks import Layout
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import Piece, pack_pieces, parted
from trajkern.trainer.run import Run, optimise
from trajkern.trainer.systems.base import Values


def score(
    policy: Policy,
    tokens: Tensor,  # [T]
    layout: Layout,
    pairs: tk.HeadInputs,
    head: str,
    temperature: float = 1.0,
) -> Tensor:
    """Log-prob of each scored token, ``[P]``; the head reads those rows only."""
    if head == "eager":
        logits = policy(tokens, layout, pairs.rows)
        return tk.token_logprobs(logits, pairs.targets, temperature=temperature, inplace_backward=True)
    hidden, arguments = policy.hidden(tokens, layout, pairs.rows), policy.head_arguments()
    return tk.linear_logprobs(hidden, targets=pairs.targets, temperature=temperature, **arguments)


class MicroBatch:
    """A micro-batch, and what the updates on it share and leave behind."""

    def __init__(self, run: Run, lesson: Lesson) -> None:
        self.run, self.lesson = run, lesson
        config, forest = run.config, lesson.forest
        self.pairs = lesson.pairs()
        self.fixed: dict[str, Any] = {"sampler_logprobs": forest.sampler_logprobs[self.pairs.tokens]}
        if run.anchor is not None:
            with torch.no_grad():
                self.fixed["ref_logprobs"] = score(
                    run.anchor, forest.tokens, forest.tree, self.pairs, config.head, config.temperature
                )
        self.old: Tensor | None = None
        self.metrics: dict[str, Tensor] = {}

    def loss(self, normalizer: float | None, learning: int) -> Tensor:
        """This micro-batch's part of the loss; the first call's log-probs are the old ones of the others.

        ``learning`` is how many tokens learn in all micro-batches.
        """
        loss, metrics = policy_term(
            self.run, self.lesson, self.pairs, self.old, self.run.config.head, self.fixed, normalizer
        )
        logprobs = metrics.pop("logprobs")
        self.old = logprobs if self.old is None else self.old
        if self.lesson.credit.divergences:
            policy, teacher = self.run.policy, self.run.system.teacher
            part = divergence_term(policy, teacher, self.lesson, self.run.config.temperature, learning)
            loss = loss + part
            metrics["divergence"] = part.detach()
        self.metrics = metrics | {"loss": loss.detach()}
        return loss

    def values(self) -> dict[str, float]:
        """The last update's metrics."""
        assert self.old is not None
        drift = (self.old - self.fixed["sampler_logprobs"]).abs().max()
        metrics = {name: value.item() for name, value in (self.metrics | {"sampler_drift": drift}).items()}
        flat = self.lesson.flat_tokens
        return metrics | {"trained": flat, "shared": flat - self.lesson.forest.tree.num_tokens}


def update(run: Run, lesson: Lesson | None) -> Values:
    """``config.updates`` optimiser steps on one batch, in micro-batches; nothing where no rank has one.

    Each loss is divided by what the batches of all ranks hold together, and gradients are added up. A rank that has
    nothing, or fewer micro-batches than another, goes along with passes that add nothing.
    """
    config, ranks, aggregate = run.config, run.ranks, run.config.loss.resolved_aggregate
    lessons = lesson.pieces(config.micro_tokens) if lesson else []
    count = ranks.most(len(lessons))
    if not count:
        return {}
    normalizer = None
    if aggregate != "token_sum" and (ranks.data or count > 1):
        normalizer = float(ranks.sum(torch.tensor(lesson.units(aggregate) if lesson else 0)))
    learning = lesson.units("token_mean") if lesson else 0
    pieces, idle = [MicroBatch(run, some) for some in lessons], range(count - len(lessons))
    if run.anchor is not None:
        for _ in idle:
            nothing(run.anchor)
    for _ in range(config.updates):
        losses = (piece.loss(normalizer, learning) for piece in pieces)
        norm = optimise(run, chain(losses, (nothing(run.policy) for _ in idle)))
    if pieces:
        run.last = pieces[-1]
    return reported(run, pieces) | {"grad_norm": norm}


def imitate(run: Run, shown: list[list[Piece]]) -> float:
    """One optimiser step of cross-entropy on demonstrations, this rank's share of them; returns the loss of all."""
    ranks, batches = run.ranks, [pack_pieces(some) for some in parted(shown, run.config.micro_tokens)]
    counts = ranks.sum(torch.tensor([[int(b.loss_mask.sum()), b.num_tokens] for b in batches]).sum(0))
    scored, trained = counts.tolist()
    idle = range(ranks.most(len(batches)) - len(batches))
    parts = []

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            logprobs = score(run.policy, batch.tokens, batch.cu_seqlens, batch.head_inputs(), run.config.head)
            loss = -logprobs.sum() / scored
            parts.append(loss.detach())
            yield loss
        for _ in idle:
            yield nothing(run.policy)

    optimise(run, losses())
    run.clock.trained += trained
    return ranks.sum(torch.stack(parts).sum()).item()


def nothing(policy: Policy) -> Tensor:
    """A loss of 0 that every parameter has a share in: in a forward and a backward pass the shards travel."""
    first = torch.zeros(1, dtype=torch.int64)
    hidden = policy.hidden(first + policy.eos, torch.tensor([0, 1]), first)
    return 0 * sum((x.sum() for x in policy.head_arguments().values() if isinstance(x, Tensor)), hidden.sum())


def reported(run: Run, pieces: list[MicroBatch]) -> Values:
    """The metrics of all micro-batches on all ranks: means over the scored tokens, but for sums and maxima."""
    batches = run.ranks.gather([piece.values() for piece in pieces])
    tokens = sum(values["num_tokens"] for values in batches)
    merged: Values = {}
    for name in batches[0]:
        every = [values[name] for values in batches]
        if name in ("loss", "divergence", "num_tokens", "trained", "shared"):
            merged[name] = sum(every)
        elif name in ("ratio_max", "sampler_drift"):
            merged[name] = max(every)
        else:
            total = sum(x * values["num_tokens"] for x, values in zip(every, batches, strict=True))
            merged[name] = total / max(tokens, 1)
    updates = run.config.updates
    run.clock.trained += updates * int(merged.pop("trained") or 0)
    run.clock.shared += updates * int(merged.pop("shared") or 0)
    if not run.config.loss.kl_coef:
        del merged["kl"]
    return merged


def policy_term(
    run: Run,
    lesson: Lesson,
    pairs: tk.HeadInputs,
    old: Tensor | None,  # [P]
    head: str,
    fixed: dict[str, Any],
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics, the entropy and the log-probs among them.

    ``fixed`` are the sampler's and the reference's log-probs, ``[P]`` each, by the names that the loss has for them.
    """
    config, forest, reads_tree = run.config, lesson.forest, lesson.credit.fits_tree(run.config.loss)
    packed: dict[str, Any] = {}
    if reads_tree:
        packed = lesson.credit.tree_inputs(config.loss, pairs.tokens, normalizer) | {"cu_seqlens": pairs.cu_seqlens}
    if head == "fused" and reads_tree:
        return tk.linear_policy_loss(
            run.policy.hidden(forest.tokens, forest.tree, pairs.rows),
            targets=pairs.targets,
            old_logprobs=old,
            temperature=config.temperature,
            with_entropy=True,
            with_logprobs=True,
            **packed,
            **run.policy.head_arguments(),
            **fixed,
        )
    stats = _stats(run, forest, pairs, head)
    per_pair: dict[str, Any] = {"logprobs": stats.logprobs, "old_logprobs": old, "entropy": stats.entropy, **fixed}
    if reads_tree:
        loss, metrics = tk.policy_loss(**per_pair, **packed)
    else:
        loss, metrics = tk.policy_loss(**lesson.flat(pairs, per_pair), config=config.loss, normalizer=normalizer)
    return loss, metrics | {"logprobs": stats.logprobs.detach()}


def _stats(run: Run, forest: Forest, pairs: tk.HeadInputs, head: str) -> tk.TokenStats:
    """Log-prob and entropy of each scored token, ``[P]`` each."""
    policy, temperature = run.policy, run.config.temperature
    if head == "eager":
        logits = policy(forest.tokens, forest.tree, pairs.rows)
        return tk.token_stats(logits, pairs.targets, temperature=temperature, inplace_backward=True)
    hidden, options = policy.hidden(forest.tokens, forest.tree, pairs.rows), policy.head_arguments()
    return tk.linear_token_stats(
        hidden, targets=pairs.targets, temperature=temperature, outputs=("entropy",), **options
    )
