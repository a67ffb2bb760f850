"""What a credit leaves out, in verl's own losses: exact where they count tokens, refused where they count rows."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.integrations.verl_batches import VOCABULARY, Queue, Rollout, actor, by_hand, config_of, padded, rollouts_of
from trajkern import credit
from trajkern.integrations import verl as adapter

SPEC = (credit.outcome() + 0.5 * credit.spans("turn") + 0.25 * credit.spans("call")).gate("well_formed")
NAME = "trajkern_credit"


@pytest.fixture
def trainers(verl_trainers):
    yield verl_trainers
    adapter.unregister()


def credited(trainers, rollouts: list[Rollout], spec: credit.Spec, **actor_options: Any) -> Any:
    adapter.register(credit=spec)
    config = config_of(NAME, actor(**actor_options))
    return trainers.legacy.compute_advantage(padded(rollouts), adv_estimator=NAME, config=config.algorithm)


def parts_of(losses: torch.Tensor, mask: torch.Tensor, mode: str, **counts: Any) -> float:
    """verl's own aggregation over micro-batches of 5 rows, added up as its gradients are."""
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    pairs = zip(losses.split(5), mask.split(5), strict=True)
    return sum(float(core.agg_loss(x, m, loss_agg_mode=mode, **counts)) for x, m in pairs)


def test_token_modes_are_exact(trainers) -> None:
    """The mean over the tokens that learn and no other, in arithmetic of its own."""
    rollouts = rollouts_of(0, groups=4)
    data = credited(trainers, rollouts, SPEC)
    mask = data.batch["response_mask"]
    losses = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    picked = [
        float(losses[row, t])
        for row, x in enumerate(rollouts)
        for t, m in enumerate(x.mask)
        if m and x.extra["reward_extra_info"]["well_formed"]
    ]
    assert 0 < len(picked) < sum(sum(x.mask) for x in rollouts)
    count = {"batch_num_tokens": int(mask.sum()), "global_batch_size": len(rollouts), "dp_size": 1}
    assert parts_of(losses, mask, "token-mean", **count) == pytest.approx(sum(picked) / len(picked), rel=1e-12)
    assert parts_of(losses, mask, "token-sum", **count) == pytest.approx(sum(picked), rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "of_row"),
    [
        ("seq-mean-token-mean", lambda x: sum(x) / len(x)),
        ("seq-mean-token-sum", sum),
        ("seq-mean-token-sum-norm", lambda x: sum(x) / 40),
    ],
)
def test_row_modes_divide_by_what_verl_was_told(trainers, mode: str, of_row: Any) -> None:
    """By ppo_mini_batch_size * rollout.n, of which a credit changes nothing; so they are refused where rows leave."""
    rollouts = rollouts_of(0, groups=4)
    mask = credited(trainers, rollouts, SPEC).batch["response_mask"]
    losses = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [losses[n][m != 0].tolist() for n, m in enumerate(mask) if m.any()]
    count = {"global_batch_size": len(rollouts), "loss_scale_factor": 40}
    found = parts_of(losses, mask, mode, **count)
    assert len(rows) < len(rollouts)
    assert found == pytest.approx(sum(map(of_row, rows)) / len(rollouts), rel=1e-7)  # verl adds 1e-8 to counts
    assert found != pytest.approx(sum(map(of_row, rows)) / len(rows), rel=1e-3)
    for factor in (None, 40):
        options = {"loss_agg_mode": mode, "loss_scale_factor": factor}
        with pytest.raises(ValueError, match=f"loss_agg_mode must be 'token-mean' or.*got '{mode}' and 'vanilla'"):
            credited(trainers, rollouts, SPEC, **options)


@pytest.mark.parametrize("loss", ["sapo", "geo_mean", "trajkern_sapo", "trajkern_luspo"])
def test_losses_that_are_means_over_rows(trainers, loss: str) -> None:
    with pytest.raises(ValueError, match=f"got 'token-mean' and '{loss.removeprefix('trajkern_')}'"):
        credited(trainers, rollouts_of(0), SPEC, policy_loss={"loss_mode": loss})


def test_row_modes_with_everybody(trainers) -> None:
    """Nothing is refused where nobody leaves; a reward that is missing is one that leaves."""
    rollouts, options = rollouts_of(0), {"loss_agg_mode": "seq-mean-token-mean"}
    for spec in (
        credit.outcome("tone"),
        SPEC + credit.outcome(),
        credit.recipe("w_reinforce"),
        credit.outcome().on("call"),
    ):
        mask = credited(trainers, rollouts, spec, **options).batch["response_mask"]
        assert mask.sum() == sum(sum(x.mask) for x in rollouts)
    for spec in (
        credit.recipe("nsr"),
        credit.outcome().only("call"),
        2 * SPEC.clip(-1, 1),
        credit.outcome(credit.outcome().gate("well_formed")),
    ):
        with pytest.raises(ValueError, match="leaves rollouts out of the loss"):
            credited(trainers, rollouts, spec, **options)
    rollouts[3].extra["reward_extra_info"]["tone"] = None
    with pytest.raises(ValueError, match="leaves rollouts out of the loss"):
        credited(trainers, rollouts, credit.outcome("tone"), **options)
    mask = credited(trainers, rollouts, credit.outcome("tone")).batch["response_mask"]
    assert not mask[3].any() and mask.any(1).sum() == len(rollouts) - 1


def test_a_mini_batch_of_which_nobody_learns(imported_verl) -> None:
    """verl's own mean over no token is 0 / 0; trajkern's losses are 0."""
    config = SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=None,
        global_batch_info={"dp_size": 2, "batch_num_tokens": 0, "global_batch_size": 4},
        get=lambda name, default: default,
    )
    assert np.isnan(
        float(imported_verl.agg_loss(torch.ones(2, 3), torch.zeros(2, 3), "token-mean", batch_num_tokens=0))
    )
    adapter.register()
    for name in ("vanilla", "gspo", "cispo"):
        new = torch.full((2, 3), -1.0, requires_grad=True)
        function = imported_verl.get_policy_loss_fn(f"trajkern_{name}")
        loss, _ = function(new.detach(), new, torch.ones(2, 3), torch.zeros(2, 3), "token-mean", config)
        loss.backward()
        assert float(loss.detach()) == 0 and not new.grad.any()
    adapter.unregister()


def test_nobody_learns(trainers) -> None:
    rollouts = rollouts_of(1)
    for x in rollouts:
        x.extra["reward_extra_info"]["well_formed"] = False
    with pytest.warns(UserWarning, match="'trajkern_credit' lets nobody of a batch learn: its advantages are 0"):
        data = credited(trainers, rollouts, SPEC)
    assert not data.batch["advantages"].any()
    assert int(data.batch["response_mask"].sum()) == sum(sum(x.mask) for x in rollouts)


class Policy(torch.nn.Module):
    """Each token's logits from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.table = torch.nn.Parameter(start)

    def forward(self, x: Rollout) -> torch.Tensor:
        """log p of the response's tokens."""
        before = torch.tensor([x.prompt[-1], *x.response[:-1]])
        return self.table[before].log_softmax(-1)[torch.arange(len(before)), torch.tensor(x.response)]


def with_log_probs(policy: Policy, seed: int) -> list[Rollout]:
    rollouts = rollouts_of(seed)
    for x in rollouts:
        x.old = policy(x).tolist()
    return rollouts


def epochs(policy: Policy, loss_of: Any) -> None:
    """Two epochs over one batch, so that the second's ratios are not 1."""
    for _ in range(2):
        policy.zero_grad()
        loss_of()
        with torch.no_grad():
            policy.table -= 0.5 * policy.table.grad


def verls_loss(policy: Policy, queue: Queue, rollouts: list[Rollout], keys: list[str]) -> None:
    """Forward and backward as verl's engine and actor: micro-batches, and tokens counted by ``loss_mask``."""
    losses, tensordict = (importlib.import_module(x) for x in ("verl.workers.utils.losses", "tensordict"))
    utilities = importlib.import_module("verl.utils.tensordict_utils")
    module = importlib.import_module("verl.workers.config.actor")
    count = int(sum(queue.rows[key]["loss_mask"].sum() for key in keys))
    names = ("prompts", "responses", "response_mask", "old_log_probs", "advantages")
    for part in range(0, len(keys), 5):
        here, data = keys[part : part + 5], queue.kv_batch_get(keys[part : part + 5], "train", list(names))
        data = tensordict.TensorDict(dict(data.items()), batch_size=[len(here)])
        utilities.assign_non_tensor(data, dp_size=1, batch_num_tokens=count, global_batch_size=len(keys))
        # a model's output has the whole row, and belongs to the token after each
        rows = [
            torch.cat((torch.zeros(len(x.prompt) - 1), policy(x), torch.zeros(1))) for x in rollouts[part : part + 5]
        ]
        config = module.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.1)
        output = {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
        losses.ppo_loss(config, output, data)[0].backward()


def own_loss(policy: Policy, rollouts: list[Rollout]) -> None:
    """PPO's clip of the tokens that learn, over their number."""
    advantages, learns = by_hand(rollouts, turns=0.5, calls=0.25)
    total = torch.zeros((), dtype=torch.float64)
    for x, a, m in zip(rollouts, advantages, learns, strict=True):
        ratio = (policy(x) - torch.tensor(x.old, dtype=torch.float64)).exp()
        a, m = torch.tensor(a, dtype=torch.float64), torch.tensor(m)
        total = total - (torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a) * m).sum()
    (total / sum(map(sum, learns))).backward()


def test_two_steps_of_the_default_trainer(trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as by hand after two batches of two epochs, through verl's queue, advantages and loss."""
    adapter.register(credit=SPEC)
    queue, policies = Queue(), (Policy(), Policy())
    monkeypatch.setattr(trainers.v1, "tq", queue)
    trainer = SimpleNamespace(config=config_of(NAME), tokenizer=None)
    for step in range(2):
        rollouts = with_log_probs(policies[0], 20 + step)
        batch = queue.put_rollouts(rollouts)
        trainers.v1.PPOTrainer._compute_advantage(trainer, batch, metrics={})
        epochs(policies[0], lambda r=rollouts, b=batch: verls_loss(policies[0], queue, r, b.keys))
        again = with_log_probs(policies[1], 20 + step)
        epochs(policies[1], lambda r=again: own_loss(policies[1], r))
    start = Policy().table
    moved = float((policies[1].table - start).detach().abs().max())
    assert moved > 0.05
    torch.testing.assert_close(policies[0].table, policies[1].table, rtol=0, atol=1e-5 * moved)
