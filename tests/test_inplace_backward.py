"""``inplace_backward``: whoever needs what it overwrites raises; what torch's in-place ops refuse, it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import trajkern as tk

VERSION = "modified by an inplace operation"
OPS = (tk.token_logprobs, lambda *args, **options: tk.token_stats(*args, **options).entropy)
USERS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda z: z.square().sum(),
    "sin": lambda z: z.sin().sum(),
    "a view": lambda z: z[:, 2:].square().sum(),
    "the base of a view": lambda z: z.view(-1).square().sum(),
    "detached": lambda z: (torch.ones((), requires_grad=True) * z.detach()).sum(),
    "token_logprobs": lambda z: tk.token_logprobs(z, torch.zeros(4, dtype=torch.int64)).sum(),
    "token_stats": lambda z: tk.token_stats(z, torch.zeros(4, dtype=torch.int64)).entropy.sum(),
    "another in place": lambda z: tk.token_logprobs(z, torch.ones(4, dtype=torch.int64), inplace_backward=True).sum(),
}


def _head() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, generator=g), torch.randn(11, 5, generator=g)
    return hidden, weight.requires_grad_(), torch.randint(11, (4,), generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [slice(None), slice(None, -1)], ids=["whole", "shifted"])
def test_equals_out_of_place(dtype: torch.dtype, cut: slice) -> None:
    gradients = []
    for inplace in (False, True):
        leaf = torch.randn((4, 6, 50), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        logits = (leaf * 1.0)[:, cut]
        targets = torch.arange(logits.shape[0] * logits.shape[1]).reshape(logits.shape[:2]) % 50
        tk.token_logprobs(logits, targets, inplace_backward=inplace).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_writes_over_the_logits() -> None:
    hidden, weight, targets = _head()
    logits, seen = hidden @ weight.t(), []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    tk.token_logprobs(logits, targets, inplace_backward=True).sum().backward()
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("op", OPS, ids=["token_logprobs", "token_stats"])
@pytest.mark.parametrize("user", USERS)
def test_logits_that_another_op_saved(op, user: str) -> None:
    hidden, weight, targets = _head()
    logits = hidden @ weight.t()
    other = USERS[user](logits)
    overwritten = op(logits, targets, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match=VERSION):
        (other + overwritten).backward()


@pytest.mark.parametrize("user", ["square", "a view", "token_stats", "detached"])
def test_whoever_reads_them_before(user: str) -> None:
    """A backward that runs first finds the logits as they were."""
    gradients = []
    for inplace in (False, True):
        hidden, weight, targets = _head()
        logits = hidden @ weight.t()
        overwritten = tk.token_logprobs(logits, targets, inplace_backward=inplace).sum()
        (overwritten + USERS[user](logits)).backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_an_op_that_saved_its_result() -> None:
    hidden, weight, targets = _head()
    capped = 5 * torch.tanh(hidden @ weight.t())  # the product saves no result
    tk.token_logprobs(capped, targets, inplace_backward=True).sum().backward()
    weight.grad = None
    with pytest.raises(RuntimeError, match=VERSION):
        tk.token_logprobs(torch.tanh(hidden @ weight.t()), targets, inplace_backward=True).sum().backward()


def test_rows_of_one_tensor() -> None:
    hidden, weight, targets = _head()
    logits = hidden @ weight.t()
    halves = [tk.token_logprobs(logits[i : i + 2], targets[i : i + 2], inplace_backward=True) for i in (0, 2)]
    with pytest.raises(RuntimeError, match=VERSION):
        torch.cat(halves).sum().backward()


@pytest.mark.parametrize(
    "logits",
    [
        lambda x: x[:, :1].expand(4, 11),
        lambda x: x[:1].expand(4, 11),
        lambda x: x.view(-1).unfold(0, 11, 2)[:4],
        lambda x: x.as_strided((4, 11), (1, 1)),
    ],
    ids=["expanded columns", "expanded rows", "unfolded", "as_strided"],
)
def test_logits_that_overlap_themselves(logits) -> None:
    hidden, weight, targets = _head()
    z = logits(hidden @ weight.t())
    with pytest.raises(ValueError, match="logits must not overlap themselves in memory where inplace_backward"):
        tk.token_logprobs(z, targets, inplace_backward=True)
    with torch.no_grad():  # nothing is written
        tk.token_logprobs(z, targets, inplace_backward=True)


def test_strides_that_do_not_overlap() -> None:
    for cut in (
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x.t()[:4],
        lambda x: x[:, ::3],
        lambda x: x[:1, :1],
    ):
        gradients = []
        for inplace in (False, True):
            weight = torch.randn(11, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
            z = cut(weight * 1.0)
            tk.token_logprobs(z, torch.zeros(len(z), dtype=torch.int64), inplace_backward=inplace).sum().backward()
            gradients.append(weight.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[1:], lambda x: x.t()], ids=["leaf", "rows", "turned"])
def test_leaves(view) -> None:
    logits = view(torch.randn(5, 5, requires_grad=True))
    with pytest.raises(ValueError, match="logits must not be a leaf that requires a gradient, or a view of one"):
        tk.token_logprobs(logits, torch.zeros(len(logits), dtype=torch.int64), inplace_backward=True)


def test_a_second_backward_is_named() -> None:
    hidden, weight, targets = _head()
    logprobs = tk.token_logprobs(hidden @ weight.t(), targets, inplace_backward=True).sum()
    logprobs.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward: the first backward has overwritten the logits"):
        logprobs.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    """What is recomputed is overwritten, and nothing else."""
    hidden, weight, targets = _head()

    def loss(w: Tensor) -> Tensor:
        return tk.token_logprobs(hidden @ w.t(), targets, inplace_backward=True).sum()

    (expected,) = torch.autograd.grad(loss(weight), weight)
    checkpoint(loss, weight, use_reentrant=reentrant).backward()
    assert torch.equal(weight.grad, expected)


def test_the_ops_themselves_count_their_writes() -> None:
    """By torch's dispatcher, too: under a profiler, and where the op is called by its own name."""
    first, second = torch.ones(3), torch.ones(3)
    torch.ops.trajkern.scale_gradients_(first, second, torch.tensor(2.0))
    torch.ops.trajkern.scale_gradients_(first, None, torch.tensor(2.0))
    assert (first._version, second._version) == (2, 1) and first.eq(4).all() and second.eq(2).all()
    hidden, weight, targets = _head()
    logits = hidden @ weight.t()
    with torch.profiler.profile():
        tk.token_logprobs(logits, targets, inplace_backward=True).sum().backward()
    assert logits._version == 1
