"""Batches of verl's trainers: rollouts with tools, in the padded format and in a queue, and a credit by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

VOCABULARY = 17


class Rollout(SimpleNamespace):
    """uid, session, number; prompt, response: token ids; mask, old, sampler: of the response; score; extra."""

    @property
    def turns(self) -> list[tuple[int, int]]:
        """[start, end) of the runs of ones."""
        edges = [0, *self.mask, 0]
        starts = [n for n in range(len(self.mask)) if edges[n + 1] and not edges[n]]
        ends = [n for n in range(1, len(self.mask) + 1) if edges[n] and not edges[n + 1]]
        return list(zip(starts, ends, strict=True))


def rollouts_of(seed: int, groups: int = 3, size: int = 4) -> list[Rollout]:
    """One to three turns of 1 to 3 tokens, a tool's 1 or 2 between them; every row has numbers for turns and calls."""
    draw, found = np.random.default_rng(seed), []
    for group in range(groups):
        prompt = draw.integers(1, VOCABULARY, draw.integers(2, 5)).tolist()
        for session in range(size):
            turns, mask = int(draw.integers(1, 4)), []
            for turn in range(turns):
                mask += [1] * int(draw.integers(1, 4)) + [0] * int(draw.integers(1, 3)) * (turn < turns - 1)
            old = -draw.random(len(mask)) - 0.1
            extra = {
                "turn_scores": draw.normal(size=turns).round(3).tolist(),
                "tool_rewards": draw.normal(size=turns - 1).round(3).tolist(),
                "reward_extra_info": {"well_formed": bool(draw.random() < 0.7), "tone": float(draw.normal())},
            }
            found.append(
                Rollout(
                    uid=f"prompt{group}",
                    session=session,
                    number=0,
                    prompt=prompt,
                    response=draw.integers(1, VOCABULARY, len(mask)).tolist(),
                    mask=mask,
                    old=old.tolist(),
                    sampler=(old + 0.05 * draw.normal(size=len(mask))).tolist(),
                    score=float(draw.integers(0, 2)),
                    extra=extra,
                )
            )
    draw.shuffle(found)
    return found


def padded(rollouts: list[Rollout], **columns: list[Any]) -> Any:
    """A DataProto as the legacy trainer has it when it computes advantages."""
    from verl.protocol import DataProto

    wide, length = max(len(x.prompt) for x in rollouts) + 1, max(len(x.response) for x in rollouts) + 1

    def left(x: list[Any]) -> list[Any]:
        return [0] * (wide - len(x)) + x

    def right(x: list[Any]) -> list[Any]:
        return x + [0] * (length - len(x))

    def real(x: Rollout) -> list[int]:
        return left([1] * len(x.prompt)) + right([1] * len(x.response))

    scores = torch.zeros(len(rollouts), length)
    for row, x in enumerate(rollouts):
        scores[row, len(x.response) - 1] = x.score
    tensors = {
        "prompts": torch.tensor([left(x.prompt) for x in rollouts]),
        "responses": torch.tensor([right(x.response) for x in rollouts]),
        "attention_mask": torch.tensor([real(x) for x in rollouts]),
        "response_mask": torch.tensor([right(x.mask) for x in rollouts]),
        "token_level_scores": scores,
        "token_level_rewards": scores,
        "old_log_probs": torch.tensor([right(x.old) for x in rollouts]),
        "rollout_log_probs": torch.tensor([right(x.sampler) for x in rollouts]),
    }
    flat = [{**x.extra, **x.extra.get("reward_extra_info", {}), "uid": x.uid} for x in rollouts]
    names = dict.fromkeys(name for x in flat for name in x if name != "reward_extra_info")
    arrays = {name: _objects([x.get(name) for x in flat]) for name in names}
    return DataProto.from_dict(tensors, arrays | {name: _objects(x) for name, x in columns.items()})


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


class Meta(SimpleNamespace):
    """keys, tags, partition_id and extra_info of a batch in a queue."""

    def __len__(self) -> int:
        return len(self.keys)


class Queue:
    """What verl's default trainer asks of its transfer queue, in a dictionary."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def put_rollouts(self, rollouts: list[Rollout], **columns: list[Any]) -> Any:
        """Writes them as verl's agent loops do; what stands for the batch."""
        for row, x in enumerate(rollouts):
            mask, scores = torch.tensor(x.mask), torch.zeros(len(x.mask))
            scores[-1] = x.score
            self.rows[_key(x)] = {
                "uid": x.uid,
                "prompts": torch.tensor(x.prompt),
                "responses": torch.tensor(x.response),
                "response_mask": mask,
                "loss_mask": mask,
                "rm_scores": scores,
                "old_log_probs": torch.tensor(x.old),
                "rollout_log_probs": torch.tensor(x.sampler),
                "extra_fields": x.extra,
                "num_turns": 2 * len(x.turns),
            } | {name: values[row] for name, values in columns.items()}
        tags = [{"is_padding": True} if x.uid.startswith("pad") else {} for x in rollouts]
        return Meta(keys=[_key(x) for x in rollouts], tags=tags, partition_id="train", extra_info={})

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        from tensordict import NonTensorStack, TensorDict

        found = {}
        for name in select_fields:
            values = [self.rows[key].get(name) for key in keys]
            if all(isinstance(x, torch.Tensor) for x in values):
                found[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
            elif any(name in self.rows[key] for key in keys):
                found[name] = NonTensorStack(*values)
        return TensorDict(found, batch_size=[len(keys)])

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any) -> Any:
        for name, column in fields.items():
            for key, x in zip(keys, column.unbind(), strict=True):
                self.rows[key][name] = x
        return Meta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id, extra_info={})

    def column(self, rollouts: list[Rollout], name: str) -> list[list[float]]:
        return [self.rows[_key(x)][name].tolist() for x in rollouts]


def _key(x: Rollout) -> str:
    return f"{x.uid}_{x.session}_{x.number}"


def actor(**options: Any) -> dict[str, Any]:
    return {"loss_agg_mode": "token-mean", "loss_scale_factor": None, "policy_loss": {"loss_mode": "vanilla"}} | options


def config_of(
    estimator: str, actor_options: dict[str, Any] | None = None, parallel_calls: int = 1, **algorithm: Any
) -> Any:
    """The part of verl's configuration that advantages read."""
    from omegaconf import OmegaConf

    options = {"adv_estimator": estimator, "gamma": 1.0, "lam": 1.0, "use_kl_in_reward": False} | algorithm
    rollout = {"n": 4, "multi_turn": {"max_parallel_calls": parallel_calls}}
    return OmegaConf.create(
        {"algorithm": options, "actor_rollout_ref": {"rollout": rollout, "actor": actor(**(actor_options or {}))}}
    )


def by_hand(rollouts: list[Rollout], *, turns: float, calls: float) -> tuple[list[list[float]], list[list[int]]]:
    """outcome + turns * spans("turn") + calls * spans("call"), of well-formed rollouts: advantages, and who learns."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, x in enumerate(rollouts):
        if x.extra["reward_extra_info"]["well_formed"]:
            groups[x.uid].append(row)
    advantages = [[0.0] * len(x.mask) for x in rollouts]
    for members in groups.values():
        outcomes = _standard([rollouts[row].score for row in members])
        of_turns = iter(_standard([s for row in members for s in rollouts[row].extra["turn_scores"]]))
        of_calls = iter(_standard([s for row in members for s in rollouts[row].extra["tool_rewards"]]))
        for row, outcome in zip(members, outcomes, strict=True):
            spans = rollouts[row].turns
            for number, (start, end) in enumerate(spans):
                value = outcome + turns * next(of_turns)
                if number < len(spans) - 1:
                    value += calls * next(of_calls)
                advantages[row][start:end] = [value] * (end - start)
    learns = [[m * x.extra["reward_extra_info"]["well_formed"] for m in x.mask] for x in rollouts]
    return advantages, learns


def _standard(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values
    deviation = stdev(values) if len(set(values)) > 1 else 0.0
    return [(x - fmean(values)) / (deviation + 1e-6) if not math.isclose(deviation, 0) else 0.0 for x in values]
