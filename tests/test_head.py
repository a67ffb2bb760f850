"""What the registry does not reach: frozen parts, workspaces, large shapes, and a vocabulary spread over ranks."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from tests.ranks import over_ranks
from trajkern import reference
from trajkern._bench.memory import peak_bytes
from trajkern._native import head as native
from trajkern._tiles import tiles
from trajkern._tiles.pairs import Head, pairs_of
from trajkern._tiles.shards import Shard
from trajkern.testing import budget_share, oracle, run
from trajkern.testing.head import LINEAR_LOGPROBS, LINEAR_POLICY_LOSS
from trajkern.testing.topk import LINEAR_TOPK

CONFIG = tk.PolicyLoss("grpo")


def _inputs(tokens: int = 24, width: int = 16, vocabulary: int = 130, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) / 4
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (tokens,), generator=g)


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    """A GRPO loss of three trajectories near the policy that sampled them."""
    pairs = targets.shape[0]
    old = reference.linear_logprobs(hidden.detach(), weight.detach(), targets) + 0.1 * torch.arange(pairs).sin()
    cu_seqlens = torch.tensor([0, pairs // 4, pairs // 2, pairs])
    advantages = options.pop("advantages", torch.tensor([1.0, -0.5, 0.3]))
    return tk.linear_policy_loss(hidden, weight, targets, old, advantages, cu_seqlens, config=CONFIG, **options)[0]


class TestFrozen:
    """A part without a gradient costs no product, and changes nobody else's."""

    def test_weight(self) -> None:
        grads = []
        for frozen in (False, True):
            hidden, weight, targets = _inputs()
            logprobs = tk.linear_logprobs(hidden, weight.requires_grad_(not frozen), targets)
            (logprobs * torch.arange(24)).sum().backward()
            grads.append(hidden.grad)
        torch.testing.assert_close(*grads, rtol=2e-5, atol=2e-6)
        assert weight.grad is None

    def test_weight_where_a_token_is_certain(self) -> None:
        """d log p / d h keeps its relative precision at a margin of 40 nats."""
        hidden, weight = torch.eye(3).requires_grad_(), 40 * torch.eye(50, 3)
        tk.linear_logprobs(hidden, weight, torch.arange(3)).sum().backward()
        exact = torch.eye(3, dtype=torch.float64).requires_grad_()
        reference.linear_logprobs(exact, weight.double(), torch.arange(3)).sum().backward()
        torch.testing.assert_close(hidden.grad, exact.grad.float(), rtol=1e-6, atol=0)

    def test_weight_with_rows_that_are_shared(self) -> None:
        hidden, weight, targets = _inputs()
        rows = torch.arange(24) // 2
        tk.linear_logprobs(hidden, weight.requires_grad_(False), targets, rows=rows).sum().backward()
        expected = hidden.detach().double().requires_grad_()
        reference.linear_logprobs(expected, weight.double(), targets, rows=rows).sum().backward()
        torch.testing.assert_close(hidden.grad, expected.grad.float(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("frozen", ["hidden", "weight"])
    def test_policy_loss(self, frozen: str) -> None:
        both, one = _inputs(), _inputs()
        _loss(*both).backward()
        one[frozen == "weight"].requires_grad_(False)
        _loss(*one).backward()
        which = int(frozen == "hidden")
        assert torch.equal(one[which].grad, both[which].grad) and one[1 - which].grad is None

    def test_no_product_for_a_frozen_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert _products(monkeypatch, frozen=True) == 4 and _products(monkeypatch, frozen=False) == 6


def _products(monkeypatch: pytest.MonkeyPatch, *, frozen: bool) -> float:
    """FLOP of the products in a policy loss and its backward, in units of T H V."""
    flop, mm, addmm = [], torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: flop.append(2 * a.numel() * b.shape[1]) or mm(a, b, **k))
    monkeypatch.setattr(
        torch, "addmm", lambda c, a, b, **k: flop.append(2 * a.numel() * b.shape[1]) or addmm(c, a, b, **k)
    )
    hidden, weight, targets = _inputs(tokens=64)
    old = torch.full(targets.shape, -4.0)
    loss, _ = tk.linear_policy_loss(
        hidden, weight.requires_grad_(not frozen), targets, old, torch.ones(1), torch.tensor([0, 64]), config=CONFIG
    )
    loss.backward()
    monkeypatch.undo()
    return sum(flop) / (hidden.numel() * weight.shape[0])


def test_masked_rows_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: seen.append(a.shape[0]) or mm(a, b, **k))
    hidden, weight, targets = _inputs()
    tk.linear_logprobs(hidden.detach(), weight.detach(), targets, mask=torch.arange(24) < 5)
    assert sum(seen) == 5


def test_zero_advantages_cost_no_backward_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: seen.append(a.numel()) or mm(a, b, **k))
    hidden, weight, targets = _inputs(tokens=256)
    _loss(hidden, weight, targets, advantages=torch.tensor([0.0, 1.0, 0.0])).backward()
    logits = 256 * hidden.shape[1]
    assert sum(seen) == logits + 2 * 64 * weight.shape[0]  # the 64 tokens of the second trajectory, in two products


@pytest.mark.parametrize("tokens", [1, 6, 9])
def test_few_rows_are_as_exact_as_many(tokens: int) -> None:
    hidden, weight, targets = _inputs(tokens, 128, 32_768)
    got = run(LINEAR_LOGPROBS, tk.linear_logprobs, {"hidden": hidden, "weight": weight, "targets": targets})
    exact = hidden.detach().double().requires_grad_()
    upstream = torch.randn(tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (reference.linear_logprobs(exact, weight.detach().double(), targets) * upstream).sum().backward()
    assert (got["grad_hidden"] - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max()


class TestWorkspace:
    def test_same_bits_while_the_rows_of_a_tile_are_the_same(self) -> None:
        row = 130 * 4
        grads = []
        for size in (8 * row, 8 * row + 1, 15 * row):
            hidden, weight, targets = _inputs()
            _loss(hidden, weight, targets, workspace_bytes=size).backward()
            grads.append((hidden.grad, weight.grad))
        for other in grads[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))

    def test_ranks_fold_blocks_of_one_size(self) -> None:
        """However unequal their shards are: they add up each block together."""
        rows = []
        for size in (16384, 3616):
            none = torch.empty(0, dtype=torch.int64)
            head = Head(torch.ones(2000, 1), torch.ones(size, 1), None, none, *[None] * 5, [1.0, 0.0, 1.0], [0] * 4, "")
            of_rank = tiles.Tiles(head, native._KERNELS)
            of_rank.shard = Shard(0, 20000, 16384, None)
            rows.append(of_rank.fold_shape(2000)[0])
        assert rows[0] == rows[1] < 2000

    def test_any_size_that_holds_a_row(self) -> None:
        grads = []
        for size in (130 * 4, None):
            hidden, weight, targets = _inputs()
            _loss(hidden, weight, targets, workspace_bytes=size).backward()
            grads.append(torch.cat([hidden.grad.flatten(), weight.grad.flatten()]))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)

    def test_less_than_a_row(self) -> None:
        hidden, weight, targets = _inputs()
        with pytest.raises(ValueError, match=r"workspace_bytes must hold one row of logits, 520 bytes; got 519"):
            _loss(hidden, weight, targets, workspace_bytes=519)


def test_many_blocks_do_not_drift() -> None:
    """The weight's gradient over 64 blocks of rows, against float64."""
    hidden, weight, targets = _inputs(tokens=64 * 8, width=8, vocabulary=50)
    upstream = torch.randn(512, generator=torch.Generator().manual_seed(1))
    (tk.linear_logprobs(hidden, weight, targets, workspace_bytes=8 * 50 * 4) * upstream).sum().backward()
    exact, plain = weight.detach().double().requires_grad_(), weight.detach().clone().requires_grad_()
    (reference.linear_logprobs(hidden.detach().double(), exact, targets) * upstream.double()).sum().backward()
    (reference.linear_logprobs(hidden.detach(), plain, targets) * upstream).sum().backward()
    error, usual = (weight.grad - exact.grad).abs().max(), (plain.grad - exact.grad).abs().max()
    assert error <= 2 * usual + torch.finfo(torch.float32).eps * exact.grad.abs().max()


def test_stride_zero_upstream() -> None:
    hidden, weight, targets = _inputs()
    tk.linear_logprobs(hidden, weight, targets).sum().backward()
    summed = hidden.grad.clone()
    hidden.grad = None
    (tk.linear_logprobs(hidden, weight, targets) * torch.ones(24)).sum().backward()
    assert torch.equal(hidden.grad, summed)


@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_a_loss_scaler_saves_gradients_below_fp16(kind: str) -> None:
    """Gradients of 1e-8 times an upstream factor of 2^16, which comes after they were formed."""
    hidden, weight, targets = _inputs()
    old = torch.full(targets.shape, -5.0)
    grads = []
    for dtype in (torch.float16, torch.float64):
        h, w = (x.detach().half().to(dtype).requires_grad_() for x in (hidden, weight))
        loss_of = tk.linear_policy_loss if dtype == torch.float16 else reference.linear_policy_loss
        loss, _ = loss_of(
            h,
            w,
            targets,
            old.to(dtype),
            torch.ones(1, dtype=dtype),
            torch.tensor([0, 24]),
            config=tk.PolicyLoss(kind),
            normalizer=2.0**20,
        )
        (loss * 2**16).backward()
        grads.append(torch.cat([h.grad.flatten(), w.grad.flatten()]).double())
    got, expected = grads
    assert (expected.abs() / 2**16 < 2**-25).float().mean() > 0.2  # 0 in fp16
    torch.testing.assert_close(got, expected, rtol=2**-10, atol=2**-25)  # half a place of fp16, and of its smallest


def test_logits_in_sixteen_bits() -> None:
    """The documented mode: logits rounded to bfloat16, as a plain linear layer gives them."""
    hidden, weight, targets = (x.detach() for x in _inputs())
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    got = tk.linear_logprobs(hidden, weight, targets, logits_dtype=torch.bfloat16)
    expected = tk.token_logprobs(hidden @ weight.t(), targets)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, tk.linear_logprobs(hidden, weight, targets))


def test_sizes_beyond_32_bits() -> None:
    """T V above 2^31: shapes and tiles on meta tensors, where no memory is touched."""
    hidden = torch.empty(70_000, 8, device="meta", requires_grad=True)
    weight = torch.empty(151_936, 8, device="meta", requires_grad=True)
    head = (hidden, weight, None, torch.empty(70_000, dtype=torch.int64, device="meta"), *(None,) * 5)
    results = torch.ops.trajkern.linear_token_stats(*head, [1.0, 0.0, 1.0], [0, 64 << 20, 0], "", 1, False)
    assert [x.shape for x in results] == [(70_000,), (70_000, 2), (70_000,)]
    rows = (64 << 20) // (151_936 * 4)
    assert rows * 151_936 < 2**31  # the largest index inside a tile


def test_idle_slots_and_pairs_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody counts there: as many slots as there could be rows, the masked pairs in none of them."""
    hidden, weight, targets = _inputs(tokens=6)
    rows, mask = torch.tensor([4, 1, 4, 4, 1, 0]), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    head = Head(hidden, weight, None, targets, rows, mask, None, None, None, [1.0, 0.0, 1.0], [0, 1 << 20, 0], "")
    exact = pairs_of(head, 130, mask, exact=True)
    assert exact.row.tolist() == [1, 4] and exact.idle is None and sorted(exact.pair.tolist()) == [0, 1, 3, 4]
    counted = pairs_of(head, 130, mask, exact=False)
    assert counted.row[:2].tolist() == [1, 4] and counted.idle.tolist() == [False, False, True, True, True, True]
    assert counted.offsets.tolist() == [0, 2, 4, 4, 4, 4, 4] and torch.equal(counted.pair[:4], exact.pair)


@pytest.mark.parametrize("name", ["mask", "shared_rows_masked", "masked_rubbish", "support_shared_rows", "rows"])
def test_uncounted_slots_give_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in LINEAR_LOGPROBS.cases if case.name == name)
    inputs = LINEAR_LOGPROBS.inputs(case, torch.float32)
    expected = run(LINEAR_LOGPROBS, tk.linear_logprobs, inputs)
    monkeypatch.setattr(tiles, "pairs_of", lambda *args, exact, multiple: pairs_of(*args, False, multiple))
    got = run(LINEAR_LOGPROBS, tk.linear_logprobs, inputs)
    high, low = oracle(LINEAR_LOGPROBS, inputs)
    for key in expected:
        assert budget_share(LINEAR_LOGPROBS, key, got[key], high[key], low[key]) <= 1, key


BAD = [
    ({"weight": torch.ones(130, 8)}, ValueError, r"weight must have shape \[V, 16\].*; got float32\[130, 8\]"),
    ({"weight": torch.ones(130, 16).bfloat16()}, TypeError, r"weight must have dtype float32; got bfloat16"),
    ({"weight": torch.ones(0, 16)}, ValueError, r"weight must have shape \[V, 16\] with V at least 1"),
    ({"hidden": torch.ones(24, 16).long()}, TypeError, r"hidden must have dtype float32, .*; got int64"),
    ({"targets": torch.full((24,), 130)}, ValueError, r"targets must lie in \[0, 130\).*targets is 130 at row 0"),
    ({"targets": torch.zeros(23).long()}, ValueError, r"targets must have one entry a row of hidden, 24, .*; got 23"),
    ({"rows": torch.full((24,), 24)}, ValueError, r"rows must lie in \[0, 24\) .*; rows is 24 at pair 0"),
    ({"rows": torch.full((24,), -1)}, ValueError, r"rows must lie in \[0, 24\) .*; rows is -1 at pair 0"),
    ({"rows": torch.zeros(3).long()}, ValueError, r"rows must have shape \[24\]"),
    ({"mask": torch.ones(24)}, TypeError, r"mask must have dtype bool"),
    ({"bias": torch.ones(16)}, ValueError, r"bias must have shape \[130\]"),
    ({"temperature": -1.0}, ValueError, r"temperature must be greater than 0, got -1.0"),
    ({"temperature": torch.zeros(24)}, ValueError, r"temperature must be positive; its smallest value is 0.0"),
    ({"softcap": 0.0}, ValueError, r"softcap must be greater than 0, got 0.0"),
    ({"softcap": 8e37}, ValueError, r"softcap must be in \[7.89e-31, 1.27e\+30\] for a logit_scale of 1, got 8e\+37"),
    (
        {"softcap": 1e20, "logit_scale": 1e-15},
        ValueError,
        r"softcap must be in \[7.89e-31, 1.27e\+15\] for a logit_scale",
    ),
    ({"logit_scale": math.inf}, ValueError, r"logit_scale must be finite"),
    ({"logits_dtype": torch.float16}, ValueError, r"logits_dtype must be torch.float32; got torch.float16"),
    ({"sampling_support": torch.ones(3)}, TypeError, r"sampling_support must be a tuple \(ids, offsets\)"),
    (
        {"sampling_support": (torch.zeros(24).long(), torch.arange(25))},
        ValueError,
        r"sampling_support must hold every unmasked target; it lacks",
    ),
    (
        {"sampling_support": (torch.zeros(24).long(), torch.arange(25) // 2)},
        ValueError,
        r"sampling_support offsets must run from 0 to the 24 entries; it runs from 0 to 12",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    hidden, weight, targets = _inputs()
    with pytest.raises(error, match=f"^{text}"):
        tk.linear_logprobs(**{"hidden": hidden, "weight": weight, "targets": targets} | change)


def test_second_backward_raises() -> None:
    loss = _loss(*_inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def _rank(rank: int, cuts: list[int]) -> dict[Any, Any]:
    """One rank of a group that shares the vocabulary: values and gradients of the registry's cases."""
    ranks = len(cuts) - 1
    outcomes: dict[Any, Any] = {}
    for spec, names in SHARDED:
        for case in spec.cases:
            if case.name not in names:
                continue
            inputs = spec.inputs(case, torch.float32)
            whole = inputs["weight"].shape[0]
            shard = slice(cuts[rank] * whole // cuts[-1], cuts[rank + 1] * whole // cuts[-1])
            for name in ("weight", "bias"):
                if isinstance(inputs.get(name), Tensor):
                    inputs[name] = inputs[name][shard].clone()
            function, group = getattr(tk, spec.name), torch.distributed.group.WORLD
            outcomes[spec.name, case.name] = run(spec, partial(function, process_group=group), inputs)
    wrong = {"targets": torch.full((24,), 130), "weight": torch.ones(130 // ranks + (rank < 130 % ranks), 16)}
    for problem in (wrong, {"weight": torch.ones(40 + rank, 16 - rank), "hidden": torch.ones(24, 16 - rank)}):
        hidden, _, targets = _inputs()
        arguments = {"hidden": hidden, "targets": targets} | problem
        with pytest.raises(ValueError) as error:
            tk.linear_logprobs(**arguments, process_group=torch.distributed.group.WORLD)
        outcomes[str(sorted(problem))] = str(error.value)
    return outcomes


SHARDED = (
    (LINEAR_LOGPROBS, ("typical", "everything", "shared_rows_masked", "support", "margin_17", "very_negative")),
    (LINEAR_POLICY_LOSS, ("grpo", "full", "gspo", "everything", "small_workspace", "half_zero")),
    (LINEAR_TOPK, ("typical", "several_targets", "certain", "all", "equal", "everything", "impossible")),
)


@pytest.mark.parametrize(
    "cuts",
    [pytest.param([0, 1, 2], marks=pytest.mark.slow, id="2_ranks"), pytest.param([0, 3, 6, 7], id="3_ranks_uneven")],
)
def test_vocabulary_over_ranks(cuts: list[int], tmp_path: Path) -> None:
    """Every rank's results, within the budget of one rank's."""
    outcomes = over_ranks(len(cuts) - 1, _rank, tmp_path, cuts)
    for spec, names in SHARDED:
        for case in (c for c in spec.cases if c.name in names):
            high, low = oracle(spec, spec.inputs(case, torch.float32))
            per_rank = [results[spec.name, case.name] for results in outcomes]
            for name in high:
                if name in ("grad_weight", "grad_bias"):
                    got = [torch.cat([values[name] for values in per_rank])]
                else:
                    got = [values[name] for values in per_rank]
                for x in got:
                    assert budget_share(spec, name, x, high[name], low[name]) <= 1, f"{case.name}: {name}"
    for results in outcomes:
        assert "targets must lie in [0, 130)" in results["['targets', 'weight']"]
        assert "the same H on every rank" in results["['hidden', 'weight']"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_memory_is_the_workspace() -> None:
    """At 4,096 x 16 x 151,936, where the logits take 2.5 GB and d weight 10 MB: 64 MiB beyond the gradients."""
    hidden, weight, targets = _inputs(tokens=4096, vocabulary=151_936)
    old = torch.full((4096,), -12.0)

    def step() -> None:
        hidden.grad = weight.grad = None
        tk.linear_policy_loss(hidden, weight, targets, old, torch.ones(1), torch.tensor([0, 4096]), config=CONFIG)[
            0
        ].backward()

    gradients = hidden.nbytes + weight.nbytes
    assert peak_bytes(step, "cpu") - gradients <= (64 + 8) << 20  # 8 MiB of pages and thread stacks are not ours
