"""SkyRL (0.3.0): trajkern's estimators, policy losses and credits under names of its registries::

    from trajkern.integrations import skyrl
    skyrl.register()       # trainer.algorithm.policy_loss_type=trajkern_regular, advantage_estimator=trajkern_grpo, ...
    skyrl.register(credit=credit.outcome().gate(finished))    # advantage_estimator=trajkern_credit

SkyRL carries what is registered to its Ray workers by itself. Losses and gradients are SkyRL's to rounding, and the
exceptions are written at the functions. ``[B, L]`` tensors are read in place as B trajectories of L tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import trajkern.integrations._skyrl_credit as _credit
from trajkern._checks import suggesting
from trajkern.credit import Spec
from trajkern.integrations import _skyrl_advantages
from trajkern.integrations._adapter import check_signature, check_version, credited_by, held
from trajkern.integrations._credit_checks import spec_of
from trajkern.integrations._handle import Registered
from trajkern.integrations._skyrl_losses import LOSSES

TESTED = ("0.3.0",)
PREFIX = "trajkern_"
CORE = "skyrl.backends.skyrl_train.utils.ppo_utils"
_hooks: list[_credit.Hook] = []
_names: list[tuple[Any, str]] = []  # registries and what was put there


@suggesting
def register(*, credit: Spec | str | None = None, any_version: bool = False) -> Registered:
    """Registers estimators and policy losses with SkyRL as ``trajkern_<name>``, and a credit as ``trajkern_credit``.

    Call it where SkyRL's configuration is checked, before ``initialize_ray``: its registries then carry the names to
    every worker. ``trajkern_gae``, ``trajkern_reinforce++`` and ``trajkern_credit`` need the trainer's whole batch, and
    ask that it runs once more in the trainer's process, at the beginning of its entry point.

    Args:
        credit: an expression of :mod:`trajkern.credit`, or its "package.module:name". It finds "reward", the row's
            rewards added up; the spans "turn", runs of the loss mask; the texts of the responses; and a directive
            nothing, as SkyRL has no teacher. Its advantages become ``advantages`` and ``returns``, its mask
            ``loss_mask``.
        any_version: do not warn of a SkyRL that this was not tested with.

    Returns:
        (estimators, losses): the names registered; also a handle, whose ``disable()``, or the end of whose ``with``
        block, takes them back in this process. A second call undoes the first.

    Raises:
        ImportError: SkyRL is missing.
        RuntimeError: a version of it that lacks one of these functions, or where one takes something else; of the
            trainer's it is raised when that is imported.
        TypeError, ValueError: a credit that is none, or one that needs what SkyRL's trainer does not have. What only a
            batch can tell is refused at the first one: step-wise trajectories, a critic, ``advantage_batch_normalize``,
            and rollouts left out of the loss in any ``loss_reduction`` but "token_mean".
    """
    check_version("skyrl", TESTED, any_version)
    core = importlib.import_module(CORE)
    spec = None if credit is None else spec_of("credit", credit)
    if spec is not None:
        _credit.check_given(spec)
    unregister()
    of_advantages, of_losses = held(core, "AdvantageEstimatorRegistry"), held(core, "PolicyLossRegistry")
    estimators = ESTIMATORS | ({} if spec is None else {"credit": by_credit})
    offered = [(estimators, of_advantages), (LOSSES, of_losses)]
    for functions, registry in offered:
        theirs = held(registry, "_functions")
        for name in functions.keys() & theirs.keys():
            check_signature(f"SkyRL's {name}", theirs[name], functions[name])
    _hooks.append(_credit.Hook(spec))
    for functions, registry in offered:
        for name, function in functions.items():
            if PREFIX + name in registry._functions:  # what another process has registered
                registry.unregister(PREFIX + name)
            registry.register(PREFIX + name, function)
            _names.append((registry, PREFIX + name))
    names, hook = ([PREFIX + name for name in estimators], [PREFIX + name for name in LOSSES]), _hooks[-1]
    said = f"SkyRL: {len(names[0])} estimators and {len(names[1])} policy losses are registered as {PREFIX}NAME"
    return Registered.of(said + credited_by(spec), unregister, lambda: hook in _hooks, *names)


def unregister() -> None:
    """Takes back what :func:`register` did in this process; twice does nothing."""
    while _hooks:
        _hooks.pop().stop()
    while _names:
        registry, name = _names.pop()
        if name in registry._functions:
            registry.unregister(name)


def gae(token_level_rewards, values, response_mask, gamma, lambd, **more: Any) -> _credit.Pair:
    _credit.running("trajkern_gae")
    return _skyrl_advantages.gae(token_level_rewards, values, response_mask, gamma, lambd, **more)


def reinforce_plus_plus(token_level_rewards, response_mask, gamma, **more: Any) -> _credit.Pair:
    _credit.running("trajkern_reinforce++")
    return _skyrl_advantages.reinforce_plus_plus(token_level_rewards, response_mask, gamma, **more)


def by_credit(**_: Any) -> _credit.Pair:
    """The expression that :func:`register` was given, of the batch of the trainer that is forming advantages."""
    name = PREFIX + "credit"
    found = _credit.running(name)
    spec = next((hook.spec for hook in _hooks), None)
    if spec is None:
        raise RuntimeError(f"{name} is not known here: skyrl.register(credit=...) must run in the trainer's process")
    return _credit.credited(found, name, spec)


gae.__doc__, reinforce_plus_plus.__doc__ = _skyrl_advantages.gae.__doc__, _skyrl_advantages.reinforce_plus_plus.__doc__
ESTIMATORS: dict[str, Callable[..., Any]] = {
    "grpo": _skyrl_advantages.grpo,
    "gae": gae,
    "rloo": _skyrl_advantages.rloo,
    "reinforce++": reinforce_plus_plus,
    "maxrl": _skyrl_advantages.maxrl,
}
