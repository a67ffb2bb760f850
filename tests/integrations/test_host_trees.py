"""Trees of rollouts as TRL's rows and ART's ids have them: the same sequences, masks, log-probs and gradients."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.integrations import art
from trajkern.integrations._host_tree import TreeRollouts
from trajkern.integrations._trl_tree import tree_rollouts
from trajkern.integrations.transformers import log_probs

transformers = pytest.importorskip("transformers")
V = 31
CONFIG = tk.PolicyLoss("grpo", clip_low=0.2, clip_high=0.3, aggregate="token_sum")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for x in model.parameters():
        x.data.mul_(3)
    return model.double().eval()


def clipped_loss(new: Tensor, old: Tensor, a: Tensor) -> Tensor:
    ratio = (new - old).exp()
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a).sum()


def loss_on_tree(model: Any, rollouts: TreeRollouts) -> Tensor:
    tree, batch = rollouts.tree, rollouts.batch
    logprobs = log_probs(model, tree, rollouts.tokens, rollouts.loss_mask)[tree.flat_index]
    options: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens, "mask": batch.loss_mask, "per_token": True}
    return tk.policy_loss(logprobs, batch.old_logprobs, rollouts.advantages, config=CONFIG, **options)[0]


def same_loss(model: Any, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# TRL


def samples() -> list[dict[str, Any]]:
    """Of two prompts that begin alike: forks, one that goes on behind another's tokens as context, a duplicate."""
    g = torch.Generator().manual_seed(1)
    system, prompt, other = [4, 5, 6], [7, 8], [7, 9]
    turns = [[10, 11, 12], [10, 11, 13, 14], [15]]
    rows = [(system + prompt, turn, 0) for turn in turns] + [(system + prompt + turns[0] + [20, 21], [22, 23], 0)]
    rows += [(system + other, [10, 11], 1), (system + prompt, turns[0], 0), (system + other, [10], 1)]
    return [
        {
            "input_ids": torch.tensor(context + written).numpy(),
            "completion_mask": torch.tensor([0] * len(context) + [1] * len(written)).numpy(),
            "old_log_probs": -4 * torch.rand(len(context + written), generator=g).numpy(),
            "advantage": 0.5 * n - 1.3,
            "group_id": f"prompt {group}",
        }
        for n, (context, written, group) in enumerate(rows)
    ]


def row_of(rows: list[dict[str, Any]]) -> Any:
    """TRL's own row where it is installed."""
    try:
        from trl.experimental.async_grpo.packing import TreeRow
    except ImportError:
        return SimpleNamespace(samples=rows)
    row = TreeRow()
    for sample in rows:
        row.add(sample)
    return row


def test_a_row_s_paths_are_its_samples_token_by_token() -> None:
    row = row_of(samples())
    tree, batch, tokens, advantages = tree_rollouts(row)
    bounds = batch.cu_seqlens.tolist()
    assert tree.num_leaves == len(row.samples) == 7 and tree.flat_cu_seqlens.tolist() == bounds
    for sample, (a, b) in zip(row.samples, itertools.pairwise(bounds), strict=True):
        assert tokens[tree.flat_index[a:b]].tolist() == batch.tokens[a:b].tolist() == sample["input_ids"].tolist()
        assert batch.loss_mask[a:b].tolist() == sample["completion_mask"].tolist()
        assert batch.old_logprobs[a:b].tolist() == sample["old_log_probs"].tolist()
        assert advantages[a:b].tolist() == pytest.approx((sample["advantage"] * sample["completion_mask"]).tolist())
    assert batch.group_ids.tolist() == [0, 0, 0, 0, 1, 0, 1]


def test_a_row_has_no_token_twice() -> None:
    """TRL repeats one for each branch; here each distinct prefix is one token."""
    row = row_of(samples())
    tree, *_ = tree_rollouts(row)
    prefixes = {tuple(x["input_ids"][: n + 1]) for x in row.samples for n in range(len(x["input_ids"]))}
    assert tree.num_tokens == len(prefixes) == 18
    if hasattr(row, "tokens"):
        assert tree.num_tokens < len(row.tokens)


def test_a_row_s_loss_is_that_of_its_samples(model: Any) -> None:
    """A shared token that one sample learns and another has as context, with log-probs of each sample's own."""
    row = row_of(samples())
    theirs = torch.zeros((), dtype=torch.float64)
    for sample in row.samples:
        tokens, mask, old = (torch.from_numpy(sample[x]) for x in ("input_ids", "completion_mask", "old_log_probs"))
        every = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        learnt = mask[1:] > 0
        theirs = theirs + clipped_loss(every[learnt], old[1:][learnt], torch.tensor(sample["advantage"]))
    same_loss(model, loss_on_tree(model, tree_rollouts(row)), theirs)


def test_a_row_s_first_token_is_never_learnt() -> None:
    sample = samples()[0]
    sample["completion_mask"] = sample["completion_mask"] | 1
    assert tree_rollouts(row_of([sample])).batch.loss_mask.tolist() == [False] + [True] * 7


@pytest.mark.parametrize(
    "row, error, message",
    [
        (3, TypeError, "row must be a TreeRow of TRL, .*; got int"),
        (SimpleNamespace(samples=[]), ValueError, "row must have at least one sample, got none"),
        ({"advantage": torch.nan}, ValueError, "advantage of row must be finite numbers; entry 0 of 1 is nan"),
        (
            {"old_log_probs": torch.full((8,), torch.inf)},
            ValueError,
            "old_log_probs of row must be finite numbers; entry 0 of 8 is inf",
        ),
        (
            {"completion_mask": [1]},
            ValueError,
            "completion_mask must have one entry a token, 8 in samples\\[0\\]; got 1",
        ),
        ({"input_ids": []}, ValueError, "input_ids must have at least one token; samples\\[0\\] has none"),
        ({"group_id": None}, ValueError, "samples must have .*; samples\\[0\\] has no group_id"),
    ],
)
def test_rows_that_are_none(row: Any, error: type, message: str) -> None:
    if isinstance(row, dict):
        sample = samples()[0] | row
        if row == {"group_id": None}:
            del sample["group_id"]
        row = SimpleNamespace(samples=[sample])
    with pytest.raises(error, match=message):
        tree_rollouts(row)


# ART


def art_row(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Two prompts, with a token of each kept back for its completions, and one rollout that shares nothing; padded.

    Each group's prompt ends one token early, so that a completion's first token, the prompt's last, is not learnt.
    """
    g = torch.Generator().manual_seed(2)
    segments = [(50, 50, [4, 5, 6]), (-9, 50, [7, 10, 11]), (2**60, 50, [7, 12]), (3, 50, [7, 10, 13, 14])]
    segments += [(60, 60, [4, 8]), (61, 60, [9, 15]), (70, 99, [4, 16, 17])]
    columns = [(token, own, above, k) for own, above, x in segments for k, token in enumerate(x)]
    tokens, own, above, place = zip(*columns, strict=True)
    length, pad = len(tokens), 3
    learnt = [own[t] != above[t] and place[t] > 0 for t in range(length)]

    def floats(*bounds: float) -> Tensor:
        values = torch.rand(length, generator=g) * (bounds[1] - bounds[0]) + bounds[0]
        return torch.cat((values, torch.full((pad,), torch.nan)))

    packed = {
        "tokens": [*tokens, *[-100] * pad],
        "group_ids": [*own, *[-1] * pad],
        "parent_ids": [*above, *[-1] * pad],
        "assistant_mask": learnt + [False] * pad,
    }
    packed = {name: torch.tensor(x) for name, x in packed.items()}
    packed |= {"logprobs": floats(-4, 0), "advantages": floats(-1, 1), "weights": floats(0.2, 2)}
    for name, (at, value) in (changes or {}).items():
        packed[name][at] = value
    return {name: torch.stack((x, x)) for name, x in packed.items()} | {"pixel_values": [None, None]}


def test_art_s_paths_are_its_rollouts_token_by_token() -> None:
    packed = art_row()
    tree, batch, tokens, advantages = art.tree_rollouts(packed, 1)
    assert tokens.tolist() == packed["tokens"][1, :19].tolist() and tree.num_leaves == 5
    bounds = tree.flat_cu_seqlens.tolist()
    sequences = [[4, 5, 6, 7, 10, 11], [4, 5, 6, 7, 12], [4, 5, 6, 7, 10, 13, 14], [4, 8, 9, 15], [4, 16, 17]]
    assert [batch.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)] == sequences
    assert tokens[tree.flat_index].tolist() == batch.tokens.tolist() and batch.group_ids.tolist() == [0, 0, 0, 1, 2]
    for name, values in (("assistant_mask", batch.loss_mask), ("logprobs", batch.old_logprobs)):
        assert values.tolist() == packed[name][1][tree.flat_index].tolist()
    weighed = (packed["advantages"] * packed["weights"])[1][tree.flat_index]
    assert advantages.tolist() == torch.where(batch.loss_mask, weighed, 0).tolist()


def test_art_s_mask_is_the_tree_s() -> None:
    """Who sees whom, by ART's rule: before it, and of the token's own group or its parent's."""
    packed = art_row()
    tree = art.tree_rollouts(packed, 0).tree
    own, above = (packed[x][0, :19] for x in ("group_ids", "parent_ids"))
    rule = (own[:, None] == own) | (above[:, None] == own)
    assert torch.equal(tree.attention_mask(dense=True)[0, 0], rule.tril())


def test_art_s_loss_is_that_of_its_row(model: Any) -> None:
    """ART's own: its mask, the next token's log-prob at each place of the row, and weights."""
    packed = art_row()
    tree = art.tree_rollouts(packed, 0).tree
    row = {name: x[0, :19] for name, x in packed.items() if name != "pixel_values"}
    seen = (row["group_ids"][:, None] == row["group_ids"]) | (row["parent_ids"][:, None] == row["group_ids"])
    bias = torch.zeros(19, 19, dtype=torch.float64).masked_fill(~seen.tril(), torch.finfo(torch.float64).min)
    logits = model(row["tokens"][None], attention_mask=bias[None, None], position_ids=tree.positions[None]).logits
    new = logits[0, :-1].log_softmax(-1).gather(1, row["tokens"][1:, None])[:, 0]
    old, a, weights, mask = (row[x][1:] for x in ("logprobs", "advantages", "weights", "assistant_mask"))
    ratio = (new - old).exp()
    each = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a) * weights
    same_loss(model, loss_on_tree(model, art.tree_rollouts(packed, 0)), each[mask].sum())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"group_ids": (slice(8, 12), 50)},
            "segment_ids must mark one run of tokens each; id 50 begins again at token 8",
        ),
        ({"parent_ids": (9, 60)}, "parent_ids must be one id along a segment; .* changes at 9"),
        ({"parent_ids": (slice(6, 8), -9)}, "parent_ids must name prompts, .* token 6's parent has another"),
        ({"parent_ids": (slice(3, 6), 60)}, "parent_ids must name a segment that stands before.* token 3's is 60"),
        ({"group_ids": (4, -1), "parent_ids": (4, -1)}, "group_ids must be -1 behind the last token only.* it is at 4"),
        ({"assistant_mask": (2, True)}, "assistant_mask must be False on a prompt of several completions.*at 2"),
        ({"assistant_mask": (6, True)}, "assistant_mask must be False on a segment's first token.*at 6"),
        ({"logprobs": (5, torch.nan)}, "logprobs must be numbers where assistant_mask is True, .* it is NaN at 5"),
        ({"weights": (5, -1.0)}, "weights must be at least 0"),
        ({"advantages": (5, torch.inf)}, "advantages must be finite; it is inf at index 5"),
    ],
)
def test_rows_that_art_never_makes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        art.tree_rollouts(art_row(changes), 0)


def test_what_else_art_has_is_refused_by_name() -> None:
    packed = art_row()
    with pytest.raises(ValueError, match="pixel_values must be None"):
        art.tree_rollouts(packed | {"pixel_values": [torch.ones(1), None]}, 0)
    art.tree_rollouts(packed | {"pixel_values": [torch.ones(1), None]}, 1)
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 22\]"):
        art.tree_rollouts(packed | {"weights": packed["weights"][:, :3]}, 0)
    with pytest.raises(TypeError, match="assistant_mask must have dtype bool"):
        art.tree_rollouts(packed | {"assistant_mask": packed["tokens"]}, 0)
    del packed["weights"]
    with pytest.raises(ValueError, match="packed must have weights"):
        art.tree_rollouts(packed, 0)
