"""A run's state: what it trains, where it stands, and how it is saved and resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern.credit import Spec
from trajkern.trainer import checkpoint
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.evaluate import Accuracy
from trajkern.trainer.folder import CHECKPOINT, Folder
from trajkern.trainer.lagging import ANCHOR
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.place import Clock, Phase, Start, read_place
from trajkern.trainer.ranks import Ranks, full
from trajkern.trainer.report import Display, Metrics
from trajkern.trainer.stopping import Interrupt, Interrupted
from trajkern.trainer.systems import System
from trajkern.trainer.tasks import Question, Splits, Task


class Diverged(RuntimeError):
    """A step that cannot be taken: its gradient is not finite."""


class Stage(NamedTuple):
    """A recipe at work: its settings, what plays, what credits the rollouts, and what the loop draws from."""

    config: TrainConfig
    system: System
    spec: Spec
    pool: list[Question]


@dataclass
class Run:
    """Everything that a step reads or changes."""

    given: TrainConfig  # of all stages
    stage: Stage
    ranks: Ranks
    task: Task
    splits: Splits
    policy: Policy
    generator: torch.Generator
    max_new: int
    folder: Folder
    metrics: Metrics
    display: Display
    interrupt: Interrupt
    optimizer: torch.optim.Optimizer
    phase: Phase = "warmup"
    step: int = 0
    start: Start = Start()
    before: Accuracy | None = None
    last: Any = None  # the last micro-batch that was trained
    clock: Clock = field(default_factory=Clock)
    began: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> Path:
        """The folder of the results."""
        return self.folder.path

    @property
    def config(self) -> TrainConfig:
        """This stage's."""
        return self.stage.config

    @property
    def system(self) -> System:
        return self.stage.system

    @property
    def spec(self) -> Spec:
        return self.stage.spec

    @property
    def pool(self) -> list[Question]:
        return self.stage.pool

    @property
    def anchor(self) -> Policy | None:
        """The policy before this stage, where the loss has a KL term."""
        return self.system.copies.get(ANCHOR)

    def close(self) -> None:
        """Leave the terminal and the folder to others."""
        with contextlib.closing(self.folder), contextlib.closing(self.metrics):
            self.display.end()

    def record(self, values: dict[str, float | int | None]) -> None:
        """Write a step's metrics and show them, with the phase's tokens and seconds so far."""
        clock = self.clock
        spent = {"tokens": clock.sampled + clock.scored, "seconds": round(clock.sampling + clock.training, 3)}
        values = {**values, **spent, "tokens/s": round(clock.rate)}
        self.metrics.write("warmup" if self.phase == "warmup" else "main", self.step, values)
        self.display.step(self.step, values)

    def save(self, name: str = CHECKPOINT) -> Path:
        """Write the checkpoint ``name``, from which this run continues step for step."""
        place = {
            "config": self.given.to_json(),
            "phase": self.phase,
            "step": self.step,
            "start": asdict(self.start),
            "before": self.before and asdict(self.before),
            "system": self.system.state(),
            "data": self.task.fingerprint,
            "clock": vars(self.clock),
            "metrics": self.metrics.marks,
        }
        models = {"policy": self.policy, **self.system.copies}
        self.folder.check()
        self.metrics.sync()
        path = self.out / name if self.ranks.number == 0 else None
        checkpoint.save(path, models=models, optimizer=self.optimizer, generator=self.generator, place=place)
        return self.out / name

    def restore(self, stored: checkpoint.Checkpoint) -> None:
        """Continue where ``stored`` stands; what the stage, the optimiser and the generator hold is the caller's to
        restore."""
        place = read_place(stored.place)
        self.phase, self.step, self.start = place.phase, place.step, place.start
        theirs, ours = (_measured(config) for config in (place.config, self.given.to_json()))
        self.before, self.clock = place.before if theirs == ours else None, place.clock

    def between_steps(self) -> None:
        """The place where a run may stop: heed a signal that came to any rank, and write the regular checkpoint."""
        every = self.config.checkpoint_every
        if number := self.ranks.largest(self.interrupt.signal):
            path = self.save()
            self.ranks.largest(0)  # a rank that ends first would have torchrun end rank 0, which is writing
            raise Interrupted(path, number)
        if self.phase != "warmup" and every and self.step and self.step % every == 0:
            self.save()

    def draw(self, pool: Sequence, count: int) -> list:
        """``count`` different items."""
        order = torch.randperm(len(pool), generator=self.generator, device=self.generator.device)[:count]
        return [pool[i] for i in order.tolist()]


def optimise(run: Run, losses: Iterable[Tensor]) -> float:
    """One step against the sum of ``losses`` over all ranks, which is clipped to norm 1; returns its norm before.

    Each of them may be formed when it is asked for: it is backpropagated, and its memory given back, before the next.
    """
    run.optimizer.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    groups = [group["params"] for group in run.optimizer.param_groups]
    gradients = [[p.grad for p in some if p.grad is not None] for some in groups]
    norms = [full(torch.nn.utils.get_total_norm(some)) for some in gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if not norm.isfinite():
        raise Diverged(f"the gradient's norm must be finite to take a step, got {norm.item()}")
    for some in groups:
        torch.nn.utils.clip_grads_with_norm_(some, 1.0, norm)
    run.optimizer.step()
    return norm.item()


@contextlib.contextmanager
def deterministic(threads: int | None, device: torch.device) -> Iterator[None]:
    """The same bits for the same seed and number of threads; on a GPU as far as cuBLAS goes without being told."""
    memory: Any = torch.utils.deterministic
    state = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory)
    torch.set_num_threads(threads or state[0])
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    memory.fill_uninitialized_memory = False  # the flag's debugging aid, which costs a pass over every allocation
    try:
        yield
    finally:
        torch.set_num_threads(state[0])
        torch.use_deterministic_algorithms(state[1])
        memory.fill_uninitialized_memory = state[2]


def _measured(config: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the questions and samples that accuracy is measured on, of a run's settings as JSON."""
    return (config["task"], config["seed"], config["eval"]["heldout"], config["eval"]["samples"])
