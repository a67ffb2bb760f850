"""What a credit reads: a packed batch and everything that is known of its rollouts, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import (
    check_device,
    check_flag,
    check_instance,
    check_process_group,
    check_shape,
    check_tensor,
    check_valued,
    describe,
    readable,
    suggesting,
)
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._values import check_finite, check_squarable
from trajkern.credit._ranks import Ranks
from trajkern.layouts.batch import PackedBatch
from trajkern.layouts.spans import Spans, trajectories
from trajkern.layouts.tree import Tree

_REWARDS = (torch.bool, *INTEGERS, *FLOATS)
_MOVABLE = (Tensor, PackedBatch, Spans, Tree)
RESERVED = ("tree", "texts", "rows", "score", "teacher_logprobs", "sampler_logprobs", "divergence")
Score = Callable[..., tuple[Tensor, Tensor]]


@suggesting
@dataclass(frozen=True, eq=False, repr=False)
class Rollouts:
    """N rollouts of T tokens, and what there is to credit them by.

    Args:
        batch: the rollouts. Its loss mask says which tokens the policy wrote, its ``group_ids`` who shares a prompt.
        rewards: name -> ``[N]``, float, integer or bool (these become float32); NaN where a rollout could not be
            scored, which takes it out of the terms that read this reward. Left out it is ``{"reward": batch.rewards}``.
        spans: name -> :class:`trajkern.Spans` of the batch. "turn" is made of the loss mask where it is left out.
        span_rewards: name -> ``[S]``, as ``rewards``, one a span: of the spans of the term that reads it.
        flags: name -> bool ``[N]``, what gates ask for.
        tree: the tree of which trajectory n is the path of leaf n.
        texts: what each rollout says, for rewards that are functions.
        rows: of each rollout, the data set's columns, a mapping.
        score: ``score(contexts, targets, *, temperature=1.0, ranks=False)`` returns (log-probs ``[P]`` of each target's
            tokens in its context, ``cu_seqlens`` ``[len(targets) + 1]``), and with ``ranks`` also each token's place
            ``[P]`` in the vocabulary, 1 for the likeliest. Without a gradient; contexts and targets are texts or lists
            of token ids. Every rank makes equally many calls.
        teacher_logprobs: float ``[T]``, finite on scored tokens: log p of the tokens under a teacher, such as the
            policy that has been shown a hint. Where it is the policy's own log-prob nothing is directed.
        adds_divergences: whether the caller adds ``Credit.divergences`` to its loss; without, they are refused.
        process_group: of torch.distributed, over whose ranks groups are spread. Statistics are then those of all ranks'
            rollouts; every rank must make the same calls. Trees and spans are never spread.

    Construction reads values on the host, which waits for a GPU, once a batch.

    Raises:
        TypeError, ValueError: naming the field, what it must be and what it was.
    """

    batch: PackedBatch
    rewards: Mapping[str, Tensor] | None = None
    spans: Mapping[str, Spans] = field(default_factory=dict)
    span_rewards: Mapping[str, Tensor] = field(default_factory=dict)
    flags: Mapping[str, Tensor] = field(default_factory=dict)
    tree: Tree | None = None
    texts: Sequence[str] | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    score: Score | None = None
    teacher_logprobs: Tensor | None = None  # [T]
    process_group: Any = None
    adds_divergences: bool = False
    ranks: Ranks = field(init=False, repr=False)
    unscored: frozenset[str] = field(init=False, repr=False)  # the rewards that have a NaN
    memory: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_instance("batch", self.batch, PackedBatch)
        self._check_names()
        check_process_group("process_group", self.process_group)
        self._set("adds_divergences", check_flag("adds_divergences", self.adds_divergences))
        rewards = self.rewards
        if rewards is None:
            rewards = {} if self.batch.rewards is None else {"reward": self.batch.rewards}
        for name in rewards:
            if name in RESERVED or ":" in name:
                raise ValueError(f"rewards must not be called {', '.join(RESERVED)}, nor with a colon; got {name!r}")
        scored = {name: self._reward(f"rewards[{name!r}]", x) for name, x in rewards.items()}
        self._set("rewards", scored)
        self._set("unscored", frozenset(name for name, x in scored.items() if bool(x.isnan().any())))
        spans = dict(self.spans)
        for name, x in spans.items():
            self._check_spans(name, x)
        if "turn" not in spans:
            spans["turn"] = Spans.turns(self.batch.loss_mask, self.batch.cu_seqlens)
        self._set("spans", spans)
        of_spans = {name: self._reward(f"span_rewards[{name!r}]", x, True) for name, x in self.span_rewards.items()}
        self._set("span_rewards", of_spans)
        self._set("flags", dict(self.flags))
        for name, flag in self.flags.items():
            check_tensor(f"flags[{name!r}]", flag, dtypes=(torch.bool,), device=self.device)
            check_valued(f"flags[{name!r}]", flag)
            check_shape(f"flags[{name!r}]", flag, (len(self),), "one flag a rollout")
        self._check_entries("texts", self.texts, str, "texts")
        self._check_entries("rows", self.rows, Mapping, "mappings of columns")
        if self.score is not None and not callable(self.score):
            raise TypeError(f"score must be a function, got {describe(self.score)}")
        self._check_tree()
        self._check_teacher()
        dtypes = {name: str(x.dtype) for name, x in scored.items()}
        dtypes |= {f"span_rewards:{name}": str(x.dtype) for name, x in self.span_rewards.items()}
        counts = {"rollouts": len(self), "trees": 0 if self.tree is None else self.tree.num_roots}
        counts |= {f"spans:{name}": len(x) for name, x in spans.items()}
        self._set("ranks", Ranks.of(self.process_group, counts, self.batch.group_ids, dtypes))

    def __len__(self) -> int:
        """N."""
        return self.batch.num_trajectories

    def __repr__(self) -> str:
        """The batch, and what is known of it, in a line."""
        named = ("rewards", "spans", "span_rewards", "flags")
        known = [f"{name}={[*found]}" for name in named if (found := getattr(self, name))]
        known += [x for x in ("tree", "texts", "rows", "score", "teacher_logprobs") if getattr(self, x) is not None]
        return f"Rollouts({', '.join((repr(self.batch), *known))})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Rollouts:
        """The same rollouts on another device, not validated again; what functions remembered of them is forgotten."""
        check_device("device", device)
        moved = object.__new__(Rollouts)

        def there(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: there(y) for name, y in x.items()}
            return x.to(device, non_blocking=non_blocking) if isinstance(x, _MOVABLE) else x

        for each in fields(self):
            moved._set(each.name, {} if each.name == "memory" else there(getattr(self, each.name)))
        return moved

    @property
    def device(self) -> torch.device:
        return self.batch.device

    @property
    def log_ratio_base(self) -> Tensor | None:
        """The log-probs that a teacher's are compared with, ``[T]``: the old ones, else the sampler's."""
        batch = self.batch
        base = batch.sampler_logprobs if batch.old_logprobs is None else batch.old_logprobs
        return None if base is None else base.detach()

    @property
    def names(self) -> set[str]:
        """What there is to read, as a credit's ``needs`` calls it."""
        return {*self.once("names", self._names)}  # nobody else's

    def _names(self) -> set[str]:
        found = {*self.rewards} if self.rewards else set()
        for kind in ("spans", "span_rewards", "flags"):
            found |= {f"{kind}:{name}" for name in getattr(self, kind)}
        known = ("tree", "texts", "rows", "score", "teacher_logprobs")
        found |= {name for name in known if getattr(self, name) is not None}
        if self.rows:
            found |= {f"rows:{column}" for column in self.rows[0] if all(column in row for row in self.rows)}
        if self.rows is not None and not len(self.rows):
            found.add("rows:*")  # of no rollouts, any column
        if self.log_ratio_base is not None:
            found.add("sampler_logprobs")
        if self.adds_divergences:
            found.add("divergence")
        return found

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, the first time that this key is asked for: what several rewards and gates read."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def reward(self, name: str) -> Tensor:
        """The rollouts' reward of this name, ``[N]``."""
        assert self.rewards is not None
        return self.rewards[name]

    @property
    def whole(self) -> Spans:
        """Each rollout as a span."""
        return self.once("whole", lambda: trajectories(self.batch.bounds.long(), self.batch.num_tokens))

    @property
    def token_lists(self) -> list[list[int]]:
        """The tokens of each rollout, for a host that scores them."""
        batch = self.batch
        return self.once("token_lists", lambda: [x.tolist() for x in batch.tokens.split(batch.lengths.tolist())])

    @property
    def prompt_lengths(self) -> list[int]:
        """How many tokens stand before the first that the policy wrote, in each rollout."""

        def lengths() -> list[int]:
            masks = self.batch.loss_mask.split(self.batch.lengths.tolist())
            return [int(x.int().argmax()) if bool(x.any()) else x.shape[0] for x in masks]

        return self.once("prompt_lengths", lengths)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _reward(self, name: str, x: Any, of_spans: bool = False) -> Tensor:
        check_tensor(name, x, dtypes=_REWARDS, ndim=1 if of_spans else None, device=self.device)
        check_valued(name, x)
        if not of_spans:
            check_shape(name, x, (len(self),), "one reward a rollout")
        check_whole(name, x)
        return widened(x.detach())

    def _check_names(self) -> None:
        for name in ("rewards", "spans", "span_rewards", "flags"):
            x = getattr(self, name)
            if x is None and name == "rewards":
                continue
            if not isinstance(x, Mapping):
                raise TypeError(f"{name} must be a mapping of names, got {describe(x)}")
            for key in x:
                if not isinstance(key, str):
                    raise TypeError(f"{name} must be a mapping of names, got the key {describe(key)}")

    def _check_entries(self, name: str, x: Any, kind: type, what: str) -> None:
        """That there is one of the kind for each rollout, or nothing at all."""
        if x is None:
            return
        if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
            raise TypeError(f"{name} must be a sequence of {what}, got {describe(x)}")
        if len(x) != len(self):
            raise ValueError(f"{name} must have one entry for each of the {len(self)} rollouts, got {len(x)}")
        for n, entry in enumerate(x):
            if not isinstance(entry, kind):
                raise TypeError(f"{name} must be {what}; entry {n} is {describe(entry)}")

    def _check_spans(self, name: str, x: Any) -> None:
        check_instance(f"spans[{name!r}]", x, Spans)
        if x.num_tokens != self.batch.num_tokens:
            raise ValueError(f"spans[{name!r}] must be of {self.batch.num_tokens} tokens, got {x.num_tokens}")
        try:
            Spans(x.start, x.end, x.trajectory, x.index, x.num_tokens, self.batch.cu_seqlens)
        except ValueError as error:
            raise ValueError(f"spans[{name!r}]: {error}") from None

    def _check_tree(self) -> None:
        tree, batch = self.tree, self.batch
        if tree is None:
            return
        check_instance("tree", tree, Tree)
        bounds, index = batch.cu_seqlens.long(), tree.flat_index
        if tree.num_leaves != len(self) or not torch.equal(tree.flat_cu_seqlens, bounds):
            raise ValueError(
                "tree must have the rollouts as its leaves' paths, in their order; "
                f"its leaves' lengths are {tree.flat_lengths.tolist()[:8]}, the rollouts' {bounds.diff().tolist()[:8]}"
            )
        if tree.source is not None:
            if bool((tree.source >= batch.num_tokens).any()):
                raise ValueError("tree must be of these rollouts; its source points outside of them")
            if not torch.equal(batch.tokens[tree.source][index], batch.tokens):
                raise ValueError("tree must have the rollouts' tokens on its paths; some differ")
        marked = torch.zeros(2, tree.num_tokens, dtype=torch.bool, device=self.device)
        marked[0, index[batch.loss_mask]] = True
        marked[1, index[~batch.loss_mask]] = True
        if bool(marked.all(0).any()):
            raise ValueError("tree must share tokens only where the rollouts' loss masks agree; some differ")
        self._set("tree", self._of_groups(tree))

    def _of_groups(self, tree: Tree) -> Tree:
        """The tree, a root's group being its rollouts' in the batch."""
        groups, roots = self.batch.group_ids.long(), tree.leaf_root
        of_root = groups.new_zeros(tree.num_roots).scatter(0, roots, groups)
        if not torch.equal(of_root[roots], groups):
            raise ValueError("tree must have roots whose rollouts share a group; group_ids differ below one")
        if tree.group_ids is None:
            return replace(tree, group_ids=of_root)
        pairs = torch.stack((tree.leaf_group.long(), groups)).unique(dim=1).shape[1]
        if not pairs == tree.leaf_group.unique().shape[0] == groups.unique().shape[0]:
            raise ValueError("tree must have the rollouts' groups; its group_ids make others")
        return tree

    def _check_teacher(self) -> None:
        teacher = self.teacher_logprobs
        if teacher is None:
            return
        check_tensor("teacher_logprobs", teacher, dtypes=FLOATS, device=self.device)
        check_valued("teacher_logprobs", teacher)
        check_shape("teacher_logprobs", teacher, (self.batch.num_tokens,), "one a token; a teacher is never padded")
        check_finite("teacher_logprobs", teacher, where=self.batch.loss_mask)
        if self.log_ratio_base is None:
            raise ValueError("teacher_logprobs needs old_logprobs or sampler_logprobs of the batch, which has neither")
        self._set("teacher_logprobs", teacher.detach())


def widened(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def check_whole(name: str, x: Tensor) -> None:
    """ValueError for integers that float32 does not tell apart. Reads device values."""
    if x.dtype in INTEGERS and bool((x.abs() > 2**24).any()):
        raise ValueError(f"{name} must be integers of a magnitude of at most 2^24, which float32 holds, or float64")


def spans_each(owner: Tensor, count: int, weights: Tensor | None = None) -> Tensor:  # [S] int64 both
    """How many spans each of ``count`` rollouts has, or what their ``weights`` add up to, int64 ``[N]``."""
    each = torch.ones_like(owner) if weights is None else weights
    return torch.zeros(count, dtype=torch.int64, device=owner.device).index_add(0, owner, each)


def check_counted(name: str, x: Tensor, where: Tensor) -> None:
    """What a statistic counts has squares that add up, where reading it is free."""
    if readable(x):
        check_squarable(name, x, where)
