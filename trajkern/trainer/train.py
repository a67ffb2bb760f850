"""The reference trainer, top to bottom: set-up, supervised warm-up, reinforcement, evaluation, summary."""

from __future__ import annotations

import copy
import math
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import trajkern as tk
from trajkern import recipes
from trajkern.trainer import checkpoint
from trajkern.trainer.collect import collect
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.cost import measure
from trajkern.trainer.evaluate import Accuracy, evaluate
from trajkern.trainer.packing import pack_pieces
from trajkern.trainer.plot import plot
from trajkern.trainer.policy import Policy, load_policy
from trajkern.trainer.report import Display, Metrics
from trajkern.trainer.run import METRICS, Clock, Run, deterministic, interruptible, optimise, results_folder
from trajkern.trainer.systems import Values, load_system, recipe_names
from trajkern.trainer.tasks import Question, Task, load_task
from trajkern.trainer.update import policy_term, score, update

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
    """Train as ``config`` says and print a summary.

    Raises:
        ValueError: an unknown task, model or recipe; a checkpoint that is truncated or of another model; an ``out``
            that holds another run.
        Interrupted: Ctrl-C; a checkpoint has been written.
    """
    backend = tk.use_backend("reference") if config.reference else nullcontext()
    with backend, deterministic(config.threads), interruptible() as interrupt:
        run = set_up(config, interrupt)
        try:
            if run.phase == "warmup":
                warm_up(run)
                begin_main(run)
            reinforce(run)
            return finish(run)
        finally:
            run.display.end()
            run.metrics.close()


def set_up(config: TrainConfig, interrupt: threading.Event) -> Run:
    """Questions, policy, optimiser and result files; nothing is written before every argument has been checked."""
    if config.recipe not in recipe_names():
        raise ValueError(f"recipe must be one of {', '.join(recipe_names())}; got {config.recipe!r}")
    stored = checkpoint.load(config.resume) if config.resume else None
    display = Display()
    task, sizes = load_task(config.task, config.seed), config.eval
    display.say(f"{config.task}: drawing questions, seed {config.seed}")
    splits = task.splits(
        heldout=sizes.heldout,
        validation=sizes.validation,
        demonstrations=config.warmup.demonstrations,
        train=config.questions,
    )
    torch.manual_seed(config.seed)
    policy = load_policy(config.model, config.tiny, splits.demonstrations[: config.shots])
    phase = stored.place["phase"] if stored else "warmup"
    anchor = copy.deepcopy(policy).requires_grad_(False) if config.loss.kl_coef and phase == "main" else None
    optimizer = make_optimizer(config, task, policy, phase)
    if stored:
        checkpoint.restore_model(stored, "policy", policy)
        if anchor:
            checkpoint.restore_model(stored, "anchor", anchor)
        checkpoint.restore_optimizer(stored, optimizer)
    system = load_system(config, task, policy)
    longest = max(len(policy.answer(q.answer)) for q in (*splits.demonstrations, *splits.validation))
    out = results_folder(config)
    history = stored.path.parent / METRICS if stored else None
    size = stored.place["metrics"] if stored else 0
    run = Run(
        config=config,
        task=task,
        splits=splits,
        system=system,
        pool=system.pool(splits),
        policy=policy,
        anchor=anchor,
        generator=torch.Generator().manual_seed(config.seed),
        max_new=config.max_new or longest,
        out=out,
        metrics=Metrics(out / METRICS, history=history, size=size, tensorboard=config.tensorboard),
        display=display,
        interrupt=interrupt,
        optimizer=optimizer,
    )
    if stored:
        run.restore(stored)
    parameters = sum(p.numel() for p in policy.parameters())
    display.say(f"{config.model}: {parameters:,} parameters, {torch.get_num_threads()} threads; results in {out}")
    return run


def make_optimizer(config: TrainConfig, task: Task, policy: Policy, phase: str) -> torch.optim.Optimizer:
    supervised = phase == "warmup" or config.control == "supervised"
    betas, decay = (0.9, 0.99), 0.0
    if supervised:
        own = config.warmup.weight_decay
        betas, decay = (0.9, 0.98), task.weight_decay if own is None else own
    return torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=betas, weight_decay=decay, fused=True)


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
        batch = pack_pieces([run.system.demonstration(question) for question in drawn])
        loss = -score(run.policy, batch.tokens, batch.cu_seqlens, batch.head_inputs(), run.config.head).mean()
        optimise(run, loss)
        run.clock.trained += batch.num_tokens
        return loss.item()


def begin_main(run: Run) -> None:
    """Measure the start, give the main loop a fresh optimiser, and save the state that every control shares."""
    run.before = report_heldout(run, 0)
    run.phase, run.step, run.clock = "main", 0, Clock()
    run.optimizer = make_optimizer(run.config, run.task, run.policy, run.phase)
    if run.config.loss.kl_coef:
        run.anchor = copy.deepcopy(run.policy).requires_grad_(False)
    if run.config.warmup.steps:
        run.save("warmup.safetensors")


def reinforce(run: Run) -> None:
    """The main loop: a fixed number of steps, under a time limit that says so when it bites."""
    config = run.config
    run.display.begin(config.recipe if config.control == "none" else config.control, config.steps, run.step)
    while run.step < config.steps:
        run.between_steps()
        if time.monotonic() - run.began > config.time_limit:
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
    if credit is not None:
        with run.clock.timing("training"):
            values |= update(run, credit)
    return values


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
    if config.recipe in recipes.TREE_RECIPES:
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
    sizes = {"samples": run.config.eval.samples, "max_new": run.max_new}
    return evaluate(run.policy, run.task, questions, greedy=greedy, prompt=run.system.prompt, **sizes)


def finish(run: Run) -> Result:
    """The last checkpoint, the last evaluation, the curve and the summary."""
    path, config = run.save(), run.config
    after = report_heldout(run, run.step)
    metrics, curve = run.out / METRICS, run.out / "curve.png"
    kind = config.recipe if config.control == "none" else config.control
    plot(metrics, curve, f"{config.task}, {kind}, seed {config.seed}")
    seconds = time.monotonic() - run.began
    assert run.before is not None
    result = Result(run.before, after, run.step, seconds, run.clock, curve, metrics, path)
    run.display.say(summary(config, kind, result))
    if config.head == "eager" and run.last:
        credit, pairs, given = run.last
        for head in ("eager", "fused"):
            term = partial(policy_term, run, credit, pairs, None, head, given)
            cost = measure(lambda term=term: term()[0].backward())  # type: ignore[misc]
            run.display.say(f"{head:5} head on the last batch, model included: {cost}")
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
