"""The divergence's loops over blocks of rows, which the CPU's and the GPU's launchers share.

The forward needs whole rows of both logits, since the terms of a mixture mix two softmaxes. The backward, which knows
every row's sums, needs no more than slices of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trajkern._tiles import tiles as head_tiles
from trajkern._tiles.arguments import Head
from trajkern._tiles.tiles import Grads, Tiles, part_of, slices

SAVED = 6  # numbers a row that the backward needs, see csrc/cpu/divergence.cpp


class Kernels(NamedTuple):
    """A backend's: those of its head, rows and gradient (see their launchers)."""

    head: head_tiles.Kernels
    rows: Callable[..., None]
    gradient: Callable[..., None]


class Arguments(NamedTuple):
    """What both ops begin with."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [T, H']
    teacher_weight: Tensor  # [V, H']
    mask: Tensor | None  # [T]
    temperature: float
    beta: float
    workspace: int

    def tiles(self, kernels: Kernels) -> tuple[Tiles, Tiles]:
        """The student's and the teacher's, each in half of the workspace."""
        none = torch.empty(0, dtype=torch.int64, device=self.hidden.device)
        heads = ((self.hidden, self.weight), (self.teacher_hidden, self.teacher_weight))
        scales, options = [self.temperature, 0.0, 1.0], [0, self.workspace // 2, 0]
        student, teacher = (
            Tiles(Head(*head, None, none, None, None, None, None, None, scales, options, ""), kernels.head)
            for head in heads
        )
        return student, teacher


class _Block(NamedTuple):
    """The tokens that are computed together and their states; a masked one's are 0."""

    first: bool
    tokens: Tensor  # [R]
    hidden: Tensor  # [R, H]
    teacher_hidden: Tensor  # [R, H']


def _blocks(of: Arguments, tokens: Tensor, rows: int, host: bool) -> Iterator[_Block]:
    for lo in range(0, tokens.shape[0], rows):
        some = tokens[lo : lo + rows]
        states = of.hidden[some], of.teacher_hidden[some]
        if of.mask is not None and not host:
            live = of.mask[some, None]
            states = torch.where(live, states[0], 0), torch.where(live, states[1], 0)
        yield _Block(lo == 0, some, *states)


def _tokens(of: Arguments, live: Tensor | None, host: bool) -> Tensor:
    """Those to compute: the live ones, or all where nobody may ask how many they are."""
    if live is None or not host:
        return torch.arange(of.hidden.shape[0], device=of.hidden.device)
    return live.nonzero().squeeze(1)


def linear_divergence(kernels: Kernels, *args: object) -> list[Tensor]:
    """[divergence, saved]."""
    of = Arguments(*args)  # type: ignore[arg-type]
    student, teacher = of.tiles(kernels)
    divergence = of.hidden.new_zeros(of.hidden.shape[0], dtype=student.dtype)
    saved = of.hidden.new_zeros((of.hidden.shape[0], SAVED), dtype=student.state_dtype)
    tokens = _tokens(of, of.mask, student.host)
    rows, columns = student.whole_rows(tokens.shape[0])
    z, z_teacher = (student.empty(min(rows, tokens.shape[0]), student.size) for _ in range(2))
    for block in _blocks(of, tokens, rows, student.host):
        count = block.tokens.shape[0]
        for part in slices(student.size, columns):
            student.logits(block.hidden, part, z[:count, part])
            teacher.logits(block.teacher_hidden, part, z_teacher[:count, part])
        results = divergence.new_empty(count), saved.new_empty(count, SAVED)
        kernels.rows(z[:count], z_teacher[:count], student.scale(block.tokens), of.beta, *results)
        divergence[block.tokens], saved[block.tokens] = results
    if of.mask is not None:
        divergence.masked_fill_(~of.mask, 0)
    return [divergence, saved]


def linear_divergence_backward(kernels: Kernels, *args: object) -> list[Tensor]:
    """The gradients in hidden and weight that ``needs`` asks for, the logits computed again."""
    of, (grad, saved, needs) = Arguments(*args[:-3]), args[-3:]  # type: ignore[arg-type]
    assert isinstance(grad, Tensor) and isinstance(saved, Tensor) and isinstance(needs, list)
    student, teacher = of.tiles(kernels)
    if of.mask is not None:
        grad = torch.where(of.mask, grad, 0)
    tokens = _tokens(of, grad != 0, student.host)
    rows, columns = student.fold_shape(tokens.shape[0], writes_weight=needs[1])
    z, z_teacher = (student.empty(rows, columns) for _ in range(2))
    grads = Grads.of(student, [*needs, False], -(-tokens.shape[0] // rows))
    for block in _blocks(of, tokens, rows, student.host):
        count = block.tokens.shape[0]
        scale, known, upstream = student.scale(block.tokens), saved[block.tokens], grad[block.tokens]
        grad_hidden = None if grads.hidden is None else grads.hidden.new_empty(block.hidden.shape)
        narrowing = student.narrowing(scale, None, upstream)
        for part in slices(student.size, columns):
            width = part.stop - part.start
            tile, tile_teacher = part_of(z, count, width), part_of(z_teacher, count, width)
            student.logits(block.hidden, part, tile)
            teacher.logits(block.teacher_hidden, part, tile_teacher)
            tile_grad = student.gradient_of(tile)
            kernels.gradient(tile_grad, tile, tile_teacher, scale, of.beta, known, upstream, part.start, narrowing)
            student.chain(tile_grad, block.hidden, part, grads, grad_hidden, block.first, narrowing)
        if grads.hidden is not None and grad_hidden is not None:
            grads.hidden[block.tokens] = grad_hidden if narrowing is None else narrowing.undone(grad_hidden)
    return grads.finish(student.head, student.shard)
