"""What the adapters share: the versions they know, patches that can be undone, padded rows read as a pack, and the
losses that TRL and Liger-Kernel name alike."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, fields
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import as_number, check_choice, check_flag, check_tensor, checked_field, renamed
from trajkern.integrations._arguments import NUMBERS, choosing, weighing
from trajkern.integrations._handle import Enabled

_ABSENT = object()
_warned: set[tuple[str, str]] = set()  # packages and versions

# The loss types of TRL, and of Liger-Kernel, which follows it -> how each becomes one number there.
GRPO_AGGREGATES = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "seq_mean_token_sum_norm",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "sapo": "seq_mean_token_mean",
    "luspo": "seq_mean_token_sum",
    "vespo": "token_mean",
}
# what PolicyLoss calls the options of these
_FIELDS = {
    "clip_low": "epsilon_low",
    "clip_high": "epsilon_high",
    "clip_dual": "delta",
    "kl_coef": "beta",
    "ratio_level": "importance_sampling_level",
    "max_length": "max_completion_length",
    "sapo_tau_pos": "sapo_temperature_pos",
    "sapo_tau_neg": "sapo_temperature_neg",
}
_UNCLIPPED = ("cispo", "sapo", "vespo")  # without the clipped ratio, and so without its two-sided bound delta


def check_version(package: str, tested: Sequence[str], any_version: bool) -> None:
    """Raises where ``package`` is missing; warns once of a version that is not ``tested``, but for ``any_version``."""
    any_version = check_flag("any_version", any_version)
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed; trajkern was tested with {', '.join(tested)}") from error
    public = installed.partition("+")[0]  # without what a build of a commit adds
    if public not in tested and not any_version and (package, installed) not in _warned:
        _warned.add((package, installed))
        warnings.warn(
            f"trajkern was tested with {package} {' and '.join(tested)}, not with {installed}: the names and "
            "signatures that it replaces fit there, what they compute was not compared. any_version=True silences this",
            UserWarning,
            stacklevel=3,
        )


def held(owner: Any, name: str) -> Any:
    """What a module or class of a host has by that name; RuntimeError, which names it, where there is none."""
    if not hasattr(owner, name):
        raise RuntimeError(f"{owner.__name__} must have {name}, which trajkern stands in for; this version has none")
    return getattr(owner, name)


def check_signature(
    name: str, theirs: Callable[..., Any], ours: Callable[..., Any], *, unread: Set[str] | None = None
) -> None:
    """RuntimeError where the host's function takes what its stand-in does not, or takes it elsewhere.

    ``unread``: arguments are passed by name, so that their order is free, and these say nothing to the stand-in.
    """
    wanted, known = _parameters(theirs), _parameters(ours)
    fits = wanted == known[: len(wanted)] if unread is None else set(wanted) <= {*known, *unread}
    if not fits:
        raise RuntimeError(
            f"{name} must take ({', '.join(known)}) for trajkern to stand in for it; "
            f"this version takes ({', '.join(wanted)})"
        )


def _parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, without what binds it."""
    found = inspect.signature(function).parameters.values()
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [x.name for x in found if x.kind not in free and x.name not in ("self", "ctx")]


def check_reads(name: str, function: Callable[..., Any], known: Set[str]) -> None:
    """RuntimeError where the source of a host's method reads an option or an input that its stand-in knows nothing of.

    What it reads are attributes of ``self`` and of ``self.args``, and entries of ``inputs``, as ``self.x``, ``args.x``
    and ``inputs.x``. A signature does not say them, and a stand-in that goes without one computes something else.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    if unknown := {x for node in ast.walk(tree) if (x := _read(node))} - known:
        also = ", ".join(sorted(unknown))
        raise RuntimeError(f"{name} must read what trajkern knows; this version also reads {also}")


def _read(node: ast.AST) -> str | None:
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return f"self.{name}"
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="args"), attr=name):
            return f"args.{name}"
        case (
            ast.Subscript(value=ast.Name(id="inputs"), slice=ast.Constant(value=str() as name))
            | ast.Call(
                func=ast.Attribute(value=ast.Name(id="inputs"), attr="get" | "pop"),
                args=[ast.Constant(value=str() as name), *_],
            )
            | ast.Compare(left=ast.Constant(value=str() as name), comparators=[ast.Name(id="inputs")])
        ):
            return f"inputs.{name}"
    return None


class Patches:
    """Entries put into registries, module namespaces and classes, and what stood there before."""

    def __init__(self) -> None:
        self._undone = 0  # how often
        self._replaced: list[tuple[MutableMapping[str, Any] | type, str, Any, Any]] = []

    def put(self, owner: MutableMapping[str, Any] | type, name: str, value: Any) -> None:
        self._replaced.append((owner, name, value, _entries(owner).get(name, _ABSENT)))
        _put(owner, name, value)

    def undo(self) -> None:
        """Restores every entry that is still the one that was put there; twice does nothing."""
        self._undone += 1
        while self._replaced:
            owner, name, value, before = self._replaced.pop()
            if _entries(owner).get(name) is value:
                _put(owner, name, before)

    def enabled(self, host: str, undo: Callable[[], None], also: str = "") -> Enabled:
        """The handle of what stands here now, which ``undo`` takes back; it says what of the host's was replaced."""
        return Enabled.of(f"{host}: {self.described()}{also}", undo, self.standing())

    def standing(self) -> Callable[[], bool]:
        """Whether what stands here now still does."""
        now = self._undone
        return lambda: self._undone == now

    def described(self) -> str:
        """What was replaced, and where."""
        places: dict[str, list[str]] = {}
        for owner, name, *_ in self._replaced:
            where = owner.__qualname__ if isinstance(owner, type) else str(owner.get("__name__"))
            places.setdefault(name, []).append(where)
        return "trajkern stands in for " + "; ".join(f"{name} of {', '.join(found)}" for name, found in places.items())


def _entries(owner: MutableMapping[str, Any] | type) -> Mapping[str, Any]:
    return vars(owner) if isinstance(owner, type) else owner


def _put(owner: MutableMapping[str, Any] | type, name: str, value: Any) -> None:
    if isinstance(owner, type):
        delattr(owner, name) if value is _ABSENT else setattr(owner, name, value)
    elif value is _ABSENT:
        del owner[name]
    else:
        owner[name] = value


def credited_by(spec: Any) -> str:
    """The end of a line: whose the advantages are."""
    return "" if spec is None else f"; advantages by {spec!r:.200}"


class WhenImported:
    """Calls a function with each of some modules as soon as it is loaded, or at once where it already is.

    What stands in a module that loads much, and that most processes never load, can so be replaced in those that do.
    """

    def __init__(self, then: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._then = then

    def start(self) -> None:
        sys.meta_path.insert(0, self)
        for name, then in self._then.items():
            if name in sys.modules:
                then(sys.modules[name])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self._then:
            return None
        others = (x for x in sys.meta_path if x is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                self._then[name](module)

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec

    def stop(self) -> None:
        """From now on nothing is called."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class PaddedRows(NamedTuple):
    """Padded ``[B, L]`` tensors as a pack of B trajectories of L tokens each, of which the mask says who takes part.

    A view: nothing is copied, and no device value is read. A row without a True is an empty trajectory.
    """

    mask: Tensor  # bool [B * L]
    cu_seqlens: Tensor  # [B + 1]
    shape: torch.Size

    def pack(self, name: str, x: Tensor) -> Tensor:
        """``x`` ``[B, L]`` as ``[B * L]``; an error names it as ``name``."""
        check_tensor(name, x, dtypes=NUMBERS, device=self.mask.device)
        if x.shape != self.shape:
            raise ValueError(f"{name} must have the mask's shape {list(self.shape)}, got {list(x.shape)}")
        return x.reshape(-1)

    def pad(self, x: Tensor) -> Tensor:
        """``x`` ``[B * L]`` as ``[B, L]``."""
        return x.view(self.shape)

    def spread(self, x: Tensor) -> Tensor:  # [B]
        """Each row's value on its tokens that take part and 0 elsewhere, ``[B, L]``."""
        return torch.where(self.pad(self.mask), x[:, None], 0)

    def mean(self, x: Tensor) -> Tensor:  # [B, L] or [B * L]
        """The mean over the tokens that take part, 0 where there are none."""
        taken = torch.where(self.mask, x.detach().reshape(-1), 0)
        return taken.sum() / self.mask.sum().clamp_min(1)


def padded_rows(name: str, mask: Tensor, *, weighs: bool = False) -> PaddedRows:
    """The rows of a padded mask ``[B, L]`` of any dtype, nonzero where a token takes part.

    It must choose, with 0 and 1, unless the caller takes what it weighs into account.
    """
    check_tensor(name, mask, dtypes=NUMBERS)
    chosen = weighing(name, mask) != 0 if weighs else choosing(name, mask)
    if mask.ndim != 2:
        raise ValueError(f"{name} must have shape [B, L], got {list(mask.shape)}")
    rows, length = mask.shape
    cu_seqlens = torch.arange(rows + 1, device=mask.device) * length
    return PaddedRows(chosen.reshape(-1), cu_seqlens, mask.shape)


@dataclass(frozen=True)
class GRPOOptions:
    """The options of a loss by the names that TRL's and Liger-Kernel's GRPO have for them."""

    loss_type: str
    importance_sampling_level: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    use_bias_correction_kl: bool
    max_completion_length: int | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "importance_sampling_level", ("token", "sequence"))
        for each in fields(self):  # before PolicyLoss takes None for its own default
            value = getattr(self, each.name)
            if each.type not in ("str", "bool") and not (value is None and "None" in str(each.type)):
                checked_field(self, as_number, each.name)

    @property
    def clips(self) -> bool:
        """Whether the ratio is clipped on both sides."""
        return self.loss_type not in _UNCLIPPED

    def policy_loss(self) -> tk.PolicyLoss:
        """The same loss here; ValueError for a bound that trajkern has not."""
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type 'dr_grpo', got None")
        if self.clips and self.delta is not None and self.delta < 1 + self.epsilon_high:
            raise ValueError(f"delta must be at least 1 + epsilon_high = {1 + self.epsilon_high}, got {self.delta}")
        cispo = self.loss_type == "cispo"
        if cispo and self.epsilon_high < 1:
            raise ValueError(
                f"epsilon_high must be at least 1 for loss_type 'cispo', whose bound it is; got {self.epsilon_high}"
            )
        with renamed(_FIELDS):
            return tk.PolicyLoss(
                self.loss_type,
                ratio_level=self.importance_sampling_level,
                aggregate=GRPO_AGGREGATES[self.loss_type],
                clip_low=1.0 if cispo else self.epsilon_low,
                clip_high=self.epsilon_high - cispo,
                clip_dual=self.delta if self.clips else None,
                max_length=self.max_completion_length,
                kl="k3_corrected" if self.use_bias_correction_kl else "k3",
                kl_coef=self.beta,
                sapo_tau_pos=self.sapo_temperature_pos,
                sapo_tau_neg=self.sapo_temperature_neg,
                vespo_k_pos=self.vespo_k_pos,
                vespo_lambda_pos=self.vespo_lambda_pos,
                vespo_k_neg=self.vespo_k_neg,
                vespo_lambda_neg=self.vespo_lambda_neg,
            )


def clipped(ratio: Tensor, advantages: Tensor, config: tk.PolicyLoss) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient, bool: below its band with a negative advantage, above it with a positive."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
