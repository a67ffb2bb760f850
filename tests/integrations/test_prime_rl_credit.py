"""Credits in prime-rl's orchestrator: what its grpo finds in a group's traces, what it assigns, what is refused.

prime-rl is not on PyPI; its algorithm, its sink and a trace are written down as far as they meet (commit 559b447).
"""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from trajkern import credit
from trajkern.integrations import _adapter
from trajkern.integrations import prime_rl as adapter
from trajkern.integrations._prime_rl_credit import GRPO, SINK


def iter_trainable_traces(episodes: list[Any]):
    for episode in episodes:
        for trace in episode.traces:
            if not trace.has_error and trace.agent.trainable and any(any(node.mask) for node in trace.nodes):
                yield episode, trace


def assign_advantages(trace: Any, values: float | list[float]) -> None:
    """A value for each sampled token of the graph, in the order of its messages."""
    nodes = [node for node in trace.nodes if any(node.mask)]
    left = [float(values)] * sum(sum(node.mask) for node in nodes) if isinstance(values, float) else list(values)
    for node in nodes:
        node.advantages, left = left[: sum(node.mask)], left[sum(node.mask) :]
    assert not left


class GRPOAlgorithm:
    def __init__(self, length_penalty: Any = None) -> None:
        self.length_penalty = length_penalty

    async def score_group(self, episodes: list[Any]) -> None:
        traces = [trace for _, trace in iter_trainable_traces(episodes)]
        mean = sum(trace.reward for trace in traces) / len(traces)
        for trace in traces:
            assign_advantages(trace, trace.reward - mean)


class TrainSink:
    def __init__(self, filter_zero_advantages: bool, algorithm: Any, groups: dict[str, list[Any]]) -> None:
        self.config = SimpleNamespace(train=SimpleNamespace(filter_zero_advantages=filter_zero_advantages))
        self.tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [str(x) for x in ids])
        self.algorithm, self.groups = algorithm, groups

    async def process_group(self, group_id: str) -> None:
        await self.algorithm.score_group(self.groups.pop(group_id))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The classes of prime-rl that a credit meets."""
    if find_spec("prime_rl") is not None:
        pytest.skip("written down for where prime-rl is not installed")
    for name in ("prime_rl", "prime_rl.orchestrator", "prime_rl.orchestrator.algo", GRPO, SINK):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[GRPO]).update(
        GRPOAlgorithm=GRPOAlgorithm, iter_trainable_traces=iter_trainable_traces, assign_advantages=assign_advantages
    )
    vars(sys.modules[SINK]).update(TrainSink=TrainSink)
    monkeypatch.setattr(_adapter, "version", lambda package: "0.8.0")
    yield
    adapter.disable_credit()
    adapter.disable_credit()


def _node(first: int, scaffold: int, sampled: int, parent: int | None) -> SimpleNamespace:
    mask = [False] * scaffold + [True] * sampled
    ids = list(range(first, first + len(mask)))
    return SimpleNamespace(token_ids=ids, mask=mask, logprobs=[-0.5] * sampled, advantages=None, parent=parent)


def _trace(n: int, reward: float, turns: tuple[int, ...], **changed: Any) -> SimpleNamespace:
    nodes = [_node(10, 2, 0, None)]
    for turn in turns:
        nodes += [_node(20, 1, turn, len(nodes) - 1), _node(40, 2, 0, len(nodes))]
    trace = SimpleNamespace(
        id=str(n),
        nodes=nodes,
        reward=reward,
        rewards={"solved": SimpleNamespace(score=float(n % 2), weight=2.0), "absent": None},
        metrics={"tone": float(n), "late": None} | ({"rare": 1.0} if n else {}),
        agent=SimpleNamespace(name="agent", trainable=True),
        info={"number": n},
        is_truncated=n == 2,
        has_error=False,
    )
    vars(trace).update(changed)
    return trace


REWARDS = (1.0, 0.0, 0.5, 2.5)
TURNS = ((3, 1), (2,), (1, 2, 1), (4,))


def _group(**changed: Any) -> list[SimpleNamespace]:
    """Four traces in three episodes; two more do not train."""
    traces = [_trace(n, reward, turns, **changed) for n, (reward, turns) in enumerate(zip(REWARDS, TURNS, strict=True))]
    failed = _trace(9, 7.0, (2,), has_error=True)
    frozen = _trace(8, 7.0, (2,), agent=SimpleNamespace(name="judge", trainable=False))
    parts = (traces[:1] + [failed], traces[1:3], [traces[3], frozen])
    return [SimpleNamespace(traces=part) for part in parts]


def _assigned(spec: Any, filtered: bool = True, penalty: Any = None, **changed: Any) -> list[list[list[float]]]:
    """Of each trace that trains, the advantages of each message that the policy wrote."""
    adapter.enable_credit(spec)
    episodes = _group(**changed)
    asyncio.run(TrainSink(filtered, GRPOAlgorithm(penalty), {"g": episodes}).process_group("g"))
    others = [x for episode in episodes for x in episode.traces if x.has_error or not x.agent.trainable]
    assert all(node.advantages is None for trace in others for node in trace.nodes)
    found = [trace for _, trace in iter_trainable_traces(episodes)]
    return [[node.advantages for node in trace.nodes if any(node.mask)] for trace in found]


def _check(found: list[list[list[float]]], values: list[float]) -> None:
    expected = [[[value] * turn for turn in turns] for value, turns in zip(values, TURNS, strict=True)]
    assert [[len(y) for y in x] for x in found] == [list(x) for x in TURNS]
    for mine, theirs in zip(found, expected, strict=True):
        assert [y for x in mine for y in x] == pytest.approx([y for x in theirs for y in x])


def test_as_grpo_and_with_metrics(host) -> None:
    theirs = _group()
    asyncio.run(GRPOAlgorithm().score_group(theirs))
    before = [[n.advantages for n in trace.nodes if any(n.mask)] for _, trace in iter_trainable_traces(theirs)]
    plain = credit.outcome(scale="none")
    found = _assigned(plain)
    _check(found, [0.0, -1.0, -0.5, 1.5])
    assert found == before
    _check(_assigned(plain + 0.5 * credit.outcome("tone", scale="none")), [-0.75, -1.25, -0.25, 2.25])
    _check(_assigned(credit.outcome("solved", scale="none")), [-0.5, 0.5, -0.5, 0.5])


def test_what_is_left_out_has_no_advantage(host) -> None:
    """Which prime-rl's filter takes out of its loss; without the filter it is an error."""
    gated = credit.outcome(scale="none").gate("solved")
    _check(_assigned(gated), [0.0, -1.25, 0.0, 1.25])
    one = credit.outcome("rare", scale="none") + credit.outcome(scale="none").gate("truncated")
    _check(_assigned(one), [0.0, 0.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"filter_zero_advantages must be True where a credit leaves"):
        _assigned(gated, filtered=False)
    _check(_assigned(credit.outcome(scale="none"), filtered=False), [0.0, -1.0, -0.5, 1.5])


def test_a_message_is_a_turn(host) -> None:
    def later(rollouts: credit.Rollouts) -> torch.Tensor:
        return rollouts.spans["turn"].index.float()

    found = _assigned(credit.spans("turn", reward=later, scale="none"))
    turn = [[set(y) for y in x] for x in found]
    assert [len(y) for x in turn for y in x] == [1] * 7
    first, second, third = (turn[2][k].pop() for k in range(3))
    assert (second - first, third - second) == pytest.approx((1, 1))


def test_functions_read_texts_rows_and_log_probs(host) -> None:
    seen: list[credit.Rollouts] = []

    def said(rollouts: credit.Rollouts) -> torch.Tensor:
        seen.append(rollouts)
        return torch.tensor([float(row["info"]["number"]) for row in rollouts.rows])

    _check(_assigned(credit.outcome(said, scale="none")), [-1.5, -0.5, 0.5, 1.5])
    (rollouts,) = seen
    assert list(rollouts.texts)[1] == str([21, 22, 40, 41])
    assert rollouts.rows[3]["trace"].id == "3" and rollouts.rows[3]["agent"] == "agent"
    batch = rollouts.batch
    assert set(batch.sampler_logprobs[batch.loss_mask].tolist()) == {-0.5} and batch.num_groups == 1


REFUSED: list[tuple[Any, str]] = [
    (credit.outcome().whiten() * 2.0, r"without .whiten\(\) and within='batch' in prime-rl"),
    (credit.outcome(within="batch"), r"without .whiten\(\) and within='batch' in prime-rl"),
    (credit.directive(), "credit must do without 'teacher_logprobs' in prime-rl: its grpo has no reference"),
    (credit.spans("turn"), "credit must do without 'span_rewards:turn' in prime-rl"),
    (credit.recipe("dro"), "credit must do without 'score' in prime-rl"),
    (credit.outcome("manner"), "needs 'manner', which the rollouts do not have; they have"),
    ("nothing", '"package.module:name" is expected'),
]


@pytest.mark.parametrize(("expression", "message"), REFUSED, ids=[x[1][:40] for x in REFUSED])
def test_refused(host, expression: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _assigned(expression)


def test_what_prime_rl_must_be_and_have(host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="length_penalty must be unset with a credit"):
        _assigned(credit.outcome(), penalty=object())
    with pytest.raises(RuntimeError, match=r"asked for by prime-rl's TrainSink.process_group"):
        asyncio.run(GRPOAlgorithm().score_group(_group()))
    adapter.disable_credit()
    asyncio.run(GRPOAlgorithm().score_group(_group()))  # prime-rl's own again
    monkeypatch.setattr(GRPOAlgorithm, "score_group", lambda self, traces: None)
    with pytest.raises(RuntimeError, match=r"GRPOAlgorithm.score_group must take \(episodes\)"):
        adapter.enable_credit(credit.outcome())
    monkeypatch.delattr(sys.modules[GRPO], "assign_advantages")
    with pytest.raises(RuntimeError, match="must have assign_advantages, which"):
        adapter.enable_credit(credit.outcome())
