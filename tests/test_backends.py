"""use_backend and backends: unknown, missing and unsuitable backends, and what to install."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from types import SimpleNamespace

import pytest
import torch

import trajkern as tk
from trajkern import _backends, _ext, cli
from trajkern._native import _args

TOKENS, CU_SEQLENS = torch.zeros(4), torch.tensor([0, 4])
ARGUMENTS = {
    "token_logprobs": {"logits": torch.zeros(2, 5), "targets": torch.zeros(2, dtype=torch.int64)},
    "group_advantages": {"rewards": torch.ones(2), "group_ids": torch.zeros(2, dtype=torch.int64)},
    "gae": {"rewards": TOKENS, "values": TOKENS, "cu_seqlens": CU_SEQLENS},
    "policy_loss": {
        "logprobs": TOKENS,
        "old_logprobs": TOKENS,
        "advantages": torch.ones(1),
        "cu_seqlens": CU_SEQLENS,
        "config": tk.PolicyLoss(),
    },
}


@pytest.mark.parametrize("name", ["gpu", "", None, "Native"])
def test_unknown_name(name) -> None:
    expected = rf"name must be one of 'reference', 'native', 'triton', 'cuda'; got {name!r}"
    with pytest.raises(ValueError, match=expected), tk.use_backend(name):
        pass


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("native", r"pip install \.` with a C\+\+17 compiler"),
        ("cuda", r"install nvcc, then `TRAJKERN_CUDA=1 pip install \.`"),
    ],
)
def test_not_built(monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
    monkeypatch.setattr(_ext, "problem", lambda module: f"No module named 'trajkern.{module}'")
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: .*No module named.*{advice}"):
        with tk.use_backend(name):
            pass
    assert re.search(advice, tk.backends()[name])


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend 'triton' is not available: .*`pip install triton`"):
        with tk.use_backend("triton"):
            pass


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_ext, "problem", lambda module: None)
    monkeypatch.setattr(_backends, "_has_triton", lambda: True)
    monkeypatch.setattr(_backends, "_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: no CUDA device"):
        with tk.use_backend(name):
            pass


@pytest.mark.parametrize(
    "version, asked", [(None, "a CUDA build of torch on a machine"), ("13.0", "it takes a machine")]
)
def test_no_gpu_beside_a_cuda_build_of_torch(version: str | None, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_ext, "problem", lambda module: None)
    assert asked in tk.backends()["cuda"]


@pytest.mark.parametrize(
    ("name", "function", "text"),
    [
        ("triton", "token_logprobs", r"backend 'triton' runs on cuda tensors, got cpu tensors"),
        ("cuda", "group_advantages", r"backend 'cuda' runs on cuda tensors, got cpu tensors"),
        ("cuda", "policy_loss", r"backend 'cuda' has no policy_loss kernels; it is one of .*'native', 'triton'"),
        ("triton", "gae", r"backend 'triton' has no advantage kernels; it is one of .*'cuda', 'native'"),
    ],
)
def test_wrong_for_the_tensors(monkeypatch: pytest.MonkeyPatch, name: str, function: str, text: str) -> None:
    monkeypatch.setattr(_backends, "_unavailable", lambda name: None)
    monkeypatch.setattr(_backends, "_interpreted", lambda: False)
    with tk.use_backend(name), pytest.raises(RuntimeError, match=text):
        getattr(tk, function)(**ARGUMENTS[function])


def test_the_choice_ends_with_the_block() -> None:
    before = _backends.asked()
    with pytest.raises(KeyError), tk.use_backend("reference"):
        with tk.use_backend("reference"):
            pass
        assert _backends.asked() == "reference"
        raise KeyError
    assert _backends.asked() is before


def _opened(name: str) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(tk.use_backend(name))
    return stack


def test_blocks_that_overlap() -> None:
    """Left in the order of their entry, each takes its own choice with it."""
    before = _backends.asked()
    first, second, third = (_opened(name) for name in ("reference", "native", "reference"))
    found = [_backends.asked()]
    for block in (first, third, second):
        block.close()
        found.append(_backends.asked())
    assert found == ["reference", "reference", "native", before]


def test_every_thread_has_its_own_choice() -> None:
    meeting, found = threading.Barrier(3, timeout=20), dict[str, list[bool]]()
    x = torch.zeros(2)

    def work(name: str) -> None:
        with tk.use_backend(name) if name else contextlib.nullcontext():
            found[name] = []
            for _ in range(50):
                meeting.wait()
                found[name].append(_backends.wants_reference("span", x))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "native", "")]
    with tk.use_backend("reference"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {"reference": [True] * 50, "native": [False] * 50, "": [False] * 50}


def test_a_task_has_the_choice_of_the_block_that_started_it_until_that_is_left() -> None:
    async def ask(turns: list[asyncio.Event]) -> list[str | None]:
        found = [_backends.asked()]
        for turn in turns:
            await turn.wait()
            found.append(_backends.asked())
        return found

    async def both() -> tuple[list[str | None], list[str | None]]:
        inside, left = asyncio.Event(), asyncio.Event()
        outer = asyncio.create_task(ask([inside, left]))
        with tk.use_backend("reference"):
            inner = asyncio.create_task(ask([inside, left]))
            inside.set()
            await asyncio.sleep(0.01)
        left.set()
        return await outer, await inner

    before = _backends.asked()
    assert asyncio.run(both()) == ([before] * 3, ["reference", "reference", before])


def test_a_block_that_another_thread_leaves() -> None:
    before, block = _backends.asked(), _opened("reference")
    leaving = threading.Thread(target=block.close)
    leaving.start()
    leaving.join()
    assert _backends.asked() is before


def _gpu(monkeypatch: pytest.MonkeyPatch, hip: str | None, **properties: object) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(_backends, "_has_triton", lambda: True)
    monkeypatch.setattr(_ext, "problem", lambda module: None)


def test_what_a_rocm_machine_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's families; what is CUDA C++ runs as the reference, whatever was built."""
    _gpu(monkeypatch, "7.0", name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", warp_size=64)
    assert tk.backends()["triton"] == "available" and "ROCm" in tk.backends()["cuda"]
    on_gpu = SimpleNamespace(is_cpu=False, device=torch.device("cuda"))
    runs = {family: _backends.wants_reference(family, on_gpu) for family in _backends.OWNERS}
    assert {family for family, reference in runs.items() if reference} == {"advantage", "span", "tree"}
    report = "\n".join(cli.report())
    assert "on an AMD GPU" in report and "reference, not yet run on a GPU" in report and "gfx950" in report
    assert max(map(len, report.splitlines())) <= cli.WIDTH


@pytest.mark.parametrize(
    ("hip", "properties", "says"),
    [
        ("7.0", {"name": "AMD Radeon VII", "gcnArchName": "gfx906:sramecc-"}, "one of gfx942, gfx950.* VII is gfx906"),
        (
            None,
            {"name": "Tesla V100", "major": 7, "minor": 0},
            "8.0 or more, and Tesla V100 has compute capability 7.0",
        ),
    ],
)
def test_a_gpu_that_no_kernel_is_made_for(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, properties: dict[str, object], says: str
) -> None:
    _gpu(monkeypatch, hip, **properties)
    assert re.search(says, tk.backends()["triton"])
    with pytest.raises(RuntimeError, match=f"logprob: .*{says}.*use_backend"):
        _backends._kernels.__wrapped__("logprob", "cuda", None)


def test_a_build_without_the_gpu_s_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def gae(*args: object) -> None:
        raise RuntimeError("CUDA: no kernel image is available for execution on the device")

    monkeypatch.setattr(_ext, "cuda", lambda: SimpleNamespace(gae=gae))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX")
    with pytest.raises(RuntimeError, match="no kernels for NVIDIA RTX, compute capability 12.0: .*TRAJKERN_CUDA=120"):
        _args.call("gae", torch.empty(3, device="meta"))
