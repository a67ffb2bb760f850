"""Credits in AReaL's actor: advantages, and who learns, of a rank's trajectories.

AReaL hands its actor a dictionary a prompt, whose rows ``[g, L]`` are the prompt's rollouts. From where it forms
advantages on, an entry of a token stands in the column before the token's own.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern._checks import readable, renamed
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._values import check_finite
from trajkern.credit import Spec
from trajkern.credit.rollouts import RESERVED
from trajkern.integrations._adapter import Patches, check_signature, held
from trajkern.integrations._arguments import choosing
from trajkern.integrations._credit_checks import check_given, metrics_of
from trajkern.integrations._outside import Outside

ACTOR = "areal.trainer.ppo.actor"
NOT_GIVEN = {  # what a credit may need -> why AReaL's actor does not have it
    "score": "its actor scores the batch's own tokens alone (a reward function's score is 'reward')",
    "tree": "its rollouts share no prefix that it knows of",
    "divergence": "advantages are formed before there are logits",
    "texts": "its actor has no tokenizer; what a text tells can be an entry [g] of a workflow's dictionary",
    "rows": "a workflow's dictionary has tensors alone; what a row tells can be an entry [g] of it",
    "rows:": "a workflow's dictionary has tensors alone; what a row tells can be an entry [g] of it",
    "span_rewards:": "an entry of a workflow's dictionary is a number a rollout; a span's reward can be a function",
}
NEUTRAL = {"kl_ctl": 0, "discount": 1, "gae_lambda": 1, "adv_norm": None, "reward_norm": None}
OF_TOKENS = ("logprobs", "prox_logp", "teacher_logp")
Trajectories = list[dict[str, Any]]


def put(patches: Patches, spec: Spec) -> None:
    """Puts the credit in the place of what AReaL's ``PPOActor`` computes."""
    check_given(spec, "AReaL", NOT_GIVEN)
    module = importlib.import_module(ACTOR)
    owner = held(module, "PPOActor")
    theirs = held(owner, "compute_advantages")
    ours = _credited(theirs, spec, module)
    check_signature("AReaL's PPOActor.compute_advantages", theirs, ours)
    patches.put(owner, "compute_advantages", functools.wraps(theirs)(ours))


def _credited(theirs: Callable[..., Any], spec: Spec, module: ModuleType) -> Callable[..., Any]:
    def compute_advantages(self: Any, data: Trajectories) -> Trajectories:
        _check_options(self.config, data)
        found = theirs(self, data)  # rewards as AReaL shapes them, and log-probs and masks of the column before
        result, real = spec(_rollouts(self, found)), [choosing("attention_mask", x["attention_mask"]) for x in found]
        held(module, "stats_tracker").scalar(**metrics_of(result))
        sizes = [int(x.sum()) for x in real]
        anyone = _anyone(result)
        for x, where, a, mask in zip(
            found, real, result.advantages.split(sizes), result.mask.split(sizes), strict=True
        ):
            advantages = _of_columns(a.to(x["advantages"].dtype), where)
            x["advantages"], x["returns"] = advantages, advantages.clone()
            if anyone:
                x["loss_mask"] = torch.where(_of_columns(mask, where), x["loss_mask"], 0)
        return found

    return compute_advantages


def _check_options(config: Any, data: Trajectories) -> None:
    for name, neutral in NEUTRAL.items():
        if getattr(config, name) != neutral:
            instead = ": .whiten() does it" if name == "adv_norm" else ": a credit compares rewards by itself"
            raise ValueError(
                f"actor.{name} must be {neutral} with a credit, which has no KL and no values"
                f"{instead if name.endswith('norm') else ''}; got {getattr(config, name)}"
            )
    if any("values" in x for x in data):
        raise ValueError("values must not be there: a credit has no returns for a critic to learn")


def _checked(found: Any) -> tuple[Trajectories, list[Tensor]]:
    """A rank's trajectories, whose entries of tokens have one shape each, and their real tokens."""
    given = Outside("trajectories", found).each()
    if not given:
        raise ValueError("trajectories must hold at least one dictionary, got none")
    device: torch.device | None = None
    for x in given:
        shape = x.at("attention_mask").tensor(ndim=2, device=device).shape
        device = x.mapping()["attention_mask"].device
        x.at("input_ids").tensor(shape, INTEGERS, device)
        x.at("tot_rewards").tensor(shape, FLOATS, device)
        x.at("loss_mask").tensor(shape, device=device)
        for name in OF_TOKENS:
            if (entry := x.get(name)) is not None:
                entry.tensor(shape, FLOATS, device)
            if (entry is None) != (given[0].get(name) is None):
                raise ValueError(f"{name} must be in all trajectories or in none; {x.path} is not as the first")
    return found, [choosing("attention_mask", x.value["attention_mask"]) for x in given]


def _rollouts(actor: Any, found: Trajectories) -> credit.Rollouts:
    """The rollouts of a rank, a dictionary's rows as a group."""
    found, real = _checked(found)

    def of_tokens(name: str, columns: int = 1) -> Tensor:
        return torch.cat([x[name].roll(columns, -1)[where] for x, where in zip(found, real, strict=True)])

    lengths = torch.cat([x.sum(1) for x in real])
    group = _ranks(actor)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    numbers = torch.arange(len(found), device=lengths.device) * ranks + rank  # no other rank has these
    sizes = torch.tensor([x.shape[0] for x in real], device=lengths.device)
    names = {"old_logprobs": "prox_logp"}
    if actor.config.use_decoupled_loss or not actor.config.recompute_logprob:  # else they are the recomputed ones
        names["sampler_logprobs"] = "logprobs"
    with renamed(names):
        batch = tk.PackedBatch(
            of_tokens("input_ids", 0),
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            choosing("loss_mask", of_tokens("loss_mask")),
            numbers.repeat_interleave(sizes),
            **{ours: of_tokens(theirs) for ours, theirs in names.items() if found[0].get(theirs) is not None},
        )
    columns = {name: torch.cat([x[name] for x in found]) for name in _columns(found)}
    flags = {name: x != 0 for name, x in columns.items() if bool(((x == 0) | (x == 1)).all())}
    rewards = {"reward": torch.cat([x["tot_rewards"].sum(-1) for x in found])}
    if readable(rewards["reward"]):
        check_finite("tot_rewards", rewards["reward"], ~rewards["reward"].isnan())  # NaN leaves a rollout out
    teacher = None if found[0].get("teacher_logp") is None else of_tokens("teacher_logp").float()
    if batch.old_logprobs is None and batch.sampler_logprobs is None:
        teacher = None
    with renamed({"rewards['reward']": "tot_rewards", "teacher_logprobs": "teacher_logp"}):
        rewards = columns | rewards
        return credit.Rollouts(batch, rewards=rewards, flags=flags, teacher_logprobs=teacher, process_group=group)


def _columns(found: Trajectories) -> list[str]:
    """The entries of a number a rollout that a workflow added."""

    def told(name: str, x: Mapping[str, Any]) -> bool:
        y = x.get(name)
        if not isinstance(y, Tensor) or y.is_meta or y.shape != x["attention_mask"].shape[:1]:
            return False
        whole = not y.is_floating_point() and y.dtype != torch.bool
        return not y.is_complex() and not (whole and bool((y.abs() > 2**24).any()))  # what float32 holds

    own = {"reward", "rewards", *RESERVED}
    return [name for name in found[0] if name not in own and ":" not in name and all(told(name, x) for x in found)]


def _of_columns(x: Tensor, real: Tensor) -> Tensor:  # [tokens of these rows], bool [g, L]
    """Of each token, in the column before its own, 0 elsewhere."""
    return x.new_zeros(real.shape).masked_scatter(real, x).roll(-1, -1)


def _ranks(actor: Any) -> Any:
    """The process group over which a batch's groups are spread, None in a process of its own."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = actor.engine.data_parallel_group
    return None if dist.get_world_size(group) == 1 else group


def _anyone(result: credit.Credit) -> bool:
    """Whether somebody learns on some rank; AReaL's engines refuse a batch of which nobody does."""
    found, group = result.mask.any(), result.rollouts.process_group
    if group is not None:
        counted = found.int()
        dist.all_reduce(counted, group=group)
        found = counted > 0
    if not bool(found):
        warnings.warn("a credit lets nobody of a batch learn: its advantages are 0", UserWarning, stacklevel=3)
    return bool(found)
