"""Wrapped, sharded and quantised causal models beside the plain model's own forward, one rank against two."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trajkern as tk
from trajkern.integrations._wrapped import linear_weight
from trajkern.integrations.transformers import head_arguments, log_probs
from trajkern.testing import SPECS

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
from tests.integrations.wrapped_ranks import CASES, RANKS, adapted, own, packed, tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


Found = list[dict[str, Any]]  # of each rank, by case


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Found]:
    """What two ranks find in the quick cases, or in the others, each run once."""

    @functools.cache
    def run(quick: bool) -> Found:
        folder = tmp_path_factory.mktemp("ranks")
        names = [name for name, case in CASES.items() if case.quick == quick]
        command = [sys.executable, "-m", "tests.integrations.wrapped_ranks", str(folder), *names]
        done = subprocess.run(command, cwd=ROOT, timeout=400, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(folder / str(rank)) for rank in range(RANKS)]

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if case.quick else pytest.mark.slow) for x, case in CASES.items()]
)
def test_two_ranks_are_as_one(ranks: Callable[[bool], Found], name: str) -> None:
    case = CASES[name]
    model = case.make()
    model = adapted(model) if "lora" in name else model
    of_rank = [found[name] for found in ranks(case.quick)]
    for rank in range(RANKS):
        assert not isinstance(of_rank[rank], str), of_rank[rank]
        logprobs, loss = own(model, packed(rank, case.lengths[rank]), detached="detached" in name)
        if loss.requires_grad:  # not of a rank without tokens
            (loss if case.summed else loss / RANKS).backward()
        for found in ("no_grad", "logprobs"):
            torch.testing.assert_close(of_rank[rank][found], logprobs, rtol=case.tolerance, atol=case.tolerance)
    expected = {key: x.grad for key, x in model.named_parameters() if x.grad is not None and x.grad.any()}
    for each in of_rank:
        actual = {key: x for key, x in each["grads"].items() if x.any()}
        assert actual.keys() == expected.keys()
        for key, x in expected.items():
            scale = float(x.abs().max())
            torch.testing.assert_close(actual[key], x, rtol=0, atol=case.tolerance * 10 * scale, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    "compiled", [torch.compile, lambda model: model.compile() or model], ids=["around", "in place"]
)
def test_a_compiled_model_is_looked_into(compiled: Callable[[Any], Any]) -> None:
    model, plain = compiled(tiny()), tiny()
    torch.testing.assert_close(log_probs(model, packed(0)), own(plain, packed(0))[0], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tensor -> it as a DTensor of one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("one") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: DTensor.from_local(x.detach(), mesh, [Replicate()])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.name)
def test_every_op_refuses_a_sharded_argument_by_name(op: Any, replicated: Callable[[Tensor], Tensor]) -> None:
    tried = set()
    for case in (case for case in op.cases if not case.large):
        inputs = op.inputs(case, torch.float32)
        for name in {name for name, x in inputs.items() if isinstance(x, Tensor)} - tried:
            tried.add(name)
            with pytest.raises(TypeError, match=rf"{name} must be a plain tensor, not a DTensor .*{name}\.full_tensor"):
                getattr(tk, op.name)(**inputs | {name: replicated(inputs[name])})
    assert tried


def test_a_head_split_over_tensor_parallel_ranks_is_refused(replicated: Callable[[Tensor], Tensor]) -> None:
    model = tiny()
    model.lm_head.weight = nn.Parameter(replicated(model.lm_head.weight))
    with pytest.raises(TypeError, match="model's head weight must be a plain tensor, not a DTensor"):
        log_probs(model, packed(0))


def test_memory_that_a_wrapper_took_back_is_not_read() -> None:
    weight = torch.randn(7, 5)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight must have memory"):
        tk.linear_logprobs(torch.randn(3, 5), weight, torch.tensor([0, 1, 2]))


class Linear8bitLt(nn.Linear):
    """By its name bitsandbytes' layer of 8 bits, which rounds what it multiplies."""


class Packed(nn.Module):
    """As layers of GPTQ and AWQ: no weight."""

    qweight = torch.zeros(2, 2)


class Integers(nn.Module):
    """A layer of a quantised weight."""

    weight = torch.zeros(61, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    "layer, says",
    [
        (lambda: Linear8bitLt(32, 61), "a Linear8bitLt rounds them to 8 bits"),
        (Packed, "a linear layer with a weight, got Packed"),
        (Integers, r"a weight of floats; Integers has int8\[61, 32\]"),
    ],
)
def test_heads_that_are_no_product_of_floats(layer: Callable[[], Any], says: str) -> None:
    model = tiny()
    model.lm_head = layer()
    with pytest.raises(TypeError, match=f"model's head must .*{says}"):
        head_arguments(model)


@pytest.mark.parametrize("kind, compute", [("nf4", torch.float32), ("fp4", torch.float32), ("nf4", torch.bfloat16)])
def test_a_head_of_four_bits(kind: str, compute: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    head = bitsandbytes.nn.Linear4bit(32, 61, bias=False, compute_dtype=compute, quant_type=kind)
    model = tiny()
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head.to("cpu")
    weight = linear_weight(model.lm_head)
    assert weight.dtype == compute and weight.shape == (61, 32)
    tolerance = 1e-4 if compute == torch.float32 else 0.1
    actual, (expected, loss) = log_probs(model, packed(0)), own(model, packed(0))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert loss.requires_grad and actual.requires_grad


@pytest.mark.parametrize("family", ["Llama", "Phi"])  # without and with a bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # which autocast leaves as it is
def test_autocast_is_the_model_s_own(family: str, dtype: torch.dtype) -> None:
    model = tiny(family=family).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual, (expected, _) = log_probs(model, packed(0)), own(model, packed(0))
    tolerance = 1e-5 if dtype == torch.float64 else 0.15
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
