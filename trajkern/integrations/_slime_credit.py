"""Credits in slime: advantages, and who learns, of a rank's rollouts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern._checks import renamed, shown
from trajkern.credit import Spec
from trajkern.integrations._credit_checks import may_leave_out, spec_of
from trajkern.integrations._outside import Outside
from trajkern.integrations._slime_batch import Samples, entry, samples_of, tokens_of
from trajkern.integrations._slime_options import check_layout, is_miles, option

COLUMNS = ("truncated", "source_names", "sample_indices", "rollout_ids", "round_number")
LOGPROBS = {"old_logprobs": "log_probs", "ref_logprobs": "ref_log_probs", "sampler_logprobs": "rollout_log_probs"}
OPTION = "trajkern_credit"


def advantages(args: Any, rollout_data: MutableMapping[str, Any]) -> None:
    """For slime's ``--custom-advantage-function-path``: token advantages of an expression of :mod:`trajkern.credit`.

    The expression is named "package.module:name" by the key ``trajkern_credit`` of the YAML file that
    ``--custom-config-path`` names, which slime puts into ``args``. Without one it is ``credit.outcome()`` with
    ``--disable-grpo-std-normalization`` as its ``scale``: GRPO of the raw rewards.

    An expression finds "reward", which is the raw one (``raw_reward``, before slime compares it within its group); the
    flag "truncated"; the spans "turn", runs of the loss mask; "teacher_logprobs" for a directive, which is taken to
    ``log_probs``, else to ``rollout_log_probs``; and in the rows of a function what else slime ships of a sample. A
    group is the ``n_samples_per_prompt`` samples that follow one another, on whichever ranks they are.

    Writes ``advantages`` and ``returns``, lists of float32 ``[R_n]``, and ``loss_masks`` without the tokens that the
    expression takes out. slime then adds on-policy distillation and ``--normalize-advantages``, as after its own.

    Raises:
        ValueError, TypeError: naming what is wrong: an expression that needs what slime does not ship; one that can
            leave tokens out where slime divides by what it counted before (without ``--calculate-per-token-loss``, or
            with ``--normalize-advantages``); a critic; ``kl_coef``; rollouts of several samples, whose groups are
            not known here; context parallelism; miles, which has no such flag.
    """
    samples = samples_of(rollout_data, "rollout_data")
    spec = _spec(args, rollout_data)
    found = spec(_rollouts(args, rollout_data, samples))
    learns = found.mask[samples.places]
    narrowed = learns != samples.mask
    if _counts_before(args) and bool(narrowed.any()):
        raise ValueError(
            "calculate_per_token_loss must be True and normalize_advantages False where a credit leaves tokens or "
            f"rollouts out of the loss (also by a raw_reward of NaN): slime divides by what it counted before; "
            f"{spec!r} does"
        )
    rollout_data["loss_masks"] = samples.split(torch.where(learns, samples.loss_masks, 0))
    parts = samples.split(found.advantages[samples.places].float())
    rollout_data["advantages"], rollout_data["returns"] = parts, list(parts)


def _counts_before(args: Any) -> bool:
    """Whether slime uses a number or mask of tokens that it took before its advantages."""
    return not option(args, "calculate_per_token_loss") or bool(option(args, "normalize_advantages"))


def _spec(args: Any, rollout_data: Mapping[str, Any]) -> Spec:
    # of a split sequence slime holds slices of log-probs here, and takes slices: an expression reads whole rollouts
    check_layout(args, "advantages", context_parallel_size=1)
    if is_miles(args):
        raise ValueError("args must be slime's, as miles has no custom_advantage_function_path; these have qkv_format")
    if option(args, "kl_coef") != 0:
        raise ValueError(
            f"kl_coef must be 0 with trajkern's advantages, whose reward has no KL in it (use_kl_loss has one); got "
            f"{option(args, 'kl_coef')}"
        )
    if rollout_data.get("values") is not None:
        raise ValueError("values must not be there: trajkern's advantages have no returns for a critic to learn")
    name = getattr(args, OPTION, None)
    if name is None:
        return credit.outcome(scale="std" if option(args, "grpo_std_normalization") else "none")
    spec = spec_of(OPTION, name)
    if _counts_before(args) and may_leave_out(spec):
        raise ValueError(
            f"calculate_per_token_loss must be True and normalize_advantages False with a {OPTION} that can leave "
            f"tokens or rollouts out of the loss: slime divides by what it counted before; got {spec!r}"
        )
    return spec


def _rollouts(args: Any, data: Mapping[str, Any], samples: Samples) -> credit.Rollouts:
    count = len(samples.response_lengths)
    tokens = tokens_of(data, "tokens")
    if tokens.shape[0] != sum(samples.total_lengths):
        raise ValueError(f"tokens must be the {sum(samples.total_lengths)} of total_lengths, got {tokens.shape[0]}")

    def placed(name: str) -> Tensor | None:
        found = entry(data, name)
        x = None if found is None else samples.flat(name, found)
        return None if x is None else x.new_zeros(tokens.shape[0]).index_copy(0, samples.places, x)

    bounds = torch.tensor([0, *samples.total_lengths], device=tokens.device).cumsum(0)
    mask = torch.zeros_like(tokens, dtype=torch.bool).index_copy(0, samples.places, samples.mask)
    ids = torch.tensor(_groups(args, data, count), device=tokens.device)
    columns = {name: data[name] for name in COLUMNS if data.get(name) is not None}
    columns = {name: Outside(name, x).values() for name, x in columns.items()}
    if short := next((name for name, x in columns.items() if len(x) != count), None):
        raise ValueError(f"{short} must have a value for each of the {count} samples, got {len(columns[short])}")
    flags = {}
    if "truncated" in columns:
        flags["truncated"] = torch.tensor(Outside("truncated", columns["truncated"]).choices(), device=tokens.device)
    teacher = placed("teacher_log_probs")
    with renamed(LOGPROBS | {"teacher_logprobs": "teacher_log_probs", "rewards['reward']": "raw_reward"}):
        logprobs = {ours: placed(theirs) for ours, theirs in LOGPROBS.items()}
        return credit.Rollouts(
            tk.PackedBatch(tokens, bounds, mask, ids, **logprobs),
            rewards={"reward": torch.tensor(_raw_rewards(data), dtype=torch.float32, device=tokens.device)},
            flags=flags,
            rows=[dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or None,
            teacher_logprobs=None if teacher is None else teacher.float(),
            process_group=_ranks(),
        )


def _groups(args: Any, data: Mapping[str, Any], count: int) -> list[int]:
    """The number of each sample's prompt in the whole batch."""
    missing = [name for name in ("partition", "raw_reward") if data.get(name) is None]
    if missing:
        raise ValueError(
            "rollout_data must have partition, where this rank's samples stand in the whole batch, and raw_reward, of "
            f"the whole batch; it has no {', '.join(missing)}"
        )
    size, prompts = option(args, "n_samples_per_prompt"), option(args, "rollout_batch_size")
    places = Outside("partition", data["partition"]).values()
    of_all, rollouts = len(Outside("raw_reward", data["raw_reward"]).values()), data.get("rollout_ids")
    ids = None if rollouts is None else Outside("rollout_ids", Outside("rollout_ids", rollouts).values()).ids()
    alone = ids is None or len(set(ids)) == count
    if of_all != size * prompts or not alone:
        raise ValueError(
            f"a batch must have n_samples_per_prompt * rollout_batch_size = {size} * {prompts} samples, one a rollout, "
            f"for trajkern's advantages, which find groups by it; raw_reward has {of_all}"
            f"{'' if alone else ', several of one rollout_ids'}"
        )
    found = Outside("partition", places).ids()
    if len(found) != count or len(set(found)) < count or max(found) >= of_all:
        raise ValueError(
            f"partition must say of each of the {count} samples where it stands among {of_all}; got {shown(places)}"
        )
    return [place // size for place in found]


def _raw_rewards(data: Mapping[str, Any]) -> list[float]:
    rewards = Outside("raw_reward", data["raw_reward"])
    values = [rewards.values()[place] for place in Outside("partition", data["partition"]).values()]
    if bad := [x for x in values if not isinstance(x, (int, float))]:
        raise TypeError(f"raw_reward must be a number a sample (reward_key takes one of several), got {bad[0]!r}")
    return rewards._replace(value=values).reals(missing=True, flags=True)


def _ranks() -> Any:
    """The process group over which a batch's samples are spread, None in a process of its own."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    megatron = importlib.import_module("megatron.core.parallel_state")
    group = megatron.get_data_parallel_group(with_context_parallel=False)
    return None if dist.get_world_size(group) == 1 else group
