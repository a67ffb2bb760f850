"""The options of slime and miles that are read here, each held against its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trajkern._checks import check_count, check_flag, check_number, describe

_ABSENT = object()


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {describe(value)}")
    return value


def _number(name: str, value: Any) -> float:
    return float(check_number(name, value))


def _share(name: str, value: Any) -> float:
    return float(check_number(name, value, above=0, high=1))


def _whole(name: str, value: Any) -> int:
    return check_count(name, value, low=1)


_OF_KIND: dict[Callable[[str, Any], Any], str] = {
    _text: "advantage_estimator kl_loss_type qkv_format",
    _or_none(_text): "custom_tis_function_path custom_pg_loss_reducer_function_path",
    _number: "entropy_coef kl_coef kl_loss_coef eps_clip opsm_delta tis_clip tis_clip_low rollout_temperature",
    _or_none(_number): "eps_clip_high eps_clip_c",
    _share: "rollout_top_p",
    _whole: "context_parallel_size tensor_model_parallel_size n_samples_per_prompt rollout_batch_size",
    check_flag: "calculate_per_token_loss use_kl_loss use_unbiased_kl use_tis get_mismatch_metrics use_opsm "
    "use_rollout_logprobs skip_actor_forward_only observe_training_entropy true_on_policy_mode normalize_advantages "
    "grpo_std_normalization",
}
_KINDS = {name: check for check, names in _OF_KIND.items() for name in names.split()}


def option(args: Any, name: str, default: Any = _ABSENT) -> Any:
    """An option of the host's; TypeError or ValueError where there is none and no default, or one of another kind."""
    found = getattr(args, name, default)
    if found is _ABSENT:
        raise ValueError(f"args must have {name}, which slime and miles have and trajkern reads; it has none")
    return found if found is default else _KINDS[name](name, found)


def is_miles(args: Any) -> bool:
    """Whether these are options of miles, which alone has a choice of layouts."""
    return hasattr(args, "qkv_format")


def check_layout(args: Any, what: str, **more: Any) -> None:
    """ValueError where options lay the tokens out as nothing here reads them, or are none of ``more``."""
    legal = {"qkv_format": "thd", "true_on_policy_mode": False} | more
    for name, value in legal.items():
        if (found := option(args, name, value)) != value:
            raise ValueError(f"{name} must be {value!r} for trajkern's {what}, got {found!r}")
