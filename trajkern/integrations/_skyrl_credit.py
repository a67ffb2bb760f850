"""What SkyRL's trainer knows where it forms advantages, its whole batch: for credits, and to refuse single steps.

An estimator of SkyRL's registry gets rewards and a mask. :class:`Hook` replaces the trainer's method that calls it, so
that the batch is at hand meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern._checks import describe, renamed
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._values import check_finite
from trajkern.credit import Spec
from trajkern.integrations._adapter import Patches, WhenImported, check_signature, held
from trajkern.integrations._arguments import NUMBERS, choosing
from trajkern.integrations._credit_checks import may_leave_out
from trajkern.integrations._outside import Outside

TRAINER = "skyrl.train.trainer"
GIVEN = {"reward", "texts", "sampler_logprobs", "spans:turn"}
Pair = tuple[Tensor, Tensor]


class Running(NamedTuple):
    """A trainer of SkyRL's that is forming advantages, and its batch."""

    trainer: Any
    data: Any


current: ContextVar[Running | None] = ContextVar("running", default=None)


class Hook:
    """The trainer's ``compute_advantages_and_returns``, which tells who called; in place until :meth:`stop`."""

    def __init__(self, spec: Spec | None) -> None:
        self.spec = spec
        self._patches = Patches()
        self._imports = WhenImported({TRAINER: self._put})
        try:
            self._imports.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._imports.stop()
        self._patches.undo()

    def _put(self, module: ModuleType) -> None:
        owner = held(module, "RayPPOTrainer")
        theirs = held(owner, "compute_advantages_and_returns")
        ours = _telling(theirs)
        check_signature("SkyRL's RayPPOTrainer.compute_advantages_and_returns", theirs, ours)
        self._patches.put(owner, "compute_advantages_and_returns", functools.wraps(theirs)(ours))


def _telling(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def compute_advantages_and_returns(self: Any, data: Any) -> Any:
        token = current.set(Running(self, data))
        try:
            return theirs(self, data)
        finally:
            current.reset(token)

    return compute_advantages_and_returns


def running(name: str) -> Running:
    """Who calls an estimator that must know: RuntimeError where nobody says, ValueError where it is step-wise."""
    found = current.get()
    if found is None:
        raise RuntimeError(
            f"{name} needs more than SkyRL hands to an estimator: trajkern.integrations.skyrl.register() must also run "
            "in the process of the trainer, at the beginning of its entry point"
        )
    if found.trainer.cfg.generator.step_wise_trajectories:
        raise ValueError(
            f"generator.step_wise_trajectories must be False for {name}: of a trajectory its last step alone would get "
            "here, and one number would go to all steps"
        )
    return found


def check_given(spec: Spec) -> None:
    """ValueError where a credit needs what SkyRL's trainer does not have."""
    try:
        spec.check(GIVEN)
    except ValueError as error:
        raise ValueError(f"credit must be one that SkyRL's trainer can feed: {error}") from None


class _Texts(Sequence[str]):
    """What each rollout says behind its prompt, decoded where somebody asks."""

    def __init__(self, decode: Callable[[], list[str]], count: int) -> None:
        self._decode, self._count = functools.cache(decode), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, n: Any) -> Any:
        return self._decode()[n]


def credited(found: Running, name: str, spec: Spec) -> Pair:
    """The advantages of an expression; also narrows the batch's loss mask to who learns."""
    trainer, data = found
    algorithm = trainer.cfg.trainer.algorithm
    _check_options(name, algorithm, data)
    if algorithm.loss_reduction != "token_mean" and may_leave_out(spec):
        _refuse_means(name, algorithm, spec)
    rows = data["response_mask"].shape[0] - data.metadata.get("pad_size", 0)
    rollouts, real = _rollouts(trainer, data, rows)
    result = spec(rollouts)
    advantages, learns = (_of_responses(x, real, data["response_mask"]) for x in (result.advantages, result.mask))
    before = data["loss_mask"] > 0
    if algorithm.loss_reduction != "token_mean" and bool((before & ~learns)[:rows].any()):
        _refuse_means(name, algorithm, spec)
    data["loss_mask"] = torch.where(learns, data["loss_mask"], 0)
    values = torch.stack([x.double() for x in result.metrics.values()]).tolist()
    trainer.all_metrics.update({f"credit/{key}": x for key, x in zip(result.metrics, values, strict=True)})
    return advantages.float(), advantages.float()


def _check_options(name: str, algorithm: Any, data: Any) -> None:
    if algorithm.advantage_batch_normalize:
        raise ValueError(f"algorithm.advantage_batch_normalize must be False for {name}, whose .whiten() does it")
    if not isinstance(data, Mapping) and not hasattr(data, "get"):
        raise TypeError(f"data must be a batch of SkyRL's, got {describe(data)}")
    if data.get("values") is not None:
        raise ValueError(f"trainer.critic.model.path must be None for {name}: a credit has no returns for a critic")
    if not isinstance(data.metadata, Mapping):
        raise TypeError(f"the batch's metadata must be a mapping, got {describe(data.metadata)}")
    if data.metadata.get("uids") is None:
        raise ValueError(f"the batch's metadata must have uids for {name}, which say who shares a prompt; it has none")


def _refuse_means(name: str, algorithm: Any, spec: Spec) -> None:
    raise ValueError(
        f"algorithm.loss_reduction must be 'token_mean' where {name!r} leaves tokens or rollouts out of the loss: "
        f"SkyRL's other means divide by all of them, whoever is left; got {algorithm.loss_reduction!r} and {spec!r}"
    )


def _entries(data: Any) -> dict[str, Tensor]:
    """The tensors of a batch, of one number of rows, those of responses of one shape, on the CPU."""
    given, cpu = Outside("data", data), torch.device("cpu")
    found = {"sequences": given.at("sequences").tensor(dtypes=INTEGERS, ndim=2, device=cpu)}
    found["attention_mask"] = given.at("attention_mask").tensor(found["sequences"].shape, device=cpu)
    found["response_mask"] = given.at("response_mask").tensor(ndim=2, device=cpu)
    rows, length = found["response_mask"].shape
    if rows != len(found["sequences"]) or length > found["sequences"].shape[1]:
        raise ValueError(
            "response_mask must have the rows of sequences and at most their columns, "
            f"{list(found['sequences'].shape)}; got {[rows, length]}"
        )
    for name, dtypes in {"loss_mask": NUMBERS, "rewards": FLOATS}.items():
        found[name] = given.at(name).tensor((rows, length), dtypes, cpu)
    for name in ("action_log_probs", "rollout_logprobs"):
        if (entry := given.get(name)) is not None:
            found[name] = entry.tensor((rows, length), FLOATS, cpu)
    return found


def _rollouts(trainer: Any, data: Any, rows: int) -> tuple[credit.Rollouts, Tensor]:
    """The batch without the rows that only make up the number, and its real tokens, bool ``[rows, W]``."""
    entries = _entries(data)
    uids = Outside("the batch's metadata", data.metadata["uids"], "uids").values()
    if len(uids) != len(entries["sequences"]) or not 0 <= rows <= len(uids):
        raise ValueError(f"uids must have one for each of the {len(entries['sequences'])} rows, got {len(uids)}")
    if wrong := [x for x in uids if not isinstance(x, (str, int))]:
        raise TypeError(f"uids must be texts or ints, got {describe(wrong[0])}")
    tokens, real = entries["sequences"][:rows], choosing("attention_mask", entries["attention_mask"][:rows])
    width = tokens.shape[1] - entries["response_mask"].shape[1]

    def behind_prompts(x: Tensor) -> Tensor:  # [B, L]
        return torch.nn.functional.pad(x[:rows], (width, 0))

    numbers: dict[Any, int] = {}
    ids = [numbers.setdefault(uid, len(numbers)) for uid in uids[:rows]]
    names = {"old_logprobs": "action_log_probs", "sampler_logprobs": "rollout_logprobs"}
    with renamed(names):
        batch = tk.PackedBatch.from_padded(
            tokens,
            real,
            loss_mask=choosing("loss_mask", behind_prompts(entries["loss_mask"])),
            group_ids=torch.tensor(ids, dtype=torch.int64, device="cpu"),
            **{ours: behind_prompts(entries[theirs]) for ours, theirs in names.items() if theirs in entries},
        )

    def decoded() -> list[str]:
        responses = choosing("response_mask", behind_prompts(entries["response_mask"]))
        said = [row[kept].tolist() for row, kept in zip(tokens, responses, strict=True)]
        return trainer.tokenizer.batch_decode(said, skip_special_tokens=True)

    rewards = {"reward": entries["rewards"][:rows].sum(-1).float()}
    check_finite("rewards", rewards["reward"], ~rewards["reward"].isnan())  # NaN leaves a rollout out
    return credit.Rollouts(batch, rewards=rewards, texts=_Texts(decoded, rows)), real


def _of_responses(x: Tensor, real: Tensor, response_mask: Tensor) -> Tensor:  # [T]
    """Of each token of the responses ``[B, L]``, 0 elsewhere and in the rows that follow the real ones."""
    rows, width = real.shape
    flat = x.new_zeros(real.shape).masked_scatter(real, x)[:, width - response_mask.shape[1] :]
    return torch.nn.functional.pad(flat, (0, 0, 0, response_mask.shape[0] - rows))
