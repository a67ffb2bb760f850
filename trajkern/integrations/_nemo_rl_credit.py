"""Credits in NeMo-RL's GRPO trainers: an advantage estimator that reads an expression of :mod:`trajkern.credit`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern._checks import describe
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern.credit import Spec
from trajkern.credit.rollouts import RESERVED
from trajkern.integrations._adapter import Patches, check_signature, held
from trajkern.integrations._arguments import choosing
from trajkern.integrations._credit_checks import check_given, may_leave_out, metrics_of
from trajkern.integrations._outside import Outside

GRPO = "nemo_rl.algorithms.grpo"
HOLDERS = (GRPO, "nemo_rl.algorithms.grpo_sync", "nemo_rl.algorithms.single_controller_utils.setup")
NAME = "trajkern_credit"
PREFIX = "reward/"  # of the entries that are components of a reward
NOT_GIVEN = {  # what a credit may need -> why no trainer of NeMo-RL has it
    "score": "advantages are formed in the driver, which has no model (an environment's score is 'reward')",
    "tree": "its rollouts share no prefix that it knows of",
    "divergence": "advantages are formed in the driver, which has no logits",
    "teacher_logprobs": "its trainers hand a teacher's log-probs to their own estimator 'opd' alone",
    "texts": "a message of NeMo-Gym has no text; rollouts.rows has each rollout's message_log",
    "span_rewards:": "an environment gives a number a rollout; a span's reward can be a function",
}


def check(spec: Spec) -> None:
    """ValueError where a credit needs what NeMo-RL does not have, or can leave something out of the loss."""
    check_given(spec, "NeMo-RL", NOT_GIVEN)
    if may_leave_out(spec):
        _refuse(spec)


def put(patches: Patches, spec: Spec) -> None:
    """Puts :func:`maker`'s function where NeMo-RL's trainers look for an estimator."""
    module = importlib.import_module(GRPO)
    theirs, ours = held(module, "_create_advantage_estimator"), maker(spec)
    check_signature("NeMo-RL's _create_advantage_estimator", theirs, ours)
    called = held(held(module, "GDPOAdvantageEstimator"), "compute_advantage")
    check_signature("NeMo-RL's compute_advantage", called, Estimator.compute_advantage, unread=set())
    for holder in HOLDERS:
        if holder in sys.modules and vars(sys.modules[holder]).get("_create_advantage_estimator") is theirs:
            patches.put(vars(sys.modules[holder]), "_create_advantage_estimator", ours)


def maker(spec: Spec) -> Callable[[Any], Estimator]:
    """``_create_advantage_estimator`` of a driver that has chosen the credit."""

    def _create_advantage_estimator(master_config: Any) -> Estimator:
        name = master_config.grpo.adv_estimator.name
        if name != NAME:
            raise ValueError(f"grpo.adv_estimator.name must be {NAME!r} where enable(credit=...) ran; got {name!r}")
        return Estimator(spec)

    return _create_advantage_estimator


class Estimator:
    """The advantages of a batch by an expression; ``last_metrics`` is logged by NeMo-RL's asynchronous trainer."""

    def __init__(self, spec: Spec) -> None:
        check(spec)
        self.spec = spec
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(
        self,
        prompt_ids: Tensor,  # [B, P]
        rewards: Tensor,  # [B]
        mask: Tensor,  # [B, S]
        repeated_batch: Mapping[str, Any],
        **_: Any,
    ) -> Tensor:
        """Float32 ``[B, S]``, 0 where ``mask`` is; rows of equal ``prompt_ids`` are a group.

        Raises:
            ValueError: naming the entry: a batch without the messages of its rollouts, or whose messages and mask
                disagree; a reward, flag or span that the expression needs and the batch has not; a reward of NaN, which
                would leave a rollout out.
        """
        rows, real = _rollouts(prompt_ids, rewards, mask, repeated_batch)
        found = self.spec(rows)
        if bool((found.mask != rows.batch.loss_mask).any()):
            _refuse(self.spec)
        self.last_metrics = metrics_of(found)
        return torch.zeros(real.shape, dtype=torch.float32, device=mask.device).masked_scatter(
            real, found.advantages.float()
        )


def _refuse(spec: Spec) -> None:
    raise ValueError(
        "a credit must leave no token and no rollout out of the loss in NeMo-RL (no gate, no .only, no reward of NaN): "
        f"its trainers count the tokens that learn by themselves, and take advantages alone; got {spec!r}"
    )


def _rollouts(
    prompt_ids: Tensor, rewards: Tensor, mask: Tensor, batch: Mapping[str, Any]
) -> tuple[credit.Rollouts, Tensor]:
    """The batch, and its real tokens, bool ``[B, S]``."""
    mask = Outside("mask", mask).tensor(ndim=2)
    prompt_ids = Outside("prompt_ids", prompt_ids).tensor(dtypes=INTEGERS, ndim=2)
    if not isinstance(batch, Mapping):
        raise TypeError(f"repeated_batch must be a mapping, got {describe(batch)}")
    if "message_log" not in batch:
        raise ValueError(
            "repeated_batch must have message_log, the rollouts' messages, for a credit: data_plane.enabled must be "
            f"False, as NeMo-RL's trainers over a data plane keep them elsewhere; it has {', '.join(sorted(batch))}"
        )
    logs = Outside("repeated_batch", batch["message_log"], "message_log").each()
    parts = [[x.at("token_ids").tensor(dtypes=INTEGERS, ndim=1) for x in log.each()] for log in logs]
    lengths = torch.tensor([sum(len(x) for x in part) for part in parts], dtype=torch.int64, device=mask.device)
    learns = choosing("mask", mask)
    if len(logs) != len(mask) or len(prompt_ids) != len(mask):
        raise ValueError(
            f"prompt_ids and message_log must have a row for each of the mask's {len(mask)}; got {len(prompt_ids)} and "
            f"{len(logs)}"
        )
    real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if bool((lengths > mask.shape[1]).any()) or bool((learns & ~real).any()):
        raise ValueError(
            f"message_log must have the tokens of the mask's {list(mask.shape)}, row by row and to their ends; "
            f"its lengths are {lengths.tolist()[:8]}"
        )
    count = (len(mask),)
    rewards = Outside("compute_advantage", rewards, "rewards").tensor(count, FLOATS)
    pack = tk.PackedBatch(
        torch.cat([mask.new_zeros(0, dtype=torch.int64), *(x.to(mask.device).long() for y in parts for x in y)]),
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        learns[real],
        torch.unique(prompt_ids, dim=0, return_inverse=True)[1].to(mask.device),
    )
    components = {name.removeprefix(PREFIX): x for name, x in batch.items() if name.startswith(PREFIX)}
    named = {
        name: Outside("repeated_batch", x, PREFIX + name).tensor(count).to(mask.device)
        for name, x in components.items()
        if name not in RESERVED and ":" not in name
    }
    truncated = batch.get("truncated")
    cut = [] if truncated is None else Outside("repeated_batch", truncated, "truncated").choices()
    if truncated is not None and len(cut) != len(logs):
        raise ValueError(f"truncated must have a flag for each of the {len(logs)} rollouts, got {len(cut)}")
    flags = {} if truncated is None else {"truncated": torch.tensor(cut, device=mask.device)}
    columns = {name: x for name, x in batch.items() if _is_column(x, len(logs))}
    own = {"reward": rewards.to(mask.device).float()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return credit.Rollouts(pack, rewards=named | own, flags=flags, rows=rows), real


def _is_column(x: Any, count: int) -> bool:
    """Whether this is a list of a value a rollout."""
    return isinstance(x, Sequence) and not isinstance(x, str) and len(x) == count
