"""From questions to credit: sample rollouts, reward and compare them, drop what has nothing to teach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trajkern import recipes
from trajkern.recipes import dro
from trajkern.trainer.credit import Credit, credit_of
from trajkern.trainer.evaluate import each, rewards_of
from trajkern.trainer.forest import Forest
from trajkern.trainer.packing import select
from trajkern.trainer.run import Run
from trajkern.trainer.sampling import environment, sample
from trajkern.trainer.systems import Found, Local, Played, System, Values, rubric
from trajkern.trainer.systems.feedback import teacher_logprobs
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.tree_sampling import grow, leaf_chances, plant, thin


def collect(run: Run, questions: list[Question]) -> tuple[Values, Credit | None]:
    """A step's metrics so far, and what this rank trains of it; None where it has nothing left to learn from."""
    tree = run.config.recipe in recipes.TREE_RECIPES
    with run.ranks.gathered(run.policy):
        values, credit = (tree_credit if tree else group_credit)(run, questions)
    merged = run.ranks.merged(values)
    run.clock.sampled += int(merged.pop("sampled") or 0)
    if merged.get("gated_rollouts") == merged.pop("rollouts"):
        run.display.say(f"step {run.step}: the gate let no rollout through; nothing was trained")
    return merged, credit


def group_credit(run: Run, questions: list[Question]) -> tuple[Local, Credit | None]:
    """A group of rollouts of each question; what they share, the prompt at least, becomes a tree."""
    config, system, copies, ranks = run.config, run.system, run.config.rollouts, run.ranks
    many, whole = each(questions, copies), not system.splits_groups
    rows = ranks.rows(len(many), copies if whole else 1)
    with run.clock.timing("sampling"):
        prompts = [system.prompt(question) for question in questions]
        talk = environment(run.policy, system.task, many)
        options = sampling_options(run) | {"environment": talk, "ranks": ranks, "whole": whole}
        rollouts = sample(run.policy, prompts, copies=copies, **options)
        groups = torch.arange(len(questions)).repeat_interleave(copies)[rows.begin : rows.end]
        played = system.play(rollouts, rows.of(many), groups)
    values: Local = {"reward": played.rewards, "sampled": int(rollouts.sampled.sum()), "rollouts": len(groups)}
    with run.clock.timing("training"):
        remember(system, played)
        chances = None
        if config.control == "random-rewards":
            chances = torch.rand(rows.total, generator=run.generator, device=run.generator.device)
            chances = chances[rows.begin : rows.end]
        played, keep = gated(run, played, values)
        if not played.questions and whole:
            return values, credited(run, played, Found(torch.zeros(0)), values)
        signals = system.signals(played)
        if chances is not None:
            source = dealt(played.batch.group_ids, chances[keep])
            signals = {name: x[source] for name, x in signals.items()}
        found = composed(run, played, system.credit(played, signals))
        values |= found.values
        return values, credited(run, played, found, values)


def remember(system: System, played: Played) -> None:
    """Show the system the rollouts of all ranks, so that what it keeps is the same on each."""
    if system.remembers:
        every = list(zip(played.questions, played.texts, played.rewards.tolist(), strict=True))
        questions, texts, rewards = (list(x) for x in zip(*system.ranks.gather(every), strict=True))
        system.learn(questions, texts, rewards)


def gated(run: Run, played: Played, values: Local) -> tuple[Played, Tensor]:
    """The rollouts that the rubric and its gate let through, and which they are; the others enter no statistic."""
    compose = run.config.compose
    check, groups = rubric(compose.rubric, run.system.task), played.batch.group_ids
    if check is None:
        return played, torch.ones_like(groups, dtype=torch.bool)
    passed = torch.tensor([bool(x) for x in check(played.questions, played.texts)])
    keep = dro.gate(passed, groups, mode=compose.gate, threshold=compose.threshold)
    values["gated_rollouts"] = int((~keep).sum())
    values["emptied_groups"] = len(groups.unique()) - len(groups[keep].unique())
    return played.select(keep), keep


def composed(run: Run, played: Played, found: Found) -> Found:
    """The recipe's advantages, positive ones weighed, a hint's term added."""
    compose, batch, advantages = run.config.compose, played.batch, found.advantages
    if compose.positive_weight != 1:
        advantages = torch.where(advantages > 0, compose.positive_weight * advantages, advantages)
    if not compose.hint_weight:
        return found._replace(advantages=advantages)
    assert batch.sampler_logprobs is not None
    if not found.per_token:
        advantages = torch.repeat_interleave(advantages, batch.lengths)
    gain = teacher_logprobs(run.system, played, run.config.temperature) - batch.sampler_logprobs
    return found._replace(advantages=advantages + compose.hint_weight * batch.loss_mask * gain, per_token=True)


def credited(run: Run, played: Played, found: Found, values: Local) -> Credit | None:
    """The rollouts of the groups in which some advantage is not 0: the others have nothing to learn from."""
    batch, advantages = played.batch, found.advantages
    groups = batch.group_ids
    owner = torch.repeat_interleave(torch.arange(len(groups)), batch.lengths)
    teaches = (advantages != 0).int()
    if found.per_token:
        teaches = torch.zeros_like(groups, dtype=torch.int32).index_add(0, owner, teaches)
    if found.keep is not None:
        teaches = teaches * found.keep
    live = torch.zeros(run.config.prompts, dtype=torch.int32).index_add(0, groups, teaches) > 0
    live = run.ranks.sum(live.int()) > 0
    values["live_groups"] = 0 if run.ranks.part else int(live.sum())
    keep = live[groups] if found.keep is None else live[groups] & found.keep
    if not keep.any():
        return None
    forest = Forest.from_batch(select(batch, keep))
    advantages = advantages[keep[owner]] if found.per_token else advantages[keep]
    return Credit(forest, advantages, "token" if found.per_token else "leaf", forest.loss_mask)


def tree_credit(run: Run, questions: list[Question]) -> tuple[Local, Credit | None]:
    """Trees of rollouts of each question, grown by expanding random nodes."""
    config, shape = run.config, run.config.tree
    rows = run.ranks.rows(len(questions))
    questions = rows.of(questions)
    with run.clock.timing("sampling"):
        nodes = grow(run.policy, [run.system.prompt(q) for q in questions], shape, rows=rows, **sampling_options(run))
        forest = thin(plant(nodes, shape.trees), shape.keep, leaf_chances(shape, rows, run.generator))
    groups = forest.tree.leaf_group
    rewards = rewards_of(run.policy, run.task, [questions[g] for g in groups.tolist()], forest.completions())
    sampled = sum(len(node.tokens) for node in nodes if node.parent >= 0)
    values: Local = {"reward": rewards, "sampled": sampled, "rollouts": len(rewards)}
    if config.control == "random-rewards":
        own = rows.times(shape.trees * shape.keep)
        chances = torch.rand(own.total, generator=run.generator, device=run.generator.device)
        rewards = rewards[dealt(groups, chances[own.begin : own.end])]
    with run.clock.timing("training"):
        differs = torch.zeros(len(questions)).index_add(0, groups, rewards)
        live = (differs > 0) & (differs < torch.bincount(groups))  # rewards are 0 or 1
        values["live_groups"] = int(live.sum())
        if not values["live_groups"]:
            return values, None
        forest = replace(forest, rewards=rewards).prune(live[groups])
        credit = credit_of(recipes.TREE_RECIPES[config.recipe], forest)
        return values, credit if credit.loss_mask.any() else None


def sampling_options(run: Run) -> dict[str, Any]:
    return {"max_new": run.max_new, "generator": run.generator, "temperature": run.config.temperature}


def dealt(groups: Tensor, chances: Tensor) -> Tensor:  # [N], [N] in [0, 1)
    """Whose signals each rollout is dealt, ``[N]``: each group's own in random order, noise at the same cost."""
    order = chances.argsort()
    order = order[groups[order].argsort(stable=True)]
    return torch.empty_like(order).scatter(0, groups.argsort(stable=True), order)
