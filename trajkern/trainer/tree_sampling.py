"""Tree sampling: expansions of random nodes, with the cache of what leads to them (Tree-GRPO, arXiv:2509.21240)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.forest import Forest
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.ranks import ALONE, Rows
from trajkern.trainer.sampling import Drawn, draw, left_padded, read_prompts
from trajkern.trainer.schema import Size, check_fields


@dataclass(frozen=True)
class TreeShape:
    """How a prompt's trees grow, for the recipes that compare branches.

    Args:
        trees: of a prompt; each starts as one whole completion.
        expansions: of random nodes in every round, the prompt among them.
        rounds: of expansions; a tree has rounds * expansions + 1 leaves.
        keep: leaves of a tree that are trained, drawn at random.
    """

    trees: Size = 2
    expansions: Size = 2
    rounds: Size = 1
    keep: Size = 3

    def __post_init__(self) -> None:
        check_fields(self, "tree.")
        if self.keep > self.leaves:
            raise ValueError(
                f"tree.keep must be at most tree.rounds * tree.expansions + 1 = {self.leaves}, got {self.keep}"
            )

    @property
    def leaves(self) -> int:
        """Of a tree, before some are dropped."""
        return self.rounds * self.expansions + 1


class Node(NamedTuple):
    """A prompt or a step."""

    parent: int  # its number among all nodes, -1 of a prompt
    tree: int
    tokens: list[int]
    logprobs: list[float]
    row: int  # in the cache
    end: int  # the column after its last token
    used: int  # tokens of the completion up to its end
    leaf: bool


def grow(
    policy: Policy,
    prompts: list[list[int]],
    shape: TreeShape,
    *,
    max_new: int,
    rows: Rows | None = None,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[Node]:
    """The nodes of ``shape.trees`` trees of each prompt, parents first; completions of at most ``max_new`` tokens.

    The prompts are the share ``rows`` of a batch, by default all of it. A tree starts as one chain of steps. In every
    round each of its expansions draws one of its nodes that are no leaves, with replacement, and continues from there
    to the end. Only the node's last token is read again.
    """
    tokens, keep = left_padded(prompts, policy.eos)
    width, count = tokens.shape[1], len(prompts) * shape.trees
    logits, cache = read_prompts(policy, tokens, keep, torch.full((len(prompts),), shape.trees), max_new)
    planted = (rows or ALONE.rows(len(prompts))).times(shape.trees)
    nodes = [
        Node(-1, tree, prompts[tree // shape.trees], [0.0] * len(prompts[tree // shape.trees]), tree, width, 0, False)
        for tree in range(count)
    ]
    options: dict[str, Any] = {"generator": generator, "temperature": temperature}
    drawn = draw(policy, logits, cache, torch.full((count,), max_new), rows=planted, spare=True, **options)
    _add(nodes, policy, drawn, list(range(count)), width, list(range(count)))
    for left in reversed(range(shape.rounds)):
        origins = _choose(nodes, planted, shape.expansions, generator)
        chosen = [nodes[n] for n in origins]
        lines, ends = torch.tensor([n.row for n in chosen]), torch.tensor([n.end for n in chosen])
        most = torch.tensor([max_new - n.used for n in chosen])
        last = torch.tensor([n.tokens[-1] for n in chosen])
        branch = cache.branch(lines, ends - 1, int(most.max()) + 1)
        with torch.no_grad():
            logits = policy.extend(last[:, None], torch.ones(len(last), 1, dtype=torch.bool), branch)
        begin = branch.length
        drawn = draw(policy, logits, branch, most, rows=planted.times(shape.expansions), spare=left > 0, **options)
        first = int(max(n.row for n in nodes)) + 1
        _add(nodes, policy, drawn, origins, begin, list(range(first, first + len(origins))))
        if left:
            cache = cache.join(branch)
    return nodes


def _choose(nodes: list[Node], trees: Rows, expansions: int, generator: torch.Generator) -> list[int]:
    """For every tree ``expansions`` of its nodes that are no leaves, with replacement."""
    inner: list[list[int]] = [[] for _ in range(trees.begin, trees.end)]
    for number, node in enumerate(nodes):
        if not node.leaf:
            inner[node.tree].append(number)
    places = torch.rand(trees.total, expansions, generator=generator, dtype=torch.float64, device=generator.device)
    shares = zip(inner, trees.of(places.tolist()), strict=True)
    return [some[int(place * len(some))] for some, row in shares for place in row]


def _add(nodes: list[Node], policy: Policy, drawn: Drawn, origins: list[int], begin: int, rows: list[int]) -> None:
    """Append what was drawn after each origin, a node a step; its first token stands in column ``begin``."""
    lengths = drawn.keep.sum(1).tolist()
    columns = zip(origins, rows, drawn.tokens.tolist(), drawn.logprobs.tolist(), lengths, strict=True)
    for parent, row, tokens, logprobs, length in columns:
        at, start = 0, nodes[parent].used
        for step in policy.steps(tokens[:length]):
            stop = at + step
            nodes.append(
                Node(
                    parent,
                    nodes[parent].tree,
                    tokens[at:stop],
                    logprobs[at:stop],
                    row,
                    begin + stop,
                    start + stop,
                    stop == length,
                )
            )
            parent, at = len(nodes) - 1, stop


def plant(nodes: list[Node], trees: int, first: int = 0) -> Forest:
    """The forest of these nodes, every leaf among them. Each prompt, a group numbered from ``first``, has ``trees``."""
    lengths = torch.tensor([len(n.tokens) for n in nodes])
    parent = torch.tensor([n.parent for n in nodes])
    tree = tk.Tree(parent, lengths, first + torch.arange(int((parent < 0).sum())) // trees)
    return Forest(
        tree,
        torch.tensor([token for n in nodes for token in n.tokens]),
        torch.repeat_interleave(parent >= 0, lengths),
        torch.tensor([x for n in nodes for x in n.logprobs]),
    )


def leaf_chances(shape: TreeShape, prompts: Rows, generator: torch.Generator) -> Tensor:
    """A number in [0, 1) for each leaf that was grown, of those drawn for the leaves of all ranks."""
    trees = prompts.times(shape.trees)
    more = trees.times(shape.expansions)
    begins = (trees.total + number * more.total for number in range(shape.rounds))
    numbers = [torch.arange(trees.begin, trees.end), *(begin + torch.arange(more.begin, more.end) for begin in begins)]
    return torch.rand(trees.total * shape.leaves, generator=generator, device=generator.device)[torch.cat(numbers)]


def thin(forest: Forest, keep: int, chances: Tensor) -> Forest:  # [L]
    """``keep`` leaves of each tree, those of the smallest ``chances``."""
    root = forest.tree.leaf_root
    order = chances.argsort(stable=True)
    order = order[root[order].argsort(stable=True)]  # tree after tree, shuffled in each
    counts = torch.bincount(root, minlength=forest.tree.num_roots)
    place = torch.arange(len(root)) - (counts.cumsum(0) - counts)[root[order]]
    chosen: Tensor = torch.zeros(len(root), dtype=torch.bool)
    chosen[order] = place < keep
    return forest.prune(chosen)
