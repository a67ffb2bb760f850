"""The registry's cases on the compiled kernels of every GPU family: within budget, and the same bits in another order.

A sample of them, or all small ones with ``--every-case``.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable

import pytest
import torch

import trajkern as tk
from trajkern._backends import OWNERS
from trajkern.testing import SPECS, Case, OpSpec, compiled, run
from trajkern.testing.numerics import Outcome, budget_shares

NARROW = ("common_offset", "margin_40")  # where 16 bits are hardest
SEED = 0  # of the approximations' errors and of the random order


def _needs(spec: OpSpec) -> pytest.MarkDecorator:
    tool = {"triton": "triton", "cuda": "nvcc"}[OWNERS[spec.family]["cuda"]]
    found = importlib.util.find_spec("triton") if tool == "triton" else shutil.which("nvcc")
    return pytest.mark.skipif(found is None, reason=f"no {tool}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every, rows = metafunc.config.getoption("--every-case"), []
    for spec in SPECS:
        small = [case for case in spec.cases if not case.large and not case.mixed]
        for number, case in enumerate(small):
            for dtype in spec.triton_dtypes or spec.dtypes:
                # nvcc has compiled its kernels for all cases; Triton compiles anew for most
                cheap = OWNERS[spec.family]["cuda"] == "cuda" and dtype == torch.float32
                if not every and number > 0 and not cheap and case.name not in NARROW:
                    continue
                names = spec.name, case.name, str(dtype).removeprefix("torch.")
                rows.append(pytest.param(spec, case, dtype, id="-".join(names), marks=_needs(spec)))
    metafunc.parametrize(("spec", "case", "dtype"), rows)


def _outcome(spec: OpSpec, case: Case, dtype: torch.dtype, order: str) -> tuple[Outcome, int]:
    inputs = spec.inputs(case, dtype)
    with compiled("sm_90", order=order, seed=SEED) as execution, tk.use_backend(OWNERS[spec.family]["cuda"]):
        outcome = run(spec, getattr(tk, spec.name), inputs)
    return outcome, execution.stats["launches"]


def test_within_budget_and_the_same_in_another_order(
    spec: OpSpec, case: Case, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    lowest, launches = _outcome(spec, case, dtype, "lowest")
    shares = budget_shares(spec, lowest, spec.inputs(case, dtype))
    record_property("family", spec.family)
    record_property("worst", max(shares.values(), default=0.0))
    record_property("launches", launches)
    over = {name: share for name, share in shares.items() if not share <= 1}
    assert not over, f"{case.name} ({case.reason}): share of the error budget {over}"
    for name, x in _outcome(spec, case, dtype, "random")[0].items():
        assert torch.equal(x.nan_to_num(123.0), lowest[name].nan_to_num(123.0)), f"{name} depends on the warps' order"
