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
from trajkern.trainer.growth import grow, plant, thin
from trajkern.trainer.packing import select
from trajkern.trainer.run import Run
from trajkern.trainer.sampling import environment, sample
from trajkern.trainer.systems import Found, Played, Values, rubric
from trajkern.trainer.systems.feedback import teacher_logprobs
from trajkern.trainer.tasks import Question


def collect(run: Run, questions: list[Question]) -> tuple[Values, Credit | None]:
    """A step's metrics so far, and what it trains; None where nothing is left to learn from."""
    tree = run.config.recipe in recipes.TREE_RECIPES
    return (tree_credit if tree else group_credit)(run, questions)


def group_credit(run: Run, questions: list[Question]) -> tuple[Values, Credit | None]:
    """A group of rollouts of each question; what they share, the prompt at least, becomes a tree."""
    config, system, copies = run.config, run.system, run.config.rollouts
    with run.clock.timing("sampling"):
        prompts = [system.prompt(question) for question in questions]
        talk = environment(run.policy, system.task, each(questions, copies))
        rollouts = sample(run.policy, prompts, copies=copies, environment=talk, **sampling_options(run))
        played = system.play(rollouts, questions)
    run.clock.sampled += int(rollouts.sampled.sum())
    values: Values = {"reward": played.rewards.mean().item()}
    with run.clock.timing("training"):
        system.learn(played)
        played = gated(run, played, values)
        if not played.questions:
            return values, None
        signals = system.signals(played)
        if config.control == "random-rewards":
            source = dealt(played.batch.group_ids, run.generator)
            signals = {name: x[source] for name, x in signals.items()}
        found = composed(run, played, system.credit(played, signals))
        values |= found.values
        return values, credited(played, found, values)


def gated(run: Run, played: Played, values: Values) -> Played:
    """The rollouts that the rubric and its gate let through; the others enter no statistic."""
    compose = run.config.compose
    check = rubric(compose.rubric, run.system.task)
    if check is None:
        return played
    groups = played.batch.group_ids
    passed = torch.tensor([bool(x) for x in check(played.questions, played.texts)])
    keep = dro.gate(passed, groups, mode=compose.gate, threshold=compose.threshold)
    values["gated_rollouts"] = int((~keep).sum())
    values["emptied_groups"] = len(groups.unique()) - len(groups[keep].unique())
    if not keep.any():
        run.display.say(f"step {run.step}: the gate let no rollout through; nothing was trained")
    return played.select(keep)


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


def credited(played: Played, found: Found, values: Values) -> Credit | None:
    """The rollouts of the groups in which some advantage is not 0: the others have nothing to learn from."""
    batch, advantages = played.batch, found.advantages
    groups = batch.group_ids
    owner = torch.repeat_interleave(torch.arange(len(groups)), batch.lengths)
    teaches = (advantages != 0).int()
    if found.per_token:
        teaches = torch.zeros_like(groups, dtype=torch.int32).index_add(0, owner, teaches)
    if found.keep is not None:
        teaches = teaches * found.keep
    live = torch.zeros(int(groups.max()) + 1, dtype=torch.int32).index_add(0, groups, teaches) > 0
    values["live_groups"] = int(live.sum())
    if not values["live_groups"]:
        return None
    keep = live[groups] if found.keep is None else live[groups] & found.keep
    forest = Forest.from_batch(select(batch, keep))
    advantages = advantages[keep[owner]] if found.per_token else advantages[keep]
    return Credit(forest, advantages, "token" if found.per_token else "leaf", forest.loss_mask)


def tree_credit(run: Run, questions: list[Question]) -> tuple[Values, Credit | None]:
    """Trees of rollouts of each question, grown by expanding random nodes."""
    config, shape = run.config, run.config.tree
    with run.clock.timing("sampling"):
        nodes = grow(run.policy, [run.system.prompt(q) for q in questions], shape, **sampling_options(run))
        forest = thin(plant(nodes, shape.trees), shape.keep, run.generator)
    run.clock.sampled += sum(len(node.tokens) for node in nodes if node.parent >= 0)
    groups = forest.tree.leaf_group
    rewards = rewards_of(run.policy, run.task, [questions[g] for g in groups.tolist()], forest.completions())
    values: Values = {"reward": rewards.mean().item()}
    if config.control == "random-rewards":
        rewards = rewards[dealt(groups, run.generator)]
    with run.clock.timing("training"):
        differs = torch.zeros(config.prompts).index_add(0, groups, rewards)
        live = (differs > 0) & (differs < torch.bincount(groups))  # rewards are 0 or 1
        values["live_groups"] = int(live.sum())
        if not values["live_groups"]:
            return values, None
        forest = replace(forest, rewards=rewards).prune(live[groups])
        credit = credit_of(recipes.TREE_RECIPES[config.recipe], forest)
        return values, credit if credit.loss_mask.any() else None


def sampling_options(run: Run) -> dict[str, Any]:
    return {"max_new": run.max_new, "generator": run.generator, "temperature": run.config.temperature}


def dealt(groups: Tensor, generator: torch.Generator) -> Tensor:  # [N]
    """Whose signals each rollout is dealt, ``[N]``: each group's own in random order, noise at the same cost."""
    order = torch.rand(len(groups), generator=generator).argsort()
    order = order[groups[order].argsort(stable=True)]
    return torch.empty_like(order).scatter(0, groups.argsort(stable=True), order)
