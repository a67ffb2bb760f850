"""A run before its first step: what it is made of, and what does not go together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trajkern.credit import Spec
from trajkern.recipes import sdpo
from trajkern.trainer import checkpoint
from trajkern.trainer.collect import keeps_groups, knowable
from trajkern.trainer.compose import composed, load_rubric, load_spec
from trajkern.trainer.config import TrainConfig, check_parts
from trajkern.trainer.folder import METRICS, Folder, check_folder, check_free
from trajkern.trainer.lagging import ANCHOR, Lag
from trajkern.trainer.models.policy import Policy, load_policy
from trajkern.trainer.models.tokenizer import ALPHABET
from trajkern.trainer.optional import require
from trajkern.trainer.packing import demonstration, token_count
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.report import Display, Metrics
from trajkern.trainer.run import Run, Stage
from trajkern.trainer.stopping import Interrupt
from trajkern.trainer.systems import System, system_type
from trajkern.trainer.systems.base import GIVES_HINTS
from trajkern.trainer.systems.plain import PlainTrees, differs
from trajkern.trainer.tasks import JsonlTask, Splits, Task, load_task
from trajkern.trainer.tasks.checked import spelling_in

OWN = ("config", "out", "resume", "tensorboard", "threads")  # settings that a rank may have for itself


def set_up(config: TrainConfig, ranks: Ranks, interrupt: Interrupt) -> Run:
    """Questions, policy, optimiser and result files; nothing is written before every argument has been checked."""
    stored = checkpoint.load(config.resume) if config.resume else None
    phase = stored.place["phase"] if stored else "warmup"
    task, display = load_task(config.task, config.seed), Display(quiet=ranks.number > 0)
    configs = [config, config.second] if config.second else [config]
    if phase == "then" and not config.second:
        raise ValueError(f"then.recipe must be given to resume {config.resume}, where it has begun; got None")
    specs = [load_credit(some, task) for some in configs]
    task = posed(config, task)
    if config.second and posed(config.second, task) is not task:
        raise ValueError(f"then.recipe must ask what the recipe {config.recipe} asks; got {config.then.recipe!r}")
    if stored and stored.place["config"]["task"] == config.task and stored.place["data"] != task.fingerprint:
        raise ValueError(f"task must be as it was to resume {config.resume}; {config.task} has changed since")
    check_alike(config, stored, task, ranks)
    check_places(config, stored, ranks)
    display.say(f"{config.task}: drawing questions, seed {config.seed}")
    splits = draw_splits(config, task)
    check_splits(config, splits)
    check_drawn(config, splits, ranks)
    policy = make_policy(config, splits, ranks)
    optimizer = make_optimizer(configs[phase == "then"], task, policy, phase)
    if stored:
        checkpoint.restore_model(stored, "policy", policy)
        checkpoint.restore_optimizer(stored, optimizer, policy)
    stages = [make_stage(some, spec, task, splits, policy, ranks) for some, spec in zip(configs, specs, strict=True)]
    stage = stages[phase == "then"]
    generator = torch.Generator(ranks.device).manual_seed(config.seed)
    if stored:
        restore_stage(stored, stage, splits)
        checkpoint.restore_generator(stored, generator)
    max_new = config.max_new or longest_answer(policy, task, splits)
    folder = take_folder(config, ranks)
    run = Run(
        given=config,
        stage=stage,
        ranks=ranks,
        task=task,
        splits=splits,
        policy=policy,
        generator=generator,
        max_new=max_new,
        folder=folder,
        metrics=open_metrics(config, ranks, folder.path, stored),
        display=display,
        interrupt=interrupt,
        optimizer=optimizer,
    )
    if stored:
        run.restore(stored)
    display.say(description(run))
    return run


def check_alike(config: TrainConfig, stored: checkpoint.Checkpoint | None, task: Task, ranks: Ranks) -> None:
    """Raise ValueError where a rank was given another setting, checkpoint or data than rank 0: they would wait for each
    other, or train a mixture."""
    own = {k: v for k, v in config.to_json().items() if k not in OWN} | {"task's data": task.fingerprint}
    own["checkpoint to resume"] = [stored.place[k] for k in ("phase", "step", "metrics")] if stored else None
    first = ranks.told(own)
    if differing := [name for name in own if own[name] != first[name]]:
        name = differing[0]
        raise ValueError(
            f"{name} must be the same on all ranks; got {own[name]!r} on rank {ranks.number}, {first[name]!r} on rank 0"
        )


def check_drawn(config: TrainConfig, splits: Splits, ranks: Ranks) -> None:
    """Raise ValueError where a rank has other questions than rank 0, as of a set, whose order is a process's own."""
    drawn = hashlib.sha256()
    for part, questions in vars(splits).items():
        for question in questions:
            drawn.update(repr((part, *question[:3])).encode(errors="backslashreplace"))
    if ranks.any(ranks.told(drawn.digest()) != drawn.digest()):
        raise ValueError(f"task {config.task} must draw the same questions on all ranks, in one order; they differ")


def check_places(config: TrainConfig, stored: checkpoint.Checkpoint | None, ranks: Ranks) -> None:
    """Raise ValueError where the model cannot be loaded or the results cannot be put, before what takes long."""
    if config.model != "tiny":
        from trajkern.trainer.models.huggingface import check_model

        try:
            path = Path(config.model)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise OSError("to open it might never end")
            check_model(config.model)
        except OSError as error:
            raise ValueError(f"model must be a folder, or a file that can be read; {config.model}: {error}") from None
    if config.out is not None and ranks.number == 0:
        check_free(config.out, config.resume)
    if config.tensorboard is not None and ranks.number == 0:
        require("tensorboard.summary.writer.record_writer")
        check_folder("tensorboard", config.tensorboard)


def restore_stage(stored: checkpoint.Checkpoint, stage: Stage, splits: Splits) -> None:
    """Give a stage what it remembers, and its copies of the policy. Raises ValueError where it is another's."""
    place, system = stored.place, stage.system
    if place["phase"] != "warmup":
        system.copies = make_copies(stage.config, system, splits)
        for name, copy in system.copies.items():  # the end of a warm-up may be that of a run without
            if stored.under(f"{name}.") or place["step"] > place["start"]["step"]:
                checkpoint.restore_model(stored, name, copy)
    try:
        system.restore(place["system"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"what the recipe {stage.config.recipe} remembers"
        raise ValueError(f"checkpoint must hold {what}; {stored.path} does not: {error!r}") from None


def take_folder(config: TrainConfig, ranks: Ranks) -> Folder:
    """The folder of the results, which rank 0 makes and locks."""
    folder = Folder.of(config) if ranks.number == 0 else None
    path: Path | None = ranks.told(None if folder is None else folder.path)
    assert path is not None
    return folder or Folder(path)


def make_stage(config: TrainConfig, spec: Spec, task: Task, splits: Splits, policy: Policy, ranks: Ranks) -> Stage:
    """A recipe at work. Raises ValueError where the ranks cannot share it, or its questions are too few."""
    system = load_system(config, task, policy, ranks)
    check_ranks(config, system, ranks)
    if "divergence" in spec.needs and ranks.mesh:
        raise ValueError(f"the run must have one rank for a credit with a divergence; got {ranks.mesh.size()}")
    pool = system.pool(splits)
    if len(pool) < config.prompts:
        raise ValueError(
            f"prompts must be at most {len(pool)}, the questions of {config.task!r} to train on; got {config.prompts}"
        )
    return Stage(config, system, spec, pool)


def posed(config: TrainConfig, task: Task) -> Task:
    """The task that the recipe makes of the run's."""
    return system_type(config.recipe).posed(task, settings_of(config))


def draw_splits(config: TrainConfig, task: Task) -> Splits:
    return task.splits(
        heldout=config.eval.heldout,
        validation=config.eval.validation,
        demonstrations=config.warmup.demonstrations,
        train=config.questions,
    )


def longest_answer(policy: Policy, task: Task, splits: Splits) -> int:
    """In tokens, with what an environment writes and its end."""
    shown = (demonstration(policy, task.pieces(q)) for q in (*splits.demonstrations, *splits.validation))
    return max(map(token_count, shown))


def open_metrics(config: TrainConfig, ranks: Ranks, out: Path, stored: checkpoint.Checkpoint | None) -> Metrics:
    """The run's metrics file, which continues that of the run it resumes."""
    history = stored.path.parent / METRICS if stored else None
    marks, board = stored.place["metrics"] if stored else "", config.tensorboard
    return Metrics(out / METRICS, history=history, marks=marks, tensorboard=board, quiet=ranks.number > 0)


def description(run: Run) -> str:
    """What trains, on what, and where its results go."""
    parameters = sum(p.numel() for p in run.policy.parameters())
    workers = f" on each of {run.ranks.mesh.size()} ranks" if run.ranks.mesh else ""
    threads = f"{torch.get_num_threads()} threads{workers}"
    return f"{run.config.model}: {parameters:,} parameters, {threads}; results in {run.out}"


def make_policy(config: TrainConfig, splits: Splits, ranks: Ranks) -> Policy:
    """The policy as it begins, the same for every number of ranks."""
    torch.manual_seed(config.seed)
    with torch.device("cpu"):  # a rank moves to its device what it keeps
        policy = load_policy(config.model, config.tiny, splits.demonstrations[: config.shots])
    return ranks.shard(policy)


def lags_of(config: TrainConfig, system: System) -> dict[str, Lag]:
    """The copies of the policy that the run's loss and system read, and how each lags behind it."""
    return ({ANCHOR: Lag()} if config.loss.kl_coef else {}) | system.lags()


def make_copies(config: TrainConfig, system: System, splits: Splits) -> dict[str, Policy]:
    """The copies that the run's loss and system read, of the system's policy as it is."""
    names, ranks = lags_of(config, system), system.ranks
    copies = {name: make_policy(config, splits, ranks).requires_grad_(False) for name in names}
    for copy in copies.values():
        sdpo.update_teacher(copy, system.policy, rate=1)
    return copies


def make_optimizer(config: TrainConfig, task: Task, policy: Policy, phase: str) -> torch.optim.Optimizer:
    """AdamW with the numbers of reinforcement, or of imitation in the warm-up and the supervised control."""
    betas, decay = (0.9, 0.99), 0.0
    if phase == "warmup" or config.control == "supervised":
        chosen = config.warmup.weight_decay
        betas, decay = (0.9, 0.98), task.weight_decay if chosen is None else chosen
    by_mesh: dict[Any, list[nn.Parameter]] = {}  # one fused step works on one mesh
    for parameter in policy.parameters():
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    groups = [{"params": parameters} for parameters in by_mesh.values()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=decay, fused=True)


def load_credit(config: TrainConfig, task: Task) -> Spec:
    """What credits the rollouts of ``config.recipe`` on this task.

    Raises:
        ValueError: an unknown recipe, with the list; a recipe and a task, control or rubric that do not go together; an
            expression that needs what the rollouts will not know.
    """
    recipe = config.recipe
    kind = system_type(recipe)
    check_task(config, task)
    task = posed(config, task)
    load_rubric(config.compose.rubric, task)
    if config.credit is not None:
        spec = load_spec(config.credit)
    else:
        spec = kind.expression(recipe, settings_of(config))
        if issubclass(kind, PlainTrees) and config.drop_equal:
            spec = spec.gate(differs)
    what = f"the recipe {recipe}" if config.credit is None else f"the credit {config.credit}"
    if config.control == "random-rewards" and (fixed := undealt(spec.needs)):
        raise ValueError(
            f"control must be one of none, supervised for {what}, which reads {fixed}: only what whole rollouts earned "
            "can be dealt"
        )
    spec = composed(spec, config.compose, kind.gate)
    if config.control == "random-drop" and not any(name.startswith("flags:") for name in spec.needs):
        raise ValueError(f"control must not be random-drop for {what}, which drops nothing by a flag of its rollouts")
    try:
        spec.check(knowable(config, kind, task))
    except ValueError as error:
        raise ValueError(f"the recipe {recipe} on the task {task.name} cannot give this credit: {error}") from None
    return spec


def check_task(config: TrainConfig, task: Task) -> None:
    """Raise ValueError where the task lacks a capability that the recipe or a hint's term asks for, or the built-in
    model the characters of a file."""
    system_type(config.recipe).check(config.recipe, settings_of(config), task)
    if config.compose.hint_weight and not GIVES_HINTS.met(task):
        raise ValueError(f"task must be {GIVES_HINTS.meaning}, for compose.hint_weight; got {task.name!r}")
    if config.model == "tiny":
        spelling_in(task, ALPHABET)
        if isinstance(task, JsonlTask):
            task.check_characters(ALPHABET)


def check_splits(config: TrainConfig, splits: Splits) -> None:
    """Raise ValueError where questions have no answer to show, and something is to be made of it."""
    shown, supervised = len(splits.demonstrations), config.warmup.steps > 0 or config.control == "supervised"
    if supervised and not shown:
        raise ValueError(f"task must have answers or references to imitate in the warm-up; {config.task!r} has none")
    if config.model != "tiny" and shown < config.shots:
        raise ValueError(f"shots must be at most {shown}, the demonstrations of {config.task!r}; got {config.shots}")
    if config.max_new is None and not all(q.answer for q in (*splits.demonstrations, *splits.validation)):
        raise ValueError(f"max_new must be given for {config.task!r}: not all of its questions have an answer to show")


def undealt(needs: frozenset[str]) -> str:
    """What of these the control with random rewards cannot deal: all but rewards and flags of rollouts."""
    kinds = ("span_rewards", "score", "texts", "rows")
    return ", ".join(sorted(name for name in needs if name.partition(":")[0] in kinds))


def settings_of(config: TrainConfig) -> Any:
    """The recipe's own."""
    return getattr(config, config.recipe) if system_type(config.recipe).settings_type else None


def load_system(config: TrainConfig, task: Task, policy: Policy, ranks: Ranks = ALONE) -> System:
    """The system of ``config.recipe``."""
    kind = system_type(config.recipe)
    return kind(config.recipe, settings_of(config), task, policy, ranks, config.temperature)


def check_ranks(config: TrainConfig, system: System, ranks: Ranks) -> None:
    """Raise ValueError where the ranks cannot share the work."""
    if ranks.parts == 1:
        return
    check_parts(config.loss, "the run must have one rank of data")
    whole = keeps_groups(config, system)
    if config.prompts * (1 if whole else config.rollouts) < ranks.parts:
        because = f" (the recipe {config.recipe}, or a rubric or a control, keeps groups on one rank)" if whole else ""
        raise ValueError(f"prompts must be enough for {ranks.parts} ranks of data{because}; got {config.prompts}")
    if config.warmup.batch < ranks.parts:
        raise ValueError(f"warmup.batch must be at least {ranks.parts}, the ranks of data; got {config.warmup.batch}")
