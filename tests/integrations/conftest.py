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
