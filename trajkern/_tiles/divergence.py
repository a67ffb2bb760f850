"""The divergence's loops over blocks of rows, which the CPU's and the GPU's launchers share.

The forward needs whole rows of both logits, since the terms of a mixture mix two softmaxes. The backward, which knows
every row's sums, needs no more than slices of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    """What both ops begin with. Both heads have one temperature and one workspace, half of it each."""

    student: Head  # with the mask
    teacher: Head
    beta: float
    vocabulary: int | None  # the leading ids that count; None: all

    @classmethod
    def split(cls, arguments: tuple[Any, ...]) -> tuple[Arguments, tuple[Any, ...]]:
        """What an op's arguments begin with, and the others."""
        student, rest = Head.split(arguments)
        teacher, (beta, vocabulary, *others) = Head.split(rest)
        return cls(student, teacher, beta, vocabulary), tuple(others)

    def tiles(self, kernels: Kernels) -> tuple[Tiles, Tiles]:
        student, teacher = (Tiles(head, kernels.head, self.vocabulary) for head in (self.student, self.teacher))
        return student, teacher


class _Block(NamedTuple):
    """The tokens that are computed together and their states, a masked one's 0; filled up where rows are fixed."""

    first: bool
    tokens: Tensor  # [R]
    hidden: Tensor  # [S, H], S at least R
    teacher_hidden: Tensor  # [S, H']


def _blocks(of: Arguments, tokens: Tensor, rows: int, tiles: Tiles) -> Iterator[_Block]:
    mask = of.student.mask
    for lo in range(0, tokens.shape[0], rows):
        some = tokens[lo : lo + rows]
        states = [of.student.hidden[some], of.teacher.hidden[some]]
        if mask is not None and not tiles.host:
            states = [torch.where(mask[some, None], x, 0) for x in states]
        if tiles.fixed_rows is not None:
            states = [pad(x, (0, 0, 0, rows - x.shape[0])) for x in states]
        yield _Block(lo == 0, some, *states)


def _tokens(of: Arguments, live: Tensor | None, host: bool) -> Tensor:
    """Those to compute: the live ones, or all where nobody may ask how many they are."""
    if live is None or not host:
        return torch.arange(of.student.hidden.shape[0], device=of.student.hidden.device)
    return live.nonzero().squeeze(1)


def linear_divergence(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[divergence, saved]."""
    of, _ = Arguments.split(args)
    student, teacher = of.tiles(kernels)
    hidden, mask = of.student.hidden, of.student.mask
    divergence = hidden.new_zeros(hidden.shape[0], dtype=student.dtype)
    saved = hidden.new_zeros((hidden.shape[0], SAVED), dtype=student.state_dtype)
    tokens = _tokens(of, mask, student.host)
    rows, columns = student.whole_rows(tokens.shape[0])
    z, z_teacher = (student.empty(rows, student.size) for _ in range(2))
    for block in _blocks(of, tokens, rows, student):
        count, filled = block.tokens.shape[0], block.hidden.shape[0]
        for part in slices(student.size, columns):
            student.logits(block.hidden, part, z[:filled, part], capped=True)
            teacher.logits(block.teacher_hidden, part, z_teacher[:filled, part], capped=True)
        results = divergence.new_empty(count), saved.new_empty(count, SAVED)
        kernels.rows(z[:count], z_teacher[:count], student.scale(block.tokens), of.beta, *results)
        divergence[block.tokens], saved[block.tokens] = results
    divergence += _marks(saved)
    if mask is not None:
        divergence.masked_fill_(~mask, 0)
    return [divergence, saved]


def _marks(saved: Tensor) -> Tensor:
    """NaN for a row of which a maximum or a sum of the two softmaxes is not finite, else 0, ``[T]``.

    The terms choose sides by comparisons, which a NaN passes.
    """
    return (0 * saved[:, :4]).sum(1)


def linear_divergence_backward(kernels: Kernels, *args: Any) -> list[Tensor]:
    """The gradients in hidden, weight and bias that ``needs`` asks for, the logits computed again."""
    of, (grad, saved, needs) = Arguments.split(args)
    student, teacher = of.tiles(kernels)
    if of.student.mask is not None:
        grad = torch.where(of.student.mask, grad, 0)
    grad = grad + _marks(saved).to(grad.dtype)
    tokens = _tokens(of, grad != 0, student.host)
    rows, columns = student.fold_shape(tokens.shape[0], writes_weight=needs[1])
    tiles = tuple(student.empty(rows, columns) for _ in range(2))
    grads = Grads.of(student, needs, -(-tokens.shape[0] // rows))
    for block in _blocks(of, tokens, rows, student):
        known = saved[block.tokens], grad[block.tokens]
        _chain(kernels, of, student, teacher, block, slices(student.size, columns), tiles, known, grads)
    return grads.finish(of.student, student.shard)


def _chain(
    kernels: Kernels,
    of: Arguments,
    student: Tiles,
    teacher: Tiles,
    block: _Block,
    parts: Iterator[slice],
    tiles: tuple[Tensor, ...],  # the student's and the teacher's
    known: tuple[Tensor, Tensor],  # what the forward saved of the rows, and their upstream factors
    grads: Grads,
) -> None:
    """Adds a block to the gradients."""
    count, filled = block.tokens.shape[0], block.hidden.shape[0]
    scale, (saved, upstream) = student.scale(block.tokens), known
    grad_hidden = None if grads.hidden is None else grads.hidden.new_empty(block.hidden.shape)
    narrowing = student.narrowing(scale, None, upstream)
    for part in parts:
        z, z_teacher = (part_of(tile, filled, part.stop - part.start) for tile in tiles)
        student.logits(block.hidden, part, z)
        teacher.logits(block.teacher_hidden, part, z_teacher, capped=True)
        tile_grad = student.gradient_of(z)
        every = tile_grad, z, z_teacher
        kernels.gradient(
            *(every if count == filled else (x[:count] for x in every)),
            scale,
            of.beta,
            saved,
            upstream,
            part.start,
            student.softcap,
            student.logit_scale,
            narrowing,
        )
        if count < filled:
            tile_grad[count:].zero_()
        student.chain(tile_grad, block.hidden, part, grads, grad_hidden, block.first, narrowing)
    if grads.hidden is not None and grad_hidden is not None:
        computed = grad_hidden if count == filled else grad_hidden[:count]
        grads.hidden[block.tokens] = computed if narrowing is None else narrowing.undone(computed)
