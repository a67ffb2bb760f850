"""verl (0.9.1): trajkern's estimators, policy losses and fused head in a trainer that already runs::

    from trajkern.integrations import verl
    verl.register()        # algorithm.adv_estimator=trajkern_grpo, actor.policy_loss.loss_mode=trajkern_vanilla, ...
    verl.enable_head()     # actor_rollout_ref.model.use_fused_kernels=True now runs trajkern's head
    verl.register(credit=credit.outcome().gate("well_formed"))    # algorithm.adv_estimator=trajkern_credit

Both must run in every process that looks a name up: put the lines into a module of yours and name it in the environment
variable ``VERL_USE_EXTERNAL_MODULES``, which verl imports wherever it is imported. Losses and gradients are verl's to
rounding, and the exceptions are written at the functions. ``[B, L]`` tensors are read in place as B trajectories of L
tokens under ``response_mask``; as in verl, a row without an unmasked token is not counted.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_choice, check_flag, check_process_group, check_tensor, renamed, suggesting
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern.credit import PRESETS, Spec
from trajkern.integrations import _verl_advantages, _verl_credit
from trajkern.integrations._adapter import Enabled, Patches, check_signature, check_version, credited_by, held
from trajkern.integrations._credit_checks import spec_of
from trajkern.integrations._handle import Registered
from trajkern.integrations._verl_losses import LOSSES
from trajkern.integrations._wrapped import autocasted

TESTED = ("0.9.1",)
PREFIX = "trajkern_"
UNREAD = {"alpha", "config", "epsilon", "norm_adv_by_std_in_grpo"}  # what estimators of verl's take and do not read
HEAD = "verl.utils.kernel.linear_cross_entropy"
TORCH_HEAD = "verl.utils.experimental.torch_functional"
FSDP_MESH = {"ddp", "fsdp"}  # what verl calls the dimensions of its FSDP engines' ranks
HEAD_USERS = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")

_registered, _head = Patches(), Patches()
_hooks: list[_verl_credit.Hooks] = []


@suggesting
def register(*, credit: Spec | str | None = None, replace: bool = False, any_version: bool = False) -> Registered:
    """Registers every estimator and policy loss with verl as ``trajkern_<name>``, and the credits that it can feed.

    A credit is computed where verl's trainers form advantages, of the whole batch (``docs/verl.md`` says what it finds
    there); its advantages become verl's ``advantages`` and ``returns``, its mask ``response_mask`` and ``loss_mask``.

    Args:
        credit: an expression of :mod:`trajkern.credit`, or its "package.module:name", as ``trajkern_credit``. The
            trainer's ``algorithm.adv_estimator`` must then be that name. The systems of ``credit.PRESETS`` that need
            nothing else than verl has, with their default settings, always have the names ``trajkern_<name>``; but
            "grpo" is verl's estimator of that name.
        replace: also put them in the place of verl's own functions of the same names, so that no configuration changes.
            verl gives ``values``, ``sum_pi_squared`` and the rewards of ``gdpo`` to its own names only, so ``gae``,
            ``optimal_token_baseline``, ``tir_optimal_token_baseline`` and ``gdpo`` can be used in this way alone
            (``trajkern_gdpo`` sees one reward, the sum).
        any_version: do not warn of a verl that this was not tested with.

    Returns:
        (estimators, losses): the names registered; also a handle, whose ``disable()``, or the end of whose ``with``
        block, takes them back. A second call undoes the first.

    Raises:
        ImportError: verl is missing.
        RuntimeError: a version of it that lacks one of these functions, or where one takes something else; of the
            trainers' it is raised when they are imported.
        TypeError, ValueError: a credit that is none, or one that needs what verl does not have: a model that scores, a
            tree, logits. What only a batch can tell is refused at the first one.
    """
    check_version("verl", TESTED, any_version)
    replace = check_flag("replace", replace)
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    specs, required = _credits(credit)
    unregister()
    unfed = {name: _verl_credit.not_reached(PREFIX + name) for name in specs}
    estimators = unfed | _verl_advantages.VERL | _verl_advantages.OWN
    of_advantages, of_losses = held(core, "ADV_ESTIMATOR_REGISTRY"), held(core, "POLICY_LOSS_REGISTRY")
    kinds = (estimators, of_advantages, UNREAD), (LOSSES, of_losses, None)
    for functions, registry, unread in kinds:
        for name in functions.keys() & registry.keys():
            check_signature(f"verl's {name}", registry[name], functions[name], unread=unread)
    _hooks.append(_verl_credit.Hooks({PREFIX + name: spec for name, spec in specs.items()}, required))
    for functions, registry, _ in kinds:
        for name, function in functions.items():
            _registered.put(registry, PREFIX + name, function)
            if replace and name in registry:
                _registered.put(registry, name, function)
    if replace:  # verl calls these two by their function names
        _registered.put(vars(core), "compute_gae_advantage_return", _verl_advantages.gae)
        _registered.put(vars(core), "compute_grpo_outcome_advantage", _verl_advantages.grpo)
    names = [PREFIX + name for name in estimators], [PREFIX + name for name in LOSSES]
    said = f"verl: {len(names[0])} estimators and {len(names[1])} policy losses are registered as {PREFIX}NAME"
    said += ", and stand in for verl's own of the same names" if replace else ""
    return Registered.of(said + credited_by(specs.get("credit")), unregister, _registered.standing(), *names)


def unregister() -> None:
    """Takes back what :func:`register` did; twice does nothing."""
    while _hooks:
        _hooks.pop().stop()
    _registered.undo()


def _credits(credit: Spec | str | None) -> tuple[dict[str, Spec], str | None]:
    """The credits by their names, and the one that a trainer must have chosen."""
    specs = {name: preset() for name, preset in PRESETS.items() if name not in _verl_advantages.VERL}
    specs = {name: spec for name, spec in specs.items() if not spec.needs & _verl_credit.NOT_GIVEN.keys()}
    if credit is None:
        return specs, None
    spec = spec_of("credit", credit)
    _verl_credit.check_given(spec)
    return specs | {"credit": spec}, PREFIX + "credit"


@suggesting
def enable_head(*, any_version: bool = False) -> Enabled:
    """Puts :func:`linear_cross_entropy` in the place of verl's, and under its ``FusedLinearForPPO``.

    These are the two heads of ``model.use_fused_kernels=True``: ``fused_kernel_options.impl_backend`` triton, and torch
    or liger. A second call undoes the first.

    Returns:
        The handle, a context manager: ``disable()``, or the end of its block, takes this back.

    Raises:
        ImportError: verl is missing.
        RuntimeError: a version of it that lacks what this replaces, or where that takes something else. Another than
            the tested versions is warned of, unless ``any_version`` is True.
    """
    check_version("verl", TESTED, any_version)
    disable_head()
    head, torch_head = importlib.import_module(HEAD), importlib.import_module(TORCH_HEAD)
    check_signature("verl's linear_cross_entropy", held(head, "linear_cross_entropy"), linear_cross_entropy)
    theirs = held(torch_head, "FusedLinearForPPO")
    check_signature("verl's FusedLinearForPPO", theirs.__init__, FusedLinearForPPO.__init__)
    check_signature("verl's FusedLinearForPPO.forward", theirs.forward, FusedLinearForPPO.forward)
    _head.put(vars(head), "linear_cross_entropy", linear_cross_entropy)
    _head.put(vars(torch_head), "FusedLinearForPPO", FusedLinearForPPO)
    for name in HEAD_USERS:  # these hold the name from their import on
        if name in sys.modules:
            _head.put(vars(sys.modules[name]), "linear_cross_entropy", linear_cross_entropy)
    return _head.enabled("verl", disable_head)


def disable_head() -> None:
    """Takes back what :func:`enable_head` did; twice does nothing."""
    _head.undo()


class _PartOfGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return grad / ctx.parts, None


def _gathered(weight: Tensor) -> Tensor:
    """The whole of a head that verl's FSDP2 engine has sharded; there its gradient is the mean of the ranks'.

    verl hands over ``lm_head.weight`` outside of the head's own forward, in which FSDP2 would gather it.
    """
    kinds = sys.modules.get("torch.distributed.tensor")
    if kinds is None or not isinstance(weight, kinds.DTensor):
        return weight
    mesh = weight.device_mesh
    if not set(mesh.mesh_dim_names or ("",)) <= FSDP_MESH:
        return weight  # of another parallelism, which the head refuses
    whole = weight.full_tensor(grad_placements=[kinds.Partial()] * mesh.ndim)
    return _PartOfGradient.apply(whole, mesh.size())


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of that name: (log-probs, entropy) of the labels, each ``[P]`` float32; logits are never stored.

    With a group of n ranks ``weight`` is this rank's rows of the vocabulary. As with verl's, the ranks' gradients of
    ``hidden`` have to be summed by what comes before (Megatron's sequence parallelism does); here they are equal parts.
    A gradient of the entropy that nobody asks for costs nothing. ``reduction`` must be "none". Under autocast the
    product is autocast's, as verl's own is. A weight that verl's FSDP2 engine has sharded is gathered, for forward and
    backward, and its gradient averaged over the ranks as FSDP2 does; verl's own torch head fails there.
    """
    reduction = check_choice("reduction", reduction, ("none",))  # the one that verl asks for
    check_tensor("hidden", hidden, dtypes=FLOATS)
    check_tensor("labels", labels, dtypes=INTEGERS, device=hidden.device)
    check_process_group("dist_process_group", dist_process_group)
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels must have shape {list(hidden.shape[:-1])}, one a row; got {list(labels.shape)}")
    hidden, weight = autocasted(hidden.reshape(labels.numel(), hidden.shape[-1]), _gathered(weight))
    group = dist_process_group
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if ranks > 1:
        hidden = _PartOfGradient.apply(hidden, ranks)
    with renamed({"targets": "labels"}):
        stats = tk.linear_token_stats(
            hidden, weight, labels.reshape(-1), temperature=temperature, process_group=group if ranks > 1 else None
        )
    assert stats.entropy is not None
    return stats.logprobs, stats.entropy


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of that name; ``chunk_size`` and ``impl_backend`` choose among verl's own ways and change nothing.

    Log-probs and entropy have the shape of ``input_ids`` and are float32, where verl's torch way rounds the entropy to
    the hidden states' dtype, and the logits before it.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be 'torch' or 'liger', got {impl_backend!r}")

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        out = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return out[0].view(input_ids.shape), out[1].view(input_ids.shape)
