"""Credits in prime-rl's orchestrator: what its ``grpo`` assigns to the tokens of a group, by an expression.

An algorithm of prime-rl's sees one group at a time, as episodes whose traces are graphs of messages. A trace is a
rollout here, its tokens those of its messages in their order, each once, whatever branches they belong to.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern._checks import renamed
from trajkern.credit import Spec
from trajkern.credit.rollouts import RESERVED
from trajkern.credit.spec import Whitened
from trajkern.credit.terms import Outcome
from trajkern.integrations._adapter import Patches, check_signature, held
from trajkern.integrations._credit_checks import check_given
from trajkern.integrations._outside import Outside

GRPO = "prime_rl.orchestrator.algo.grpo"
SINK = "prime_rl.orchestrator.train_sink"
NOT_GIVEN = {  # what a credit may need -> why prime-rl's orchestrator does not have it
    "score": "its algorithms score with the models of their own configuration alone",
    "tree": "its traces are graphs of messages, whose branches are one rollout",
    "divergence": "its orchestrator has no logits",
    "teacher_logprobs": "its grpo has no reference; its opd and opsd put theirs into a loss of their own",
    "span_rewards:": "its environments give a number a trace; a span's reward can be a function",
}
current: ContextVar[Any] = ContextVar("sink", default=None)  # prime-rl's TrainSink that scores a group


def put(patches: Patches, spec: Spec) -> None:
    """Puts the credit in the place of ``GRPOAlgorithm.score_group``."""
    check_given(spec, "prime-rl", NOT_GIVEN)
    _check_of_group(spec, spec)
    module, sink = importlib.import_module(GRPO), held(importlib.import_module(SINK), "TrainSink")
    owner = held(module, "GRPOAlgorithm")
    scores, processes = held(owner, "score_group"), held(sink, "process_group")
    ours, telling = _scoring(spec, module), _telling(processes)
    check_signature("prime-rl's GRPOAlgorithm.score_group", scores, ours)
    check_signature("prime-rl's TrainSink.process_group", processes, telling)
    patches.put(owner, "score_group", functools.wraps(scores)(ours))
    patches.put(sink, "process_group", functools.wraps(processes)(telling))


def _check_of_group(spec: Spec, whole: Spec) -> None:
    """ValueError for a statistic over more than a group, as prime-rl shows its algorithms no more than one."""
    if isinstance(spec, Whitened) or (isinstance(spec, Outcome) and spec.within == "batch"):
        raise ValueError(
            "credit must do without .whiten() and within='batch' in prime-rl, whose algorithms see one group at a "
            f"time; got {whole!r}"
        )
    rewards = (spec.reward,) if isinstance(spec, Outcome) and isinstance(spec.reward, Spec) else ()
    for inner in (*spec.inner, *rewards):
        _check_of_group(inner, whole)


def _telling(theirs: Callable[..., Any]) -> Callable[..., Any]:
    async def process_group(self: Any, group_id: str) -> Any:
        token = current.set(self)
        try:
            return await theirs(self, group_id)
        finally:
            current.reset(token)

    return process_group


def _scoring(spec: Spec, module: ModuleType) -> Callable[..., Any]:
    traces_of, assign = held(module, "iter_trainable_traces"), held(module, "assign_advantages")

    async def score_group(self: Any, episodes: list[Any]) -> None:
        sink = current.get()
        if sink is None:
            raise RuntimeError(
                "a credit must be asked for by prime-rl's TrainSink.process_group, whose options it reads"
            )
        if self.length_penalty is not None:
            raise ValueError(
                "orchestrator.algo.length_penalty must be unset with a credit, whose rewards can be functions of "
                f"lengths; got {self.length_penalty!r}"
            )
        traces = [trace for _, trace in traces_of(episodes)]
        found = spec(_rollouts(traces, sink.tokenizer))
        mask = found.rollouts.batch.loss_mask
        if not sink.config.train.filter_zero_advantages and bool((found.mask != mask).any()):
            raise ValueError(
                "orchestrator.train.filter_zero_advantages must be True where a credit leaves tokens or rollouts out "
                f"of the loss, which is how prime-rl leaves them out; {spec!r} does"
            )
        lengths = found.rollouts.batch.lengths.tolist()
        for trace, a, sampled in zip(traces, found.advantages.split(lengths), mask.split(lengths), strict=True):
            assign(trace, a[sampled].tolist())

    return score_group


class _Node(NamedTuple):
    """A message of a trace."""

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]

    @classmethod
    def of(cls, node: Outside) -> _Node:
        tokens, mask = node.at("token_ids").ids(), node.at("mask").choices()
        if len(mask) != len(tokens):
            raise ValueError(f"{node.name} must have a mask for each of its {len(tokens)} token_ids, got {len(mask)}")
        logprobs = node.at("logprobs").reals()
        if len(logprobs) not in (0, sum(mask)):
            raise ValueError(
                f"{node.name} must have logprobs for each of the {sum(mask)} tokens of its mask, or none; got "
                f"{len(logprobs)}"
            )
        return cls(tokens, mask, logprobs)


def _rollouts(traces: Sequence[Any], tokenizer: Any) -> credit.Rollouts:
    """A group of prime-rl's, a trace as a rollout."""
    given = Outside("traces", traces).each()
    if not given:
        raise ValueError("traces must hold at least one, got none")
    of_traces = [[_Node.of(node) for node in trace.at("nodes").each()] for trace in given]
    nodes = [node for own in of_traces for node in own]
    lengths = torch.tensor([sum(len(node.tokens) for node in own) for own in of_traces], device="cpu")
    tokens = torch.tensor([x for node in nodes for x in node.tokens], dtype=torch.int64, device="cpu")
    mask = torch.tensor([x for node in nodes for x in node.mask], dtype=torch.bool, device="cpu")
    written = torch.tensor([x for node in nodes for x in node.logprobs], dtype=torch.float32, device="cpu")
    whole = len(written) == int(mask.sum())
    if not whole and len(written):
        raise ValueError("traces must all have logprobs of what was sampled, or none; some nodes have none")
    placed = torch.zeros(mask.shape, dtype=torch.float32, device="cpu").masked_scatter(mask, written) if whole else None
    with renamed({"loss_mask": "a trace's mask", "sampler_logprobs": "a trace's logprobs"}):
        batch = tk.PackedBatch(
            tokens,
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            mask,
            torch.zeros(len(given), dtype=torch.int64, device="cpu"),
            sampler_logprobs=placed,
        )
    rewards, flags = _told(given)
    return credit.Rollouts(
        batch,
        rewards=rewards,
        spans={"turn": _turns(of_traces, batch.cu_seqlens)},
        flags=flags,
        texts=_Texts(batch, tokenizer),
        rows=[
            {
                "trace": x.value,
                "agent": x.at("agent").at("name").text(),
                "info": None if (info := x.get("info")) is None else info.value,
            }
            for x in given
        ],
    )


def _told(traces: Sequence[Outside]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rewards and flags by their names: an environment's metrics, its rewards' scores, and the trace's whole reward."""
    columns: dict[str, list[float]] = {}
    for n, trace in enumerate(traces):
        rewards, metrics = trace.at("rewards"), trace.at("metrics")
        scores = {x: None if (found := rewards.get(x)) is None else found.at("score") for x in rewards.mapping()}
        for name, x in ({x: metrics.get(x) for x in metrics.mapping()} | scores).items():
            columns.setdefault(name, [math.nan] * len(traces))[n] = math.nan if x is None else x.real(missing=True)
    named = {
        name: torch.tensor(x, dtype=torch.float32, device="cpu")
        for name, x in columns.items()
        if name not in RESERVED and ":" not in name
    }
    flags = {name: x != 0 for name, x in named.items() if bool(((x == 0) | (x == 1)).all())}
    named["reward"] = torch.tensor([x.at("reward").real() for x in traces], dtype=torch.float32, device="cpu")
    return named, flags | {"truncated": torch.tensor([x.at("is_truncated").choice() for x in traces], device="cpu")}


def _turns(traces: Sequence[Sequence[_Node]], cu_seqlens: Tensor) -> tk.Spans:
    """What the policy wrote of each message, as a turn."""
    found: list[tuple[int, int, int, int]] = []
    for n, (nodes, at) in enumerate(zip(traces, cu_seqlens.tolist(), strict=False)):
        number = 0
        for node in nodes:
            if places := [i for i, sampled in enumerate(node.mask) if sampled]:
                found.append((at + places[0], at + places[-1] + 1, n, number))
                number += 1
            at += len(node.tokens)
    start, end, owner, index = torch.tensor(found, dtype=torch.int64, device="cpu").view(-1, 4).unbind(1)
    return tk.Spans(start, end, owner, index, int(cu_seqlens[-1]), cu_seqlens)


class _Texts(Sequence[str]):
    """What each rollout says from its first sampled token on, decoded where somebody asks."""

    def __init__(self, batch: tk.PackedBatch, tokenizer: Any) -> None:
        self._batch, self._tokenizer = batch, tokenizer

    def __len__(self) -> int:
        return self._batch.num_trajectories

    def __getitem__(self, n: Any) -> Any:
        return self._decoded[n]

    @functools.cached_property
    def _decoded(self) -> list[str]:
        lengths = self._batch.lengths.tolist()
        pairs: Iterable[Any] = zip(self._batch.tokens.split(lengths), self._batch.loss_mask.split(lengths), strict=True)
        said = [x[(m.cumsum(0) > 0)].tolist() for x, m in pairs]
        return self._tokenizer.batch_decode(said, skip_special_tokens=True)
