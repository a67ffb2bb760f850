"""Cases of any size: what an op is timed on when a user names the shapes, and the small ones of ``--quick``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trajkern._bench import advantage, head, logprob, policy_loss, reflection, span, topk, tree
from trajkern._bench.case import Problem, TimedCase

FORWARD, BACKWARD = "forward", "forward + backward"
TOPK = 20  # of linear_topk, and at most half a vocabulary
Maker = Callable[[str], Problem]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a case of an op has.

    Args:
        letters: what each number is, as in ``T`` tokens.
        shown: how a case names them, and the dtype after them.
        least: the smallest that each may be.
        quick: the sizes of ``--quick``.
        works: work -> (the sizes, dtype) -> the maker of a problem.
        typed: whether the inputs take a dtype; else they are float32.
    """

    letters: tuple[str, ...]
    shown: str
    least: tuple[int, ...]
    quick: tuple[int, ...]
    works: dict[str, Callable[..., Maker]]
    typed: bool = False

    def shape(self, size: Sequence[int], dtype: torch.dtype) -> str:
        return self.shown.format(*size, dtype=str(dtype)[6:])

    def check(self, name: str, size: Sequence[int]) -> tuple[int, ...]:
        """The numbers. Raises ValueError that says which there must be."""
        wanted = ",".join(self.letters)
        if len(size) != len(self.letters) or not all(isinstance(n, int) and not isinstance(n, bool) for n in size):
            raise ValueError(f"{name} must be the whole numbers {wanted}; got {size!r}")
        for letter, n, least in zip(self.letters, size, self.least, strict=True):
            if n < least:
                raise ValueError(f"{name}: {letter} must be at least {least}, got {n}")
        return tuple(size)


def _logits(op: str, backward: bool) -> Callable[..., Maker]:
    return lambda t, v, dtype: logprob.problem(op, t, v, dtype, backward=backward)


def _untyped(make: Callable[..., Maker], **options: Any) -> Callable[..., Maker]:
    return lambda *size_and_dtype: make(*size_and_dtype[:-1], **options)


def _topk(backward: bool) -> Callable[..., Maker]:
    return lambda t, h, v, dtype: topk.problem(t, h, v, min(TOPK, max(1, v // 2)), dtype, backward)


def _groups(trajectories: int, members: int) -> Maker:
    if trajectories < members:
        raise ValueError(f"N must be at least a group's members, {members}; got {trajectories}")
    return advantage.groups(trajectories, members)


def _scan(op: str) -> Callable[..., Maker]:
    def make(tokens: int, trajectories: int, dtype: torch.dtype) -> Maker:
        _check_tokens(tokens, trajectories)
        return advantage.scan(op, tokens, trajectories)

    return make


def _loss(tokens: int, trajectories: int, dtype: torch.dtype) -> Maker:
    _check_tokens(tokens, trajectories)
    return policy_loss.problem(tokens, trajectories, backward=True)


def _check_tokens(tokens: int, trajectories: int) -> None:
    if tokens < trajectories:
        raise ValueError(f"T must be at least N, {trajectories}; got {tokens}")


def _reflection(upstream: tuple[str, ...]) -> Callable[..., Maker]:
    def make(rollouts: int, length: int, dtype: torch.dtype) -> Maker:
        if rollouts % reflection.MEMBERS:
            raise ValueError(f"N must be a multiple of {reflection.MEMBERS}, a group's members; got {rollouts}")
        return reflection.problem(rollouts, length, upstream=upstream)

    return make


_LOGITS: dict[str, Any] = {
    "letters": ("T", "V"),
    "shown": "{:,} × {:,} {dtype}",
    "least": (1, 1),
    "quick": (64, 32_768),
    "typed": True,
}
_HEAD: dict[str, Any] = {
    "letters": ("T", "H", "V"),
    "shown": "{:,} × {:,} × {:,} {dtype}",
    "least": (1, 1, 1),
    "quick": (64, 256, 16_384),
    "typed": True,
}
_TREE: dict[str, Any] = {"letters": ("M",), "shown": "about {:,} nodes", "least": (121,), "quick": (65_536,)}
_SPANS: dict[str, Any] = {"letters": ("T",), "shown": "about {:,} tokens", "least": (810,), "quick": (65_536,)}
_PACK: dict[str, Any] = {
    "letters": ("T", "N"),
    "shown": "{:,} tokens, {:,} trajectories",
    "least": (1, 1),
    "quick": (65_536, 256),
}

SIZES: dict[str, Sizes] = {
    "token_logprobs": Sizes(
        **_LOGITS, works={FORWARD: _logits("token_logprobs", False), BACKWARD: _logits("token_logprobs", True)}
    ),
    "token_stats": Sizes(
        **_LOGITS, works={FORWARD: _logits("token_stats", False), BACKWARD: _logits("token_stats", True)}
    ),
    "linear_logprobs": Sizes(**_HEAD, works={FORWARD: head.forward_problem}),
    "linear_policy_loss": Sizes(**_HEAD, works={BACKWARD: head.loss_problem}),
    "linear_topk": Sizes(**_HEAD, works={FORWARD: _topk(False), BACKWARD: _topk(True)}),
    "group_advantages": Sizes(
        ("N", "G"), "{:,} trajectories in groups of {:,}", (4, 2), (4096, 8), {FORWARD: _untyped(_groups)}
    ),
    "discounted_returns": Sizes(**_PACK, works={FORWARD: _scan("discounted_returns")}),
    "gae": Sizes(**_PACK, works={FORWARD: _scan("gae")}),
    "whiten": Sizes(("T",), "{:,} tokens, mask", (4,), (65_536,), {FORWARD: _untyped(advantage.masked)}),
    "policy_loss": Sizes(**_PACK, works={BACKWARD: _loss}),
    "reflection_rewards": Sizes(
        ("N", "L"),
        "{:,} rollouts of {:,} tokens, groups of 8",
        (8, 1),
        (1024, 64),
        {FORWARD: _reflection(()), BACKWARD: _reflection(("rewards",))},
    ),
    "subtree_reduce": Sizes(**_TREE, works={FORWARD: _untyped(tree.reduce_problem)}),
    "sibling_advantages": Sizes(**_TREE, works={FORWARD: _untyped(tree.sibling_problem)}),
    "branch_coefficients": Sizes(**_TREE, works={FORWARD: _untyped(tree.branch_problem)}),
    "span_reduce": Sizes(**_SPANS, works={FORWARD: _untyped(partial(span.problem, "mean"))}),
    "spread": Sizes(**_SPANS, works={FORWARD: _untyped(partial(span.problem, None))}),
}


def cases(op: str, size: Sequence[int], dtype: torch.dtype, device: str, name: str = "shape") -> list[TimedCase]:
    """An op's cases of that size, a kind of work each. Raises ValueError where it has no such size."""
    sizes = SIZES[op]
    size = sizes.check(name, size)
    shape = sizes.shape(size, dtype if sizes.typed else torch.float32)
    try:
        return [TimedCase(op, work, shape, make(*size, dtype), devices=(device,)) for work, make in sizes.works.items()]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def quick(device: str) -> list[TimedCase]:
    """A small case of every op, with its backward where there is one."""
    return [cases(op, sizes.quick, torch.float32, device)[-1] for op, sizes in SIZES.items()]
