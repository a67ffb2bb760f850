"""TRL's GRPOTrainer on one or on two ranks of gloo, whose groups are spread over them: what it trained, for a test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.integrations.trl_trainers import REWARDS, spoken, tiny, trainer_of
from trajkern import credit
from trajkern.integrations import trl as adapter

RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
}


def lengths(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.spans["turn"].lengths.float()


def likely(rollouts: credit.Rollouts) -> Tensor:
    """Log p of the reference behind a rollout; the last rank scores a row more, so that ranks differ in their work."""
    counts, rank = rollouts.ranks.counts, rollouts.ranks.rank
    last = counts is None or rank == len(counts["rollouts"]) - 1
    assert rollouts.score is not None and rollouts.rows is not None
    contexts, targets = list(rollouts.token_lists), [row["reference"] for row in rollouts.rows]
    logprobs, bounds = rollouts.score(contexts + [[3]] * last, targets + ["a"] * last)
    sums = [x.sum() for x in logprobs.split(bounds.diff().tolist())]
    return torch.stack(sums[: len(rollouts)])


def loud(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.reward("action") > 0


SPEC = (
    (credit.outcome("action") + 0.5 * credit.spans("turn", reward=lengths)).gate(loud).asymmetric(0.5, 1.5)
    + 0.1 * credit.outcome(likely).gate("fine")
).whiten()


def trained(folder: Path, ranks: int, **options: Any) -> list[Any]:
    """Three steps, each on 8 rollouts of two prompts: the completions' sums of advantages, the log, the weights."""
    sizes = {"per_device_train_batch_size": 4 // ranks, "num_generations": 4, "gradient_accumulation_steps": 2}
    options |= {"model": tiny(), "shuffle_dataset": False}
    trainer = trainer_of(folder, rollout_func=spoken, **sizes, **options, **REWARDS)
    adapter.enable(trainer, credit=SPEC)
    generate, learns = trainer._generate_and_score_completions, []

    def kept(examples: list[dict[str, Any]]) -> dict[str, Any]:
        made = generate(examples)
        learns.append((made["advantages"] * made["tool_mask"]).sum(1))
        return made

    trainer._generate_and_score_completions = kept
    trainer.train()
    logged = [
        {k: x[k] for k in ("credit/kept", "grad_norm", "entropy")} for x in trainer.state.log_history if "loss" in x
    ]
    weights = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    return [learns, logged, weights]


def rank_of_two(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    for name, options in RUNS.items():
        own = Path(folder) / name / str(rank)
        own.mkdir(parents=True)
        torch.save(trained(own, 2, **options), own / "trained.pt")


if __name__ == "__main__":
    mp.spawn(rank_of_two, args=(sys.argv[1], int(sys.argv[2])), nprocs=2)
