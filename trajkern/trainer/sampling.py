"""Batched sampling through a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import trajkern as tk
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.ranks import ALONE, Ranks, Rows
from trajkern.trainer.tasks.base import Question, Task

# Of a rollout's number and all its tokens after the prompt: what the environment adds, and whether that is the end;
# None while the policy's turn goes on.
Environment = Callable[[int, list[int]], tuple[list[int], bool] | None]


class Rollouts(NamedTuple):
    """Left-padded prompts followed by right-padded completions."""

    tokens: Tensor  # [N, L]
    keep: Tensor  # [N, L] bool, True on prompt and completion, its end-of-sequence token included
    sampled: Tensor  # [N, L] bool, True on what the policy wrote of the completion
    logprobs: Tensor  # [N, L] log-prob each sampled token was drawn with, 0 elsewhere
    prompt_length: int  # columns before the completions

    def completions(self) -> list[list[int]]:
        """All that stands after each prompt, what an environment wrote included."""
        width = self.prompt_length
        lengths = self.keep[:, width:].sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens[:, width:].tolist(), lengths, strict=True)]


class Drawn(NamedTuple):
    """Right-padded continuations, a column a draw."""

    tokens: Tensor  # [N, S], the end-of-sequence token on padding
    keep: Tensor  # [N, S] bool
    logprobs: Tensor  # [N, S], 0 on what the policy did not write
    written: Tensor  # [N, S] bool, by the policy and not by an environment


def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    copies: int,
    max_new: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    greedy: bool = False,
    environment: Environment | None = None,
    ranks: Ranks = ALONE,
    whole: bool = False,
) -> Rollouts:
    """Sample ``copies`` completions of each prompt, adjacent, of at most ``max_new`` tokens, the environment's too.

    Each of ``ranks`` draws and returns its share of the rollouts, ``whole`` groups where asked; any number of ranks
    draws the same ones.
    """
    rows = ranks.rows(len(prompts) * copies, copies if whole else 1)
    drawing = rows._replace(end=max(rows.end, rows.begin + 1))  # an empty share draws along, for the generator's sake
    owner = torch.arange(drawing.begin, drawing.end) // copies
    first = int(owner[0])
    tokens, keep = left_padded(prompts[first : int(owner[-1]) + 1], policy.eos)
    counts = torch.bincount(owner - first)
    logits, cache = read_prompts(policy, tokens, keep, counts, max_new)
    most = torch.full((len(logits),), max_new)
    options: dict[str, Any] = {"generator": generator, "temperature": temperature, "greedy": greedy, "rows": drawing}
    drawn = draw(policy, logits, cache, most, environment=environment, **options)
    tokens, keep = (x.repeat_interleave(counts, 0) for x in (tokens, keep))
    count = rows.end - rows.begin
    return Rollouts(
        torch.cat((tokens, drawn.tokens), 1)[:count],
        torch.cat((keep, drawn.keep), 1)[:count],
        torch.cat((torch.zeros_like(keep), drawn.written), 1)[:count],
        F.pad(drawn.logprobs, (tokens.shape[1], 0))[:count],
        tokens.shape[1],
    )


def left_padded(prompts: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Token ids and where they are real, ``[N, longest]`` each."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[value] * (width - len(prompt)) + prompt for prompt in prompts])
    keep = torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in prompts])
    return tokens, keep


@torch.no_grad()
def read_prompts(policy: Policy, tokens: Tensor, keep: Tensor, copies: Tensor, room: int) -> tuple[Tensor, Any]:
    """The logits after prompt n, ``copies[n]`` times, and a cache with ``room`` more columns; each is read once."""
    cache = policy.start(len(tokens), tokens.shape[1] + room)
    logits = policy.extend(tokens, keep, cache).repeat_interleave(copies, 0)
    return logits, cache.repeat(copies)


@torch.no_grad()
def draw(
    policy: Policy,
    logits: Tensor,  # [N, V]
    cache: Any,
    most: Tensor,  # [N]
    *,
    rows: Rows,
    generator: torch.Generator,
    temperature: float = 1.0,
    greedy: bool = False,
    environment: Environment | None = None,
    spare: bool = False,
) -> Drawn:
    """Continue each sequence of the cache until its end-of-sequence token, or to its ``most`` tokens (at least 1).

    Once half of the sequences in the cache have ended only the others stay there; where it is to ``spare``, as it is
    read again afterwards, all stay. The sequences are the share ``rows`` of a batch. Every rank draws the random
    numbers of the whole batch and uses its own; the generators agree again at the end.
    """
    tokens, keeps, logprobs, writes = [], [], [], []
    alive, longest = torch.ones(len(logits), dtype=torch.bool), int(most.max())
    talk = Talk(environment, rows) if environment else None
    cached = torch.arange(len(logits))  # those that the cache holds
    while True:
        logits = logits.float()
        drawn = logits.argmax(-1) if greedy else _race(logits / temperature, rows, generator)
        written = alive
        if talk:
            drawn, by_policy = talk.speak(drawn)
            written = alive & by_policy
        tokens.append(torch.where(alive, drawn, policy.eos))
        logprobs.append(tk.token_logprobs(logits, drawn, temperature=temperature) * written)
        keeps.append(alive)
        writes.append(written)
        alive = alive & ~(written & (drawn == policy.eos)) & (len(tokens) < most)
        if talk:
            alive = talk.listen(drawn, written, alive)
        if len(tokens) == longest or not alive.any():
            if not greedy:
                for _ in range(rows.ranks.most(len(tokens)) - len(tokens)):
                    _race(logits, rows, generator)
            return Drawn(*(torch.stack(x, 1) for x in (tokens, keeps, logprobs, writes)))
        if not spare and 2 * int(alive.sum()) <= len(cached):
            cached, stay = alive.nonzero().squeeze(1), alive[cached].nonzero().squeeze(1)
            cache = cache.select(stay)
        found = policy.extend(tokens[-1][cached, None], keeps[-1][cached, None], cache)
        logits = found if len(cached) == len(logits) else logits.index_copy(0, cached, found.float())


class Talk:
    """The environment's side of rollouts in progress: what it has yet to write in each."""

    def __init__(self, environment: Environment, rows: Rows) -> None:
        self._environment, self._first, count = environment, rows.begin, rows.end - rows.begin
        self._said: list[list[int]] = [[] for _ in range(count)]
        self._pending: list[list[int]] = [[] for _ in range(count)]
        self._last = [False] * count  # whether the rollout ends with what is pending

    def speak(self, drawn: Tensor) -> tuple[Tensor, Tensor]:  # [N]
        """The next token of each rollout, the environment's where it has one; and which are the policy's, bool."""
        by_policy = torch.tensor([not pending for pending in self._pending])
        words = torch.tensor([pending[0] if pending else 0 for pending in self._pending])
        return torch.where(by_policy, drawn, words), by_policy

    def listen(self, tokens: Tensor, written: Tensor, alive: Tensor) -> Tensor:  # [N] each
        """Note these tokens, let the environment answer the policy's, and return which rollouts go on."""
        go_on = alive.tolist()
        for row, (token, by_policy) in enumerate(zip(tokens.tolist(), written.tolist(), strict=True)):
            if not go_on[row]:
                continue
            self._said[row].append(token)
            if not by_policy:
                self._pending[row].pop(0)
            elif (reply := self._environment(self._first + row, self._said[row])) is not None:
                self._pending[row], self._last[row] = list(reply[0]), reply[1]
            go_on[row] = bool(self._pending[row]) or not self._last[row]
        return torch.tensor(go_on)


def environment(policy: Policy, task: Task, questions: Sequence[Question]) -> Environment | None:
    """The task's replies to rollout n of ``questions[n]``; None where the task never replies."""
    if not task.interactive:
        return None

    def reply(row: int, tokens: list[int]) -> tuple[list[int], bool] | None:
        answer = task.reply(questions[row], policy.spelling(tokens))
        return None if answer is None else (policy.encode(answer.text), answer.done)

    return reply


def _race(logits: Tensor, rows: Rows, generator: torch.Generator) -> Tensor:  # [N, V] -> [N]
    """A draw from each softmax, as torch.multinomial makes it: the token whose exponential arrives first."""
    arrival = logits.new_empty(rows.total, logits.shape[1]).exponential_(generator=generator)
    return (logits.softmax(-1) / arrival[rows.begin : rows.end]).argmax(-1)
