"""Trajectories whose tokens lie on several ranks have the loss, metrics and gradients of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trajkern as tk
from tests.ranks import over_ranks
from trajkern.testing.head import LINEAR_POLICY_LOSS
from trajkern.testing.numerics import Outcome, budget_share, oracle, run
from trajkern.testing.policy_loss import POLICY_LOSS
from trajkern.testing.registry import Case, Inputs, OpSpec

RANKS = 3
OF_PAIRS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "mask", "targets", "rows")


def _splits(inputs: Inputs) -> bool:
    refused = ("branch", "sampling_support", "supervised_weights", "kl_weights")
    return inputs["config"].exact_in_parts and all(inputs.get(name) is None for name in refused)


def _cases(spec: OpSpec) -> list[Case]:
    return [case for case in spec.cases if _splits(spec.inputs(case, torch.float32))]


SPLIT = [(spec, case) for spec in (POLICY_LOSS, LINEAR_POLICY_LOSS) for case in _cases(spec)]


def _owner(inputs: Inputs, ranks: int) -> torch.Tensor:
    """The rank of each pair: in no order, in unequal numbers, of some trajectories none, and of few pairs one alone."""
    pairs = int(inputs["cu_seqlens"][-1])
    owner = torch.randint(ranks + 1, (pairs,), generator=torch.Generator().manual_seed(pairs)).clamp_max(ranks - 1)
    return owner if pairs > 3 else owner * 0


def _share(inputs: Inputs, here: torch.Tensor, per_token: bool) -> Inputs:
    """What a rank holds: of the head the whole of hidden, and its own pairs."""
    share = dict(inputs)
    if "targets" in inputs and inputs.get("rows") is None:
        share["rows"] = torch.arange(here.numel())
    names = (*OF_PAIRS, "advantages") if per_token else OF_PAIRS
    share |= {name: share[name][here] for name in names if share.get(name) is not None}
    ends = torch.cat([here.new_zeros(1, dtype=torch.int64), here.cumsum(0)])
    return share | {"cu_seqlens": ends[inputs["cu_seqlens"].long()], "per_token": per_token}


def _per_token(inputs: Inputs) -> bool:
    return inputs.get("per_token", inputs["advantages"].numel() != inputs["cu_seqlens"].numel() - 1)


def _refused(function: Callable[..., Any], inputs: Inputs, **wrong: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        function(**inputs | wrong)
    return str(error.value)


def _errors(rank: int, group: dist.ProcessGroup) -> list[str]:
    x = torch.zeros(4)
    inputs = {"logprobs": x, "old_logprobs": x, "advantages": torch.ones(2), "config": tk.PolicyLoss("gspo")}
    inputs |= {"cu_seqlens": torch.tensor([0, 1, 4]), "sequence_group": group}
    loss = partial(_refused, tk.policy_loss, inputs)
    one_more = {"advantages": torch.ones(3), "cu_seqlens": torch.tensor([0, 1, 4, 4])} if rank == 1 else {}
    each = {"advantages": torch.ones(4), "per_token": True} if rank == 1 else {}
    return [
        loss(sequence_group="cp"),
        loss(config=tk.PolicyLoss("kl_cov")),
        loss(advantages=torch.ones(4)),
        loss(**one_more),
        loss(**each),
        loss(advantages=torch.tensor([1.0, float(rank)])),
        loss(normalizer=1.0 + rank),
        loss(config=tk.PolicyLoss("gspo", clip_high=0.2 + 0.1 * rank)),
    ]


def _rank(rank: int) -> dict[Any, Any]:
    groups = {RANKS: dist.group.WORLD, 2: dist.new_group([0, 1])}
    results: dict[Any, Any] = {"errors": _errors(rank, groups[RANKS])}
    for size, group in groups.items():
        if rank >= size:
            continue
        for spec, case in SPLIT:
            inputs = spec.inputs(case, torch.float32)
            share = _share(inputs, _owner(inputs, size) == rank, _per_token(inputs)) | {"sequence_group": group}
            results[size, spec.name, case.name] = run(spec, getattr(tk, spec.name), share)
            if size == RANKS and spec is POLICY_LOSS:
                with tk.use_backend("reference"):
                    results["reference", spec.name, case.name] = run(spec, tk.policy_loss, share)
    return results


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return over_ranks(RANKS, _rank, tmp_path_factory.mktemp("ranks"))


def _whole(shares: list[Outcome], owner: torch.Tensor) -> Outcome:
    """One process's outcome: per pair from its rank, of the head's tensors the sum, of the loss what all agree on."""
    whole = {}
    for name, x in shares[0].items():
        parts = [share[name] for share in shares]
        if name in ("grad_hidden", "grad_weight", "grad_bias"):
            whole[name] = torch.stack(parts).sum(0)
        elif x.ndim == 0:
            assert all(torch.equal(part.nan_to_num(-9.0), x.nan_to_num(-9.0)) for part in parts), name
            whole[name] = x
        else:
            whole[name] = x.new_empty(owner.shape)
            for rank, part in enumerate(parts):
                whole[name][owner == rank] = part
    return whole


@pytest.mark.parametrize("op, case", [pytest.param(*x, id=f"{x[0].name}-{x[1].name}") for x in SPLIT])
def test_over_ranks(of_ranks: list[dict[Any, Any]], op: OpSpec, case: Case) -> None:
    inputs = op.inputs(case, torch.float32)
    high, low = oracle(op, inputs)
    runs = [key for key in of_ranks[0] if key[1:] == (op.name, case.name)]
    assert len(runs) == (3 if op is POLICY_LOSS else 2)
    for run_of in runs:
        shares = [results[run_of] for results in of_ranks if run_of in results]
        whole = _whole(shares, _owner(inputs, len(shares)))
        assert whole.keys() == high.keys()
        worst = {name: budget_share(op, name, whole[name], high[name], low[name]) for name in high}
        assert max(worst.values()) <= 1, (run_of, worst)


def test_errors(of_ranks: list[dict[Any, Any]]) -> None:
    texts = of_ranks[0]["errors"]
    assert texts[0] == "sequence_group must be a process group of torch.distributed, got 'cp' (str)"
    assert texts[1].startswith("sequence_group must be None for kind 'kl_cov' with ratio level 'token'")
    assert texts[2].startswith("advantages must have length 2")
    differ = "must be the same on every rank of sequence_group; here it is"
    assert texts[3] == f"the number of trajectories in cu_seqlens {differ} 2 (int), on rank 1 another"
    assert texts[4] == f"per_token {differ} False (bool), on rank 1 another"
    for text, name in zip(texts[5:], ("advantages", "normalizer", "config"), strict=True):
        assert text.startswith(f"{name} {differ}") and text.endswith(", on rank 1 another")
