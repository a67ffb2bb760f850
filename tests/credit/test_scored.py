"""Credit by what the policy makes of an answer that it did not write, with a host whose log-probs are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import trajkern as tk
from tests.credit.conftest import rollouts_of
from trajkern import credit
from trajkern.recipes import delta_belief, dro

Text = Any  # token ids, a text, or a tuple of such parts


class Host:
    """A token's log-prob is made of it and of the sum and the length of what stands before it."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Text], list[Text]]] = []

    def ids(self, text: Text) -> list[int]:
        if isinstance(text, tuple):
            return [x for part in text for x in self.ids(part)]
        return [ord(x) for x in text] if isinstance(text, str) else list(text)

    def __call__(
        self, contexts: Sequence[Text], targets: Sequence[Text], *, temperature: float = 1.0, ranks: bool = False
    ) -> tuple[torch.Tensor, ...]:
        self.calls.append((list(contexts), list(targets)))
        logprobs, places, lengths = [], [], []
        for context, target in zip(contexts, targets, strict=True):
            before = self.ids(context)
            lengths.append(len(self.ids(target)))
            for token in self.ids(target):
                logprobs.append(-((7 * sum(before) + 3 * len(before) + token) % 11) / 5)
                places.append(1 + (sum(before) + token) % 6)
                before.append(token)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        found = torch.tensor(logprobs, dtype=torch.float64), bounds
        return (*found, torch.tensor(places)) if ranks else found


def reasoned(seed: int) -> tuple[credit.Rollouts, Host, list[list[int]]]:
    """Rollouts with a stretch of reasoning, and the tokens up to its end."""
    x, host = rollouts_of(seed), Host()
    batch = x.batch
    begin, end = batch.cu_seqlens[:-1] + 1, batch.cu_seqlens[1:] - 1
    count = len(x)
    spans = tk.Spans(begin, end, torch.arange(count), torch.zeros(count, dtype=torch.int64), batch.num_tokens)
    rows = [{"reference": f"r{group}"} for group in batch.group_ids.tolist()]
    known = credit.Rollouts(batch, x.rewards, spans={"reasoning": spans}, rows=rows, score=host)
    contexts = [x.tolist()[:-1] for x in batch.tokens.split(batch.lengths.tolist())]
    return known, host, contexts


@pytest.mark.parametrize("masked", (False, True))
def test_reflection(masked: bool) -> None:
    x, host, contexts = reasoned(1)
    targets = [row["reference"] for row in x.rows]
    logprobs, bounds = host(contexts, targets)
    prompts = [ids[: int(mask.int().argmax())] for ids, mask in zip(contexts, _masks(x), strict=True)]
    baseline = host(prompts, targets)[0] if masked else None
    host.calls.clear()
    expected = tk.reflection_rewards(logprobs, bounds, x.batch.group_ids, baseline=baseline)
    found = credit.outcome(credit.scored.Reflection(masked=masked))(x)
    assert len(host.calls) == 1 + masked and host.calls[0] == (contexts, targets)
    rows = tk.group_advantages(expected.rewards, x.batch.group_ids)
    assert found.rows is not None
    torch.testing.assert_close(found.rows, rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weights", ("variance", "uniform"))
def test_reflection_with_doubts(weights: str) -> None:
    x, host, contexts = reasoned(1)
    logprobs, bounds = host(contexts, [row["reference"] for row in x.rows])
    plain = tk.reflection_rewards(logprobs, bounds, x.batch.group_ids)
    doubted = dro.propagated(logprobs, bounds, plain.std, gamma=0.7, fraction=0.5)
    w = plain.weights if weights == "variance" else torch.full_like(logprobs, 0.5)  # references of two tokens
    expected = torch.stack([part.sum() for part in (w * doubted).split(bounds.diff().tolist())])
    reward = credit.scored.Reflection(weights=weights, propagation=0.7, reflective=0.5)
    assert bounds.diff().eq(2).all() and (expected < plain.rewards).any()
    torch.testing.assert_close(reward(x), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="propagation must be 0 where masked is True"):
        credit.recipe("dro", masked=True, propagation=1.0)


def _masks(x: credit.Rollouts) -> tuple[torch.Tensor, ...]:
    return x.batch.loss_mask.split(x.batch.lengths.tolist())


def test_dro_drops_prompts_and_trains_the_reasoning() -> None:
    x, host, contexts = reasoned(2)
    targets = [row["reference"] for row in x.rows]
    logprobs, bounds, places = host(contexts, targets, ranks=True)
    groups = x.batch.group_ids
    reflection = tk.reflection_rewards(logprobs, bounds, groups)
    keep = dro.keep_groups(reflection.group_score, drop_fraction=0.4)[groups]
    keep &= dro.rank_filter(places, bounds, groups, worst_fraction=0.5, top_k=4)
    host.calls.clear()
    found = credit.recipe("dro", drop_fraction=0.4, top_k=4, worst_fraction=0.5)(x)
    assert len(host.calls) == 1, "the references are scored once, with their ranks"
    assert torch.equal(found.keep, keep) and 0 < int(keep.sum()) < len(x)
    inside = x.spans["reasoning"].token_span >= 0
    kept = torch.repeat_interleave(keep, x.batch.lengths)
    assert torch.equal(found.mask, x.batch.loss_mask & inside & kept)
    rows = tk.group_advantages(reflection.rewards, groups, gate=keep)
    each = torch.repeat_interleave(rows, x.batch.lengths)
    torch.testing.assert_close(found.advantages, torch.where(found.mask, each, 0), rtol=1e-9, atol=1e-9)


def test_beliefs() -> None:
    x, host = rollouts_of(3), Host()
    rows = [{"belief_target": f"t{n}", "belief_probe": "?"} for n in range(len(x))]
    finished = torch.arange(len(x)) % 3 == 0
    turns = x.spans["turn"]
    penalty = -torch.rand(len(turns), dtype=torch.float64)
    known: dict[str, Any] = {"rows": rows, "score": host, "flags": {"finished": finished}}
    x = credit.Rollouts(x.batch, span_rewards={"penalty": penalty}, **known)
    beliefs, bounds, begin = [], [0], x.batch.cu_seqlens.tolist()
    for n in range(len(x)):
        mine = turns.trajectory == n
        stops = [*turns.start[mine].tolist(), begin[n + 1]]
        for at, stop in enumerate(stops):
            last = at == len(stops) - 1 and len(stops) > 1
            context = (x.batch.tokens[begin[n] : stop].tolist(), "?")
            beliefs.append(torch.nan if last and finished[n] else float(host([context], [f"t{n}"])[0].sum()))
        bounds.append(len(beliefs))
    won = x.reward("reward") > 0
    log_beliefs = torch.tensor(beliefs, dtype=torch.float64)
    rewards = delta_belief.turn_rewards(log_beliefs, torch.tensor(bounds), won=won, penalty=penalty)
    advantages = delta_belief.turn_advantages(rewards, turns.trajectory, turns.index, x.batch.group_ids)
    host.calls.clear()
    found = credit.recipe("delta_belief")(x)
    assert len(host.calls) == 1
    expected = torch.where(x.batch.loss_mask, tk.spread(advantages, turns), 0)
    torch.testing.assert_close(found.advantages, expected, rtol=1e-9, atol=1e-9)
