"""Credits in verl's trainers: advantages, and who learns, from an expression, where verl forms its own advantages.

:class:`Hooks` replaces ``compute_advantage``, which every trainer of verl calls on its controller with the whole batch,
and has the default trainer's ``_compute_advantage`` fetch what the expression reads and write the masks back.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trajkern.credit import Spec
from trajkern.credit.rollouts import RESERVED
from trajkern.integrations._adapter import Patches, WhenImported, check_signature, held
from trajkern.integrations._arguments import choosing
from trajkern.integrations._credit_checks import may_leave_out
from trajkern.integrations._verl_rollouts import LOGPROBS, Pack, Rows, rollouts_of

NOT_GIVEN = {  # what a credit may need -> why no trainer of verl has it
    "score": "verl forms advantages on its controller, which has no model (a reward function's score is 'reward')",
    "tree": "verl's rollouts share no prefix that it knows of",
    "divergence": "verl forms advantages on its controller, which has no logits",
}
OF_MASK = {"spans:turn", "spans:call", "span_rewards:turn", "span_rewards:call"}  # read from runs of response_mask
COUNTS_ALL = ("sapo", "geo_mean", "luspo")  # losses that are a mean over rows in every loss_agg_mode
COLUMNS = ["num_turns", "data_source", "reward_model", "extra_info", "index"]  # of the data set, as verl calls them


def check_given(spec: Spec) -> None:
    """ValueError where a credit needs what no trainer of verl can give."""
    for name, why in NOT_GIVEN.items():
        if name in spec.needs:
            raise ValueError(f"credit must do without {name!r} in verl: {why}; got {spec!r}")


@dataclass
class _Batch:
    """A batch of the default trainer, whose fields lie in the transfer queue."""

    queue: Any
    meta: Any
    trainer: Any
    metrics: dict[str, Any]
    written: Tensor | None = None  # bool [B, L], the mask in the queue
    lengths: Tensor | None = None  # [B]

    def rows(self, data: Any, spec: Spec) -> Rows:
        names = {name.removeprefix("flags:").removeprefix("rows:") for name in spec.needs}
        teacher = ["teacher_ids", "teacher_logprobs"] if "teacher_logprobs" in names else []
        own = sorted(name for name in names - {*RESERVED, *COLUMNS, "reward"} if ":" not in name)
        fields = ["prompts", "responses", "response_mask", "extra_fields", *COLUMNS, *teacher, *own]
        found = dict(self._fetched(fields).items())
        prompts, of_prompts = _padded(found.pop("prompts"))
        responses, self.lengths = _padded(found.pop("responses"))
        self.written = choosing("response_mask", _padded(found.pop("response_mask"))[0])
        tokens = torch.cat((prompts, responses), 1)
        real = torch.cat((_within(of_prompts, prompts), _within(self.lengths, responses)), 1)
        pair = [found.pop(name, None) for name in ("teacher_ids", "teacher_logprobs")]
        columns = {name: _listed(x) for name, x in found.items()}
        columns |= _flattened(columns.pop("extra_fields", ()))
        return Rows(
            tokens,
            real,
            self.written,
            choosing("response_mask", data.batch["response_mask"]),
            data.batch["token_level_rewards"].sum(-1),
            {name: data.batch[name] for name in LOGPROBS.values() if name in data.batch},
            columns | _flattened(columns.pop("reward_extra_info", ())),
            [_session(key) for key in self.meta.keys],
            [not tag.get("is_padding", False) for tag in self.meta.tags],
            None if any(x is None for x in pair) else (_of_tokens(pair[0], real), _of_tokens(pair[1], real)),
            self.trainer.tokenizer,
        )

    def _fetched(self, fields: list[str]) -> Any:
        return self.queue.kv_batch_get(keys=self.meta.keys, partition_id=self.meta.partition_id, select_fields=fields)

    def keep(self, mask: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Writes the mask to the queue, under both names, and the metrics to those of the step."""
        values = torch.stack([x.double() for x in metrics.values()]).tolist()
        self.metrics.update({f"credit/{name}": x for name, x in zip(metrics, values, strict=True)})
        assert self.written is not None and self.lengths is not None
        if torch.equal(mask, self.written):
            return
        rows = [x[:n].long() for x, n in zip(mask, self.lengths.tolist(), strict=True)]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        fields = importlib.import_module("tensordict").TensorDict(
            {"response_mask": nested, "loss_mask": nested.clone()}, batch_size=len(rows)
        )
        self.queue.kv_batch_put(keys=self.meta.keys, partition_id=self.meta.partition_id, fields=fields)


def _padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows padded at their ends, and their lengths."""
    if x.is_nested:
        return x.to_padded_tensor(0), x.offsets().diff()  # type: ignore[attr-defined]
    return x, torch.full((x.shape[0],), x.shape[1], device="cpu")


def _within(lengths: Tensor, x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device="cpu") < lengths[:, None]


def _of_tokens(x: Any, real: Tensor) -> Tensor:
    """What each real token of the rows has, ``[B, W, k]``."""
    if not isinstance(x, Tensor):
        raise ValueError("teacher_logprobs must be there for every output of an agent loop; some have none")
    values = x.values() if x.is_nested else x.flatten(0, 1)
    return values.new_zeros((*real.shape, values.shape[-1])).masked_scatter(real[..., None], values)


def _listed(x: Any) -> list[Any]:
    """A field of the queue as a value a row."""
    if isinstance(x, Tensor):
        return list(x.unbind()) if x.is_nested or x.ndim > 1 else x.tolist()
    return [
        getattr(y, "data", y) if type(y).__name__ == "NonTensorData" else y for y in getattr(x, "tolist", x.__iter__)()
    ]


def _flattened(column: Iterable[Any]) -> dict[str, list[Any]]:
    """The columns of a column of mappings, None where a row has no such key."""
    rows = [dict(x or {}) for x in column]
    return {name: [x.get(name) for x in rows] for name in dict.fromkeys(name for x in rows for name in x)}


def _session(key: str) -> tuple[Any, int]:
    """Whose output a row is, and the how manieth: of ``{uid}_{session}_{number}``."""
    parts = key.rsplit("_", 2)
    if len(parts) != 3 or not parts[2].isdigit():
        raise ValueError(f"a key of the batch must be uid_session_number, got {key!r}")
    return (parts[0], parts[1]), int(parts[2])


def _rows_of(data: Any) -> Rows:
    """Of a batch that has all of its fields: left-padded prompts, then right-padded responses."""
    batch, fields = data.batch, ("prompts", "responses", "attention_mask", "response_mask")
    if missing := [x for x in fields if x not in batch]:
        raise ValueError(f"the batch must have {', '.join(fields)} for a credit; it has no {', '.join(missing)}")
    learns = choosing("response_mask", batch["response_mask"])
    columns = {name: list(x.tolist()) for name, x in data.non_tensor_batch.items()}
    columns |= _flattened(columns.pop("reward_extra_info", ()))
    teacher = ("teacher_ids", "teacher_logprobs")
    return Rows(
        torch.cat((batch["prompts"], batch["responses"]), 1),
        choosing("attention_mask", batch["attention_mask"]),
        learns,
        learns,
        batch["token_level_rewards"].sum(-1),
        {name: batch[name] for name in LOGPROBS.values() if name in batch},
        columns,
        [(row, 0) for row in range(len(learns))],
        [True] * len(learns),
        (batch[teacher[0]], batch[teacher[1]]) if all(x in batch for x in teacher) else None,
        None,
    )


class Hooks:
    """The credits of this process by the names of their estimators, in the trainers of verl that it loads.

    Args:
        specs: name -> expression.
        required: the one that the trainer must have chosen; None: any, or an estimator of verl's.
    """

    def __init__(self, specs: Mapping[str, Spec], required: str | None = None) -> None:
        self._specs, self._required, self._warned = dict(specs), required, False
        self.current: ContextVar[_Batch | None] = ContextVar("batch", default=None)
        self._patches = Patches()
        self._function: tuple[Any, Any] | None = None  # verl's compute_advantage and what stands in for it
        self._imports = WhenImported(
            {
                "verl.trainer.ppo.ray_trainer": self._put_function,
                "verl.trainer.ppo.v1.utils": self._put_function,
                "verl.experimental.separation.ray_trainer": self._put_function,
                "verl.trainer.ppo.v1.trainer_base": self._put_method,
            }
        )
        try:
            self._imports.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Takes everything back."""
        self._imports.stop()
        self._specs, self._required = {}, None  # for who holds the function still
        self._patches.undo()

    def chosen(self, estimator: Any) -> Spec | None:
        """The credit of an estimator's name, if it is one."""
        name = getattr(estimator, "value", estimator)
        if self._required is not None and name != self._required:
            raise ValueError(
                f"algorithm.adv_estimator must be {self._required!r} where register(credit=...) ran; got {name!r}"
            )
        return self._specs.get(name)

    def _put_function(self, module: ModuleType) -> None:
        theirs = held(module, "compute_advantage")
        if self._function is None:
            ours = _stand_in(self, theirs)
            check_signature("verl's compute_advantage", theirs, ours)
            self._function = theirs, functools.wraps(theirs)(ours)
        vars(module)["compute_advantage"] = self._function[0]  # not what it may have imported from a patched module
        self._patches.put(vars(module), "compute_advantage", self._function[1])

    def _put_method(self, module: ModuleType) -> None:
        owner = held(module, "PPOTrainer")
        theirs = held(owner, "_compute_advantage")
        ours = _method(self, theirs, module)
        check_signature("verl's PPOTrainer._compute_advantage", theirs, ours)
        self._patches.put(owner, "_compute_advantage", functools.wraps(theirs)(ours))

    def credited(self, data: Any, name: str, spec: Spec, config: Any) -> Any:
        """The batch with advantages, returns and a mask of who learns."""
        if "values" in data.batch:
            raise ValueError(f"critic.enable must be False for {name!r}: a credit has no returns for a critic")
        batch = self.current.get()
        if batch is None:
            _check_rejection(config, spec)
        root = config._get_root() if hasattr(config, "_get_root") else {}  # the algorithm's options are a part of it
        _check_calls(root, spec)
        rows = _rows_of(data) if batch is None else batch.rows(data, spec)
        if "uid" not in data.non_tensor_batch:
            raise ValueError(f"the batch must have uid for {name!r}, which says who shares a prompt; it has none")
        pack = Pack(rows)
        found = spec(rollouts_of(pack, data.non_tensor_batch["uid"].tolist(), spec.needs))
        mask = pack.padded(found.mask)
        self._check_rows(root, name, spec, pack, mask)
        if not bool(mask.any()):
            mask = rows.learns
            self._say_nobody(name)
        if batch is not None:
            batch.keep(mask, found.metrics)
        of_mask = data.batch["response_mask"].dtype
        advantages = pack.padded(found.advantages).to(data.batch["token_level_rewards"].dtype)
        data.batch["advantages"] = data.batch["returns"] = advantages
        data.batch["response_mask"] = mask.to(of_mask)
        return data

    def _check_rows(self, root: Any, name: str, spec: Spec, pack: Pack, mask: Tensor) -> None:
        """A mean over rows divides by their number, whoever is left out of them."""
        actor = root.get("actor_rollout_ref", {}).get("actor", {})
        loss = actor.get("policy_loss", {}).get("loss_mode", "vanilla").removeprefix("trajkern_")
        mode = actor.get("loss_agg_mode", "token-mean")
        if not mode.startswith("seq-mean") and loss not in COUNTS_ALL:
            return
        gone = pack.rows.learns.any(1) & ~mask.any(1)
        if may_leave_out(spec) or bool(gone[pack.order].any()):
            raise ValueError(
                f"actor.loss_agg_mode must be 'token-mean' or 'token-sum', and policy_loss.loss_mode none of "
                f"{', '.join(COUNTS_ALL)}, where {name!r} leaves rollouts out of the loss: verl's means over rows "
                f"divide by all of them, whoever is left; got {mode!r} and {loss!r}"
            )

    def _say_nobody(self, name: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{name!r} lets nobody of a batch learn: its advantages are 0", UserWarning, stacklevel=4)


def _check_rejection(config: Any, spec: Spec) -> None:
    """Turns are runs of response_mask, which verl's rejection sampling has narrowed where this trainer calls."""
    correction = getattr(config, "rollout_correction", None) or {}
    read = sorted(spec.needs & OF_MASK)
    if read and correction.get("rollout_rs", None) is not None and not correction.get("bypass_mode", False):
        raise ValueError(
            f"algorithm.rollout_correction.rollout_rs must be null where a credit needs {', '.join(read)}: the legacy "
            "trainer keeps no mask from before the rejection; trainer.use_v1=True does"
        )


def _check_calls(root: Any, spec: Spec) -> None:
    """verl keeps no note of which turn a number of ``tool_rewards`` belongs to."""
    calls = root.get("actor_rollout_ref", {}).get("rollout", {}).get("multi_turn", {}).get("max_parallel_calls", 1)
    if "span_rewards:call" in spec.needs and calls != 1:
        raise ValueError(
            "rollout.multi_turn.max_parallel_calls must be 1 where a credit needs span_rewards:call, so that a turn "
            f"has one number of tool_rewards; got {calls}"
        )


def _stand_in(hooks: Hooks, theirs: Callable[..., Any]) -> Callable[..., Any]:
    def compute_advantage(
        data: Any,
        adv_estimator: Any,
        gamma: float = 1.0,
        lam: float = 1.0,
        num_repeat: int = 1,
        norm_adv_by_std_in_grpo: bool = True,
        config: Any = None,
    ) -> Any:
        spec = hooks.chosen(adv_estimator)
        if spec is None:
            return theirs(data, adv_estimator, gamma, lam, num_repeat, norm_adv_by_std_in_grpo, config)
        return hooks.credited(data, adv_estimator, spec, config)

    return compute_advantage


def _method(hooks: Hooks, theirs: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if hooks.chosen(self.config.algorithm.adv_estimator) is None:
            return theirs(self, batch, metrics)
        token = hooks.current.set(_Batch(held(module, "tq"), batch, self, metrics))
        try:
            return theirs(self, batch, metrics)
        finally:
            hooks.current.reset(token)

    return _compute_advantage


def not_reached(name: str) -> Callable[..., Any]:
    """What stands in verl's registry for a credit, which the registry's arguments do not suffice for."""

    def estimator(**_: Any) -> Sequence[Tensor]:
        raise RuntimeError(
            f"{name} needs more than verl hands to an estimator: trajkern.integrations.verl.register() must run in the "
            "process of the trainer, whose advantages must come from verl.trainer.ppo.ray_trainer.compute_advantage"
        )

    estimator.__name__, estimator.__doc__ = name, f"The credit {name}, which verl's trainers compute."
    return estimator
