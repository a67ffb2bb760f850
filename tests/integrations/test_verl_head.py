"""verl's fused heads: trajkern's beside verl's own, through verl's model forwards, and over a process group."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trajkern.integrations import verl as adapter


@pytest.fixture
def heads(imported_verl):
    """(verl's torch head module, the module of its triton head), patched and put right again."""
    modules = importlib.import_module(adapter.TORCH_HEAD), importlib.import_module(adapter.HEAD)
    adapter.enable_head()
    yield modules
    adapter.disable_head()


def _inputs(dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=g).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(101, 16, generator=g)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 101, (3, 7), generator=g)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dims", [2, 3])
def test_torch_head(heads, dims: int, temperature: float) -> None:
    hidden, weight, labels = _inputs()
    flat = (hidden, labels) if dims == 3 else (hidden[0], labels[0])
    outcomes = []
    for enabled in (True, False):
        if not enabled:
            adapter.disable_head()
        out = heads[0].FusedLinearForPPO().forward(flat[0], weight, flat[1], temperature=temperature)
        scale = torch.linspace(-1, 1, flat[1].numel()).view(flat[1].shape)
        grads = torch.autograd.grad((out[0] * scale - 0.3 * out[1]).sum(), (hidden, weight))
        outcomes.append((*out, *grads))
    assert isinstance(outcomes[0][0].grad_fn, torch.autograd.graph.Node)
    assert type(outcomes[0][0].grad_fn).__name__ != type(outcomes[1][0].grad_fn).__name__
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_verls(heads, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """verl's torch head under autocast multiplies in autocast's dtype whatever the two have."""
    hidden, weight, labels = _inputs()
    hidden, weight = hidden.detach().to(hidden_dtype), weight.detach().to(weight_dtype)
    outcomes = []
    for enabled in (True, False):
        if not enabled:
            adapter.disable_head()
        with torch.autocast("cpu", torch.bfloat16):
            outcomes.append(heads[0].FusedLinearForPPO().forward(hidden, weight, labels, temperature=0.9))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1].float(), rtol=0.02, atol=0.02)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        adapter.linear_cross_entropy(hidden, weight, labels)[0].sum().backward()
    assert [x.grad.dtype for x in leaves] == [hidden_dtype, weight_dtype]


def test_triton_head_is_flat_and_float32(heads) -> None:
    hidden, weight, labels = _inputs(torch.bfloat16)
    logprobs, entropy = heads[1].linear_cross_entropy(hidden, weight, labels, 0.8, "none")
    assert logprobs.shape == entropy.shape == (21,) and logprobs.dtype == entropy.dtype == torch.float32
    p = torch.log_softmax((hidden.double() @ weight.double().t()).view(21, -1) / 0.8, -1)
    torch.testing.assert_close(logprobs.double(), p.gather(1, labels.view(-1, 1))[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()  # nobody asked for the entropy's gradient
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_through_verls_forward(heads, backend: str) -> None:
    """verl's patched model forward gives the log-probs of the next tokens, from trajkern's head."""
    transformers = pytest.importorskip("transformers")
    dense = importlib.import_module("verl.models.transformers.dense_common")
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 67, (2, 9))
    forward = getattr(dense, f"forward_with_{backend}_backend")
    out = forward(model, input_ids=ids, temperature=0.9, return_dict=True)
    logits = model(input_ids=ids).logits / 0.9
    expected = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs.view(2, 9), expected, rtol=1e-5, atol=1e-5)
    out.log_probs.sum().backward()
    assert model.lm_head.weight.grad.any() and model.model.embed_tokens.weight.grad.any()


def test_enable_and_disable(imported_verl) -> None:
    modules = importlib.import_module(adapter.TORCH_HEAD), importlib.import_module(adapter.HEAD)
    before = modules[0].FusedLinearForPPO, modules[1].linear_cross_entropy
    user = type(sys)("user")
    user.linear_cross_entropy = before[1]
    sys.modules[adapter.HEAD_USERS[0]] = user
    try:
        adapter.enable_head()
        handle = adapter.enable_head()
        assert f"linear_cross_entropy of {adapter.HEAD}, user;" in repr(handle)
        assert modules[0].FusedLinearForPPO is adapter.FusedLinearForPPO
        assert modules[1].linear_cross_entropy is user.linear_cross_entropy is adapter.linear_cross_entropy
        handle.disable()
        adapter.disable_head()
        assert (modules[0].FusedLinearForPPO, modules[1].linear_cross_entropy) == before
        assert user.linear_cross_entropy is before[1]
    finally:
        del sys.modules[adapter.HEAD_USERS[0]]


def test_bad_head_arguments() -> None:
    hidden, weight, labels = _inputs()
    with pytest.raises(ValueError, match="reduction must be 'none'"):
        adapter.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
    with pytest.raises(ValueError, match=r"labels must have shape \[3, 7\]"):
        adapter.linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match="impl_backend must be"):
        adapter.FusedLinearForPPO(impl_backend="triton")


def _rank(store: str, out: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    hidden, weight, labels = _inputs()
    mine = weight.detach()[:40] if rank == 0 else weight.detach()[40:]
    mine.requires_grad_()
    logprobs, entropy = adapter.linear_cross_entropy(hidden, mine, labels, 0.9, "none", torch.distributed.group.WORLD)
    (logprobs + 0.5 * entropy).sum().backward()
    torch.save((logprobs.detach(), entropy.detach(), hidden.grad, mine.grad), f"{out}.{rank}")
    torch.save(_sharded(rank, "fsdp"), f"{out}.fsdp.{rank}")
    with pytest.raises(TypeError, match="weight must be a plain tensor, not a DTensor"):
        _sharded(rank, "tp")
    torch.distributed.destroy_process_group()


def _sharded(rank: int, name: str) -> tuple[torch.Tensor, ...]:
    """A row of the batch a rank, and a shard of the weight as verl's FSDP2 engine hands it over, or of another mesh."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
    hidden, weight, labels = _inputs()
    shard = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    logprobs, entropy = adapter.FusedLinearForPPO()(hidden[rank], shard, labels[rank], temperature=0.9)
    (logprobs + 0.5 * entropy).sum().backward()
    assert shard.grad.placements == shard.placements
    return logprobs.detach(), entropy.detach(), hidden.grad[rank], shard.grad.full_tensor()


def test_over_a_process_group(tmp_path) -> None:
    command = [sys.executable, __file__, str(tmp_path / "store"), str(tmp_path / "out")]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    parts = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    hidden, weight, labels = _inputs()
    logprobs, entropy = adapter.linear_cross_entropy(hidden, weight, labels, 0.9)
    (logprobs + 0.5 * entropy).sum().backward()
    whole = logprobs.detach(), entropy.detach(), hidden.grad, weight.grad
    for part in parts:
        torch.testing.assert_close(part[:2], whole[:2])
    torch.testing.assert_close(parts[0][2] + parts[1][2], whole[2])
    torch.testing.assert_close(torch.cat([parts[0][3], parts[1][3]]), whole[3])
    hidden, weight, labels = _inputs()
    logprobs, entropy = adapter.linear_cross_entropy(hidden[:2], weight, labels[:2], 0.9)
    (logprobs + 0.5 * entropy).sum().backward()
    for rank in range(2):  # of FSDP the gradient is the mean of the ranks'
        expected = (*(x.detach().view(2, -1)[rank] for x in (logprobs, entropy)), hidden.grad[rank], weight.grad / 2)
        torch.testing.assert_close(torch.load(tmp_path / f"out.fsdp.{rank}"), expected)


if __name__ == "__main__":
    _rank(*sys.argv[1:3], int(sys.argv[3]))
