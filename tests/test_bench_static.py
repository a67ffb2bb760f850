"""The report on compiled kernels: reading machine code, cases that exist, predictions beside measurements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from trajkern._bench import __main__ as program
from trajkern._bench import head_model, static
from trajkern._bench.static import ARCHS, GPUS, Case, Code, cases, measurements, plain, read_amdgcn, read_code
from trajkern._tiles.arguments import Head
from trajkern._tiles.tiles import Kernels, Tiles

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:0 SHARED:64 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        Function : first
    .headerflags @"EF_CUDA_SM90"
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ @!P0 LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/ STG.E desc[UR4][R2.64], R4 ;
        ..........

        Function : second
    .headerflags @"EF_CUDA_SM90"
        /*0000*/ LDG.E.EL.64 R4, desc[UR4][R2.64] ;
        /*0010*/ LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0020*/ LDS.128 R4, [R2] ;
        ..........
"""


def test_machine_code_is_read() -> None:
    assert read_code(USAGE, SASS) == [
        Code("first", 40, 0, 64, [16, 128], [32]),
        Code("second", 255, 24, 0, [8, 64], []),
    ]


AMDGCN = """
        global_load_dwordx4 v[4:7], v[2:3], off
        global_load_ushort v4, v[2:3], off
        buffer_store_dword v4, v1, s[0:3], 0 offen
        ds_read_b128 v[0:3], v9
amdhsa.kernels:
  - .args:
      - .address_space:  global
        .name:           logits
    .group_segment_fixed_size: 32
    .name:           stats_kernel
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 3
    .vgpr_count:     128
    .vgpr_spill_count: 2
"""


def test_amd_s_machine_code_is_read() -> None:
    assert read_amdgcn(AMDGCN) == Code("stats_kernel", 128, 12, 32, [16, 128], [32])


@pytest.mark.parametrize(
    "full, name",
    [
        ("void tk::cuda::(anonymous namespace)::gae_kernel<float>(float const*, tk::Rows<float>)", "gae_kernel<float>"),
        ("void tk::cuda::climb<tk::cuda::(anonymous namespace)::Of<double> >(tk::Nodes, int)", "climb<Of<double> >"),
        ("_Z3foov", "_Z3foov"),
    ],
)
def test_names_are_short(full: str, name: str) -> None:
    assert plain(full) == name


def test_every_case_is_one_of_the_benchmark_s() -> None:
    known = {(c.op, c.work, c.shape) for timed in program.FAMILIES.values() for c in timed if "cuda" in c.devices}
    assert {case[:3] for case in cases()} <= known


@pytest.mark.parametrize("case", [c for c in cases() if c.fewest < 1e8], ids=lambda c: f"{c.op}-{c.shape}")
def test_the_fewest_bytes_are_the_benchmark_s(case: Case) -> None:
    (timed,) = (c for x in program.FAMILIES.values() for c in x if (c.op, c.work, c.shape) == case[:3])
    assert timed.make("cpu").bytes == pytest.approx(case.fewest, rel=0.3)  # indices count there
    assert case.moved >= case.fewest


def test_prediction_is_the_larger_of_the_two_times() -> None:
    gpu = GPUS["H100"]
    assert Case("", "", "", 1, gpu.bandwidth, 0.5 * gpu.rate).predicted(gpu) == 1
    assert Case("", "", "", 1, gpu.bandwidth, 2.0 * gpu.rate).predicted(gpu) == 2


@pytest.mark.parametrize(("logit_bytes", "ratio", "peak"), [(4, 1.10, 5.5), (2, 1.05, 3.3)])
def test_the_head_is_predicted_within_its_bounds(logit_bytes: int, ratio: float, peak: float) -> None:
    """At 8,192 × 4,096 × 131,072: times three bare products, GiB beyond the inputs."""
    step = head_model.default_step(8192, 4096, 131_072, logit_bytes)
    assert step.seconds(head_model.H200) <= ratio * step.bare(head_model.H200)
    assert step.peak() <= peak * 2**30


@pytest.mark.parametrize("rows", [100, 4096, 8192, 8193, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_s_blocks_are_those_that_are_predicted(rows: int, dtype: torch.dtype) -> None:
    hidden = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(131_072, 4096, dtype=torch.bfloat16, device="meta")
    none = torch.empty(0, dtype=torch.int64, device="meta")
    options = [int(dtype == torch.bfloat16), 0, 0]
    head = Head(hidden, weight, None, none, None, None, None, None, None, [1.0, 0.0, 1.0], options, "")
    block, _ = Tiles(head, Kernels(False, *(None,) * 8)).whole_rows(rows, writes_weight=True)
    step = head_model.default_step(rows, 4096, 131_072, dtype.itemsize)
    assert -(-rows // block) == step.blocks and block <= step.block


def test_measurements_stand_beside(tmp_path: Path) -> None:
    case = next(cases())
    row = {"op": case.op, "work": case.work, "shape": case.shape, "seconds": {"trajkern": {"median": 0.002}}}
    other = {**row, "work": "none", "seconds": {}}
    (tmp_path / "nvidia-h200").mkdir()
    report = {"stages": {"benchmark": {"results": {"cases": [row, other]}}}}
    (tmp_path / "nvidia-h200" / "20261123.json").write_text(json.dumps(report))
    (tmp_path / "nvidia-h200" / "other.json").write_text("[]")
    medians = measurements(tmp_path)
    assert medians == {case[:3]: {"nvidia-h200": 0.002}}
    assert "measured, nvidia-h200: 2 ms" in static.text([], [case], medians)


def test_text_fits_a_terminal() -> None:
    kernel = static.Kernel("span", "k" * 60, 100, 255, 0, 65536, [32, 128], [])
    lines = static.text([kernel], list(cases()), {}).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.endswith("128     –") for line in lines)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "static.json"
    assert program.main(["--static", "--op", "span", "--arch", "90", "--json", str(path)]) == 0
    out, saved = capsys.readouterr().out, json.loads(path.read_text())
    assert {k["name"] for k in saved["kernels"]} >= {"total_kernel<float>", "spread_kernel<double>"}
    assert all(k["arch"] == 90 and k["spilled"] == 0 and k["registers"] > 0 for k in saved["kernels"])
    assert "span_reduce, forward" in out and all(set(GPUS) <= row.keys() for row in saved["cases"])


def test_without_compilers_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(static.shutil, "which", lambda name: None)
    assert program.main(["--static", "--op", "span"]) == 1
    assert "no CUDA kernels without nvcc" in capsys.readouterr().err


def test_unknown_architecture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--static", "--arch", "70"])
    assert all(str(arch) in capsys.readouterr().err for arch in ARCHS[:1])
