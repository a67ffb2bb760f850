"""From questions to credit: sample rollouts, find what is to be known of them, drop what has nothing to teach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes.dro import gate
from trajkern.trainer.compose import flags_of, load_rubric
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.divergence import HINTED
from trajkern.trainer.evaluate import each
from trajkern.trainer.forest import Lesson
from trajkern.trainer.ranks import Moments, Ranks, Rows
from trajkern.trainer.returned import unchanged
from trajkern.trainer.run import Run
from trajkern.trainer.sampling import environment, sample
from trajkern.trainer.systems.actions import action_spans, actions_of
from trajkern.trainer.systems.base import GIVES_HINTS, GroupSystem, Local, Played, System, Values
from trajkern.trainer.systems.hints import hinted_logprobs, hinted_prompts
from trajkern.trainer.systems.plain import PlainTrees, differs
from trajkern.trainer.tasks.base import Question, Task
from trajkern.trainer.tasks.capabilities import ActionTask
from trajkern.trainer.tree_sampling import grow, leaf_chances, plant, thin


def collect(run: Run, questions: list[Question]) -> tuple[Values, Lesson | None]:
    """A step's metrics so far, and what this rank trains of it; None where it has nothing left to learn from."""
    system, scored = run.system, run.system.scored
    with run.ranks.gathered(run.policy):
        with run.clock.timing("sampling"):
            if isinstance(system, PlainTrees):
                played, rows, sampled = play_trees(run, system, questions)
            else:
                assert isinstance(system, GroupSystem)
                played, rows, sampled = play(run, system, questions)
        values: Local = {"reward": played.rewards, "sampled": sampled, "rollouts": len(played.questions)}
        with run.clock.timing("training"):
            remember(system, played)
            control, order = run.config.control, None
            chances = chances_of(run, rows) if control == "random-rewards" else None
            if control == "random-drop":
                order = torch.randperm(len(questions), generator=run.generator, device=run.generator.device)
            rollouts = known(run, played, chances, values, order)
            values |= system.report(rollouts, run.spec.needs)
            lesson = credited(run, played, rollouts, values)
            values["scored"] = system.scored - scored
    merged = run.ranks.merged(values)
    run.clock.sampled += int(merged.pop("sampled") or 0)
    run.clock.scored += int(merged.pop("scored") or 0)
    if merged.get("gated_rollouts") == merged.pop("rollouts"):
        run.display.say(f"step {run.step}: the gate let no rollout through; nothing was trained")
    return merged, lesson


def keeps_groups(config: TrainConfig, system: System) -> bool:
    """Whether each group is played and credited on one rank: to deal or to gate rollouts takes all of their group."""
    dealt = config.control in ("random-rewards", "random-drop")
    return dealt or config.compose.rubric is not None or not system.splits_groups


# What :func:`known` tells a credit of any system's rollouts, by the names of its ``needs`` -> where it can.
KNOWN: dict[str, Callable[[TrainConfig, type[System], Task], bool]] = {
    **dict.fromkeys(("reward", "texts", "rows", "score", "sampler_logprobs", "spans:turn"), lambda *_: True),
    "rows:*": lambda *_: True,  # a row's columns are known with the first batch
    "flags:well_formed": lambda *_: True,
    "flags:rubric": lambda config, *_: config.compose.rubric is not None,
    **dict.fromkeys(("teacher_logprobs", "divergence"), lambda _, kind, task: kind.asks_task and GIVES_HINTS.met(task)),
    **dict.fromkeys(("action", "spans:call"), lambda _, kind, task: kind.asks_task and isinstance(task, ActionTask)),
}


def knowable(config: TrainConfig, kind: type[System], task: Task) -> set[str]:
    """What a run's credit may read, before there are rollouts."""
    return {name for name, given in KNOWN.items() if given(config, kind, task)} | kind.knows


def known(
    run: Run,
    played: Played,
    chances: Tensor | None,  # [N] in [0, 1)
    values: Local,
    order: Tensor | None = None,  # [G]
) -> credit.Rollouts:
    """The rollouts with all that the run's credit reads; where they are given, their signals dealt by ``chances``, or
    the flags of prompt ``order[g]`` to prompt g."""
    system, needs, batch = run.system, run.spec.needs, played.batch
    signals, facts = system.signals(played, needs), system.known(played, needs)
    if needs & ({"action", "spans:call"} - system.knows):
        signals, facts = with_actions(system, played, signals, facts)
    kept = judged(run, played, values)
    if chances is not None:
        ids = batch.group_ids if kept is None else 2 * batch.group_ids + kept[1]  # those that are compared
        source = dealt(ids, chances)
        signals = {name: x[source] for name, x in signals.items()}
    flags = {name: x for name, x in signals.items() if x.dtype == torch.bool}
    if kept is not None:
        flags["rubric"] = kept[0]
    pairs = list(zip(played.questions, played.texts, strict=True))
    if "flags:well_formed" in needs:
        flags["well_formed"] = torch.tensor([system.task.read(q, text).well_formed for q, text in pairs])
    if order is not None:
        flags = {name: exchanged(flag, batch.group_ids, order, run.ranks) for name, flag in flags.items()}
    rows = [{**q.entry, "prompt": q.prompt, "text": q.text, "answer": q.answer} for q, _ in pairs]
    prompts: list[list[int] | None] = [None] * len(rows)
    if needs & {"teacher_logprobs", "divergence"}:
        prompts = hinted_prompts(system, played)
    return credit.Rollouts(
        batch,
        rewards={name: x for name, x in signals.items() if name not in flags},
        flags=flags,
        tree=None if played.forest is None else played.forest.tree,
        texts=list(played.texts),
        rows=[{**row, HINTED: prompt} for row, prompt in zip(rows, prompts, strict=True)],
        score=system.score,
        teacher_logprobs=hinted_logprobs(system, played, prompts) if "teacher_logprobs" in needs else None,
        adds_divergences="divergence" in needs,
        process_group=run.ranks.data,
        **facts,
    )


def with_actions(
    system: System, played: Played, signals: dict[str, Tensor], facts: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Signals and facts with the reward "action", how many of each rollout's actions are right, and the spans "call" of
    all: of a system that does not know them itself."""
    actions = actions_of(system.task, played)
    right = torch.tensor([float(sum(action.right for action in some)) for some in actions])
    spans = {"call": action_spans(system.policy, played, actions), **facts.get("spans", {})}
    return {"action": right, **signals}, {**facts, "spans": spans}


def judged(run: Run, played: Played, values: Local) -> tuple[Tensor, Tensor] | None:
    """Which rollouts the rubric accepts, and which its gate lets through, ``[N]`` each; None without a rubric."""
    compose, groups = run.config.compose, played.batch.group_ids
    check = load_rubric(compose.rubric, run.system.task)
    if check is None:
        return None
    passed = torch.tensor(flags_of(compose.rubric, check(played.questions, played.texts), len(played.texts)))
    keep = gate(passed, groups, mode=compose.gate or run.system.gate, threshold=compose.threshold)
    values["gated_rollouts"] = int((~keep).sum())
    values["emptied_groups"] = len(groups.unique()) - len(groups[keep].unique())
    return passed, keep


def credited(run: Run, played: Played, rollouts: credit.Rollouts, values: Local) -> Lesson | None:
    """The rollouts that are kept, of the groups that have an advantage: the others have nothing to learn from."""
    batch, ranks = played.batch, run.ranks
    with unchanged(f"credit {run.config.credit or run.config.recipe}", *tensors_of(rollouts)):
        found = alike(run.spec(rollouts), run.ranks)
    values |= moments_of(found)
    owner = torch.repeat_interleave(torch.arange(len(rollouts)), batch.lengths)
    moves = torch.stack([found.advantages != 0, *(weight != 0 for _, weight in found.divergences)]).any(0)
    teaches = torch.zeros(len(rollouts), dtype=torch.int32).index_add(0, owner, moves.int()) > 0
    if played.forest is not None:
        teaches = teaches | differs(rollouts) & found.keep  # branches are compared with fewer than all of the prompt's
    live = torch.zeros(run.config.prompts, dtype=torch.int32).index_add(0, batch.group_ids, teaches.int())
    live = ranks.sum(live) > 0
    values["live_groups"] = 0 if ranks.part else int(live.sum())
    keep = found.keep & live[batch.group_ids] if run.config.drop_equal else found.keep
    if not found.mask[keep[owner]].any():
        return None
    return Lesson.of(found, keep, played.forest)


def alike(found: credit.Credit, ranks: Ranks) -> credit.Credit:
    """The credit as the first rank of the head has it: a function of an expression may not say the same twice."""
    of_head = ranks.tensor_of_head
    return replace(
        found,
        advantages=of_head(found.advantages),
        mask=of_head(found.mask),
        keep=of_head(found.keep),
        divergences=tuple((term, of_head(weight)) for term, weight in found.divergences),
        rows=None if found.rows is None else of_head(found.rows),
    )


def tensors_of(rollouts: credit.Rollouts) -> list[Tensor]:
    """What a function of an expression could change for all others."""
    fields = (*vars(rollouts.batch).values(), rollouts.teacher_logprobs)
    named = (rollouts.rewards or {}, rollouts.span_rewards, rollouts.flags)
    return [x for x in (*fields, *(x for some in named for x in some.values())) if isinstance(x, Tensor)]


def moments_of(found: credit.Credit) -> Local:
    """The credit's metrics as the ranks merge them: each term's over the tokens that it reaches."""
    kept, positive = (found.metrics[name].item() for name in ("kept", "positive"))
    values: Local = {"credit/kept": (kept, len(found.keep)), "credit/positive": (positive, int(found.mask.sum()))}
    for term, count in found.reached.items():
        mean, std = (found.metrics[f"{term}/{of}"].item() for of in ("mean", "std"))
        values[f"credit/{term}"] = Moments(mean, std, int(count))
    return values


def play(run: Run, system: GroupSystem, questions: list[Question]) -> tuple[Played, Rows, int]:
    """This rank's share of a group of rollouts of each question, which number the groups; and the tokens drawn."""
    copies, whole = run.config.rollouts, keeps_groups(run.config, system)
    rows = run.ranks.rows(len(questions) * copies, copies if whole else 1)
    many, prompts = each(questions, copies), [system.prompt(question) for question in questions]
    talk = environment(run.policy, system.task, many)
    options = sampling_options(run) | {"environment": talk, "ranks": run.ranks, "whole": whole}
    rollouts = sample(run.policy, prompts, copies=copies, **options)
    groups = torch.arange(len(questions)).repeat_interleave(copies)[rows.begin : rows.end]
    return system.play(rollouts, rows.of(many), groups), rows, int(rollouts.sampled.sum())


def play_trees(run: Run, system: PlainTrees, questions: list[Question]) -> tuple[Played, Rows, int]:
    """This rank's share of trees of rollouts, grown by expanding random nodes; and the tokens drawn."""
    shape, rows = run.config.tree, run.ranks.rows(len(questions))
    prompts = [system.prompt(q) for q in rows.of(questions)]
    nodes = grow(run.policy, prompts, shape, rows=rows, **sampling_options(run))
    chances = leaf_chances(shape, rows, run.generator)
    forest = thin(plant(nodes, shape.trees, rows.begin), shape.keep, chances)
    many, completions = [questions[g] for g in forest.tree.leaf_group.tolist()], forest.completions()
    texts = [run.policy.text(tokens) for tokens in completions]
    batch = forest.batch(torch.tensor([run.task.reward(q, text) for q, text in zip(many, texts, strict=True)]))
    sampled = sum(len(node.tokens) for node in nodes if node.parent >= 0)
    return Played(many, texts, batch, forest), rows.times(shape.trees * shape.keep), sampled


def remember(system: System, played: Played) -> None:
    """Show the system the rollouts of all ranks, so that what it keeps is the same on each."""
    if system.remembers:
        every = list(zip(played.questions, played.texts, played.rewards.tolist(), strict=True))
        questions, texts, rewards = (list(x) for x in zip(*system.ranks.gather(every), strict=True))
        system.learn(questions, texts, rewards)


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


def exchanged(flags: Tensor, groups: Tensor, order: Tensor, ranks: Ranks) -> Tensor:  # [N], [N], [G]
    """The flags of prompt ``order[g]`` as those of prompt g, ``[N]``: as many are kept of as many prompts.

    Each rank holds whole groups, in their order, and all groups are of one size.
    """
    place, own = groups.argsort(stable=True), groups.unique()
    every = torch.tensor(ranks.gather(flags[place].view(len(own), -1).tolist()), dtype=flags.dtype)
    return torch.empty_like(flags).scatter(0, place, every[order[own]].flatten())
