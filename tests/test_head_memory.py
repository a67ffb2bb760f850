"""What a head and its loss hold at once is what the formulas of `trajkern bench --memory` say.

On meta tensors of the models' own sizes, where every allocation is seen and nothing is computed, as a GPU's launchers
make them; by resident memory at small sizes; and in the committed results.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trajkern as tk
from tests.device_watch import watched
from trajkern._bench import head_memory, memory_run
from trajkern._bench.head import logprobs, loss_problem
from trajkern._bench.head_memory import FORMS, GPUS, MODELS, Sizes, longest, whole
from trajkern._bench.memory import give_back, peak_bytes
from trajkern._bench.readme import PAGE, ROOT

SHOWN = (9000, 1024, 16_384)  # tokens of each model's batch
RESULTS = ROOT / "bench" / "results" / "memory-epyc-2-cores.json"


class Held(TorchDispatchMode):
    """The most bytes of storages that are alive at once, without those of ``inputs``."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_local_scalar_dense":
            return 1.0
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.inputs:
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return logprobs(hidden, weight, targets)["logprobs"].sum()


def _trajkern(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    count = len(targets)
    cu_seqlens = torch.empty(9, dtype=torch.int64, device="meta")
    old, advantages = torch.empty(count, device="meta"), torch.empty(8, device="meta")
    return tk.linear_policy_loss(
        hidden, weight, targets, old, advantages, cu_seqlens, config=tk.PolicyLoss("grpo"), per_token=False
    )[0]


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    columns = head_memory.TRL_COLUMNS
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, columns, None, 1.0, ())[0].sum()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=False)
    ids = targets.view(8, -1)
    states, old = hidden.view(8, -1, hidden.shape[1]), torch.empty(ids.shape, device="meta")
    return loss(states, weight, ids, torch.ones_like(ids), torch.empty(8, device="meta"), old_per_token_logps=old)[0]


def _triton_of_trl(patch: pytest.MonkeyPatch) -> None:
    """Its kernels write into what they are given, and its products add up in float32 without a copy."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        patch.setattr(chunked, name, lambda *_, **__: None)
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta tensors


@pytest.mark.parametrize(
    ("form", "model", "tokens"),
    [
        *((form, model, n) for form in ("eager", "trajkern") for model, n in zip(MODELS, SHOWN, strict=True)),
        *(pytest.param("trl", model, n, marks=pytest.mark.slow) for model, n in zip(MODELS, SHOWN, strict=True)),
        pytest.param("liger", "Qwen3-8B", 16_384, marks=pytest.mark.slow),
    ],
)
def test_what_is_held_on_a_gpu(form: str, model: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "trl":
        _triton_of_trl(monkeypatch)
    if form == "liger":
        pytest.importorskip("liger_kernel")
    call: Callable[..., Tensor] = globals()[f"_{form}"]
    _, width, vocabulary = MODELS[model]
    like = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    hidden, weight = torch.empty(tokens, width, **like), torch.empty(vocabulary, width, **like)
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Held(hidden, weight) as held, watched() if form == "trajkern" else contextlib.nullcontext():
        torch.autograd.grad(call(hidden, weight, targets), [hidden, weight])
    predicted = FORMS[form](Sizes(tokens, width, vocabulary))
    assert held.peak == pytest.approx(predicted, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("form", ["eager", "trajkern"])
def test_what_is_held_on_a_cpu(form: str) -> None:
    sizes = Sizes(1024, 64, 16_384, 4, host=True)
    step = loss_problem(1024, 64, 16_384, torch.float32)("cpu").step(form)
    step()
    give_back()
    assert peak_bytes(step, "cpu") == pytest.approx(FORMS[form](sizes), rel=0.1)


def test_by_hand() -> None:
    qwen = Sizes(1024, 4096, 151_936)
    assert FORMS["eager"](qwen) == 12 * 1024 * 151_936
    assert FORMS["eager"](Sizes(8, 4096, 151_936)) == 2 * 8 * 151_936 + 2 * 4096 * (8 + 151_936)
    # a block of all rows: logits in float32; both gradients in bfloat16; the block's states, and their gradient
    assert FORMS["trajkern"](qwen) == 4 * 1024 * 151_936 + 2 * 4096 * (151_936 + 1024) + 6 * 1024 * 4096
    # blocks of 3,000 rows: d weight in float32, and cast
    blocks = FORMS["trajkern"](Sizes(9000, 4096, 151_936))
    assert blocks == 4 * 3000 * 151_936 + 6 * 4096 * 151_936 + 2 * 4096 * (9000 + 3000)
    tile = 2 * 4096 * 32_768
    assert FORMS["trl"](Sizes(8192, 4096, 151_936)) == 6 * 4096 * (8192 + 151_936) + tile
    assert whole("eager", MODELS["Qwen3-8B"], 1024) == 2 * 4096 * (151_936 + 37 * 1024) + 12 * 1024 * 151_936


@pytest.mark.parametrize("form", FORMS)
def test_the_longest_fits_and_the_next_does_not(form: str) -> None:
    for model in MODELS.values():
        for memory in GPUS.values():
            most = longest(form, model, memory)
            assert whole(form, model, most) <= memory < whole(form, model, most + 1024)
    assert longest(form, MODELS["Qwen3-8B"], 1e9) == 0


def test_committed_results_are_the_formulas() -> None:
    """Resident memory: within 5 %, but that the C library's heap keeps some of Liger's many small blocks."""
    report = json.loads(RESULTS.read_text())
    assert report["format"] == memory_run.FORMAT and set(report["points"]) == set(FORMS)
    for form, points in report["points"].items():
        assert len(points) == len(MODELS) * len(memory_run.TOKENS["cpu"])
        for p in points:
            predicted = FORMS[form](Sizes(**{k: p[k] for k in Sizes._fields}))
            assert p["predicted_bytes"] == predicted
            share = p["peak_bytes"] / predicted
            assert 0.95 < share < (1.7 if form == "liger" else 1.05)


def test_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert memory_run.main(["--load", str(RESULTS), "--png", str(tmp_path / "x.png")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    rows = [line for line in printed.splitlines() if " predicted " in line and "measured" in line]
    assert len(rows) == sum(len(x) for x in json.loads(RESULTS.read_text())["points"].values())
    most = longest("trajkern", MODELS["Qwen3-8B"], 80e9) // 1024
    page = PAGE.read_text()
    assert f"to {most}k" in page and f"from {longest('eager', MODELS['Qwen3-8B'], 80e9) // 1024}k tokens" in page
    old = tmp_path / "old.json"
    old.write_text('{"format": 0}')
    assert memory_run.main(["--load", str(old)]) == 2
