"""verl without what its functions do not need, ragged batches in its format, and a trainer of TRL."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

VERL_NEEDS = ("ray", "ray.actor", "ray.exceptions", "ray.util", "orjson")  # to distribute and to track
TRAINERS_NEED = (  # packages and parts of verl that its trainers hand work to
    *("ray", "orjson", "torchdata", "transfer_queue", "cachetools"),
    *(f"verl.{x}" for x in ("single_controller", "checkpoint_engine", "trainer.distillation", "trainer.ppo.reward")),
    *(f"verl.workers.{x}" for x in ("engine_workers", "rollout", "engine")),
    *(f"verl.experimental.{x}" for x in ("agent_loop", "reward_loop", "teacher_loop")),
    *(f"verl.utils.{x}" for x in ("dataset", "checkpoint", "tracking", "debug", "skip")),
    "verl.trainer.ppo.v1.agent_loop_tq",
)


class _StandIn(types.ModuleType):
    """A module of which every attribute can be imported and none does anything."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


@contextlib.contextmanager
def stand_in_modules(*modules: str) -> Iterator[None]:
    absent = [name for name in modules if find_spec(name.split(".")[0]) is None]
    for name in absent:
        sys.modules[name] = _StandIn(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None, is_package=True)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@pytest.fixture(scope="session")
def stand_ins() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """``with stand_ins("package", "package.module"):`` imports run as if those that are missing were there."""
    return stand_in_modules


@pytest.fixture(scope="session")
def imported_verl() -> ModuleType:
    """``verl.trainer.ppo.core_algos``; what distributes and tracks verl's work need not be installed."""
    if find_spec("verl") is None:
        pytest.skip("verl is not installed")
    with stand_in_modules(*VERL_NEEDS):
        importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
        return importlib.import_module("verl.trainer.ppo.core_algos")


class _StandIns:
    """Finds a stand-in for every module of some packages."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        wanted = any(f"{name}.".startswith(f"{package}.") for package in TRAINERS_NEED)
        return ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(scope="session")
def verl_trainers(imported_verl: ModuleType) -> SimpleNamespace:
    """verl's trainers, of which only what runs on the controller is there: ``legacy``, ``v1``, ``of_v1``, ``separate``.

    They are imported while trajkern's credits are registered, as in a process whose trainer is imported later.
    """
    from trajkern.integrations import verl

    before, finder = set(sys.modules), _StandIns()
    sys.meta_path.insert(0, finder)
    verl.register()
    try:
        modules = ["trainer.ppo.ray_trainer", "trainer.ppo.v1.trainer_base", "trainer.ppo.v1.utils"]
        found = [importlib.import_module(f"verl.{x}") for x in (*modules, "experimental.separation.ray_trainer")]
        held = [vars(x).get("compute_advantage") for x in found], found[1].PPOTrainer._compute_advantage
    finally:
        verl.unregister()
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]
    return SimpleNamespace(
        **dict(zip(("legacy", "v1", "of_v1", "separate"), found, strict=True)), while_registered=held
    )


@pytest.fixture
def core(imported_verl: ModuleType) -> Iterator[ModuleType]:
    """verl's functions with trajkern's registered beside them."""
    from trajkern.integrations import verl

    verl.register()
    yield imported_verl
    verl.unregister()


def make_batch(seed: int, dtype: torch.dtype = torch.float64, *, rows: int = 23, length: int = 19) -> SimpleNamespace:
    """Ragged rows with observations in the middle, an empty row, a lone uid, and uids of several types."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows,), generator=g)
    lengths[4] = 0
    position = torch.arange(length)
    mask = (position < lengths[:, None]) & ((torch.rand(rows, length, generator=g) > 0.2) | (position == 0))
    names = np.array(["a", ("b", 1), 7, "7", 2.5, frozenset({3})], dtype=object)
    choice = torch.randint(0, 5, (rows,), generator=g)
    choice[5] = 5
    rewards = torch.zeros(rows, length, dtype=dtype)
    last = (lengths - 1).clamp_min(0)
    rewards[torch.arange(rows), last] = torch.randint(-4, 5, (rows,), generator=g).to(dtype) / 4
    rewards[4] = 0

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    old = -normal(rows, length).abs() * 2
    return SimpleNamespace(
        rewards=rewards,
        mask=mask,
        uid=names[choice.numpy()],
        old=old,
        new=(old + 0.4 * normal(rows, length)).clamp(max=-1e-3),
        advantages=normal(rows, length),
        values=normal(rows, length),
        weights=(0.5 * normal(rows, length)).exp(),
        baselines=normal(rows),
        sum_pi_squared=torch.rand(rows, length, generator=g).to(dtype),
    )


@pytest.fixture(scope="session")
def padded_batch() -> Callable[..., SimpleNamespace]:
    return make_batch


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory):
    """A GRPOTrainer of TRL's that is training, with a KL term."""
    from tests.integrations.trl_trainers import trainer_of

    trainer = trainer_of(tmp_path_factory.mktemp("grpo"), beta=0.1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what the training loop sets
    return trainer
