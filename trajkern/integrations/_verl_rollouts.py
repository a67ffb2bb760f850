"""A batch of verl's trainers as the rollouts that a credit reads: whose tokens, and what rewards, turns and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import describe, renamed
from trajkern.credit import Rollouts
from trajkern.credit.rollouts import RESERVED
from trajkern.integrations._outside import MOST_REAL, Outside, is_list, is_shape_alone

LOGPROBS = {  # of trajkern's batch -> of verl's
    "old_logprobs": "old_log_probs",
    "ref_logprobs": "ref_log_prob",
    "sampler_logprobs": "rollout_log_probs",
}
PLACED = {"turn": "turn_scores", "call": "tool_rewards"}  # spans -> the column that has a number for each


class Rows(NamedTuple):
    """What a trainer of verl's knows of B rows, ``[B, W]``: prompts, and in the last L columns responses.

    Rows of one session, the outputs of one run of an agent loop, are one rollout, in the order of their numbers.
    """

    tokens: Tensor  # [B, W]
    real: Tensor  # bool [B, W], not padding
    written: Tensor  # bool [B, L], by the policy
    learns: Tensor  # bool [B, L], of those what no rejection took out
    rewards: Tensor  # [B]
    logprobs: Mapping[str, Tensor]  # [B, L] each
    columns: Mapping[str, Sequence[Any]]  # [B] each, with the names of verl
    sessions: Sequence[tuple[Any, int]]  # of each row, whose it is and its number there
    counted: Sequence[bool]  # False: a row that only makes up the number
    teacher: tuple[Tensor, Tensor] | None  # [B, W, k] token ids and log-probs, of the token after each
    tokenizer: Any


@dataclass(frozen=True)
class Pack:
    """Where the tokens of padded rows stand in a pack of N rollouts."""

    rows: Rows

    @cached_property
    def order(self) -> list[int]:
        """The rows that count, each rollout's one after another."""
        number: dict[Any, int] = {}
        places = [
            (number.setdefault(name, len(number)), at, row)
            for row, ((name, at), counts) in enumerate(zip(self.rows.sessions, self.rows.counted, strict=True))
            if counts
        ]
        return [row for _, _, row in sorted(places)]

    @cached_property
    def owner(self) -> Tensor:
        """The rollout of each of them, int64, never decreasing."""
        number: dict[Any, int] = {}
        names = (self.rows.sessions[row][0] for row in self.order)
        return torch.tensor([number.setdefault(name, len(number)) for name in names], dtype=torch.int64, device="cpu")

    @cached_property
    def last(self) -> list[int]:
        """The row that ends each rollout, which has its reward."""
        ends = dict(zip(self.owner.tolist(), self.order, strict=True))
        return list(ends.values())

    @cached_property
    def index(self) -> Tensor:
        """Where each token stands in the flattened rows, int64 ``[T]``."""
        width = self.rows.tokens.shape[1]
        places = torch.arange(self.rows.tokens.numel(), device="cpu").view(-1, width)
        order = torch.tensor(self.order, dtype=torch.int64, device="cpu")
        return places[order][self.rows.real[order]]

    @cached_property
    def row(self) -> Tensor:
        """The row of each token, int64 ``[T]``."""
        return self.index // self.rows.tokens.shape[1]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        lengths = self.rows.real.sum(1)[torch.tensor(self.order, dtype=torch.int64, device="cpu")]
        of_rollout = torch.zeros(len(self.last), dtype=torch.int64, device="cpu").index_add(0, self.owner, lengths)
        return torch.cat((lengths.new_zeros(1), of_rollout.cumsum(0)))

    def taken(self, x: Tensor) -> Tensor:  # [B, W, ...] or [B, L]
        """Of each token, ``[T, ...]``; 0 in the prompts."""
        width = self.rows.tokens.shape[1]
        if x.shape[1] != width:
            x = torch.nn.functional.pad(x, (width - x.shape[1], 0))
        return x.flatten(0, 1)[self.index]

    def padded(self, x: Tensor) -> Tensor:  # [T]
        """Of each token of the responses, ``[B, L]``, 0 where there is none."""
        count, width = self.rows.tokens.shape
        flat = x.new_zeros(count * width).index_copy(0, self.index, x)
        return flat.view(count, width)[:, width - self.rows.written.shape[1] :]


def rollouts_of(pack: Pack, groups: Sequence[Any], needs: Set[str]) -> Rollouts:
    """The rollouts, with everything that verl's batch has and a credit that ``needs`` this could read.

    ``groups``: of each row, who it is compared with. ValueError where something that is needed cannot be placed.
    """
    rows, last = pack.rows, pack.last
    prompts = rows.real[:, : rows.real.shape[1] - rows.written.shape[1]].any(1)
    if not bool(prompts[pack.order].all()):
        row = next(n for n in pack.order if not prompts[n])
        raise ValueError(
            f"prompts must have a token in every row, which predicts the response's first; row {row} has none"
        )
    number: dict[Any, int] = {}
    ids = torch.tensor([number.setdefault(groups[row], len(number)) for row in last], dtype=torch.int64, device="cpu")
    batch = tk.PackedBatch(
        pack.taken(rows.tokens),
        pack.cu_seqlens,
        pack.taken(rows.learns),
        ids,
        **{ours: pack.taken(rows.logprobs[theirs]) for ours, theirs in LOGPROBS.items() if theirs in rows.logprobs},
    )
    columns = {name: [x[row] for row in last] for name, x in _columns(rows).items()}
    numbers = {name: x for name, values in columns.items() if (x := _numbers(values)) is not None}
    numbers["reward"] = rows.rewards[torch.tensor(last, dtype=torch.int64, device="cpu")]
    spans, span_rewards = _spans(pack, needs)
    return Rollouts(
        batch,
        rewards={name: x for name, x in numbers.items() if name not in RESERVED and ":" not in name},
        spans=spans,
        span_rewards=span_rewards,
        flags={name: x != 0 for name, x in numbers.items() if bool(((x == 0) | (x == 1)).all())},
        texts=None if rows.tokenizer is None else _Texts(pack),
        rows=[dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or None,
        teacher_logprobs=_teacher(pack) if "teacher_logprobs" in needs else None,
    )


def _numbers(values: Sequence[Any]) -> Tensor | None:
    """A column of numbers, ``[N]`` float32, NaN where there is none; None for another column."""
    plain = [x.item() if _is_number(x) and not is_shape_alone(x) else x for x in values]
    if all(x is None for x in plain) or not all(x is None or isinstance(x, (bool, int, float)) for x in plain):
        return None
    if any(x is not None and abs(x) > MOST_REAL and x not in (math.inf, -math.inf) for x in plain):
        return None  # what float32 does not hold
    return torch.tensor([math.nan if x is None else float(x) for x in plain], dtype=torch.float32, device="cpu")


def _is_number(x: Any) -> bool:
    """Whether this is an array or tensor of one element without dimensions."""
    return isinstance(x, (np.generic, np.ndarray, Tensor)) and x.ndim == 0


class _Texts(Sequence[str]):
    """What each rollout says behind its prompt, decoded where somebody asks."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack

    def __len__(self) -> int:
        return len(self._pack.last)

    def __getitem__(self, n: Any) -> Any:
        return self._decoded[n]

    @cached_property
    def _decoded(self) -> list[str]:
        pack = self._pack
        response = pack.taken(torch.ones_like(pack.rows.written))
        lengths = pack.cu_seqlens.diff().tolist()
        tokens, kept = (x.split(lengths) for x in (pack.taken(pack.rows.tokens), response))
        ids = [x[y].tolist() for x, y in zip(tokens, kept, strict=True)]
        return pack.rows.tokenizer.batch_decode(ids, skip_special_tokens=True)


def _spans(pack: Pack, needs: Set[str]) -> tuple[dict[str, tk.Spans], dict[str, Tensor]]:
    columns, turns = _columns(pack.rows), tk.Spans.turns(pack.taken(pack.rows.written), pack.cu_seqlens)
    spans, rewards = {"turn": turns}, {}
    if "tool_rewards" in columns:
        spans["call"] = _calls(pack, turns)
    own, own_rewards = (_mappings(name, columns.get(name, ())) for name in ("spans", "span_rewards"))
    for name in sorted({name for x in own for name in x}):
        spans[name] = _own_spans(pack, name, own)
    for name, column in PLACED.items():
        if name in spans and any(_lists(column, columns.get(column, ()))):
            found = _placed(pack, spans[name], columns[column], column, f"spans {name!r}")
            if isinstance(found, Tensor):
                rewards[name] = found
            elif f"span_rewards:{name}" in needs:
                raise ValueError(found)
    for name in sorted({name for x in own_rewards for name in x} & spans.keys()):
        found = _placed(pack, spans[name], [x.get(name) for x in own_rewards], "span_rewards", f"spans {name!r}")
        if not isinstance(found, Tensor):
            raise ValueError(found)
        rewards[name] = found
    return spans, rewards


def _calls(pack: Pack, turns: tk.Spans) -> tk.Spans:
    """The turns that a tool answers: what follows in the response was not written by the policy.

    The last turn of a row is one, too, where the row has one number more than such turns: the answer did not fit.
    """
    row = pack.row
    if not len(turns):
        return turns
    of_turn, after = row[turns.end - 1], turns.end.clamp_max(row.shape[0] - 1)
    answered = (turns.end < row.shape[0]) & (row[after] == of_turn)
    count = pack.rows.tokens.shape[0]
    seen = torch.zeros(count, dtype=torch.int64, device="cpu").index_add(0, of_turn, answered.long())
    numbers = _lists("tool_rewards", _columns(pack.rows)["tool_rewards"])
    given = torch.tensor([len(x) for x in numbers], dtype=torch.int64, device="cpu")
    is_last = torch.cat((of_turn[1:] != of_turn[:-1], torch.ones(1, dtype=torch.bool, device="cpu")))
    calls = answered | (is_last & (given == seen + 1)[of_turn])
    start, end, trajectory, index = (x[calls] for x in (turns.start, turns.end, turns.trajectory, turns.index))
    return tk.Spans(start, end, trajectory, index, turns.num_tokens)


def _placed(pack: Pack, spans: tk.Spans, values: Sequence[Any], column: str, what: str) -> Tensor | str:
    """The numbers of the rows one after another, one a span; or why they cannot be placed."""
    row = pack.row[(spans.end - 1).clamp_min(0)] if len(spans) else torch.zeros(0, dtype=torch.int64, device="cpu")
    counts = torch.zeros(len(values), dtype=torch.int64, device="cpu").index_add(0, row, torch.ones_like(row)).tolist()
    found: list[float] = []
    lists = _lists(column, values)
    for n in pack.order:
        if len(lists[n]) != counts[n]:
            return f"{column} must have a number for each of the {counts[n]} {what} of row {n}, got {len(lists[n])}"
        found += lists[n]
    return torch.tensor(found, dtype=torch.float32, device="cpu")


def _columns(rows: Rows) -> dict[str, Sequence[Any]]:
    """The columns, each with a value a row."""
    count = rows.tokens.shape[0]
    for name, x in Outside("columns", rows.columns).mapping().items():
        if not isinstance(x, np.ndarray) and not is_list(x):
            raise Outside(str(name), x).refuse("a list or an array of a value a row")
        if (isinstance(x, np.ndarray) and not x.ndim) or len(x) != count:
            raise ValueError(f"{name} must have a value for each of the {count} rows; got {describe(x)}")
    return dict(rows.columns)


def _lists(column: str, values: Sequence[Any]) -> list[list[float]]:
    """Each row's numbers, none where there is None."""
    given = [Outside("the batch", x, f"{column}[{n}]") for n, x in enumerate(values)]
    return [[] if x.value is None else x.reals(missing=True, flags=True) for x in given]


def _mappings(column: str, values: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Each row's mapping of names, none where there is None."""
    given = [Outside("the batch", x, f"{column}[{n}]") for n, x in enumerate(values)]
    found = [{} if x.value is None else x.mapping() for x in given]
    for x, names in zip(given, found, strict=True):
        if not all(isinstance(name, str) for name in names):
            raise x.refuse("a mapping of names")
    return found


def _pair(span: Outside) -> tuple[int, int]:
    values = span._replace(value=span.values()).ids()
    if len(values) != 2:
        raise ValueError(f"{span.name} must be a start and an end, got {describe(span.value)}")
    return values[0], values[1]


def _own_spans(pack: Pack, name: str, column: Sequence[Any]) -> tk.Spans:
    """Spans that an agent loop wrote down, ``[start, end)`` in tokens of the response."""
    width, length = pack.rows.tokens.shape[1], pack.rows.written.shape[1]
    order = torch.tensor(pack.order, dtype=torch.int64, device="cpu")
    lengths = pack.rows.real[order].sum(1)
    begin = lengths.cumsum(0) - pack.rows.real[order][:, width - length :].sum(1)
    found: list[tuple[int, int, int, int]] = []
    index: dict[int, int] = {}
    for row, first, stop, owner in zip(
        pack.order, begin.tolist(), lengths.cumsum(0).tolist(), pack.owner.tolist(), strict=True
    ):
        given = Outside("the batch", column[row].get(name, ()), f"spans[{row}][{name!r}]")
        for start, end in map(_pair, given._replace(value=given.values()).each()):
            if not 0 <= start <= end <= stop - first:
                raise ValueError(
                    f"spans[{name!r}] must be 0 <= start <= end <= {stop - first}, the response of row {row}; "
                    f"got [{start}, {end}]"
                )
            found.append((first + start, first + end, owner, index.setdefault(owner, 0)))
            index[owner] += 1
    starts, ends, trajectory, number = torch.tensor(found, dtype=torch.int64, device="cpu").view(-1, 4).unbind(1)
    with renamed(dict.fromkeys(("start", "end", "index"), f"spans[{name!r}]")):
        return tk.Spans(starts, ends, trajectory, number, int(pack.cu_seqlens[-1]), pack.cu_seqlens)


def _teacher(pack: Pack) -> Tensor | None:
    """log p of each token under verl's teacher, ``[T]``, whose numbers stand at the token before."""
    if pack.rows.teacher is None:
        return None
    ids, logprobs = (pack.taken(x) for x in pack.rows.teacher)
    tokens, scored = pack.taken(pack.rows.tokens), pack.taken(pack.rows.learns)
    before = torch.arange(tokens.shape[0], device="cpu").sub(1).clamp_min(0)
    here = ids[before] == tokens[:, None]
    if bool((scored & ~here.any(1)).any()):
        n = int(pack.row[(scored & ~here.any(1)).nonzero()[0, 0]])
        raise ValueError(
            "teacher_logprobs must have every token of the responses that is scored; one of row "
            f"{n} is not among the teacher's {ids.shape[1]} of its position"
        )
    return (
        torch.where(here, logprobs[before], -torch.inf)
        .amax(1)
        .where(scored, torch.zeros((), dtype=torch.float32, device="cpu"))
    )
