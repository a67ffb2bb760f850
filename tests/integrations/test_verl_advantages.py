"""verl's advantage estimators: trajkern's beside verl's own, on ragged batches with uids of several types."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ESTIMATORS = (
    "gae",
    "grpo",
    "grpo_vectorized",
    "gdpo",
    "grpo_passk",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "rloo_vectorized",
    "opo",
    "gpg",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
)


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    # verl adds 1e-8 to counts and to a variance, which float64 sees
    return {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}


def test_every_estimator_of_verl_has_a_counterpart(core) -> None:
    theirs = {name for name in core.ADV_ESTIMATOR_REGISTRY if not name.startswith("trajkern_")}
    assert set(ESTIMATORS) == theirs
    for name in (*ESTIMATORS, "psr", "nsr", "w_reinforce"):
        assert callable(core.get_adv_estimator_fn("trajkern_" + name))


def _estimate(core, name: str, b: SimpleNamespace, **more):
    algo = importlib.import_module("verl.trainer.config").AlgoConfig(gamma=0.9)
    arguments = {
        "token_level_rewards": b.rewards.clone(),
        "response_mask": b.mask.long(),
        "config": algo,
        "index": b.uid,
    }
    if name.endswith("gae"):
        arguments = {
            "token_level_rewards": b.rewards,
            "values": b.values,
            "response_mask": b.mask.long(),
            "gamma": 0.95,
            "lam": 0.9,
        }
    if name.endswith("remax"):
        arguments["reward_baselines"] = b.baselines
    if "optimal" in name:
        arguments |= {"old_log_probs": b.old, "sum_pi_squared": b.sum_pi_squared, "rollout_is_weights": b.weights}
    return core.get_adv_estimator_fn(name)(**arguments | more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator(core, padded_batch, name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        b = padded_batch(seed, dtype)
        if name == "grpo_passk":
            b.uid[5] = b.uid[0]
        if name.endswith("vectorized"):  # verl sorts the uids there, so they have to be comparable
            b.uid = np.array([f"<{uid!r}>" for uid in b.uid], dtype=object)
        for theirs, ours in zip(_estimate(core, name, b), _estimate(core, "trajkern_" + name, b), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == b.rewards.dtype
            torch.testing.assert_close(ours[b.mask], theirs[b.mask].to(dtype), **_tolerance(dtype))
            assert not ours[~b.mask].any()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_optimal_token_baseline_of_the_longest_row(core, padded_batch, name: str, tail: bool) -> None:
    b = padded_batch(5, rows=8)
    b.mask[:] = torch.arange(19) < torch.tensor([3, 19, 0, 7, 7, 5, 6, 0])[:, None]
    b.uid = np.array(list("xxxyyzww"), dtype=object)
    b.rewards = b.values
    for weights in (None, b.weights):
        more = {"handle_zero_tail": tail, "rollout_is_weights": weights}
        theirs, ours = (_estimate(core, n, b, **more)[0] for n in (name, "trajkern_" + name))
        torch.testing.assert_close(ours[b.mask], theirs[b.mask], **_tolerance(torch.float64))


def test_opo_of_one_token(core, padded_batch) -> None:
    """A group's only token is its own baseline, although the frequencies of its rows add up to one."""
    b = padded_batch(0, rows=6)
    b.mask[:] = torch.arange(19) < torch.tensor([1, 0, 2, 1, 0, 4])[:, None]
    b.rewards[:, 0] = torch.tensor([1.0, 0.5, 2.0, 3.0, 1.0, 4.0])
    b.uid = np.array(list("xxyyzz"), dtype=object)
    theirs, ours = (_estimate(core, name, b)[0] for name in ("opo", "trajkern_opo"))
    torch.testing.assert_close(ours[b.mask], theirs[b.mask])
    assert ours[0, 0] == 0 != b.rewards[0, 0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_std_is_left_out_where_verl_leaves_it_out(core, padded_batch, name: str) -> None:
    """Of the configuration alone, as verl's trainers call all but ``gae``, and ``grpo``, which they tell of it."""
    b = padded_batch(7)
    b.uid = np.array([f"<{uid!r}>" for uid in b.uid], dtype=object)
    b.uid[5] = b.uid[0]
    config = importlib.import_module("verl.trainer.config").AlgoConfig(gamma=0.9, norm_adv_by_std_in_grpo=False)
    more = {} if name == "gae" else {"config": config}
    told = {"norm_adv_by_std_in_grpo": False} if name == "grpo" else {}
    theirs, ours = (_estimate(core, n, b, **m)[0] for n, m in ((name, more | told), ("trajkern_" + name, more)))
    torch.testing.assert_close(ours[b.mask], theirs[b.mask].to(ours.dtype), **_tolerance(torch.float64))


def test_gdpo_with_several_rewards(core, padded_batch) -> None:
    b = padded_batch(7)
    config = {"gdpo_reward_keys": ["right", "neat"], "gdpo_reward_weights": [0.7, 2.0]}
    more = {
        "config": config,
        "non_tensor_batch": {"right": np.arange(23) % 3, "neat": list(np.arange(23) % 5 / 4)},
        "batch": {"prompts": torch.zeros(23, 2), "attention_mask": torch.cat([torch.ones(23, 2), b.mask], 1).long()},
    }
    b.mask[4, 0] = True  # verl writes the score of an empty row into the prompt's place
    pair = [_estimate(core, name, b, **more)[0] for name in ("trajkern_gdpo", "gdpo")]
    torch.testing.assert_close(pair[0].double(), pair[1].double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"gdpo_reward_keys must name rewards.*'neat', 'right'.*\['wrong'\]"):
        _estimate(core, "trajkern_gdpo", b, **more | {"config": {"gdpo_reward_keys": ["wrong"]}})
    with pytest.raises(ValueError, match="gdpo_reward_weights must hold 2 numbers"):
        _estimate(core, "trajkern_gdpo", b, **more | {"config": config | {"gdpo_reward_weights": [1.0]}})


def test_equal_rewards_are_exactly_zero_and_recipes_by_sign(core, padded_batch) -> None:
    b = padded_batch(1, torch.float32)
    b.rewards[:] = 0
    b.rewards[:, 0] = 0.1
    uid = np.array(["one"] * 23, dtype=object)
    assert not core.get_adv_estimator_fn("trajkern_grpo")(b.rewards, b.mask, uid)[0].any()
    b.rewards[:, 0] = torch.arange(23) % 2
    expected = {"psr": (0.0, 1.0), "nsr": (-1.0, 0.0), "w_reinforce": (-1.0, 0.1)}
    for name, (wrong, right) in expected.items():
        a, returns = core.get_adv_estimator_fn("trajkern_" + name)(b.rewards, b.mask, index=uid, config=None)
        row = torch.where(torch.arange(23) % 2 == 1, right, wrong)
        assert torch.equal(a, row[:, None] * b.mask) and torch.equal(a, returns)


def test_what_is_missing_is_named(core, padded_batch) -> None:
    b = padded_batch(0)
    estimator = core.get_adv_estimator_fn
    with pytest.raises(ValueError, match="index must hold the uid"):
        estimator("trajkern_grpo")(b.rewards, b.mask)
    with pytest.raises(ValueError, match="index must hold 23 uids"):
        estimator("trajkern_rloo")(b.rewards, b.mask, b.uid[:5])
    with pytest.raises(ValueError, match=r"values must be given to trajkern_gae.*replace=True"):
        estimator("trajkern_gae")(b.rewards, b.mask, config=None)
    with pytest.raises(ValueError, match=r"old_log_probs must be given.*replace=True"):
        estimator("trajkern_optimal_token_baseline")(b.rewards, b.mask, b.uid)
    with pytest.raises(ValueError, match="reward_baselines must be given"):
        estimator("trajkern_remax")(b.rewards, b.mask)
    with pytest.raises(ValueError, match="at least 2 rows with every uid"):
        estimator("trajkern_grpo_passk")(b.rewards, b.mask, b.uid)
    with pytest.raises(ValueError, match="config must be given for reinforce_plus_plus"):
        estimator("trajkern_reinforce_plus_plus")(b.rewards, b.mask)
