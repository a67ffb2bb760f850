"""The reference trainer, top to bottom: set-up, supervised warm-up, reinforcement, evaluation, summary."""

from __future__ import annotations

import copy
import math
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import recipes
from trajkern.trainer import checkpoint
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.cost import measure
from trajkern.trainer.evaluate import Accuracy, evaluate, rewards_of
from trajkern.trainer.packing import pack_demonstrations, pack_rollouts, select
from trajkern.trainer.plot import plot
from trajkern.trainer.policy import Policy, load_policy
from trajkern.trainer.report import Display, Metrics
from trajkern.trainer.run import METRICS, Clock, Run, deterministic, interruptible, optimise, results_folder
from trajkern.trainer.sampling import sample
from trajkern.trainer.tasks import Task

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
    recipes.recipe(config.recipe)
    stored = checkpoint.load(config.resume) if config.resume else None
    display = Display()
    task, sizes = Task(config.task, config.seed), config.eval
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
    longest = max(len(policy.answer(q.answer)) for q in (*splits.demonstrations, *splits.validation))
    out = results_folder(config)
    history = stored.path.parent / METRICS if stored else None
    size = stored.place["metrics"] if stored else 0
    run = Run(
        config=config,
        task=task,
        splits=splits,
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
        values: dict[str, float | int | None] = {"loss": supervised_step(run)}
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
    began = time.perf_counter()
    batch = pack_demonstrations(run.policy, run.draw(run.splits.demonstrations, run.config.warmup.batch))
    loss = -score(run.policy, batch, run.config.head).mean()
    optimise(run, loss)
    run.clock.trained += batch.num_tokens
    run.clock.training += time.perf_counter() - began
    return loss.item()


def score(policy: Policy, batch: tk.PackedBatch, head: str, temperature: float = 1.0) -> Tensor:
    """Log-prob of each scored token, ``[P]``; the head reads those rows only."""
    pairs = batch.head_inputs()
    where = (batch.tokens, batch.cu_seqlens, pairs.rows)
    if head == "eager":
        return tk.token_logprobs(policy(*where), pairs.targets, temperature=temperature, inplace_backward=True)
    hidden, arguments = policy.hidden(*where), policy.head_arguments()
    return tk.linear_logprobs(hidden, targets=pairs.targets, temperature=temperature, **arguments)


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


def policy_step(run: Run) -> dict[str, float | int | None]:
    """Sample groups of rollouts, reward them, and descend the policy loss."""
    config, clock, began = run.config, run.clock, time.perf_counter()
    questions = run.draw(run.splits.train, config.prompts)
    rollouts = sample(
        run.policy,
        [run.policy.prompt(question) for question in questions],
        copies=config.rollouts,
        max_new=run.max_new,
        generator=run.generator,
        temperature=config.temperature,
    )
    clock.sampled += int(rollouts.sampled.sum())
    clock.sampling += time.perf_counter() - began
    rewards = rewards_of(run.policy, run.task, questions, rollouts.completions())
    values: dict[str, float | int | None] = {"reward": rewards.mean().item()}
    if config.control == "random-rewards":
        rewards = deal(rewards.view(config.prompts, -1), run.generator).flatten()
    began = time.perf_counter()
    batch = pack_rollouts(rollouts, rewards, torch.arange(config.prompts).repeat_interleave(config.rollouts))
    advantages = recipes.recipe(config.recipe)(batch)
    live = (advantages.view(config.prompts, -1) != 0).any(1)  # a group of equal rewards has nothing to learn from
    values["live_groups"] = int(live.sum())
    if values["live_groups"]:
        keep = live.repeat_interleave(config.rollouts)
        values |= update(run, select(batch, keep), advantages[keep])
    clock.training += time.perf_counter() - began
    return values


def update(run: Run, batch: tk.PackedBatch, advantages: Tensor) -> dict[str, float]:  # [N]
    """``config.updates`` optimiser steps on one batch. The first one's log-probs are the old ones: no extra forward."""
    config, pairs = run.config, batch.head_inputs()
    assert batch.sampler_logprobs is not None
    given: dict[str, Any] = {"sampler_logprobs": batch.sampler_logprobs[pairs.tokens]}
    if run.anchor is not None:
        with torch.no_grad():
            given["ref_logprobs"] = score(run.anchor, batch, config.head, config.temperature)
    old: Tensor | None = None
    for _ in range(config.updates):
        loss, metrics = policy_term(run, batch, pairs, advantages, old, config.head, given)
        old = old if old is not None else metrics["logprobs"]
        del metrics["logprobs"]
        optimise(run, loss)
        run.clock.trained += batch.num_tokens
    assert old is not None
    metrics |= {"loss": loss.detach(), "sampler_drift": (old - given["sampler_logprobs"]).abs().max()}
    run.last = (batch, pairs, advantages, given)
    if not config.loss.kl_coef:
        del metrics["kl"]
    return {name: value.item() for name, value in metrics.items()}


def policy_term(
    run: Run,
    batch: tk.PackedBatch,
    pairs: tk.HeadInputs,
    advantages: Tensor,  # [N]
    old: Tensor | None,  # [P]
    head: str,
    given: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics, the entropy and the log-probs among them."""
    config, where = run.config, (batch.tokens, batch.cu_seqlens, pairs.rows)
    if head == "eager":
        logits = run.policy(*where)
        stats = tk.token_stats(logits, pairs.targets, temperature=config.temperature, inplace_backward=True)
        loss, metrics = tk.policy_loss(
            stats.logprobs, old, advantages, pairs.cu_seqlens, config=config.loss, entropy=stats.entropy, **given
        )
        return loss, metrics | {"logprobs": stats.logprobs.detach()}
    return tk.linear_policy_loss(
        run.policy.hidden(*where),
        targets=pairs.targets,
        old_logprobs=old,
        advantages=advantages,
        cu_seqlens=pairs.cu_seqlens,
        config=config.loss,
        temperature=config.temperature,
        with_entropy=True,
        with_logprobs=True,
        **run.policy.head_arguments(),
        **given,
    )


def deal(rewards: Tensor, generator: torch.Generator) -> Tensor:  # [G, rollouts]
    """Each group's own rewards in random order: the same groups learn at the same cost, from noise."""
    return rewards.gather(1, torch.rand(rewards.shape, generator=generator).argsort(1))


def supervised_control(run: Run) -> dict[str, float | int | None]:
    """As many supervised steps as cost one policy step.

    A forward pass over a token counts 1, its backward pass 2. A policy step is charged its prompts and completions once
    for sampling and all its rollouts three times for training, those dropped for equal rewards too.
    """
    config, policy = run.config, run.policy
    some = run.splits.demonstrations
    prompt = sum(len(policy.prompt(q)) for q in some) / len(some)
    answer = sum(len(policy.answer(q.answer)) for q in some) / len(some)
    rollouts = config.prompts * config.rollouts
    sampling = config.prompts * prompt + rollouts * answer
    cost = sampling + 3 * config.updates * rollouts * (prompt + answer)
    batches = cost / (3 * config.warmup.batch * (prompt + answer))
    count = math.floor((run.step + 1) * batches) - math.floor(run.step * batches)
    losses = [supervised_step(run) for _ in range(count)]
    return {"loss": sum(losses) / len(losses) if losses else None, "batches": count}


def validate(run: Run, values: dict[str, float | int | None]) -> Accuracy:
    """Accuracy on the validation questions, entered into ``values``."""
    samples = run.config.eval.samples
    accuracy = evaluate(run.policy, run.task, run.splits.validation, samples=samples, max_new=run.max_new)
    values |= {"val_pass@1": accuracy.pass_at_1, "val_pass@k": accuracy.pass_at_k}
    return accuracy


def report_heldout(run: Run, step: int) -> Accuracy:
    """Accuracy on the held-out questions, entered into the metrics."""
    run.display.say(f"evaluating on {len(run.splits.heldout)} held-out questions")
    samples = run.config.eval.samples
    accuracy = evaluate(run.policy, run.task, run.splits.heldout, samples=samples, max_new=run.max_new, greedy=True)
    values = {"pass@1": accuracy.pass_at_1, "pass@k": accuracy.pass_at_k, "greedy": accuracy.greedy}
    run.metrics.write("heldout", step, values)
    return accuracy


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
        batch, pairs, advantages, given = run.last
        for head in ("eager", "fused"):
            term = partial(policy_term, run, batch, pairs, advantages, None, head, given)
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
        f"curve       {result.curve}",
        f"metrics     {result.metrics}",
        f"checkpoint  {result.checkpoint}",
    ]
    return "\n".join(lines)
