"""What the registry does not reach: the choice itself, frozen parts, ranks, exactness, and bad input."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trajkern as tk
from tests.ranks import over_ranks
from trajkern._native import topk

INF = math.inf


def _inputs(tokens: int = 12, width: int = 16, vocabulary: int = 70) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, width, generator=g) for rows in (tokens, vocabulary))
    return hidden.requires_grad_(), (weight / 4).requires_grad_()


def _chosen(z: Tensor, k: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU's kernel over tiles of so many columns: logits, ids, and what the tiles are left with."""
    rows, left = z.shape[0], []
    logits, ids = z.new_full((rows, k), -INF), torch.full((rows, k), z.shape[1])
    for first in range(0, z.shape[1], columns):
        left.append(tile := z[:, first : first + columns].clone())
        topk.exchange(tile, first, 0, logits, ids, first + columns >= z.shape[1])
    return logits, ids, torch.cat(left, 1)


class TestChoice:
    """Of equal logits the lower id, wherever tiles begin; and no logit is lost."""

    SIZE = 300
    ROWS = {
        "random": lambda: torch.randn(4, 300, generator=torch.Generator().manual_seed(0)),
        "few values": lambda: torch.randint(4, (4, 300), generator=torch.Generator().manual_seed(1)).float(),
        "all equal": lambda: torch.zeros(2, 300),
        "ascending": lambda: torch.arange(300.0)[None],
        "descending": lambda: -torch.arange(300.0)[None],
        "impossible": lambda: torch.where(torch.arange(300) % 50 == 7, 1.0, -INF)[None],
        "zeros of both signs": lambda: torch.tensor([0.0, -0.0]).repeat(150)[None],
    }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("columns", [7, 64, 130, 300])
    @pytest.mark.parametrize("name", ROWS)
    def test_exchange(self, name: str, columns: int, dtype: torch.dtype) -> None:
        z = self.ROWS[name]().to(dtype)
        for k in (1, 5, 64, 299, 300):
            logits, ids, left = _chosen(z, k, columns)
            order = z.sort(dim=1, descending=True, stable=True).indices
            assert torch.equal(ids, order[:, :k])
            assert torch.equal(logits, z.gather(1, ids))
            rest = torch.cat((z.gather(1, order[:, k:]), z.new_full((len(z), k), -INF)), 1)
            assert torch.equal(left.sort(dim=1, descending=True).values, rest)

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
    @pytest.mark.parametrize("name", ROWS)
    def test_of_a_gpu(self, name: str) -> None:
        """The same by torch's own selection."""
        from trajkern._triton.topk import exchange

        z = self.ROWS[name]()
        for k, columns in ((1, 130), (5, 7), (64, 300), (300, 64)):
            logits, ids = z.new_full((len(z), k), -INF), torch.full((len(z), k), 300)
            left = []
            for first in range(0, 300, columns):
                left.append(tile := z[:, first : first + columns].clone())
                exchange(tile, first, 0, logits, ids, False)
            expected = _chosen(z, k, columns)
            assert torch.equal(logits, expected[0]) and torch.equal(ids, expected[1])
            assert torch.equal(*(x.sort(dim=1).values for x in (torch.cat(left, 1), expected[2])))

    def test_a_row_without_numbers_costs_no_other(self) -> None:
        hidden, weight = (x.detach() for x in _inputs())
        whole = tk.linear_topk(hidden, weight, 5)
        hidden[3, 0] = math.nan
        found = tk.linear_topk(hidden, weight, 5)
        assert bool(found.logprobs[3].isnan().all()) and bool(found.tail[3].isnan())
        assert bool(((found.ids >= 0) & (found.ids < 70)).all())
        others = torch.arange(12) != 3
        assert torch.equal(found.ids[others], whole.ids[others])
        assert torch.equal(found.logprobs[others], whole.logprobs[others])


def test_log_probs_are_those_of_the_head() -> None:
    """At the ids, at the targets, and their gradients, with nothing else asked for."""
    hidden, weight = _inputs()
    targets = torch.randint(70, (12, 3), generator=torch.Generator().manual_seed(2))
    options = {"temperature": 0.8, "softcap": 6.0}
    found = tk.linear_topk(hidden, weight, 5, targets=targets, **options)
    assert found.target_logprobs is not None
    for x, ids in ((found.logprobs, found.ids), (found.target_logprobs, targets)):
        rows = torch.arange(12).repeat_interleave(ids.shape[1])
        same = tk.linear_logprobs(hidden, weight, ids.flatten(), rows=rows, **options).view_as(x)
        torch.testing.assert_close(x, same, rtol=2e-6, atol=1e-6)
        grads = [torch.autograd.grad(y.sin().sum(), (hidden, weight), retain_graph=True) for y in (x, same)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_part(frozen: str) -> None:
    """It has no gradient, and changes nobody else's."""
    grads = []
    for needed in (True, False):
        hidden, weight = _inputs()
        leaves = {"hidden": hidden, "weight": weight, "bias": torch.linspace(-1, 1, 70, requires_grad=True)}
        leaves[frozen].requires_grad_(needed)
        found = tk.linear_topk(**leaves, k=4)
        (found.logprobs.sum() + found.tail.sum()).backward()
        grads.append({name: x.grad for name, x in leaves.items()})
    every, some = grads
    assert some.pop(frozen) is None
    assert all(torch.equal(every[name], x) for name, x in some.items())


def test_results_without_upstream_need_no_gradient() -> None:
    hidden, weight = _inputs()
    found = tk.linear_topk(hidden, weight, 4, rows=torch.tensor([5, 2, 9]), targets=torch.tensor([1, 2, 3]))
    assert not found.ids.requires_grad
    (found.logprobs[1].sum() + found.tail[2]).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 9]


def test_gradient_where_two_tokens_are_certain() -> None:
    """The others' d z sum up to what the two's are: 1 - p alone would round to 0."""
    weight = torch.zeros(50, 1).index_fill(0, torch.tensor([7, 9]), 30.0).requires_grad_()
    tk.linear_topk(torch.ones(1, 1), weight, 2).tail.backward()
    assert weight.grad is not None
    expected = torch.full((50, 1), 1 / 48).index_fill(0, torch.tensor([7, 9]), -0.5)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=0)


def test_same_bits_for_any_number_of_threads() -> None:
    z, before = torch.randn(64, 20000, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    outcomes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outcomes.append(_chosen(z, 20, 16384))
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*outcomes, strict=True))


def test_distillation_on_policy() -> None:
    """From both sides' likeliest tokens: over all but one id it is the divergence of the whole distributions."""
    (hidden, weight), size = _inputs(vocabulary=20), 20
    teacher_hidden, teacher_weight = (x.detach().flip(0) * 1.2 for x in (hidden, weight))
    known = tk.linear_topk(teacher_hidden, teacher_weight, 10)
    own = tk.linear_topk(hidden, weight, 15, targets=known.ids)
    assert own.target_logprobs is not None
    rows = torch.arange(12).repeat_interleave(15)
    theirs = tk.linear_logprobs(teacher_hidden, teacher_weight, own.ids.flatten(), rows=rows).view(12, 15)
    ids = torch.cat((own.ids, known.ids), 1)
    both = torch.cat((own.logprobs, own.target_logprobs), 1), torch.cat((theirs, known.logprobs), 1)
    for beta in (0.0, 0.3, 1.0):
        found = tk.topk_divergence(*both, ids=ids, beta=beta)
        (actual,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
        for t in range(12):
            union = ids[t].unique()
            assert len(union) < size + 1
            logprobs = [x @ y.t() for x, y in ((hidden[t], weight), (teacher_hidden[t], teacher_weight))]
            once = [x.log_softmax(-1)[union][None] for x in logprobs]
            (expected,) = torch.autograd.grad(tk.topk_divergence(*once, beta=beta).sum(), hidden)
            torch.testing.assert_close(found[t : t + 1].detach(), tk.topk_divergence(*once, beta=beta).detach())
            torch.testing.assert_close(actual[t], expected[t], rtol=1e-4, atol=1e-6)


class TestRanks:
    """A vocabulary in shards: the same as of one process."""

    CASES = {
        "plain": (6, {}),
        "k above a shard": (9, {"targets": True}),
        "options": (4, {"softcap": 3.0, "temperature": 0.7, "rows": True, "targets": True, "mask": True}),
        "equal logits": (12, {"equal": True}),
        "no rows": (3, {"none": True}),
    }

    def run(self, name: str, inputs: list[Tensor], group=None) -> list[Tensor]:
        k, asked = self.CASES[name]
        hidden, weight, bias = (x.detach().clone() for x in inputs)
        if "equal" in asked:
            hidden, weight, bias = hidden.sign(), weight.sign(), torch.zeros_like(bias)
        leaves = [x.requires_grad_() for x in (hidden[:0] if "none" in asked else hidden, weight, bias)]
        options = {name: value for name, value in asked.items() if isinstance(value, float)}
        rows = torch.tensor([3, 0, 3, 7, 5]) if "rows" in asked else None
        count = len(leaves[0]) if rows is None else len(rows)
        if "targets" in asked:
            options["targets"] = (torch.arange(2 * count) * 5 % 40).view(count, 2)
        if "mask" in asked:
            options["mask"] = torch.arange(count) != 1
        found = tk.linear_topk(leaves[0], leaves[1], k, bias=leaves[2], rows=rows, process_group=group, **options)
        tensors = [x for x in found if x is not None]
        loss = sum((x * (torch.arange(x.numel()).view_as(x) + 1.0).sin()).sum() for x in tensors if x.requires_grad)
        return [x.detach() for x in tensors] + list(torch.autograd.grad(loss, leaves))

    def on_rank(self, rank: int, cuts: tuple[int, ...], inputs: list[Tensor]) -> dict[str, list[Tensor]]:
        group = torch.distributed.group.WORLD
        shard = slice(cuts[rank], cuts[rank + 1])
        outcomes = {}
        for name in self.CASES:
            hidden, weight, bias = inputs
            outcomes[name] = self.run(name, [hidden, weight[shard], bias[shard]], group)
        with pytest.raises(ValueError, match="k must be 1 to 40, the size of the vocabulary; got 41"):
            tk.linear_topk(inputs[0], inputs[1][shard], 41, process_group=group)
        return outcomes

    @pytest.mark.slow  # tests/test_head.py has ranks with the registry's cases
    def test_same_as_of_one(self, tmp_path: Path) -> None:
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((8, 6), (40, 6), (40,))]
        cuts = (0, 7, 40)  # the first rank has fewer tokens than k
        ranks = over_ranks(2, self.on_rank, tmp_path, cuts, inputs)
        for name in self.CASES:
            whole = self.run(name, inputs)
            *found, hidden, weight, bias = whole
            for rank, outcomes in enumerate(ranks):
                shard = slice(cuts[rank], cuts[rank + 1])
                *mine, of_hidden, of_weight, of_bias = outcomes[name]
                for a, b in zip(mine, found, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=f"{name} {rank}")
                torch.testing.assert_close(of_hidden, hidden, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(of_weight, weight[shard], rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(of_bias, bias[shard], rtol=1e-11, atol=1e-12)
            assert all(torch.equal(a, b) for a, b in zip(ranks[0][name][:3], ranks[1][name][:3], strict=True))


class TestBadInput:
    def _bad(self, error: type[Exception], match: str, **options) -> None:
        hidden, weight = _inputs()
        with pytest.raises(error, match=match):
            tk.linear_topk(**{"hidden": hidden, "weight": weight, "k": 3} | options)

    def test_k(self) -> None:
        for bad in (0, -1, 71):
            self._bad(ValueError, f"^k must be 1 to 70, the size of the vocabulary; got {bad}", k=bad)
        for bad in (True, 3.0, "3", None, torch.tensor(3)):
            self._bad(TypeError, "^k must be an int, got", k=bad)

    def test_tensors(self) -> None:
        self._bad(TypeError, "^hidden must be a tensor", hidden=None)
        self._bad(ValueError, r"^weight must have shape \[V, 16\]", weight=torch.zeros(70, 15))
        self._bad(TypeError, "^weight must have dtype float32", weight=torch.zeros(70, 16).double())
        self._bad(ValueError, r"^bias must have shape \[70\]", bias=torch.zeros(69))

    def test_rows(self) -> None:
        self._bad(TypeError, "^rows must have dtype int64", rows=torch.zeros(3))
        self._bad(ValueError, "^rows must have 1 dimension", rows=torch.zeros(3, 1, dtype=torch.int64))
        self._bad(ValueError, r"^rows must lie in \[0, 12\) .* rows is 12", rows=torch.tensor([0, 12]))
        self._bad(ValueError, r"^rows must lie in \[0, 12\) .* rows is -1", rows=torch.tensor([-1, 1]))

    def test_targets(self) -> None:
        shape = r"^targets must have shape \[12\] or \[12, M\] with M at least 1, the tokens of each row; got "
        for bad in (torch.zeros(11), torch.zeros(11, 2), torch.zeros(12, 0), torch.zeros(12, 1, 1), torch.tensor(0)):
            self._bad(ValueError, shape, targets=bad.long())
        self._bad(TypeError, "^targets must have dtype int64", targets=torch.zeros(12))
        self._bad(ValueError, r"^targets must lie in \[0, 70\) .* 70", targets=torch.full((12, 2), 70))
        self._bad(
            ValueError, r"^targets must have shape \[2\]", targets=torch.zeros(12).long(), rows=torch.ones(2).int()
        )

    def test_options(self) -> None:
        self._bad(ValueError, r"^mask must have shape \[12\] \(one flag a row", mask=torch.ones(11, dtype=torch.bool))
        self._bad(TypeError, "^mask must have dtype bool", mask=torch.ones(12))
        self._bad(ValueError, "^temperature must be greater than 0", temperature=0.0)
        self._bad(ValueError, r"^temperature must have shape \[12\]", temperature=torch.ones(3))
        self._bad(ValueError, "^softcap must be greater than 0", softcap=-1.0)
        self._bad(ValueError, "^logit_scale must be finite", logit_scale=INF)
        self._bad(ValueError, "^workspace_bytes must hold one row of logits, 280 bytes", workspace_bytes=279)
        self._bad(TypeError, "^batch_invariant must be True or False", batch_invariant=1)

    def test_second_derivative(self) -> None:
        hidden, weight = _inputs()
        with pytest.raises(RuntimeError, match="trajkern.linear_topk: differentiable once"):
            torch.autograd.grad(tk.linear_topk(hidden, weight, 3).tail.sum(), hidden, create_graph=True)
