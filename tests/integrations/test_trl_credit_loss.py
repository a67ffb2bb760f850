"""Who is left out is in no mean: every loss of a credited generation, split by TRL, against its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import trajkern as tk  # noqa: E402
from tests.integrations.test_trl_loss import LOSSES, changed, compared  # noqa: E402
from tests.integrations.trl_trainers import REWARDS, batch, examples_of, generated, spoken, trainer_of, trl  # noqa: E402
from trajkern import credit  # noqa: E402
from trajkern.integrations import trl as adapter  # noqa: E402
from trajkern.integrations._trl_loss import COUNTED, grpo_loss  # noqa: E402

HIGH, LOW, BETA, DELTA = 0.3, 0.2, 0.05, 1.7


def vowels(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.reward("action") > 0


def lengths(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.spans["turn"].lengths.float()


def first_rows(rollouts: credit.Rollouts) -> Tensor:
    return torch.arange(len(rollouts)) < 3


SPECS = {
    "rollouts": credit.outcome("action", within="batch").gate(vowels),
    "tokens": (credit.outcome("action") + credit.spans("turn", reward=lengths)).gate(vowels),
    "turns only": credit.outcome("action").only("late").gate(vowels),
    "few": credit.outcome("action", within="batch").gate(first_rows),
}


EVERY_TIME = {("grpo", "few"), *((x, "tokens") for x in ("grpo", "bnpo", "dapo", "luspo"))}
CASES = [
    pytest.param(loss_type, kept, marks=() if (loss_type, kept) in EVERY_TIME else pytest.mark.slow)
    for loss_type in LOSSES
    for kept in SPECS
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory):
    """Of four micro-batches of two completions."""
    sizes = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4}
    folder = tmp_path_factory.mktemp("losses")
    options = {"beta": BETA, "delta": DELTA, "use_bias_correction_kl": False}
    trainer = trainer_of(folder, rollout_func=spoken, **options, **REWARDS, **sizes)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    return trainer


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test enables is gone behind it."""
    yield
    for target in list(adapter._enabled):
        adapter.disable(target)


def late(rollouts: credit.Rollouts) -> Any:
    """Turns but for the first: some completions have none."""
    turns = rollouts.spans["turn"]
    later = turns.index > 0
    kept = (x[later] for x in (turns.start, turns.end, turns.trajectory, turns.index))
    return tk.Spans(*kept, turns.num_tokens)


def logprobs_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """``[B, L]``, of a model without TRL's head."""
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
    mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
    length = inputs["completion_ids"].shape[1]
    logits = model(ids, attention_mask=mask).logits[:, -length - 1 : -1]
    return logits.log_softmax(2).gather(2, inputs["completion_ids"][..., None])[..., 0]


def terms_of(loss_type: str, new: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What each token adds to the loss, ``[B, L]``, written out."""
    a, old, ref = (inputs[x].double() for x in ("advantages", "old_per_token_logps", "ref_per_token_logps"))
    a = a[:, None] if a.ndim == 1 else a
    mask, ratio = inputs["tool_mask"] * inputs["completion_mask"], (new - old).exp()
    if loss_type == "cispo":
        policy = -ratio.clamp(max=3.0).detach() * a * new
    elif loss_type == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        policy = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * a
    elif loss_type == "vespo":
        w = ((new - old) * mask).sum(1, keepdim=True).detach()
        k, scale = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        policy = -(scale + k * w - scale * w.exp()).exp() * a * new
    else:
        policy = -torch.minimum(ratio.clamp(max=DELTA) * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
    return policy + BETA * ((ref - new).exp() - (ref - new) - 1)


def loss_of(loss_type: str, model: Any, inputs: dict[str, Any], counted: Tensor) -> Tensor:
    """Of the whole generation: a mean over the tokens or the completions that learn."""
    terms, mask = terms_of(loss_type, logprobs_of(model, inputs), inputs), inputs["tool_mask"] > 0
    of_row, tokens = torch.where(mask, terms, 0).sum(1), mask.sum(1)
    if loss_type in ("grpo", "sapo"):
        return (of_row / tokens.clamp(min=1)).sum() / counted.sum()
    if loss_type in ("luspo", "dr_grpo"):
        return of_row.sum() / counted.sum() / (6 if loss_type == "dr_grpo" else 1)
    if loss_type == "bnpo":
        return torch.stack(
            [of_row[i : i + 2].sum() / tokens[i : i + 2].sum().clamp(min=1) for i in range(0, 8, 2)]
        ).mean()
    return of_row.sum() / tokens.sum()


@pytest.mark.parametrize("loss_type, kept", CASES)
def test_a_generation_s_loss(loss_type: str, kept: str, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, summed over shuffled micro-batches of which some have nobody who learns."""
    changed(trainer, monkeypatch, {"loss_type": loss_type, "epsilon_high": 3.0 if loss_type == "cispo" else HIGH})
    adapter.enable(trainer, credit=SPECS[kept], spans={"late": late})
    inputs = generated(trainer)
    written = torch.tensor([sum(x) for x in spoken([x["prompt"] for x in examples_of(trainer)], trainer)["env_mask"]])
    learns = inputs["tool_mask"].any(1)
    assert written.all() and 0 < int(learns.sum()) < 8 and int(inputs[COUNTED]) == int(learns.sum())
    g = torch.Generator().manual_seed(2)
    exact = plain(trainer.model)
    new = logprobs_of(exact, inputs).detach().float()
    for name, noise in (("old_per_token_logps", 0.4), ("ref_per_token_logps", 0.2)):
        inputs[name] = new + noise * torch.randn(new.shape, generator=g)
    utils = trl.trainer.utils
    inputs = utils.shuffle_sequence_dict(inputs)
    trainer.model.zero_grad()
    total = torch.zeros(())
    for part in utils.split_tensor_dict(inputs, 4):
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        total += loss.detach()
    expected = loss_of(loss_type, exact, inputs, inputs["tool_mask"].any(1))
    expected.backward()
    torch.testing.assert_close(total.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    for ours, theirs in zip(trainer.model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-4, atol=1e-6)


def plain(model: Any) -> Any:
    """The same weights in float64, in a model that TRL has not touched."""
    exact = type(model)(copy.deepcopy(model.config)).double()
    exact.load_state_dict(model.state_dict())
    return exact


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "dapo"])
def test_completions_that_trl_masks_count_as_in_trl(
    loss_type: str, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing left out, a loss is TRL's own, number for number."""
    changed(trainer, monkeypatch, {"loss_type": loss_type, "mask_truncated_completions": True})
    monkeypatch.setattr(trainer, "eos_token_ids", list(range(3, 16)))
    adapter.enable(trainer, credit=credit.outcome("action", eps=1e-4))
    inputs = generated(trainer)
    parts = trl.trainer.utils.split_tensor_dict(inputs, 4)
    part = next(x for x in parts if int(x["completion_mask"].any(1).sum()) == 1)
    assert int(inputs[COUNTED]) == 8
    adapter.disable(trainer)
    compared(trainer, grpo_loss, part)


@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss_type", [pytest.param(x, marks=() if x == "vespo" else pytest.mark.slow) for x in LOSSES])
def test_advantages_of_tokens(loss_type: str, level: str, grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are TRL's own loss, too."""
    options = {"loss_type": loss_type, "epsilon_high": 3.0, "importance_sampling_level": level}
    changed(grpo, monkeypatch, options | {"off_policy_mask_threshold": 0.05})
    inputs = batch()
    inputs["advantages"] = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    compared(grpo, grpo_loss, inputs)
