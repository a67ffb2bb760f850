"""Batches and options of host trainers, as far as they need no host."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.attack.mutated import Mutation
from tests.attack.target import Target, same
from tests.integrations import skyrl_batches, slime_batches
from tests.integrations.slime_ranks import options, rollout_data
from trajkern import credit
from trajkern.integrations import (
    _areal_credit,
    _nemo_rl_credit,
    _nemo_rl_terms,
    _prime_rl_credit,
    _skyrl_credit,
    areal,
    art,
    prime_rl,
    slime,
)
from trajkern.integrations._skyrl_losses import LOSSES
from trajkern.integrations._trl_tree import tree_rollouts
from trajkern.integrations._verl_rollouts import Pack, Rows, rollouts_of


def targets() -> Iterator[Target]:
    for part in (_of_slime, _of_prime_rl, _of_areal, _of_nemo_rl, _of_skyrl, _of_trees, _of_verl):
        yield from part()


TOKENIZER = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [str(x) for x in ids])


def _of_prime_rl() -> Iterator[Target]:
    def node(first: int, scaffold: int, sampled: int) -> SimpleNamespace:
        mask = [False] * scaffold + [True] * sampled
        ids = list(range(first, first + len(mask)))
        return SimpleNamespace(token_ids=ids, mask=mask, logprobs=[-0.5] * sampled, parent=None)

    def trace(n: int) -> SimpleNamespace:
        found = SimpleNamespace(id=str(n), nodes=[node(1, 2, 0), node(20, 1, 2 + n), node(40, 2, 1)], reward=0.5 * n)
        found.rewards = {"solved": SimpleNamespace(score=float(n % 2), weight=2.0), "absent": None}
        found.metrics, found.info, found.is_truncated = {"tone": float(n), "late": None}, {"n": n}, n == 1
        found.agent = SimpleNamespace(name="agent", trainable=True)
        return found

    def call(traces: Any) -> Any:
        found = credit.outcome()(_prime_rl_credit._rollouts(traces, TOKENIZER))
        return found.advantages, found.rollouts.rewards, found.rollouts.flags

    more: dict[str, Any] = {"unread": ("id", "parent", "trainable", "info", "weight"), "another": meant}
    more |= {"optional": ("late", "absent", "solved", "tone", "info"), "words": ("trace", "traces")}
    yield Target("prime_rl.enable_credit", call, [trace(0), trace(1)], "traces", **more)
    x, mask = -torch.rand(5) - 0.1, torch.tensor([True, True, False, True, True])
    inputs = SimpleNamespace(trainer_logprobs=x, inference_logprobs=x - 0.1, ref_logprobs=None, advantages=x + 0.5)
    inputs.loss_mask, inputs.loss_weights = mask, torch.ones(5)
    yield Target(
        "prime_rl.policy_loss",
        prime_rl.policy_loss,
        inputs,
        "inputs",
        another=meant,
        words=("trainer_logprobs", "inference_logprobs"),
        optional=("ref_logprobs", "loss_weights"),
    )


def _of_areal() -> Iterator[Target]:
    x, mask = -torch.rand(2, 4) - 0.1, torch.ones(2, 4)
    given = {
        "logprobs": x,
        "prox_logp": x,
        "advantages": x,
        "loss_mask": mask,
        "teacher_logp": x,
        "rl_loss_weight": 1.0,
    }
    given |= {"distill_loss_weight": 0.1, "versions": mask, "cu_seqlens": None}
    call = partial(areal.GRPOLoss(), x, None)
    more: dict[str, Any] = {"optional": ("teacher_logp", "rl_loss_weight", "distill_loss_weight", "cu_seqlens")}
    more |= {"another": meant, "unread": ("versions", "cu_seqlens"), "words": ("old_logprobs", "proximal_logprobs")}
    yield Target("areal.GRPOLoss", call, given, "input_data", **more)
    rejection = SimpleNamespace(level="token", action="mask", metric="ratio", agg="mean", lower=0.5, upper=2.0)
    of_batch = {"logprobs": x, "proximal_logprobs": x, "old_logprobs": x, "advantages": x, "eps_clip": 0.2}
    call = partial(_with_rejection, {**of_batch, "loss_mask": mask})
    yield Target("areal.ppo_actor_loss_fn", call, rejection, "rejection_sampling", another=_none_or_meant)
    found = [_trajectories(n) for n in (0, 1)]
    actor = SimpleNamespace(config=SimpleNamespace(use_decoupled_loss=True, recompute_logprob=True), engine=None)
    more = {"another": _entry, "optional": ("teacher_logp", "prox_logp", "logprobs")}
    yield Target("areal.enable(credit)", partial(_areal_credit_of, actor), found, "trajectories", **more)


def _none_or_meant(change: Mutation) -> bool:
    return (change.after is None and change.names in ((), ("lower",))) or meant(change)


def _entry(change: Mutation) -> bool:
    """A workflow's own entries are columns where all trajectories have a number a rollout, and else nothing."""
    return change.names[-1:] in (("tone",), ("good",)) or meant(change)


def _with_rejection(arguments: dict[str, Any], rejection: Any) -> Any:
    return areal.ppo_actor_loss_fn(**arguments, rejection_sampling=rejection)


def _trajectories(n: int) -> dict[str, Any]:
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 1, 1]])
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    x = -torch.rand(2, 5) - 0.1
    found = {"input_ids": torch.arange(10).view(2, 5) + n, "attention_mask": real, "loss_mask": mask.roll(-1, -1)}
    found |= {"logprobs": x, "prox_logp": x, "tot_rewards": torch.tensor([[0.0, 0, 1, 0, 0], [0, 0, 0, 0, 0.5]])}
    return found | {"tone": torch.tensor([1, 2]), "good": torch.tensor([0, 1]), "teacher_logp": x}


def _areal_credit_of(actor: Any, found: Any) -> Any:
    made = credit.outcome()(_areal_credit._rollouts(actor, found))
    return made.advantages, made.rollouts.rewards, made.rollouts.flags


def _of_nemo_rl() -> Iterator[Target]:
    logs = [
        [{"role": "user", "token_ids": torch.tensor([1, 2])}, {"role": "assistant", "token_ids": torch.tensor([3, n])}]
        for n in (4, 5)
    ]
    repeated = {
        "message_log": logs,
        "reward/format": torch.tensor([0.0, 1.0]),
        "truncated": torch.tensor([False, True]),
    }
    repeated["extra"] = [{"answer": 1}, {"answer": 2}]
    batch = {"prompt_ids": torch.tensor([[1, 2], [1, 2]]), "rewards": torch.tensor([1.0, 0.0])}
    batch |= {"mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1.0]]), "repeated_batch": repeated}
    of_credit: dict[str, Any] = {"another": meant, "unread": ("extra", "role"), "words": ("reward",)}
    of_credit["optional"] = ("reward/format", "truncated")
    estimator = _nemo_rl_credit.Estimator(credit.outcome(scale="none"))

    def call(x: Any) -> Any:
        if not isinstance(x, dict) or x.keys() != batch.keys():
            raise TypeError("batch must be the arguments")
        return estimator.compute_advantage(**x)

    yield Target("nemo_rl.enable(credit)", call, batch, "batch", **of_credit)
    options = {name: getattr(_nemo_rl_terms.Options(), name) for name in _nemo_rl_terms.Options.__dataclass_fields__}

    def made(x: Any) -> Any:
        return _nemo_rl_terms.Options.of(x).policy_loss()

    yield Target("nemo_rl.ClippedPGLossFn", made, options, "cfg", another=_option, optional=tuple(options))
    x = -torch.rand(2, 4) - 0.1
    data = {"token_mask": torch.ones(2, 4), "sample_mask": torch.ones(2), "generation_logprobs": x, "advantages": x}
    data |= {"prev_logprobs": x}

    def of_data(d: Any) -> Any:
        return tuple(_nemo_rl_terms.batch_of(x[:, 1:], d, False)[2:6])

    yield Target("nemo_rl.ClippedPGLossFn", of_data, data, "data", another=meant)


def _of_skyrl() -> Iterator[Target]:
    b, names = (
        skyrl_batches.make_batch(0, rows=6, length=4),
        ("regular", "dual_clip", "gspo", "sapo", "kl_cov", "cispo"),
    )
    for name in names:
        options, loss = vars(skyrl_batches.options()), partial(_skyrl_loss, LOSSES[name], b)
        read = {"sapo": "sapo", "kl_cov": "kl_cov", "cispo": "cispo", "dual_clip": "clip_ratio_c"}.get(name, "")
        known = (read,) if read in ("sapo", "kl_cov", "cispo") else ("eps_clip_low", "eps_clip_high", read)
        config = SimpleNamespace(**{key: x for key, x in options.items() if key in known})
        right = partial(_as_skyrl, name, b)
        yield Target(f"skyrl.{name}", loss, config, "config", another=meant, right=right)

    def call(x: Any) -> Any:
        data = x.get("data") if isinstance(x, dict) else x
        if isinstance(data, dict):
            data = _Data(data)
            data.metadata = x.get("metadata")
        _skyrl_credit._check_options("trajkern_credit", SimpleNamespace(advantage_batch_normalize=False), data)
        return _skyrl_credit._rollouts(SimpleNamespace(tokenizer=TOKENIZER), data, 2)[0].rewards

    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    fields = {"sequences": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5), "response_mask": mask}
    fields |= {"loss_mask": mask, "rewards": torch.ones(2, 3), "action_log_probs": -torch.ones(2, 3)}
    batch = {"data": fields, "metadata": {"uids": ["a", "a"]}}
    more: dict[str, Any] = {"another": meant, "optional": ("action_log_probs",), "words": ("sequences",)}
    yield Target("skyrl.register(credit)", call, batch, "data", **more)


class _Data(dict[str, Any]):
    metadata: Any = None


def _skyrl_loss(loss: Callable[..., Any], b: Any, config: Any) -> Any:
    return loss(b.new, b.old, b.advantages, config, b.loss_mask, None)


def _as_skyrl(name: str, b: Any, change: Mutation, result: Any, base: Any) -> bool:
    given = {key: float(x) if type(x) is int else x for key, x in vars(change.value).items()}
    config = SimpleNamespace(**(vars(skyrl_batches.options()) | given))
    loss, _ = skyrl_batches.expected(name, b, config, b.new)
    return not bool(result[0].isfinite()) or close(result[0], loss)


def _of_trees() -> Iterator[Target]:
    def sample(ids: list[int], n: int) -> dict[str, Any]:
        found = {"input_ids": np.array(ids), "completion_mask": np.array([0, 1, 1]), "group_id": "p"}
        return found | {"old_log_probs": np.array([0.0, -1.0, -0.5]), "advantage": 0.5 * n}

    row = SimpleNamespace(samples=[sample([1, 2, 3], 0), sample([1, 2, 4], 1)])

    def call(x: Any) -> Any:
        return tree_rollouts(x)[1:]

    yield Target("trl.tree_rollouts", call, row, "row", another=meant, words=("samples", "sample"))
    packed = {name: torch.zeros(1, 4, dtype=torch.int64) for name in ("tokens", "parent_ids")}
    packed |= {"group_ids": torch.tensor([[0, 0, 1, 1]]), "assistant_mask": torch.tensor([[False, False, True, True]])}
    packed |= {name: -torch.ones(1, 4) for name in ("logprobs", "advantages")} | {"weights": torch.ones(1, 4)}

    def call(x: Any) -> Any:
        return art.tree_rollouts(x, 0)[1:]

    yield Target(
        "art.tree_rollouts",
        call,
        packed | {"pixel_values": [None]},
        "packed",
        another=meant,
        words=("assistant_mask",),
        optional=("pixel_values",),
    )


def _of_verl() -> Iterator[Target]:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1.0]]) > 0
    columns: dict[str, Any] = {
        "turn_scores": [[1.0, 0.5], [0.0, 1.0]],
        "tool_rewards": [[1.0], [0.5]],
        "tone": [1.0, 2.0],
    }
    columns |= {"well_formed": [True, False], "spans": [{"own": [(0, 1)]}, {"own": [(1, 2), (2, 3)]}]}
    columns["span_rewards"] = [{"own": [1.0]}, {"own": [0.5, 0.25]}]
    rest = {"tokens": torch.arange(12).view(2, 6), "real": torch.ones(2, 6) > 0, "written": mask, "learns": mask}
    rest |= {"rewards": torch.tensor([1.0, 0.0]), "logprobs": {"old_log_probs": -torch.ones(2, 4)}}
    rest |= {"sessions": [("a", 0), ("b", 0)], "counted": [True, True], "teacher": None, "tokenizer": None}

    def call(columns: Any) -> Any:
        found = rollouts_of(Pack(Rows(**rest, columns=columns)), ["p", "p"], {"span_rewards:turn"})
        return found.rewards, found.span_rewards, found.flags

    names = tuple(columns)
    yield Target("verl.register(credit)", call, columns, "columns", another=_column, optional=names)


def _option(change: Mutation) -> bool:
    """Also none of them, and a word that another option has."""
    return (isinstance(change.after, dict) and not change.after) or meant(change)


NAMES = ("name", "group_id", "uids")  # that may be any text
MISSING = ("tone", "late", "score", "turn_scores", "tool_rewards", "own")  # that NaN says is not known


def meant(change: Mutation) -> bool:
    """Whether a host may mean it: a number for a number or a flag, a tensor of numbers of the same shape, a name, more
    or fewer parts of a list."""
    before, after, name = change.before, change.after, change.names[-1] if change.names else ""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and before.device == after.device and not after.is_complex()
    if name in ("rewards", "metrics", "logprobs") and after in ((), {}):
        return True
    if isinstance(after, (str, int)) and name in NAMES:
        return True
    if isinstance(after, (list, tuple)) and isinstance(before, list) and before:
        return all(type(x) is type(before[0]) and not isinstance(x, (int, float)) for x in after)
    number = isinstance(after, (int, float)) and (abs(after) < 1e38 or (after != after and name in MISSING))
    return change.is_number_for_number or (number and (before is None or isinstance(before, (bool, float))))


def _column(change: Mutation) -> bool:
    """What else a column may hold: of any kind where nothing reads it as spans, and arrays of numbers."""
    is_plain = change.names[:1] in (("tone",), ("well_formed",))
    is_plain = (is_plain and len(change.path) == 2) or (
        is_plain and isinstance(change.after, list) and bool(change.after)
    )
    rewards = change.names[:1] == ("span_rewards",)  # of which some may not be known
    same_length = isinstance(change.after, list) and isinstance(change.before, list)
    same_length = same_length and len(change.after) == len(change.before)
    is_plain = is_plain or (rewards and (change.after is None or same_length))
    array = isinstance(change.after, np.ndarray) and isinstance(change.before, list)
    of_spans = change.names[:1] in (("turn_scores",), ("tool_rewards",))  # without a credit that needs them
    missing = change.after is None and (of_spans or not isinstance(change.before, (list, int)))
    array = array or (of_spans and isinstance(change.after, list))
    return (isinstance(change.after, dict) and not change.path) or is_plain or array or missing or meant(change)


def _of_slime() -> Iterator[Target]:
    batch, logits = slime_batches.micro_batch(1)
    reducer = slime_batches.reducer(batch, False)
    args = Namespace(**(slime_batches.SLIME | {"use_tis": True, "use_kl_loss": True, "entropy_coef": 0.1}))
    of_batch = partial(_slime_loss, args, logits=logits, reducer=reducer)
    more: dict[str, Any] = {"another": _any, "right": partial(_as_host, partial(_slime_expected, args, logits=logits))}
    yield Target("slime.policy_loss", of_batch, batch, "batch", unread=("opd_reverse_kl",), **more)
    of_args = partial(_slime_loss, batch=batch, logits=logits, reducer=reducer)
    more["right"] = partial(_as_host, partial(_slime_expected, batch=batch, logits=logits))
    yield Target("slime.policy_loss", of_args, args, "args", unread=("get_mismatch_metrics", "opsm_delta"), **more)
    data, given = rollout_data(list(range(6))), options()
    of_data, of_args = partial(_slime_advantages, given), partial(_slime_advantages, data=data)
    more["right"] = partial(_as_grpo, given)
    yield Target("slime.advantages", of_data, data, "rollout_data", **more)
    more["right"] = lambda change, result, base: _as_grpo(change.value, change, result, base, data)
    yield Target("slime.advantages", of_args, given, "args", **more)


def _slime_loss(args: Any, batch: Any, logits: Tensor, reducer: Any) -> Any:
    try:
        return slime.policy_loss(args, batch, logits, reducer)
    except RuntimeError as error:
        if "neither is loaded" in str(error):  # of a host's function, as documented
            raise ValueError(str(error)) from error
        raise


def _slime_expected(args: Any, batch: Any, logits: Tensor) -> Any:
    batch, args = {"log_probs": None, **batch}, Namespace(**({"eps_clip_c": None} | vars(args)))
    for name, x in vars(args).items():
        setattr(args, name, float(x) if type(x) is int else x)
    args.eps_clip_high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    if batch.get("rollout_mask_sums") is None:
        batch["rollout_mask_sums"] = [x.sum() for x in batch["loss_masks"]]
    return slime_batches.expected(args, batch, logits.double())


def _slime_advantages(args: Any, data: Any) -> Any:
    data = dict(data) if isinstance(data, dict) else data
    slime.advantages(args, data)
    return {name: data[name] for name in ("advantages", "returns", "loss_masks")}


def _as_grpo(args: Any, change: Mutation, result: Any, base: Any, data: Any = None) -> bool:
    """Rewards less their group's mean, over its deviation where that is asked for, on the tokens of the masks."""
    data = change.value if data is None else data
    places = torch.as_tensor(data["partition"])
    rewards = torch.tensor([float(data["raw_reward"][int(x)]) for x in places], dtype=torch.float64)
    for group in places.div(args.n_samples_per_prompt, rounding_mode="floor").unique():
        own = (places.div(args.n_samples_per_prompt, rounding_mode="floor") == group) & ~rewards.isnan()
        centred = rewards[own] - rewards[own].mean()
        rewards[own] = centred / (centred.std() + 1e-6) if args.grpo_std_normalization else centred
    rewards = rewards.nan_to_num(0)  # of who is left out
    expected = [x * (mask != 0) for x, mask in zip(rewards, data["loss_masks"], strict=True)]
    return all(map(close, result["advantages"], expected)) and same(result["advantages"], result["returns"])


def _any(change: Mutation) -> bool:
    return True


def _as_host(theirs: Callable[[Any], Any], change: Mutation, result: Any, base: Any) -> bool:
    """Whether it is what the host's formula makes of it, or says by NaN that it is nothing."""
    if slime_batches.FULLY_MASKED in change.path:
        return same(result, base)
    if not bool(result[0].isfinite()):
        return True
    try:
        loss, metrics = theirs(change.value)
    except Exception:
        return False
    return close(result[0], loss) and all(close(x, metrics[name]) for name, x in result[1].items() if name in metrics)


def close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
