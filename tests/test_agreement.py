"""Ranks that call a function over their group differently: every one of them gets the error that names what differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trajkern as tk
from tests.ranks import over_ranks
from trajkern import credit

RANKS, PAIRS, WIDTH, VOCABULARY = 2, 6, 8, 20
Call = Callable[[int, dist.ProcessGroup], Any]


def head(function: Callable[..., Any], *others: Any, pairs: int = PAIRS, **options: Any) -> Call:
    """A call of a head's op, in float32, on this rank's half of the vocabulary."""
    dtype = options.pop("dtype", torch.float32)

    def call(rank: int, group: dist.ProcessGroup) -> Any:
        numbers = torch.Generator().manual_seed(5)
        hidden = torch.randn(pairs, WIDTH, generator=numbers).to(dtype)
        weight = torch.randn(VOCABULARY, WIDTH, generator=numbers).to(dtype)[rank::RANKS]
        targets = torch.randint(VOCABULARY, (pairs,), generator=numbers)
        given = others or (targets,)
        return function(hidden, weight, *given, process_group=group, **options)

    return call


def loss_in_head(**options: Any) -> Call:
    settings: dict[str, Any] = {"config": tk.PolicyLoss("grpo")} | options
    old, advantages = settings.pop("old", torch.full((PAIRS,), -3.0)), torch.ones(PAIRS)

    def function(hidden: Any, weight: Any, targets: Any, **given: Any) -> Any:
        return tk.linear_policy_loss(hidden, weight, targets, old, advantages, torch.tensor([0, PAIRS]), **given)

    return head(function, per_token=True, **settings)


def groups(rewards: int = 4, **options: Any) -> Call:
    x = torch.arange(float(rewards))
    return lambda _, group: tk.group_advantages(x, x.long() % 2, process_group=group, **options)


def whitened(**options: Any) -> Call:
    return lambda _, group: tk.whiten(torch.arange(4.0), process_group=group, **options)


def loss(kind: str = "gspo", **options: Any) -> Call:
    x, bounds = torch.zeros(4), torch.tensor([0, 1, 4])
    return lambda _, group: tk.policy_loss(
        x, x, torch.ones(2), bounds, config=tk.PolicyLoss(kind), sequence_group=group, **options
    )


def credited(spec: credit.Spec, **known: Any) -> Call:
    mask = torch.tensor([False, True] * 2)

    def call(_: int, group: dist.ProcessGroup) -> Any:
        batch = tk.PackedBatch(torch.arange(4), torch.tensor([0, 2, 4]), mask, torch.tensor([0, 0]), torch.ones(2))
        return spec(credit.Rollouts(batch, process_group=group, **known)).advantages

    return call


def on(backend: str, call: Call) -> Call:
    def inside(rank: int, group: dist.ProcessGroup) -> Any:
        with tk.use_backend(backend):
            return call(rank, group)

    return inside


LOGPROBS, TOPK = head(tk.linear_logprobs), head(tk.linear_topk, 3)
ENTROPY = head(tk.linear_token_stats, outputs=("entropy",))
OUTCOME, FLAGS = credit.outcome(), {"right": torch.tensor([True, True])}
# what every rank names, the call of the first rank and of the second
DIFFERENT: dict[str, tuple[str, Call, Call]] = {
    "rows of hidden": ("the number of rows of hidden", LOGPROBS, head(tk.linear_logprobs, pairs=PAIRS + 1)),
    "dtype": ("the dtype of hidden", LOGPROBS, head(tk.linear_logprobs, dtype=torch.float64)),
    "a mask": ("mask", LOGPROBS, head(tk.linear_logprobs, mask=torch.arange(PAIRS) > 2)),
    "rows": ("rows", LOGPROBS, head(tk.linear_logprobs, rows=torch.zeros(PAIRS, dtype=torch.int64))),
    "targets": ("targets", LOGPROBS, head(tk.linear_logprobs, torch.zeros(PAIRS, dtype=torch.int64))),
    "a bias": ("bias", LOGPROBS, head(tk.linear_logprobs, bias=torch.ones(VOCABULARY // RANKS))),
    "temperature": ("temperature", LOGPROBS, head(tk.linear_logprobs, temperature=2.0)),
    "blocks": ("workspace_bytes", LOGPROBS, head(tk.linear_logprobs, workspace_bytes=10_000)),
    "another op": ("process_group", LOGPROBS, ENTROPY),
    "another family": ("process_group", TOPK, groups()),
    "a backend": ("use_backend", LOGPROBS, on("reference", LOGPROBS)),
    "outputs": ("outputs", ENTROPY, head(tk.linear_token_stats, outputs=("is_top1",))),
    "k": ("k", TOPK, head(tk.linear_topk, 4)),
    "a loss": ("config", loss_in_head(), loss_in_head(config=tk.PolicyLoss("grpo", clip_high=0.9))),
    "old log-probs": ("old_logprobs", loss_in_head(), loss_in_head(old=torch.full((PAIRS,), -2.0))),
    "scale": ("scale", groups(), groups(scale="none")),
    "eps": ("eps", groups(0), groups(eps=1.0)),
    "ddof": ("ddof", whitened(), whitened(ddof=0)),
    "another group's function": ("process_group", whitened(), groups()),
    "a loss of parts": ("config", loss(), loss("grpo")),
    "its normaliser": ("normalizer", loss(), loss(normalizer=2.0)),
    "a loss and a statistic": ("sequence_group|process_group", loss(), groups()),
    "a credit": ("the expression", credited(OUTCOME), credited(OUTCOME.whiten())),
    "what it reads": (
        "what it reads of the rollouts",
        credited(OUTCOME.gate("right"), flags=FLAGS),
        credited(OUTCOME.gate("right")),
    ),
    "rollouts and an op": ("process_group", credited(OUTCOME), LOGPROBS),
}
ALIKE = (LOGPROBS, ENTROPY, TOPK, loss_in_head(), groups(), whitened(), loss(), credited(OUTCOME))


def _rank(rank: int) -> dict[str, str]:
    found, group = {}, dist.group.WORLD
    for name, (_, *calls) in DIFFERENT.items():
        try:
            calls[rank](rank, group)
            found[name] = "a result"
        except ValueError as error:
            found[name] = str(error)
        for call in ALIKE:  # the group is as it was
            call(rank, group)
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return over_ranks(RANKS, _rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_rank_names_what_differs(of_ranks: list[dict[str, str]], name: str) -> None:
    legal = DIFFERENT[name][0].split("|")
    for rank, found in enumerate(of_ranks):
        assert found[name].startswith(tuple(f"{x} must be " for x in legal)), found[name]
        assert found[name].endswith(f", on rank {1 - rank} another"), found[name]


def test_what_is_alike_on_two_ranks_is_told_alike() -> None:
    """A digest is of the values: not of their dtype, their strides, nor of where an object lies."""
    from trajkern.ops._agreement import _digest

    x = torch.tensor([[0.0, torch.nan], [2.0, 3.0]])
    assert _digest(x) == _digest(x.double()) == _digest(x.t().contiguous().t()) == _digest(x.neg().neg())
    assert _digest(x) != _digest(x.t()) and _digest(x) != _digest(x.flatten())
    assert _digest(1) == _digest(1.0) != _digest(2) and _digest(0.0) == _digest(-0.0)
    assert _digest((x, None)) == _digest([x, None]) != _digest((None, x))
    assert _digest(object()) == _digest(object())
