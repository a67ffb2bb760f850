"""Layouts after they are made, recipes on tensors and the losses of the adapters wait for no GPU.

Their tensors are meta tensors that the ops take for a GPU's (tests/device_watch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import trajkern as tk
from tests.device_watch import HostRead, on_meta, watched
from trajkern import credit, recipes
from trajkern.recipes import delta_belief, dro, feedback, gigpo, rlcr, sdpo, srl, toolpo, tree_grpo, treepo, treerl

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter runs no launcher", allow_module_level=True)


def _batch() -> tk.PackedBatch:
    return tk.PackedBatch(
        torch.arange(9),
        torch.tensor([0, 4, 4, 7, 9]),
        torch.tensor([False, True, True, False, False, True, True, False, True]),
        torch.tensor([5, 3, 5, 3]),
        torch.tensor([1.0, 0.0, 0.5, -1.0]),
        torch.full((9,), -1.0),
    )


def _tree() -> tk.Tree:
    return tk.Tree(torch.tensor([-1, 0, 0, 1, 1, -1, 5]), torch.tensor([4, 3, 2, 0, 6, 2, 7]), torch.tensor([8, 8]))


def _of_layouts() -> dict[str, Callable[[], Any]]:
    batch, tree = on_meta(_batch()), on_meta(_tree())
    spans = on_meta(tk.Spans.turns(_batch().loss_mask, _batch().cu_seqlens))
    per_token = torch.empty(tree.num_tokens, device="meta", dtype=torch.bool)
    return {
        "to_padded": lambda: batch.to_padded(batch.tokens, side="left"),
        "head_inputs": lambda: batch.head_inputs(),
        "tree": lambda: [getattr(tree, name) for name in ("positions", "rows", "flat_cu_seqlens", "leaf_group")],
        "leaf_weights": lambda: tree.leaf_weights(per_token, "seq_mean_token_mean"),
        "attention_mask": lambda: [tree.attention_mask(dense=True), tree.attention_mask(dense=False)],
        "token_span": lambda: spans.token_span,
    }


def _of_recipes() -> dict[str, Callable[[], Any]]:
    batch, tree, n, s = on_meta(_batch()), on_meta(_tree()), 4, 6
    new = partial(torch.empty, device="meta")
    whole, flags = partial(new, dtype=torch.int64), partial(new, dtype=torch.bool)
    leaves, mask, cu = new(tree.num_leaves), flags(tree.num_tokens), batch.cu_seqlens
    logprobs = new(batch.num_tokens)
    calls = {name: partial(recipes.RECIPES[name], batch) for name in recipes.RECIPES}
    calls |= {name: partial(x.advantages, tree, leaves, mask) for name, x in recipes.TREE_RECIPES.items()}
    return calls | {
        "treerl.code": lambda: treerl.node_rewards(leaves, tree, form="code", selected=flags(tree.num_leaves)),
        "treepo.group_size": lambda: treepo.advantages(new(n), whole(n, 3), weighting="group_size"),
        "gigpo": lambda: gigpo.step_advantages(new(s), whole(s), whole(s), whole(s), episode_rewards=new(n)),
        "toolpo": lambda: toolpo.token_advantages(new(n), new(n), whole(n), flags(batch.num_tokens), cu),
        "toolpo.action": lambda: toolpo.action_rewards(new(n), toolpo.fold_preference(new(n), new(n))),
        "rlcr": lambda: rlcr.rewards(new(n), new(n), well_formed=flags(n)),
        "rlcr.calibration": lambda: rlcr.calibration(new(n), new(n)),
        "delta_belief": lambda: delta_belief.turn_rewards(new(s + n), whole(n + 1), won=flags(n), penalty=new(s)),
        "delta_belief.turns": lambda: [
            delta_belief.turn_advantages(new(s), whole(s), whole(s), whole(n), finished=finished)
            for finished in delta_belief.FINISHED
        ],
        "dro.prompts": lambda: dro.rank_filter(whole(batch.num_tokens), cu, whole(n), worst_fraction=0.5, top_k=3),
        "dro.groups": lambda: dro.keep_groups(new(n), drop_fraction=0.3),
        "dro.length": lambda: dro.length_reward(new(n), new(n), beta=0.1),
        "dro.gate": lambda: [dro.gate(flags(n), whole(n), mode=mode) for mode in dro.GATES],
        "tree_grpo.tokens": lambda: tree_grpo.token_advantages(new(s), whole(s), whole(s), flags(s)),
        "tree_grpo.pooled": lambda: tree_grpo.pooled_outcomes(new(n), whole(n), whole(n), gate=flags(n)),
        "toolpo.group": lambda: toolpo.group_preference(new(n), flags(n), whole(n)),
        "dro.doubt": lambda: dro.propagated(new(batch.num_tokens), cu, new(batch.num_tokens), gamma=4.0, fraction=0.5),
        "dro.gap": lambda: dro.right_minus_wrong(new(n), flags(n), whole(n)),
        "sdpo": lambda: [
            sdpo.divergence_loss(new(s, 9), sdpo.topk(new(s, 9), 3), whole(s), new(s), mask=flags(s)),
            sdpo.peers(new(n), whole(n)),
        ],
        "srl": lambda: srl.rewards(new(n), srl.keep_groups(new(n), whole(n), min_std=0.1)),
        "feedback": lambda: feedback.token_advantages(new(n), logprobs, logprobs, batch.loss_mask, cu),
        "feedback.votes": lambda: feedback.majority_vote(new(3, n)),
        "feedback.steps": lambda: feedback.step_advantages(new(s), whole(s), whole(s)),
    }


def _of_credit() -> dict[str, Callable[[], Any]]:
    """But for a gated term of a tree, which prunes it."""
    batch, tree = _batch(), _tree()
    flags = {"ok": torch.tensor([True, False, True, True])}
    calls = tk.Spans(torch.tensor([1, 5]), torch.tensor([3, 7]), torch.tensor([0, 2]), torch.tensor([0, 0]), 9)
    known = {"spans": {"call": calls}, "span_rewards": {"call": torch.ones(2), "turn": torch.ones(3)}, "flags": flags}
    rewards = {name: batch.rewards for name in ("reward", "action", "confidence", "similarity")}
    teacher = torch.full((9,), -2.0)
    flat = credit.Rollouts(
        replace(batch, sampler_logprobs=batch.old_logprobs), rewards, **known, teacher_logprobs=teacher
    )
    leaves, tokens = tree.num_leaves, tree.flat_index.shape[0]
    scored = ((torch.arange(tree.num_tokens) % 2 == 1) & (tree.rows >= 0))[tree.flat_index]
    of_tree = tk.PackedBatch(
        torch.zeros(tokens, dtype=torch.int64),
        tree.flat_cu_seqlens,
        scored,
        tree.leaf_group,
        torch.ones(leaves),
        sampler_logprobs=torch.zeros(tokens),
    )
    grown = credit.Rollouts(of_tree, tree=tree).to("meta")
    vars(grown)["tree"] = on_meta(tree)
    x = flat.to("meta")
    config, at = tk.PolicyLoss("dapo"), torch.empty(5, device="meta", dtype=torch.int64)
    specs = {
        name: credit.recipe(name) for name in ("grpo", "psr", "nsr", "w_reinforce", "toolpo", "rlcr", "srl", "feedback")
    }
    specs["delta_belief"] = credit.recipe("delta_belief", reward="turn")
    specs["tokens"] = credit.tree_terms.OfTokens()
    specs["composed"] = (
        (credit.outcome() + 0.5 * credit.spans("call", within="index")).gate("ok", "pass_rate").asymmetric(0.1)
        + 0.1 * credit.directive(where="failed").only("turn")
        + credit.outcome("action", within="batch").on("call").whiten().clip(-1, 1)
    )
    calls_of = {name: partial(spec, x) for name, spec in specs.items()}
    trees = ("tree_grpo", *recipes.TREE_RECIPES)
    calls_of |= {name: lambda name=name: credit.recipe(name)(grown).tree_inputs(config, at) for name in trees}
    return calls_of | {"loss_inputs": lambda: specs["composed"](x).loss_inputs(at)}


class _Accelerator:
    """Of one process, which has nobody to wait for."""

    num_processes, sync_gradients = 1, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def _trainer(loss_type: str, level: str) -> Any:
    """What TRL's trainers show their loss, with every option on that costs something."""
    rows, length = 5, 7
    args = {f"vespo_{x}": 1.0 for x in ("k_pos", "k_neg", "lambda_pos", "lambda_neg")}
    args |= {f"entropy_{x}": 0.01 for x in ("target", "coef_delta", "coef_min", "coef_max")}
    scores = [torch.empty(rows, length, device="meta", requires_grad=True) for _ in range(2)]
    mode = {name: [] for name in ("kl", "entropy", "policy_loss", "aux_loss", "entropy_coef", "cispo_clip_ratio")}
    mode |= {f"clip_ratio/{x}": [] for x in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}
    mode |= {"vespo/phi_seq_mean": []}

    class Trainer(SimpleNamespace):
        __hash__ = object.__hash__  # as TRL's have it

    def score(model, input_ids, attention_mask, logits_to_keep, compute_entropy, compute_aux_loss):
        return *scores, torch.empty((), device="meta")

    return Trainer(
        args=SimpleNamespace(
            **args,
            delta=None,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        accelerator=_Accelerator(),
        model=SimpleNamespace(training=True),
        _metrics={"train": mode},
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=0.2,
        epsilon_high=3.0,
        beta=0.1,
        max_completion_length=length,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=2,
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=True,
        entropy_coef=0.01,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
        aux_loss_enabled=True,
        router_aux_loss_coef=0.1,
        _get_per_token_logps_and_entropies=score,
        get_gamma_weights=lambda a, difference, *x, **y: difference.exp(),
    )


def _of_trl() -> dict[str, Callable[[], Any]]:
    from trajkern.integrations._trl_loss import grpo_loss, rloo_loss

    rows, length = 5, 7
    new = partial(torch.empty, device="meta")
    inputs = {name: new(rows, length, dtype=torch.int64) for name in ("completion_ids", "completion_mask")}
    inputs |= {name: new(rows, 3, dtype=torch.int64) for name in ("prompt_ids", "prompt_mask")}
    inputs |= {name: new(rows, length) for name in ("old_per_token_logps", "ref_per_token_logps")}
    inputs |= {"advantages": new(rows), "old_logps": new(rows), "num_items_in_batch": new(())}
    calls = {"rloo": lambda: rloo_loss(_trainer("grpo", "token"), None, inputs).backward()}
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"):
        for level in ("token", "sequence"):
            calls[f"{loss_type}-{level}"] = lambda x=loss_type, y=level: grpo_loss(
                _trainer(x, y), None, inputs
            ).backward()
    return calls


class _Options(SimpleNamespace):
    """verl's configurations, which are read by attributes and as mappings."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def _of_verl() -> dict[str, Callable[[], Any]]:
    from trajkern.integrations._verl_losses import LOSSES

    rows, length = 5, 7
    new = partial(torch.empty, rows, length, device="meta")
    names = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef")
    policy = _Options(dro_beta=0.1, **dict.fromkeys(names))
    config = _Options(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, tau_pos=1.0, tau_neg=1.05, policy_loss=policy
    )

    def call(name: str) -> None:
        weights, mask = new(), new(dtype=torch.bool)
        LOSSES[name](new(), new(requires_grad=True), new(), mask, "token-mean", config, weights)[0].backward()

    return {name: partial(call, name) for name in LOSSES if name != "bypass_mode"}  # verl's own code decides there


def _of_transformers() -> dict[str, Callable[[], Any]]:
    from trajkern.integrations import _model_head
    from trajkern.integrations import transformers as adapter

    batch, hidden = on_meta(_batch()), 8

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, position_ids, use_cache, attention_mask):
            return SimpleNamespace(last_hidden_state=torch.empty(*input_ids.shape, hidden, device="meta"))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model, self.head = Backbone(), torch.nn.Linear(hidden, 50, device="meta")
            self.config = SimpleNamespace(_attn_implementation="sdpa", get_text_config=SimpleNamespace)

        def get_input_embeddings(self):
            return SimpleNamespace(num_embeddings=50)

        def get_output_embeddings(self):
            return self.head

    def call() -> None:
        with patch.object(_model_head, "check_loaded"):  # no model lies on meta whose numbers anybody wants
            adapter.token_stats(Model(), batch, check=False)  # a measurement is read

    return {"token_stats": call}


GROUPS = {
    "layouts": _of_layouts,
    "recipes": _of_recipes,
    "credit": _of_credit,
    "trl": _of_trl,
    "verl": _of_verl,
    "transformers": _of_transformers,
}


@pytest.mark.parametrize("group", GROUPS)
def test_what_stands_on_the_ops_waits_for_nothing(group: str) -> None:
    waits = {}
    for name, call in GROUPS[group]().items():
        try:
            with watched():
                call()
        except HostRead as error:
            waits[name] = str(error)
    assert not waits


# name -> kernels that a credit launches at most, those of its metrics among them: 12 a term
CREDIT_LAUNCHES = {"grpo": 39, "toolpo": 66, "tree_grpo": 71, "composed": 210}


@pytest.mark.parametrize("name", CREDIT_LAUNCHES)
def test_launches_of_credit(name: str) -> None:
    call = _of_credit()[name]
    with watched() as watch:
        call()
    assert watch.kernels <= CREDIT_LAUNCHES[name]
