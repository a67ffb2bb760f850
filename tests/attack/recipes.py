"""Every function of the recipes, and arguments that it takes: four tokens, two rollouts of one group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import trajkern as tk
from trajkern.recipes import (
    delta_belief,
    dro,
    feedback,
    gigpo,
    grpo,
    nsr,
    reward_models,
    rlcr,
    sdpo,
    spo,
    srl,
    toolpo,
    tree_grpo,
    treepo,
    treerl,
    treerpo,
    vineppo,
)

Good = dict[Callable[..., Any], dict[str, Any]]


def tree() -> tk.Tree:
    return tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1]))


def good(batch: tk.PackedBatch) -> Good:
    x, mask = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.ones(4, dtype=torch.bool)
    cu_seqlens, ids, each = torch.tensor([0, 2, 4]), torch.tensor([5, 5]), torch.tensor([0, 1])
    rewards, won = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    of_group, packed = {"group_ids": ids}, {"cu_seqlens": cu_seqlens}
    turns = {"log_beliefs": x, "cu_beliefs": cu_seqlens, "penalty": torch.zeros(2), "won": won}
    of_turns = {"turn_rewards": rewards, "trajectory": each, "turn": torch.tensor([0, 0]), **of_group}
    least = {"ranks": torch.tensor([1, 2, 1, 2]), **packed, **of_group, "worst_fraction": 0.5, "top_k": 1}
    steps = {"returns": rewards, "trajectory": each, "anchor": torch.tensor([0, 0]), "group": ids}
    spread = {"logprobs": x, **packed, "std": torch.rand(4), "gamma": 0.5, "fraction": 0.5}
    told = {"rewards": rewards, "teacher_logprobs": x, "old_logprobs": x, "loss_mask": mask, **packed}
    counts = {"rewards": rewards, "ids": ids, "counts": torch.tensor([3, 1]), "gate": won}
    action = {"success": rewards, "action": rewards, **of_group, "action_mask": mask, **packed}
    return {
        grpo: {"batch": batch},
        delta_belief.turn_rewards: turns,
        delta_belief.turn_advantages: of_turns,
        dro.rank_filter: least,
        dro.keep_groups: {"group_score": torch.tensor([0.5, 1.0]), "drop_fraction": 0.5},
        dro.length_reward: {"lengths": torch.tensor([3, 4]), "reference_lengths": torch.tensor([3, 3]), "beta": 0.5},
        dro.propagated: spread,
        dro.gate: {"passed": won, **of_group},
        dro.right_minus_wrong: {"rewards": rewards, "correct": won, **of_group},
        feedback.majority_vote: {"votes": torch.tensor([[1.0, -1.0], [1.0, 0.0]])},
        feedback.select_hint: {"scores": [1, 1], "hints": ["look at the units", None]},
        feedback.token_advantages: told,
        feedback.step_advantages: {"step_rewards": rewards, "group": ids, "step": torch.tensor([0, 0])},
        gigpo.step_advantages: {**steps, "episode_rewards": torch.ones(2)},
        nsr.advantages: {"correct": won, "kind": "w_reinforce"},
        **_of_distillation(x, mask),
        **_of_reward_models(won),
        rlcr.rewards: {"correct": won, "confidence": torch.tensor([0.9, 0.2]), "well_formed": won},
        rlcr.calibration: {"correct": won, "confidence": torch.tensor([0.9, 0.2])},
        rlcr.vote: {"answers": ["a", "b"], "confidences": torch.tensor([0.9, 0.2])},
        sdpo.peers: {"rewards": rewards, **of_group},
        spo.low_probability: {"old_logprobs": x},
        srl.similarity: {"actions": ["a"], "expert_actions": ["b"]},
        srl.rewards: {"similarity": rewards, "well_formed": won},
        srl.keep_groups: {"rewards": rewards, **of_group, "min_std": 1e-4},
        toolpo.answered: {"simulate": str.upper, "call": "a"},
        toolpo.action_rewards: {"correct_calls": torch.tensor([2, 0]), "preference": rewards},
        toolpo.fold_preference: {"direct_lengths": torch.tensor([4, 4]), "folded_lengths": torch.tensor([3, 5])},
        toolpo.group_preference: {"lengths": torch.ones(2), "folded": won, **of_group},
        toolpo.token_advantages: action,
        tree_grpo.leaf_advantages: {"rewards": rewards, "tree_ids": ids, **of_group},
        tree_grpo.token_advantages: {"token_rewards": x, "tree_ids": ids[[0, 0, 1, 1]], "group_ids": ids[[0, 0, 1, 1]]}
        | {"counted": mask},
        tree_grpo.pooled_outcomes: counts,
        treepo.advantages: {"rewards": rewards, "branch_ids": torch.tensor([[5, 0], [5, 1]])},
        **{
            f: {"leaf_rewards": rewards, "tree": tree()}
            for f in (tree_grpo.node_rewards, spo.node_advantages, treerpo.node_advantages, treerl.node_rewards)
        },
        vineppo.step_advantages: {"values": torch.tensor([0.5, 1.0, 0.0]), "step_rewards": rewards},
    }


def _of_distillation(x: torch.Tensor, mask: torch.Tensor) -> Good:
    top, logits = torch.full((4, 2), math.log(0.25)), torch.arange(20.0).view(4, 5)
    student, tokens = nn.Linear(2, 2), torch.tensor([0, 1, 2, 4])
    of_tokens = {"old_logprobs": x, "weights": torch.ones(4), "mask": mask}
    return {
        sdpo.token_losses: {"student_logprobs": top, "teacher_logprobs": top, "logprobs": x, **of_tokens},
        sdpo.divergence_loss: {"logits": logits, "teacher": logits.log_softmax(1), "tokens": tokens, **of_tokens},
        sdpo.topk: {"logits": logits, "k": 2},
        sdpo.frozen_teacher: {"student": student},
        sdpo.update_teacher: {"teacher": sdpo.frozen_teacher(student), "student": student},
    }


def _of_reward_models(right: torch.Tensor) -> Good:
    scores = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    return {
        reward_models.rule_rewards: {"judgements": ["A", "B"], "labels": ["A", "A"], "rule": "rm_r1"},
        reward_models.verdict: {"text": "<answer>[[A]]</answer>"},
        reward_models.meta_loss: {"logits": torch.tensor([0.5, -0.5]), "right": right, "weights": torch.ones(2)},
        reward_models.vote: {"scores": scores},
        reward_models.meta_vote: {"scores": scores, "meta": torch.tensor([0.5, 1.0]), "keep": 1},
        reward_models.elo: {"wins": torch.tensor([[0.0, 1.0], [0.0, 0.0]])},
        reward_models.knockout: {"compare": int.__lt__, "candidates": [1, 2, 3], "seed": 0},
        reward_models.round_robin: {"prefer": _prefer, "candidates": [1, 2, 3]},
        reward_models.majority: {"prefer": _prefer},
    }


def _prefer(firsts: list[int], seconds: list[int]) -> torch.Tensor:
    return torch.tensor([[float(a < b) for a, b in zip(firsts, seconds, strict=True)]])
