"""On-policy distillation: the student writes, and its teacher says of each token what it would have found likely there.

The student is SmolLM2 without every third of its layers, the teacher all of it. Each step the student answers four
questions; of every token that it wrote, its own 64 likeliest candidates are asked of the teacher, and KL(student ||
teacher) over these and one bucket for the rest is the loss. Neither model's logits are ever whole. It prints how far
the student still is, and what its candidates leave out; on one core of an AMD EPYC, to begin with:

    step  0  divergence 6.217  outside the 64 candidates   3.9%   14.1 CPU s
    step  1  divergence 6.535  outside the 64 candidates   2.4%   12.3 CPU s
    step  2  divergence 4.990  outside the 64 candidates   1.9%   11.3 CPU s
    step  3  divergence 3.589  outside the 64 candidates   1.0%   11.3 CPU s
    step  4  divergence 2.586  outside the 64 candidates   0.6%   11.9 CPU s
"""

from __future__ import annotations

import copy
import time
from typing import Any

import smollm2
import torch
from torch import Tensor

import trajkern as tk
from trajkern.integrations.transformers import head_arguments, hidden_states

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Name three fruits.", "What do bees make?")
ANSWERS, LENGTH = 1, 12  # to a question; tokens of each
CANDIDATES, RATE = 64, 2e-5


def thinned(teacher: Any, every: int = 3) -> Any:
    """The model without one in ``every`` layers: a student that has to learn to speak again."""
    student = copy.deepcopy(teacher)
    kept = [layer for number, layer in enumerate(student.model.layers, 1) if number % every]
    student.model.layers = torch.nn.ModuleList(kept)
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number  # its place in the cache
    student.config.num_hidden_layers = len(student.model.layers)
    return student


def divergence(student: Any, teacher: Any, batch: tk.PackedBatch) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) of every token that was written ``[P]``, and the mass outside the candidates ``[P]``."""
    rows = batch.head_inputs().rows  # the hidden states that predict them
    own = tk.linear_topk(hidden_states(student, batch)[rows], k=CANDIDATES, **head_arguments(student))
    each = torch.arange(len(rows)).repeat_interleave(CANDIDATES)  # as many targets a row
    with torch.no_grad():
        states, head = hidden_states(teacher, batch)[rows], head_arguments(teacher)
        theirs = tk.linear_logprobs(states, targets=own.ids.flatten(), rows=each, **head).view_as(own.logprobs)
    return tk.topk_divergence(own.logprobs, theirs, beta=1.0), own.tail.exp()  # beta 0: KL(teacher || student)


def main(teacher: Any, tokenizer: Any, steps: int = 10, seed: int = 0) -> list[float]:
    """The mean divergences that are printed."""
    torch.manual_seed(seed)
    student, prompts, found = thinned(teacher), [smollm2.asked(tokenizer, x) for x in QUESTIONS], []
    optimizer = torch.optim.AdamW(student.parameters(), RATE, weight_decay=0.0)
    for step in range(steps):
        start = time.process_time()
        rollouts = [x for prompt in prompts for x in smollm2.sample(student, prompt, ANSWERS, LENGTH)]
        batch = smollm2.pack(rollouts, [len(prompt) for prompt in prompts for _ in range(ANSWERS)])
        each, tail = divergence(student, teacher, batch)
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        found.append(each.mean().item())
        print(
            f"step {step:2}  divergence {found[-1]:.3f}  outside the {CANDIDATES} candidates {tail.mean():6.1%}", end=""
        )
        print(f"  {time.process_time() - start:5.1f} CPU s", flush=True)
    said = tokenizer.decode(rollouts[0][len(prompts[0]) :], skip_special_tokens=True)
    print(f"{QUESTIONS[0]} {said!r}")
    return found


if __name__ == "__main__":
    main(*smollm2.load())
