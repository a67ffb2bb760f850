"""Cases of the recipes that do more than compose ops; every contender must give the very same values."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern._bench.case import BARE, OURS, Function, Target, TimedCase
from trajkern.layouts.spans import trajectories
from trajkern.recipes import dro, srl, toolpo
from trajkern.testing.numerics import Outcome
from trajkern.testing.registry import Inputs

TOKENS, MEMBERS, ROLLOUTS = 1_000_000, 8, 65_536
PAIRS, CHARACTERS = 200, 2_000


@dataclass
class Exact:
    """A :class:`~trajkern._bench.case.Problem` of a function outside the registry; its gate is equality with eager.

    With a ``tolerance`` floats may differ by that much where eager adds up in another order.
    """

    op: str
    inputs: Inputs
    ours: Function
    eager: Function
    bare: Callable[[], Any]
    bytes: int
    flops: int = 0
    peers: dict[str, Function] = field(default_factory=dict)
    tolerance: float = 0.0
    compose: None = None  # of no package's log-probs

    @property
    def functions(self) -> dict[str, Function]:
        return {OURS: self.ours, "eager": self.eager, **self.peers}

    def step(self, name: str) -> Callable[[], Outcome]:
        return partial(self.functions[name], **self.inputs)

    def budget_shares(self, name: str) -> dict[str, float]:
        """0 for an output that is equal to eager's, infinity for another that may not differ."""
        out = self.step(name)()
        expected = self.eager(**self.inputs)
        return {k: self._share(out[k], x) for k, x in expected.items()}

    def _share(self, out: Tensor, expected: Tensor) -> float:
        if torch.equal(out, expected):
            return 0.0
        if not self.tolerance or not out.is_floating_point():
            return float("inf")
        return float((out - expected).abs().max()) / self.tolerance


def _text(draw: random.Random) -> str:
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(1, 9))) for _ in range(CHARACTERS)]
    return " ".join(words)[:CHARACTERS]


def _edited(text: str, draw: random.Random) -> str:
    """A fifth of the words moved."""
    words = text.split(" ")
    for _ in range(len(words) // 5):
        words.insert(draw.randrange(len(words)), words.pop(draw.randrange(len(words))))
    return " ".join(words)


def _difflib(actions: list[str], expert_actions: list[str]) -> Outcome:
    ratios = [SequenceMatcher(None, a, b).ratio() for a, b in zip(actions, expert_actions, strict=True)]
    return {"similarity": torch.tensor(ratios, dtype=torch.float64)}


def _similarity(device: str) -> Exact:
    draw = random.Random(0)
    experts = [_text(draw) for _ in range(PAIRS)]
    moved = PAIRS * CHARACTERS * 2
    return Exact(
        op="srl.similarity",
        inputs={"actions": [_edited(text, draw) for text in experts], "expert_actions": experts},
        ours=lambda **inputs: {"similarity": srl.similarity(**inputs)},
        eager=_difflib,
        bare=torch.zeros(moved, dtype=torch.uint8).clone,
        bytes=moved,
    )


def _packed() -> dict[str, Tensor]:
    """Trajectories of 500 to 1,500 tokens, half of them the policy's, in turns of about 40."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(500, 1501, (TOKENS // 1000,), generator=generator)
    mask = torch.repeat_interleave(torch.arange(2 * TOKENS // 40) % 2 == 0, 40)[: lengths.sum()]
    return {"loss_mask": mask, "cu_seqlens": torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))}


def _turns_form(loss_mask: Tensor, cu_seqlens: Tensor) -> Outcome:
    before = torch.cat((loss_mask.new_zeros(1), loss_mask[:-1]))
    before[cu_seqlens[:-1]] = False
    after = torch.cat((loss_mask[1:], loss_mask.new_zeros(1)))
    after[cu_seqlens[1:] - 1] = False
    return {"start": (loss_mask & ~before).nonzero()[:, 0], "end": (loss_mask & ~after).nonzero()[:, 0] + 1}


def _turns(device: str) -> Exact:
    inputs = _packed()

    def ours(**inputs: Tensor) -> Outcome:
        spans = tk.Spans.turns(**inputs)
        return {"start": spans.start, "end": spans.end}

    turns = ours(**inputs)
    return Exact(
        op="Spans.turns",
        inputs=inputs,
        ours=ours,
        eager=_turns_form,
        bare=inputs["loss_mask"].clone,
        bytes=inputs["loss_mask"].nbytes + 2 * turns["start"].nbytes + inputs["cu_seqlens"].nbytes,
    )


def _ids(count: int) -> Tensor:
    return torch.arange(count) // MEMBERS


def _gate_ours(passed: Tensor, group_ids: Tensor, cu_seqlens: Tensor, tokens: int) -> Outcome:
    keep = dro.gate(passed, group_ids, mode="reject_group_if_all_fail")
    return {"weights": tk.spread(keep.float(), trajectories(cu_seqlens, tokens))}


def _gate_form(passed: Tensor, group_ids: Tensor, cu_seqlens: Tensor, tokens: int) -> Outcome:
    of_group = torch.zeros(int(group_ids.max()) + 1).scatter_add(0, group_ids, passed.float())
    keep = (of_group > 0)[group_ids]
    return {"weights": torch.repeat_interleave(keep.float(), cu_seqlens.diff(), output_size=tokens)}


def _gate(device: str) -> Exact:
    cu_seqlens = _packed()["cu_seqlens"]
    count, tokens = cu_seqlens.shape[0] - 1, int(cu_seqlens[-1])
    passed = torch.rand(count, generator=torch.Generator().manual_seed(1)) < 0.1
    return Exact(
        op="dro.gate",
        inputs={"passed": passed, "group_ids": _ids(count), "cu_seqlens": cu_seqlens, "tokens": tokens},
        ours=_gate_ours,
        eager=_gate_form,
        bare=torch.zeros(tokens).clone,
        bytes=4 * tokens,
    )


def _toolpo_form(
    success: Tensor, action: Tensor, group_ids: Tensor, action_mask: Tensor, cu_seqlens: Tensor
) -> Outcome:
    groups = int(group_ids.max()) + 1

    def centred(x: Tensor) -> Tensor:
        means = torch.zeros(groups).scatter_reduce(0, group_ids, x, "mean", include_self=False)
        return x - means[group_ids]

    of_outcome, of_action = (
        torch.repeat_interleave(centred(x), cu_seqlens.diff(), output_size=action_mask.shape[0])
        for x in (success, action)
    )
    return {"advantages": of_outcome + action_mask * of_action}


def _toolpo(device: str) -> Exact:
    inputs = _packed()
    count = inputs["cu_seqlens"].shape[0] - 1
    draw = torch.Generator().manual_seed(2)
    whole = {name: torch.randint(0, 9, (count,), generator=draw) * 8.0 for name in ("success", "action")}
    return Exact(
        op="toolpo.token_advantages",
        inputs={
            **whole,
            "group_ids": _ids(count),
            "action_mask": inputs["loss_mask"],
            "cu_seqlens": inputs["cu_seqlens"],
        },
        ours=lambda **inputs: {"advantages": toolpo.token_advantages(**inputs)},
        eager=_toolpo_form,
        bare=torch.zeros(inputs["loss_mask"].shape[0]).clone,
        bytes=5 * inputs["loss_mask"].nbytes,
    )


def _rollouts() -> credit.Rollouts:
    """A million tokens of short rollouts with a call each, a flag and a teacher."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.full((ROLLOUTS,), TOKENS // ROLLOUTS)
    lengths[: TOKENS % ROLLOUTS] += 1
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    mask = torch.rand(TOKENS, generator=draw) < 0.8
    mask[bounds[:-1]] = False
    tokens, rewards = torch.zeros(TOKENS, dtype=torch.int64), torch.randint(0, 2, (ROLLOUTS,), generator=draw)
    logprobs = -torch.rand(2, TOKENS, generator=draw)
    batch = tk.PackedBatch(tokens, bounds, mask, _ids(ROLLOUTS), rewards.float(), sampler_logprobs=logprobs[0])
    start, number = bounds[:-1] + 2, torch.arange(ROLLOUTS)
    return credit.Rollouts(
        batch,
        spans={"call": tk.Spans(start, start + 5, number, torch.zeros_like(number), TOKENS)},
        span_rewards={"call": torch.randint(0, 9, (ROLLOUTS,), generator=draw).float()},
        flags={"ok": torch.rand(ROLLOUTS, generator=draw) < 0.9},
        teacher_logprobs=logprobs[1],
    )


def _composed_form(rollouts: credit.Rollouts) -> Outcome:
    """Rollout by rollout and span by span in eager torch, each term spread to tokens as it is formed."""
    batch, calls, keep = rollouts.batch, rollouts.spans["call"], rollouts.flags["ok"]

    def compared(x: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        groups = int(ids.max()) + 1
        size, total = (
            torch.zeros(groups).double().index_add(0, ids, y) for y in (counted.double(), counted * x.double())
        )
        apart = x - (total / size.clamp_min(1))[ids]
        squares = torch.zeros(groups).double().index_add(0, ids, counted * apart.square())
        std = (squares / (size - 1).clamp_min(1)).sqrt()[ids]
        alone = torch.where(size[ids] == 1, x / (1 + 1e-6), apart / (std + 1e-6))
        return torch.where(counted, alone, 0).float()

    owner = torch.repeat_interleave(torch.arange(len(keep)), batch.lengths)
    assert batch.rewards is not None and rollouts.teacher_logprobs is not None and batch.sampler_logprobs is not None
    outcome = compared(batch.rewards, batch.group_ids, keep)[owner]
    of_calls = compared(rollouts.span_rewards["call"], batch.group_ids[calls.trajectory], keep[calls.trajectory])
    advantages = outcome + 0.5 * torch.where(calls.token_span >= 0, of_calls[calls.token_span], 0)
    advantages = torch.where(advantages > 0, 0.1 * advantages, advantages)
    failed = (batch.rewards <= 0)[owner]
    advantages = advantages + 0.1 * torch.where(failed, rollouts.teacher_logprobs - batch.sampler_logprobs, 0)
    mask = batch.loss_mask & (keep[owner] | failed)
    return {"advantages": torch.where(mask, advantages, 0), "mask": mask}


def _composed(device: str) -> Exact:
    rollouts = _rollouts()
    spec = (credit.outcome() + 0.5 * credit.spans("call")).gate("ok").asymmetric(0.1)
    spec = spec + 0.1 * credit.directive(where="failed")

    def ours(rollouts: credit.Rollouts) -> Outcome:
        found = spec(rollouts)
        return {"advantages": found.advantages, "mask": found.mask}

    batch, calls, result = rollouts.batch, rollouts.spans["call"], ours(rollouts)
    read = [batch.loss_mask, batch.cu_seqlens, batch.group_ids, batch.rewards, batch.sampler_logprobs]
    read += [rollouts.teacher_logprobs, rollouts.flags["ok"], *rollouts.span_rewards.values()]
    moved = [x for x in (*read, calls.start, calls.end, calls.trajectory, *result.values()) if x is not None]
    return Exact(
        op="credit",
        inputs={"rollouts": rollouts},
        ours=ours,
        eager=_composed_form,
        bare=lambda: [x.clone() for x in moved],
        bytes=sum(x.nbytes for x in moved),
        tolerance=1e-6,
    )


_PACK = f"{TOKENS:,} tokens of {TOKENS // 1000:,} trajectories"

CASES = (
    TimedCase("Spans.turns", "forward", _PACK, _turns, (Target("fast", 5, "eager"),), ("cpu",)),
    TimedCase("dro.gate", "as weights of the tokens", _PACK, _gate, (Target("fast", 5, "eager"),), ("cpu",)),
    TimedCase("toolpo.token_advantages", "forward", _PACK, _toolpo, (), ("cpu",)),
    TimedCase(
        "credit",
        "three terms, a gate, an asymmetry",
        f"{TOKENS:,} tokens of {ROLLOUTS:,} rollouts",
        _composed,
        (Target("times", 10, BARE),),
        ("cpu",),
    ),
    TimedCase(
        "srl.similarity",
        "eager is difflib",
        f"{PAIRS} pairs of {CHARACTERS:,} characters",
        _similarity,
        (Target("fast", 10, "eager"),),
        ("cpu",),
    ),
)
