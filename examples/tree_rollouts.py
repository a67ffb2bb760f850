"""Rollouts of a HuggingFace model as a tree: what they share is run once, and branches are compared where they part.

SmolLM2 answers a question four times; the first two answers are taken back to their middle and go on from there three
more times each. ``python examples/tree_rollouts.py`` prints the tree, the share of right answers behind each node and
how it did against its siblings, and then takes the loss of all rollouts twice: one by one, and as the tree. Of what it
prints, on one core of an AMD EPYC:

      0.50 right, +0.25  'The capital of Australia is'
        1.00 right, +0.67  ' Canberra.'
          1.00 right, +0.00  '<|im_end|>'
          1.00 right, +0.00  " We don't have any"
        0.00 right, -0.33  ' Sydney.<|im_end|>'
        0.00 right, -0.33  ' Perth.<|im_end|>'
    one by one  470 tokens   11.4 CPU s  loss +0.041404  |gradient| 3.985161
    as a tree    85 tokens    3.6 CPU s  loss +0.041404  |gradient| 3.985161
"""

from __future__ import annotations

import time
from typing import Any

import smollm2
import torch
from torch import Tensor

import trajkern as tk
from trajkern.integrations.transformers import head_arguments, hidden_states

QUESTION = "What is the capital of Australia?"
LENGTH = 12  # tokens of an answer
LOSS = tk.PolicyLoss("dapo", clip_high=0.28)


def is_right(answer: str) -> bool:
    return "Canberra" in answer


def branching(model: Any, prompt: list[int]) -> list[list[int]]:
    """Four rollouts, and three more from the middle of each of the first two."""
    rollouts = smollm2.sample(model, prompt, 4, LENGTH)
    for first in rollouts[:2]:
        middle = (len(prompt) + len(first)) // 2
        rollouts += smollm2.sample(model, first[:middle], 3, len(prompt) + LENGTH - middle)
    return rollouts


def show(tree: tk.Tree, tokens: Tensor, rewards: Tensor, tokenizer: Any) -> None:
    right = tk.subtree_reduce(rewards, tree, "mean")  # [M], of the rollouts through each node
    against = tk.sibling_advantages(right, tree, scale="none")  # [M]
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parent.tolist()):
        children.setdefault(parent, []).append(node)

    def line(node: int) -> None:
        begin, end = tree.node_offsets[node : node + 2].tolist()
        text = tokenizer.decode(tokens[begin:end]).replace("\n", "⏎")
        shown = text if len(text) < 72 else f"{text[:20]} ... {text[-45:]}"
        if end > begin:  # a rollout that is another's copy, or its beginning, has no token of its own
            print(f"{'  ' * int(tree.depth[node])}{right[node]:.2f} right, {against[node]:+.2f}  {shown!r}")
        for child in children.get(node, []):
            line(child)

    for root in children[-1]:
        line(root)


def flat_loss(model: Any, batch: tk.PackedBatch, advantages: Tensor) -> Tensor:
    rows, targets, _, cu_seqlens = batch.head_inputs()
    hidden, head = hidden_states(model, batch), head_arguments(model)
    given = {"targets": targets, "rows": rows, "cu_seqlens": cu_seqlens, "advantages": advantages}
    return tk.linear_policy_loss(hidden, old_logprobs=None, **given, **head, config=LOSS)[0]


def tree_loss(model: Any, batch: tk.PackedBatch, advantages: Tensor, tree: tk.Tree) -> Tensor:
    tokens, written = batch.tokens[tree.source], batch.loss_mask[tree.source]
    rows, targets, _, cu_seqlens = tree.pairs(tokens, written)
    hidden, head = hidden_states(model, tree, tokens), head_arguments(model)
    given = {"targets": targets, "rows": rows, "cu_seqlens": cu_seqlens, "advantages": None}
    paths = tk.Paths(tree, advantages)  # each rollout's advantage, on the path from the prompt to its leaf
    return tk.linear_policy_loss(hidden, old_logprobs=None, **given, **head, branch=paths, config=LOSS)[0]


def main(model: Any, tokenizer: Any, seed: int = 2) -> list[tuple[float, Tensor]]:
    """The loss and a gradient, of the rollouts one by one and of the tree."""
    torch.manual_seed(seed)
    prompt = smollm2.asked(tokenizer, QUESTION)
    rollouts = branching(model, prompt)
    rewards = torch.tensor([float(is_right(tokenizer.decode(rollout[len(prompt) :]))) for rollout in rollouts])
    batch = smollm2.pack(rollouts, [len(prompt)] * len(rollouts), rewards=rewards)
    tree = tk.Tree.from_trajectories(batch)
    show(tree, batch.tokens[tree.source], rewards, tokenizer)

    advantages, found = tk.group_advantages(rewards, batch.group_ids), []
    for name, count, loss_of in (
        ("one by one", batch.num_tokens, lambda: flat_loss(model, batch, advantages)),
        ("as a tree", tree.num_tokens, lambda: tree_loss(model, batch, advantages, tree)),
    ):
        model.zero_grad()
        start = time.process_time()
        loss = loss_of()
        loss.backward()
        took, grad = time.process_time() - start, model.get_input_embeddings().weight.grad.clone()
        found.append((loss.item(), grad))
        print(f"{name:<10} {count:4} tokens  {took:5.1f} CPU s  loss {loss:+.6f}  |gradient| {grad.norm():.6f}")
    return found


if __name__ == "__main__":
    main(*smollm2.load())
