"""Optimiser steps of the policy loss on a forest of rollouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.blocks import Layout
from trajkern.trainer.credit import Credit
from trajkern.trainer.policy import Policy
from trajkern.trainer.run import Run, optimise


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


def update(run: Run, credit: Credit) -> dict[str, float]:
    """``config.updates`` optimiser steps on one batch. The first one's log-probs are the old ones: no extra forward."""
    config, forest = run.config, credit.forest
    pairs = forest.tree.pairs(forest.tokens, credit.loss_mask)
    given: dict[str, Any] = {"sampler_logprobs": forest.sampler_logprobs[pairs.tokens]}
    if run.anchor is not None:
        with torch.no_grad():
            given["ref_logprobs"] = score(
                run.anchor, forest.tokens, forest.tree, pairs, config.head, config.temperature
            )
    old: Tensor | None = None
    for _ in range(config.updates):
        loss, metrics = policy_term(run, credit, pairs, old, config.head, given)
        old = old if old is not None else metrics["logprobs"]
        del metrics["logprobs"]
        optimise(run, loss)
        run.clock.trained += forest.flat_tokens
        run.clock.shared += forest.flat_tokens - forest.tree.num_tokens
    assert old is not None
    metrics |= {"loss": loss.detach(), "sampler_drift": (old - given["sampler_logprobs"]).abs().max()}
    run.last = (credit, pairs, given)
    if not config.loss.kl_coef:
        del metrics["kl"]
    return {name: value.item() for name, value in metrics.items()}


def policy_term(
    run: Run,
    credit: Credit,
    pairs: tk.HeadInputs,
    old: Tensor | None,  # [P]
    head: str,
    given: dict[str, Any],  # [P] each
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics, the entropy and the log-probs among them."""
    config, where = run.config, (credit.forest.tokens, credit.forest.tree, pairs.rows)
    loss, reads_tree = config.loss, credit.reads_tree(config.loss)
    if head == "fused" and reads_tree:
        return tk.linear_policy_loss(
            run.policy.hidden(*where),
            targets=pairs.targets,
            old_logprobs=old,
            advantages=None,
            cu_seqlens=pairs.cu_seqlens,
            temperature=config.temperature,
            with_entropy=True,
            with_logprobs=True,
            **credit.packed(loss),
            **run.policy.head_arguments(),
            **given,
        )
    if head == "fused":
        arguments = run.policy.head_arguments() | {"targets": pairs.targets, "temperature": config.temperature}
        stats = tk.linear_token_stats(run.policy.hidden(*where), outputs=("entropy",), **arguments)
    else:
        logits = run.policy(*where)
        stats = tk.token_stats(logits, pairs.targets, temperature=config.temperature, inplace_backward=True)
    own: dict[str, Any] = {"logprobs": stats.logprobs, "old_logprobs": old, "entropy": stats.entropy, **given}
    if reads_tree:
        own |= {"advantages": None, "cu_seqlens": pairs.cu_seqlens, **credit.packed(loss)}
    else:
        own = credit.flat(own) | {"config": loss}
    value, metrics = tk.policy_loss(**own)
    return value, metrics | {"logprobs": stats.logprobs.detach()}
