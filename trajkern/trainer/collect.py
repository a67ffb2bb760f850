"""From questions to credit: sample rollouts, reward and compare them, drop what has nothing to teach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trajkern.trainer.compose import composed, gated
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.credit import Credit
from trajkern.trainer.evaluate import each, rewards_of
from trajkern.trainer.forest import Forest
from trajkern.trainer.packing import select
from trajkern.trainer.ranks import Rows
from trajkern.trainer.run import Run
from trajkern.trainer.sampling import environment, sample
from trajkern.trainer.systems.base import Assigned, GroupSystem, Local, Played, System, Values
from trajkern.trainer.systems.plain import PlainTrees
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.tree_sampling import grow, leaf_chances, plant, thin


def collect(run: Run, questions: list[Question]) -> tuple[Values, Credit | None]:
    """A step's metrics so far, and what this rank trains of it; None where it has nothing left to learn from."""
    system = run.system
    with run.ranks.gathered(run.policy):
        if isinstance(system, PlainTrees):
            values, credit = tree_credit(run, system, questions)
        else:
            assert isinstance(system, GroupSystem)
            values, credit = group_credit(run, system, questions)
    merged = run.ranks.merged(values)
    run.clock.sampled += int(merged.pop("sampled") or 0)
    if merged.get("gated_rollouts") == merged.pop("rollouts"):
        run.display.say(f"step {run.step}: the gate let no rollout through; nothing was trained")
    return merged, credit


def keeps_groups(config: TrainConfig, system: System) -> bool:
    """Whether each group is played and credited on one rank: to deal or to gate rollouts takes all of their group."""
    return config.control == "random-rewards" or config.compose.rubric is not None or not system.splits_groups


def group_credit(run: Run, system: GroupSystem, questions: list[Question]) -> tuple[Local, Credit | None]:
    """A group of rollouts of each question; what they share, the prompt at least, becomes a tree."""
    config, whole = run.config, keeps_groups(run.config, system)
    rows = run.ranks.rows(len(questions) * config.rollouts, config.rollouts if whole else 1)
    with run.clock.timing("sampling"):
        played, sampled = play(run, system, questions, rows, whole)
    values: Local = {"reward": played.rewards, "sampled": sampled, "rollouts": len(played.questions)}
    with run.clock.timing("training"):
        remember(system, played)
        chances = chances_of(run, rows) if config.control == "random-rewards" else None
        played, keep = gated(config.compose, system.task, played, values)
        if not played.questions and whole:
            return values, credited(run, played, Assigned(torch.zeros(0)), values)
        signals = system.signals(played)
        if chances is not None:
            source = dealt(played.batch.group_ids, chances[keep])
            signals = {name: x[source] for name, x in signals.items()}
        assigned = composed(config.compose, system, played, system.credit(played, signals))
        values |= assigned.values
        return values, credited(run, played, assigned, values)


def play(run: Run, system: GroupSystem, questions: list[Question], rows: Rows, whole: bool) -> tuple[Played, int]:
    """This rank's rollouts, the share ``rows`` of all, in groups numbered as the questions; and the tokens drawn."""
    copies = run.config.rollouts
    many, prompts = each(questions, copies), [system.prompt(question) for question in questions]
    talk = environment(run.policy, system.task, many)
    options = sampling_options(run) | {"environment": talk, "ranks": run.ranks, "whole": whole}
    rollouts = sample(run.policy, prompts, copies=copies, **options)
    groups = torch.arange(len(questions)).repeat_interleave(copies)[rows.begin : rows.end]
    return system.play(rollouts, rows.of(many), groups), int(rollouts.sampled.sum())


def remember(system: GroupSystem, played: Played) -> None:
    """Show the system the rollouts of all ranks, so that what it keeps is the same on each."""
    if system.remembers:
        every = list(zip(played.questions, played.texts, played.rewards.tolist(), strict=True))
        questions, texts, rewards = (list(x) for x in zip(*system.ranks.gather(every), strict=True))
        system.learn(questions, texts, rewards)


def credited(run: Run, played: Played, assigned: Assigned, values: Local) -> Credit | None:
    """The rollouts of the groups in which some advantage is not 0: the others have nothing to learn from."""
    batch, advantages = played.batch, assigned.advantages
    groups = batch.group_ids
    owner = torch.repeat_interleave(torch.arange(len(groups)), batch.lengths)
    teaches = (advantages != 0).int()
    if assigned.per_token:
        teaches = torch.zeros_like(groups, dtype=torch.int32).index_add(0, owner, teaches)
    if assigned.keep is not None:
        teaches = teaches * assigned.keep
    live = torch.zeros(run.config.prompts, dtype=torch.int32).index_add(0, groups, teaches) > 0
    live = run.ranks.sum(live.int()) > 0
    values["live_groups"] = 0 if run.ranks.part else int(live.sum())
    keep = live[groups] if assigned.keep is None else live[groups] & assigned.keep
    if not keep.any():
        return None
    forest = Forest.from_batch(select(batch, keep))
    advantages = advantages[keep[owner]] if assigned.per_token else advantages[keep]
    return Credit(forest, advantages, "token" if assigned.per_token else "leaf", forest.loss_mask)


def tree_credit(run: Run, system: PlainTrees, questions: list[Question]) -> tuple[Local, Credit | None]:
    """Trees of rollouts of each question, grown by expanding random nodes."""
    config, shape = run.config, run.config.tree
    rows = run.ranks.rows(len(questions))
    questions = rows.of(questions)
    with run.clock.timing("sampling"):
        nodes = grow(run.policy, [system.prompt(q) for q in questions], shape, rows=rows, **sampling_options(run))
        forest = thin(plant(nodes, shape.trees), shape.keep, leaf_chances(shape, rows, run.generator))
    groups = forest.tree.leaf_group
    rewards = rewards_of(run.policy, run.task, [questions[g] for g in groups.tolist()], forest.completions())
    sampled = sum(len(node.tokens) for node in nodes if node.parent >= 0)
    values: Local = {"reward": rewards, "sampled": sampled, "rollouts": len(rewards)}
    if config.control == "random-rewards":
        rewards = rewards[dealt(groups, chances_of(run, rows.times(shape.trees * shape.keep)))]
    with run.clock.timing("training"):
        differs = torch.zeros(len(questions)).index_add(0, groups, rewards)
        live = (differs > 0) & (differs < torch.bincount(groups))  # rewards are 0 or 1
        values["live_groups"] = int(live.sum())
        if not values["live_groups"]:
            return values, None
        credit = system.credit(replace(forest, rewards=rewards).prune(live[groups]))
        return values, credit if credit.loss_mask.any() else None


def sampling_options(run: Run) -> dict[str, Any]:
    return {"max_new": run.max_new, "generator": run.generator, "temperature": run.config.temperature}


def chances_of(run: Run, rows: Rows) -> Tensor:
    """A number in [0, 1) for each row of this rank, of those drawn for the rows of all."""
    return torch.rand(rows.total, generator=run.generator, device=run.generator.device)[rows.begin : rows.end]


def dealt(groups: Tensor, chances: Tensor) -> Tensor:  # [N], [N] in [0, 1)
    """Whose signals each rollout is dealt, ``[N]``: each group's own in random order, noise at the same cost."""
    order = chances.argsort()
    order = order[groups[order].argsort(stable=True)]
    return torch.empty_like(order).scatter(0, groups.argsort(stable=True), order)
