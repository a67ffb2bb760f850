"""``python -m trajkern._bench.packed``: training on packed trees beside the same rollouts flat, in time and memory.

Times the forward and the backward pass of the whole built-in model with the fused policy loss, both in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._bench.memory import peak_bytes
from trajkern._bench.table import seconds, table
from trajkern._bench.timing import Summary, WallClock, race, ratio
from trajkern.testing.tree import regular_tree
from trajkern.trainer.blocks import Layout
from trajkern.trainer.model import ModelConfig
from trajkern.trainer.policy import CharacterModel
from trajkern.trainer.tokenizer import VOCABULARY

BOUND = 1.25  # packed may take at most so many times the share of the flat tokens that it has
CONFIG = tk.PolicyLoss("grpo")


@dataclass(frozen=True)
class Work:
    """Rollouts whose prefixes are shared; a node a step or a prompt."""

    name: str
    tree: tk.Tree
    prompt: int  # tokens of each root that are not scored
    bounded: bool = False  # by BOUND


def works() -> list[Work]:
    steps = regular_tree(5, 3, 64)
    return [
        Work("depth 5, branching 3, 64-token steps", steps, 64, bounded=True),
        Work("16 prompts of 256 tokens, 8 rollouts of 128", _groups(16, 256, 8, 128), 256),
        Work("64 prompts of 8 tokens, 8 rollouts of 4", _groups(64, 8, 8, 4), 8),
    ]


def _groups(prompts: int, prompt: int, rollouts: int, completion: int) -> tk.Tree:
    """Prompts, each with its completions as leaves."""
    parent = [-1] * prompts + [p for p in range(prompts) for _ in range(rollouts)]
    lengths = [prompt] * prompts + [completion] * (prompts * rollouts)
    return tk.Tree(torch.tensor(parent), torch.tensor(lengths))


def contenders(work: Work, model: CharacterModel) -> dict[str, Callable[[], Tensor]]:
    """A training step's forward and backward from the rollouts as they are; both return the loss."""
    tree, generator = work.tree, torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (tree.num_tokens,), generator=generator)
    advantages = torch.randn(tree.num_leaves, generator=generator)
    scored = tree.positions >= work.prompt
    pairs, index = tree.pairs(tokens, scored), tree.flat_index
    flat = tk.PackedBatch(tokens[index], tree.flat_cu_seqlens, scored[index], torch.arange(tree.num_leaves))

    def step(tokens: Tensor, layout: Layout, pairs: tk.HeadInputs, **credit: Any) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss, _ = tk.linear_policy_loss(
            model.hidden(tokens, layout, pairs.rows),
            targets=pairs.targets,
            old_logprobs=None,
            cu_seqlens=pairs.cu_seqlens,
            config=CONFIG,
            **credit,
            **model.head_arguments(),
        )
        loss.backward()
        return loss.detach()

    def packed() -> Tensor:
        fresh = tk.Tree(tree.parent, tree.node_lengths)  # nothing derived before, as a new batch's
        return step(tokens, fresh, pairs, advantages=None, branch=tk.Paths(fresh, advantages))

    return {
        "packed": packed,
        "flat": lambda: step(flat.tokens, flat.cu_seqlens, flat.head_inputs(), advantages=advantages),
    }


def measure(work: Work, seconds_each: float) -> dict[str, Any]:
    """Times, peaks and shares of a work; raises AssertionError where the two losses differ."""
    torch.manual_seed(0)
    model = CharacterModel(ModelConfig())
    calls = contenders(work, model)
    losses = {name: call() for name, call in calls.items()}
    torch.testing.assert_close(losses["packed"], losses["flat"], rtol=1e-4, atol=1e-6)
    peaks = {name: statistics.median(peak_bytes(call, "cpu") for _ in range(5)) for name, call in calls.items()}
    samples = race(calls, WallClock(), seconds=seconds_each, rounds=(5, 100))
    share = work.tree.num_tokens / work.tree.flat_index.shape[0]
    time = ratio(samples["packed"], samples["flat"])
    return {
        "work": work.name,
        "tokens": {"packed": work.tree.num_tokens, "flat": work.tree.flat_index.shape[0], "share": share},
        "seconds": {name: vars(Summary.of(x)) for name, x in samples.items()},
        "time": time / share,
        "met": time / share <= BOUND if work.bounded else None,
        "peak_bytes": peaks,
        "memory": peaks["packed"] / peaks["flat"] / share,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    said = {None: "", True: f" (met: ≤ {BOUND} ×)", False: f" (**not met**: ≤ {BOUND} ×)"}
    columns = ("rollouts", "tokens, packed / flat", "time", "of the tokens' share", "peak memory", "of the share")
    rows = [
        (
            r["work"],
            "{packed:,} / {flat:,} = {share:.3f}".format(**r["tokens"]),
            " / ".join(seconds(r["seconds"][name]["median"]) for name in ("packed", "flat")),
            f"{r['time']:.2f} ×{said[r['met']]}",
            " / ".join(f"{r['peak_bytes'][name] / 2**20:.0f} MiB" for name in ("packed", "flat")),
            f"{r['memory']:.2f} ×",
        )
        for r in results
    ]
    return table(columns, rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trajkern._bench.packed", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing each work; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print every number as JSON, too")
    options = parser.parse_args(argv)
    results = [measure(work, options.seconds) for work in works()]
    print(markdown(results))
    if options.json:
        print(json.dumps(results, indent=1))
    return 0 if all(r["met"] is not False for r in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
