"""The reference trainer, top to bottom: set-up, supervised warm-up, reinforcement, evaluation, summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import trajkern as tk
from trajkern._no_memory import ran_out
from trajkern.trainer.collect import collect
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.evaluate import Accuracy, evaluate
from trajkern.trainer.folder import METRICS, WARM, continues, failure
from trajkern.trainer.idle import Idle
from trajkern.trainer.lagging import follow
from trajkern.trainer.packing import Piece, token_count
from trajkern.trainer.place import Clock, Start
from trajkern.trainer.plot import plot
from trajkern.trainer.ranks import RankError, joined
from trajkern.trainer.returned import sharing
from trajkern.trainer.rounds import questions_of
from trajkern.trainer.run import Diverged, Run, deterministic
from trajkern.trainer.setup import lags_of, load_credit, make_copies, make_optimizer, make_stage, set_up
from trajkern.trainer.stopping import Interrupted, interruptible
from trajkern.trainer.summary import Result, summary
from trajkern.trainer.systems.base import Values
from trajkern.trainer.systems.plain import PlainTrees
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.theirs import said
from trajkern.trainer.update import imitate, update

RAMP = 20  # warm-up steps over which the learning rate rises


def train(config: TrainConfig) -> Result:
    """Train as ``config`` says and print a summary. Under torchrun the ranks train together; rank 0 writes and shows.

    Raises:
        ValueError: an unknown task, model, recipe or device; a checkpoint that is truncated or of another model; an
            ``out`` that holds another run; more ranks than can share the work.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint has been written.
        TypeError: before the run begins, a task whose attributes or methods are of another kind.
        ResultsError: a file could not be read or written (a full disk, a folder that is gone), the code of a task, a
            credit or a rubric of one's own failed or returned what is refused, or another setting cannot be met in the
            middle of the run, or memory ran out; the message has it and the last checkpoint.
        RankError: another rank failed or died; the last checkpoint stands.
    """
    folder: list[Path] = []  # of the results, once it is known
    spare = bytearray(2**22)  # for what is to be said where memory has run out
    # a mode that torch asks at every call, so only where it is needed
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        with on_cpu:
            return trained(config, folder)
    except (Interrupted, KeyboardInterrupt, RankError):
        raise
    except BaseException as error:  # whatever a task may raise
        del spare
        words = said(error, config, begun=bool(folder)) or ran_out(error)
        if words is None and not isinstance(error, (OSError, Diverged)):
            raise
        if words and not folder and isinstance(error, (ValueError, ImportError)):
            raise ValueError(words) from error
        raise failure(error, folder[0] if folder else config.out, config.resume, words) from error


def trained(config: TrainConfig, folder: list[Path]) -> Result:
    """What came of the run; the folder of its results is added to ``folder``."""
    backend = tk.use_backend("reference") if config.reference else nullcontext()
    with (
        backend,
        joined(config.device, config.tensor_parallel) as ranks,
        deterministic(config.threads, ranks.device),
        interruptible(patient=ranks.mesh is not None) as interrupt,
        ranks.device if ranks.device.type != "cpu" else nullcontext(),  # a default device slows every call down
        sharing(ranks.of_head if ranks.head else None),
    ):
        run = set_up(config, ranks, interrupt)
        folder.append(run.out)
        try:
            if config.resume and not continues(config.resume, run.out):
                run.save()  # from here on the folder stands by itself
            if run.phase == "warmup":
                warm_up(run)
                begin_main(run)
            reinforce(run)
            if run.phase == "main" and run.given.second and run.step >= run.config.steps:
                begin_then(run, run.given.second)
                reinforce(run)
            return finish(run)
        finally:
            run.close()


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
        values: Values = {"loss": supervised_step(run, run.splits.demonstrations, run.system.demonstration)}
        run.step += 1
        accuracy = validate(run, values) if run.step % settings.check_every == 0 else None
        run.record(values)
        if accuracy and accuracy.pass_at_1 >= settings.pass_at_1 and accuracy.pass_at_k >= settings.pass_at_k:
            break
    else:
        if settings.steps:
            run.display.say(f"warm-up ended at its limit of {settings.steps} steps, below its validation band")
    run.display.end()


def supervised_step(run: Run, pool: list[Question], show: Callable[[Question], list[Piece]]) -> float:
    """One optimiser step of cross-entropy on a batch of what is shown of the questions in ``pool``."""
    with run.clock.timing("training"):
        questions = run.draw(pool, run.config.warmup.batch)
        share = run.ranks.rows(len(questions)).of(questions)
        return imitate(run, [show(question) for question in share])


def begin_main(run: Run) -> None:
    """Measure the start, give the main loop a fresh optimiser, and save the state that every control shares."""
    run.before = report_heldout(run, 0)
    run.phase, run.step, run.clock = "main", 0, Clock()
    run.optimizer = make_optimizer(run.config, run.task, run.policy, run.phase)
    run.system.copies = make_copies(run.config, run.system, run.splits)
    if run.config.warmup.steps:
        run.save(WARM)


def begin_then(run: Run, config: TrainConfig) -> None:
    """Go over to the second recipe, with a fresh optimiser; steps and clock go on."""
    spec = load_credit(config, run.task)
    run.stage = make_stage(config, spec, run.task, run.splits, run.policy, run.ranks)
    run.phase, run.start = "then", Start(run.step, run.clock.drawn)
    run.optimizer = make_optimizer(run.config, run.task, run.policy, run.phase)
    run.system.copies = make_copies(run.config, run.system, run.splits)


def reinforce(run: Run) -> None:
    """A stage: a fixed number of steps, under limits of time and tokens that say so when they bite."""
    config, end = run.config, run.start.step + run.config.steps
    run.display.begin(config.arm, end, run.step)
    batches = batches_a_step(run) if config.control == "supervised" else 0.0
    idle = Idle()
    while run.step < end:
        run.between_steps()
        if limit := reached_limit(run):
            run.display.say(f"{limit} reached: stopped after {run.step} of {end} steps")
            break
        decay = 1 - 0.9 * max((run.step - run.start.step) / config.steps, share_of_tokens(run))
        if config.control == "supervised":
            set_lr(run, config.warmup.lr * decay)
            values = supervised_control(run, batches)
        else:
            set_lr(run, config.lr * decay)
            values = policy_step(run)
            if words := idle.after(values):
                run.display.say(f"step {run.step + 1}: {words}")
        run.step += 1
        follow(run.system.copies, lags_of(config, run.system), run.policy, run.step - run.start.step)
        if run.step % config.eval.every == 0:
            validate(run, values)
        run.record(values)
    run.display.end()
    if words := idle.ended():
        run.display.say(words)


def reached_limit(run: Run) -> str | None:
    """The limit after which no further step starts, in words, once it is reached."""
    config, limit = run.config, run.config.token_limit
    if run.ranks.any(time.monotonic() - run.began > config.time_limit):
        return f"time limit of {config.time_limit:g} s"
    return f"token limit of {limit:,}" if limit and run.clock.drawn >= limit else None


def share_of_tokens(run: Run) -> float:
    """Of what the token limit left to this stage, what it has sampled and scored; 0 without a limit."""
    limit, before = run.config.token_limit, run.start.tokens
    return (run.clock.drawn - before) / (limit - before) if limit else 0.0


def policy_step(run: Run) -> Values:
    """Sample rollouts, reward them, and descend the policy loss on the prompts whose rewards differ."""
    values, lesson = collect(run, questions_of(run))
    with run.clock.timing("training"):
        return values | update(run, lesson)


def supervised_control(run: Run, batches: float) -> Values:
    """As many supervised steps as cost one policy step: ``batches`` of them."""
    count, system = math.floor((run.step + 1) * batches) - math.floor(run.step * batches), run.system
    losses = [supervised_step(run, system.imitated(run.splits), system.imitation) for _ in range(count)]
    return {"loss": sum(losses) / len(losses) if losses else None, "batches": count}


def batches_a_step(run: Run) -> float:
    """How many supervised steps a policy step costs.

    A forward pass over a token counts 1, its backward pass 2. A policy step is charged its prompts and completions once
    for sampling and all its rollouts three times for training, those dropped for equal rewards too, and as if no prefix
    were shared; its lengths are those foreseen.
    """
    config, system = run.config, run.system
    shown = sum(mean_lengths([system.imitation(q) for q in system.imitated(run.splits)]))
    prompt, answer = mean_lengths(system.foreseen(run.splits))
    drawn = trained = config.rollouts
    if isinstance(run.system, PlainTrees):
        drawn, trained = config.tree.trees * config.tree.leaves, config.tree.trees * config.tree.keep
    sampling = prompt + drawn * answer
    cost = config.prompts * (sampling + 3 * config.updates * trained * (prompt + answer))
    return cost / (3 * config.warmup.batch * shown)


def mean_lengths(trajectories: list[list[Piece]]) -> tuple[float, float]:
    """The mean number of tokens in their prompts, which come first, and of those behind."""
    prompt, rest = (
        sum(map(token_count, parts)) for parts in ((x[:1] for x in trajectories), (x[1:] for x in trajectories))
    )
    return prompt / len(trajectories), rest / len(trajectories)


def validate(run: Run, values: Values) -> Accuracy:
    """Accuracy on the validation questions, entered into ``values``."""
    accuracy = measured(run, run.splits.validation)
    values |= {"val_pass@1": accuracy.pass_at_1, "val_pass@k": accuracy.pass_at_k, "val_distinct": accuracy.distinct}
    values |= {f"val_{name}": value for name, value in accuracy.details.items()}
    run.system.validated(accuracy.pass_at_1, accuracy.families)
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
        sizes["rate"] = run.system.rater(run.stage.pool, run.max_new) if greedy else None
        accuracy = evaluate(run.policy, run.task, questions, greedy=greedy, prompt=run.system.prompt, **sizes)
    accuracy.details.update(run.system.statistics(questions))
    return accuracy


def finish(run: Run) -> Result:
    """The last checkpoint, the last evaluation, the curve and the summary."""
    config, path = run.given, run.save()
    after = run.before if run.before and not run.step else report_heldout(run, run.step)  # no step changes nothing
    metrics, curve, undrawn = run.out / METRICS, run.out / "curve.png", ""
    if run.ranks.number == 0:
        undrawn = plot(metrics, curve, f"{config.task}, {config.label}, seed {config.seed}")
    seconds = time.monotonic() - run.began
    result = Result(run.before, after, run.step, seconds, run.clock, None if undrawn else curve, metrics, path)
    run.display.say(summary(config, result))
    if undrawn:
        run.display.say(f"the curve could not be drawn: {undrawn}")
    if config.head == "eager" and not run.ranks.mesh:
        show_cost_of_heads(run)
    return result


def show_cost_of_heads(run: Run) -> None:
    from trajkern._bench.experiments.heads import compare  # measures as the benchmark does

    for line in compare(run):
        run.display.say(line)
