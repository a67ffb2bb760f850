"""The reference trainer, top to bottom: set-up, supervised warm-up, reinforcement, evaluation, summary."""

from __future__ import annotations

import math
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

import trajkern as tk
from trajkern.trainer import checkpoint
from trajkern.trainer.collect import collect
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.evaluate import Accuracy, evaluate
from trajkern.trainer.models.policy import Policy, load_policy
from trajkern.trainer.plot import plot
from trajkern.trainer.ranks import Ranks, joined
from trajkern.trainer.report import Display, Metrics
from trajkern.trainer.run import METRICS, Clock, Run, deterministic, interruptible, results_folder
from trajkern.trainer.setup import check_ranks, load_system
from trajkern.trainer.systems import system_type
from trajkern.trainer.systems.base import Values
from trajkern.trainer.systems.plain import PlainTrees
from trajkern.trainer.tasks import load_task
from trajkern.trainer.tasks.base import Question, Splits, Task
from trajkern.trainer.update import imitate, update

RAMP = 20  # warm-up steps over which the learning rate rises


class Result(NamedTuple):
    """Held-out accuracy after the warm-up and at the end, the speed, and the files left behind."""

    before: Accuracy
    after: Accuracy
    steps: int
    seconds: float
    clock: Clock
    curve: Path
    metrics: Path
    checkpoint: Path


def train(config: TrainConfig) -> Result:
    """Train as ``config`` says and print a summary. Under torchrun the ranks train together; rank 0 writes and shows.

    Raises:
        ValueError: an unknown task, model, recipe or device; a checkpoint that is truncated or of another model; an
            ``out`` that holds another run; more ranks than can share the work.
        Interrupted: Ctrl-C; a checkpoint has been written.
        RankError: another rank failed or died; the last checkpoint stands.
    """
    backend = tk.use_backend("reference") if config.reference else nullcontext()
    with (
        backend,
        joined(config.device, config.tensor_parallel) as ranks,
        deterministic(config.threads, ranks.device),
        interruptible(patient=ranks.mesh is not None) as interrupt,
        ranks.device if ranks.device.type != "cpu" else nullcontext(),  # a default device slows every call down
    ):
        run = set_up(config, ranks, interrupt)
        try:
            if run.phase == "warmup":
                warm_up(run)
                begin_main(run)
            reinforce(run)
            return finish(run)
        finally:
            run.display.end()
            run.metrics.close()


def set_up(config: TrainConfig, ranks: Ranks, interrupt: threading.Event) -> Run:
    """Questions, policy, optimiser and result files; nothing is written before every argument has been checked."""
    system_type(config.recipe)  # refuses an unknown one before any work
    stored = checkpoint.load(config.resume) if config.resume else None
    display = Display(quiet=ranks.number > 0)
    task, sizes = load_task(config.task, config.seed), config.eval
    display.say(f"{config.task}: drawing questions, seed {config.seed}")
    splits = task.splits(
        heldout=sizes.heldout,
        validation=sizes.validation,
        demonstrations=config.warmup.demonstrations,
        train=config.questions,
    )
    policy = make_policy(config, splits, ranks)
    phase = stored.place["phase"] if stored else "warmup"
    anchor = make_anchor(config, splits, ranks, policy) if phase == "main" else None
    optimizer = make_optimizer(config, task, policy, phase)
    if stored:
        checkpoint.restore_model(stored, "policy", policy)
        if anchor:
            checkpoint.restore_model(stored, "anchor", anchor)
        checkpoint.restore_optimizer(stored, optimizer, policy)
    system = load_system(config, task, policy, ranks)
    check_ranks(config, system, ranks)
    longest = max(len(policy.answer(q.answer)) for q in (*splits.demonstrations, *splits.validation))
    out = ranks.told(results_folder(config) if ranks.number == 0 else None)
    assert out is not None
    history = stored.path.parent / METRICS if stored else None
    size = stored.place["metrics"] if stored else 0
    written: dict[str, Any] = {"history": history, "size": size, "tensorboard": config.tensorboard}
    run = Run(
        config=config,
        ranks=ranks,
        task=task,
        splits=splits,
        system=system,
        pool=system.pool(splits),
        policy=policy,
        anchor=anchor,
        generator=torch.Generator(ranks.device).manual_seed(config.seed),
        max_new=config.max_new or longest,
        out=out,
        metrics=Metrics(out / METRICS, quiet=ranks.number > 0, **written),
        display=display,
        interrupt=interrupt,
        optimizer=optimizer,
    )
    if stored:
        run.restore(stored)
    parameters, threads = sum(p.numel() for p in policy.parameters()), f"{torch.get_num_threads()} threads"
    if ranks.mesh:
        threads += f" on each of {ranks.mesh.size()} ranks"
    display.say(f"{config.model}: {parameters:,} parameters, {threads}; results in {out}")
    return run


def make_policy(config: TrainConfig, splits: Splits, ranks: Ranks) -> Policy:
    """The policy as it begins, the same for every number of ranks."""
    torch.manual_seed(config.seed)
    with torch.device("cpu"):  # a rank moves to its device what it keeps
        policy = load_policy(config.model, config.tiny, splits.demonstrations[: config.shots])
    return ranks.shard(policy)


def make_anchor(config: TrainConfig, splits: Splits, ranks: Ranks, policy: Policy) -> Policy | None:
    """A copy of the policy as it is, where the loss has a KL term."""
    if not config.loss.kl_coef:
        return None
    anchor = make_policy(config, splits, ranks).requires_grad_(False)
    with torch.no_grad():
        for own, now in zip(anchor.parameters(), policy.parameters(), strict=True):
            own.copy_(now)
    return anchor


def make_optimizer(config: TrainConfig, task: Task, policy: Policy, phase: str) -> torch.optim.Optimizer:
    supervised = phase == "warmup" or config.control == "supervised"
    betas, decay = (0.9, 0.99), 0.0
    if supervised:
        own = config.warmup.weight_decay
        betas, decay = (0.9, 0.98), task.weight_decay if own is None else own
    meshes: dict[Any, list[torch.nn.Parameter]] = {}  # one fused step works on one mesh
    for parameter in policy.parameters():
        meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    groups = [{"params": some} for some in meshes.values()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=decay, fused=True)


def set_lr(run: Run, lr: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = lr


def warm_up(run: Run) -> None:
    """Supervised steps on the demonstrations until validation reaches the band."""
    settings = run.config.warmup
    run.display.begin("warm-up", settings.steps, run.step)
    while run.step < settings.steps:
        run.between_steps()
        set_lr(run, settings.lr * min(1.0, (run.step + 1) / RAMP))
        values: Values = {"loss": supervised_step(run)}
        run.step += 1
        checked = run.step % settings.check_every == 0
        if checked:
            accuracy = validate(run, values)
        run.record(values)
        if checked and accuracy.pass_at_1 >= settings.pass_at_1 and accuracy.pass_at_k >= settings.pass_at_k:
            break
    else:
        if settings.steps:
            run.display.say(f"warm-up ended at its limit of {settings.steps} steps, below its validation band")
    run.display.end()


def supervised_step(run: Run) -> float:
    """One optimiser step of cross-entropy on a batch of demonstrations."""
    with run.clock.timing("training"):
        drawn = run.draw(run.splits.demonstrations, run.config.warmup.batch)
        own = run.ranks.rows(len(drawn)).of(drawn)
        return imitate(run, [run.system.demonstration(question) for question in own])


def begin_main(run: Run) -> None:
    """Measure the start, give the main loop a fresh optimiser, and save the state that every control shares."""
    run.before = report_heldout(run, 0)
    run.phase, run.step, run.clock = "main", 0, Clock()
    run.optimizer = make_optimizer(run.config, run.task, run.policy, run.phase)
    run.anchor = make_anchor(run.config, run.splits, run.ranks, run.policy)
    if run.config.warmup.steps:
        run.save("warmup.safetensors")


def reinforce(run: Run) -> None:
    """The main loop: a fixed number of steps, under a time limit that says so when it bites."""
    config = run.config
    run.display.begin(config.recipe if config.control == "none" else config.control, config.steps, run.step)
    while run.step < config.steps:
        run.between_steps()
        if run.ranks.any(time.monotonic() - run.began > config.time_limit):
            limit = f"time limit of {config.time_limit:g} s reached"
            run.display.say(f"{limit}: stopped after {run.step} of {config.steps} steps")
            break
        decay = 1 - 0.9 * run.step / config.steps
        if config.control == "supervised":
            set_lr(run, config.warmup.lr * decay)
            values = supervised_control(run)
        else:
            set_lr(run, config.lr * decay)
            values = policy_step(run)
        run.step += 1
        if run.step % config.eval.every == 0:
            validate(run, values)
        run.record(values)
    run.display.end()


def policy_step(run: Run) -> Values:
    """Sample rollouts, reward them, and descend the policy loss on the prompts whose rewards differ."""
    values, credit = collect(run, run.draw(run.pool, run.config.prompts))
    with run.clock.timing("training"):
        return values | update(run, credit)


def supervised_control(run: Run) -> Values:
    """As many supervised steps as cost one policy step.

    A forward pass over a token counts 1, its backward pass 2. A policy step is charged its prompts and completions once
    for sampling and all its rollouts three times for training, those dropped for equal rewards too, and as if no prefix
    were shared.
    """
    config, policy = run.config, run.policy
    some = run.splits.demonstrations
    prompt = sum(len(policy.prompt(q)) for q in some) / len(some)
    answer = sum(len(policy.answer(q.answer)) for q in some) / len(some)
    drawn = trained = config.rollouts
    if isinstance(run.system, PlainTrees):
        drawn, trained = config.tree.trees * config.tree.leaves, config.tree.trees * config.tree.keep
    sampling = prompt + drawn * answer
    cost = config.prompts * (sampling + 3 * config.updates * trained * (prompt + answer))
    batches = cost / (3 * config.warmup.batch * (prompt + answer))
    count = math.floor((run.step + 1) * batches) - math.floor(run.step * batches)
    losses = [supervised_step(run) for _ in range(count)]
    return {"loss": sum(losses) / len(losses) if losses else None, "batches": count}


def validate(run: Run, values: Values) -> Accuracy:
    """Accuracy on the validation questions, entered into ``values``."""
    accuracy = measured(run, run.splits.validation)
    values |= {"val_pass@1": accuracy.pass_at_1, "val_pass@k": accuracy.pass_at_k}
    values |= {f"val_{name}": value for name, value in accuracy.details.items()}
    run.system.validated(accuracy.pass_at_1)
    return accuracy


def report_heldout(run: Run, step: int) -> Accuracy:
    """Accuracy on the held-out questions, entered into the metrics."""
    run.display.say(f"evaluating on {len(run.splits.heldout)} held-out questions")
    accuracy = measured(run, run.splits.heldout, greedy=True)
    values = {"pass@1": accuracy.pass_at_1, "pass@k": accuracy.pass_at_k, "greedy": accuracy.greedy}
    run.metrics.write("heldout", step, values | accuracy.details)
    return accuracy


def measured(run: Run, questions: list[Question], greedy: bool = False) -> Accuracy:
    """Accuracy on these questions, posed as the recipe poses them."""
    sizes: dict[str, Any] = {"samples": run.config.eval.samples, "max_new": run.max_new, "ranks": run.ranks}
    with run.ranks.gathered(run.policy):
        return evaluate(run.policy, run.task, questions, greedy=greedy, prompt=run.system.prompt, **sizes)


def finish(run: Run) -> Result:
    """The last checkpoint, the last evaluation, the curve and the summary."""
    path, config = run.save(), run.config
    after = report_heldout(run, run.step)
    metrics, curve = run.out / METRICS, run.out / "curve.png"
    kind = config.recipe if config.control == "none" else config.control
    if run.ranks.number == 0:
        plot(metrics, curve, f"{config.task}, {kind}, seed {config.seed}")
    seconds = time.monotonic() - run.began
    assert run.before is not None
    result = Result(run.before, after, run.step, seconds, run.clock, curve, metrics, path)
    run.display.say(summary(config, kind, result))
    if config.head == "eager" and not run.ranks.mesh:
        from trajkern._bench.experiments.heads import compare  # measures as the benchmark does

        for line in compare(run):
            run.display.say(line)
    return result


def summary(config: TrainConfig, kind: str, result: Result) -> str:
    k = config.eval.samples
    sampled, trained = result.clock.rates
    start = "after warm-up" if config.warmup.steps else "before"
    rows = [(start, result.before), (f"after {result.steps} steps of {kind}", result.after)]
    width = max(len(name) for name, _ in rows)
    lines = [
        "",
        f"{config.task}, seed {config.seed}: {config.eval.heldout} held-out questions, {k} samples each",
        f"{'':{width}}  {'pass@1':>7}  {f'pass@{k}':>7}  {'greedy':>7}",
        *(f"{name:{width}}  {a.pass_at_1:7.3f}  {a.pass_at_k:7.3f}  {a.greedy:7.3f}" for name, a in rows),
        f"tokens per second: {sampled:,.0f} sampled, {trained:,.0f} trained; {result.seconds:.0f} s in all",
        *detail_lines(config, rows),
        *shared_line(result.clock),
        f"curve       {result.curve}",
        f"metrics     {result.metrics}",
        f"checkpoint  {result.checkpoint}",
    ]
    return "\n".join(lines)


def detail_lines(config: TrainConfig, rows: list[tuple[str, Accuracy]]) -> list[str]:
    """What the task reports besides accuracy."""
    names = [name for name in rows[-1][1].details if not name.startswith("pass@")]
    found = ((name, [accuracy.details.get(name) for _, accuracy in rows]) for name in names)
    return [f"{name}: {' -> '.join('-' if x is None else f'{x:.3f}' for x in values)}" for name, values in found]


def shared_line(clock: Clock) -> list[str]:
    if not clock.shared:
        return []
    share = clock.shared / clock.trained
    return [f"shared prefixes: {clock.shared:,} of {clock.trained:,} tokens ({share:.0%}) were not computed again"]
