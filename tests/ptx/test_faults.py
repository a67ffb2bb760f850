"""Kernels that are wrong, written by hand: each is caught, and the message says where, what and whose."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ptx.text import launch
from trajkern.testing import KernelFault, compiled

# %d5: the address of this thread's element of x0, %d6: of x1, both of float32
ELEMENTS = "mad.wide.s32 %d5, %r1, 4, %d1;\nmad.wide.s32 %d6, %r1, 4, %d2;\n"
# %r5: the address of this thread's element of the tile
TILE = "mov.u32 %r6, tile;\nmad.lo.s32 %r5, %r4, 4, %r6;\n"


def caught(body: str, *tensors: torch.Tensor, **options) -> KernelFault:
    """The same fault in every order."""
    with pytest.raises(KernelFault) as fault:
        launch(".loc 1 3 1\n" + body, *tensors, **options)
    for seed in range(3):
        with pytest.raises(KernelFault) as other:
            launch(".loc 1 3 1\n" + body, *tensors, order="random", seed=seed, **options)
        assert other.value.reason.split(":")[0] == fault.value.reason.split(":")[0]
    return fault.value


def test_an_overrun_names_lane_instruction_line_and_address() -> None:
    x = torch.zeros(70)
    fault = caught(f"{ELEMENTS}.loc 1 12 5\nst.global.b32 [%d5], %r1;", x, x, threads=32, blocks=3)
    assert fault.kernel == "written" and fault.reason == "writes bytes 280 to 283 of `x0`, float32 [70], which has 280"
    (place,) = fault.places
    assert (place.instruction, place.source) == ("st.global.b32 [%d5], %r1", "written.py:12")
    assert (place.thread, place.block) == ((6, 0, 0), (2, 0, 0))
    assert fault.address is not None and fault.address % 2**39 == x.data_ptr() % 16 + 280
    assert str(fault) == (
        "written: writes bytes 280 to 283 of `x0`, float32 [70], which has 280\n"
        "  at `st.global.b32 [%d5], %r1` (written.py:12), thread 6 of block 2\n"
        f"  address {fault.address:#x}"
    )


def test_a_read_before_the_tensor_and_outside_of_a_slice() -> None:
    x = torch.zeros(64)
    body = f"{ELEMENTS}ld.global.f32 %f1, [%d5+-4];"
    assert re.search(r"reads bytes -4 to -1 of `x0`.*thread 0 of block 0", str(caught(body, x, x)), re.S)
    part = x[8:40]  # the storage goes on, the tensor does not
    launch(f"{ELEMENTS}ld.global.f32 %f1, [%d5];", part, part)
    assert "reads bytes 128 to 131" in str(caught(f"{ELEMENTS}ld.global.f32 %f1, [%d5+4];", part, part))


def test_a_pointer_to_nothing() -> None:
    x = torch.zeros(32)
    fault = caught("mov.u64 %d5, 64;\nld.global.f32 %f1, [%d5];", x)
    assert "reads where no tensor is" in str(fault) and fault.address == 64


def test_only_lanes_whose_predicate_holds_touch_memory() -> None:
    x = torch.zeros(20)
    guard = "setp.lt.s32 %p1, %r1, 20;\n"
    launch(f"{ELEMENTS}{guard}@%p1 st.global.f32 [%d5], 0f3F800000;", x, x)
    assert (x == 1).all()
    late = "setp.lt.s32 %p1, %r1, 21;\n"
    fault = caught(f"{ELEMENTS}{late}@%p1 st.global.f32 [%d5], 0f3F800000;", x, x)
    assert fault.places[0].thread == (20, 0, 0)


def test_a_misaligned_vector() -> None:
    x = torch.zeros(300)
    body = "mad.wide.s32 %d5, %r1, 8, %d1;\nld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%d5];"
    fault = caught(body, x)
    assert "moves 16 bytes at an address that is no multiple of 16" in fault.reason
    assert fault.places[0].thread == (1, 0, 0) and "ld.global.v4.f32" in fault.places[0].instruction


def test_an_unwritten_read() -> None:
    x, y = torch.empty(32), torch.zeros(32)
    fault = caught(f"{ELEMENTS}ld.global.f32 %f1, [%d5];\nst.global.f32 [%d6], %f1;", x, y, fresh=(0,))
    assert "reads byte 0 of `x0`, float32 [32], which nothing has written" in fault.reason
    x = torch.empty(32)
    body = f"{ELEMENTS}st.global.f32 [%d5], 0f3F800000;\nld.global.f32 %f1, [%d5];\nst.global.f32 [%d6], %f1;"
    launch(body, x, y, fresh=(0,))
    assert (y == 1).all()


def test_an_output_left_unwritten() -> None:
    x = torch.empty(32)
    execution = launch(f"{ELEMENTS}setp.ne.s32 %p1, %r1, 5;\n@%p1 st.global.f32 [%d5], 0f3F800000;", x, x, fresh=(0,))
    with pytest.raises(KernelFault, match=r"written: 1 elements of an output, float32 \[32\].*the first of them 5"):
        execution.device.check_written(x)
    with pytest.raises(KernelFault, match="left unwritten"):
        execution.device.check_all_written()
    x[5] = 2  # by torch: it is watched by value
    execution.device.check_written([x])
    execution.device.check_all_written()


def test_unwritten_shared_memory_and_its_bounds() -> None:
    fault = caught(f"{TILE}ld.shared.f32 %f1, [%r5];", torch.zeros(1), shared=128)
    assert "reads byte 0 of shared memory, which nothing has written" in fault.reason
    fault = caught(f"{TILE}st.shared.f32 [%r5+4], %f1;", torch.zeros(1), shared=128)
    assert "writes bytes 128 to 131 of shared memory, of which the launch has 128" in fault.reason
    assert fault.places[0].thread == (31, 0, 0)


NEIGHBOUR = f"""{TILE}
    st.shared.b32 [%r5], %r4;
    {{barrier}}
    .loc 1 9 1
    add.s32 %r7, %r4, 1;
    rem.s32 %r7, %r7, {{threads}};
    mad.lo.s32 %r8, %r7, 4, %r6;
    ld.shared.b32 %r9, [%r8];
    mad.wide.s32 %d5, %r1, 4, %d1;
    st.global.b32 [%d5], %r9;
"""


@pytest.mark.parametrize(("threads", "barrier"), [(32, "bar.warp.sync -1;"), (64, "bar.sync 0;"), (32, "bar.sync 0;")])
def test_a_barrier_orders(threads: int, barrier: str) -> None:
    out = torch.zeros(threads, dtype=torch.int32)
    launch(NEIGHBOUR.format(barrier=barrier, threads=threads), out, threads=threads, shared=4 * threads)
    assert out.tolist() == [(k + 1) % threads for k in range(threads)]


SHUFFLE = "shfl.sync.bfly.b32 %r20, %r4, 1, 31, -1;"


@pytest.mark.parametrize("barrier", ["", SHUFFLE, "vote.sync.any.pred %p5, %p5, -1;", "bar.warp.sync 65535;"])
def test_a_race_within_a_warp(barrier: str) -> None:
    """Neither a shuffle nor a vote orders memory."""
    out = torch.zeros(32, dtype=torch.int32)
    if "65535" in barrier:
        barrier = "setp.lt.s32 %p6, %r4, 16;\n@%p6 bar.warp.sync 65535;"
    body = NEIGHBOUR.format(barrier=barrier, threads=32)
    with pytest.raises(KernelFault, match="nothing orders them") as fault:
        launch(body, out, shared=128)
    store, load = fault.value.places
    assert store.instruction.startswith("st.shared") and load.instruction.startswith("ld.shared")
    assert load.source == "written.py:9" and store.thread != load.thread


def test_a_race_between_warps_and_between_blocks() -> None:
    body = NEIGHBOUR.format(barrier="bar.warp.sync -1;", threads=64)
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(KernelFault) as fault:
        launch(body, out, threads=64, shared=256)
    assert {place.thread[0] // 32 for place in fault.value.places if place.thread} == {0, 1}
    total = torch.zeros(1, dtype=torch.int32)
    add = "ld.global.b32 %r5, [%d1];\nadd.s32 %r5, %r5, 1;\nsetp.eq.s32 %p1, %r4, 0;\n@%p1 st.global.b32 [%d1], %r5;"
    fault = caught(add, total, blocks=2)
    assert {place.block for place in fault.places} == {(0, 0, 0), (1, 0, 0)}


def test_a_barrier_that_a_part_reaches() -> None:
    body = "setp.ge.s32 %p1, %r4, 32;\n@%p1 bra $end;\n.loc 1 8 1\nbar.sync 0;\n$end:"
    fault = caught(body, torch.zeros(1), threads=64)
    assert "lanes wait for others that never come: 32 wait at `bar.sync 0`, 32 have returned" in fault.reason
    assert fault.places[0].source == "written.py:8"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "setp.eq.s32 %p1, %r4, 5;\n@%p1 bra $end;\nvote.sync.ballot.b32 %r5, %p2, -1;\n$end:",
            "31 wait at `vote.sync",
        ),
        (
            "setp.lt.s32 %p1, %r4, 16;\n@%p1 bra $one;\nbar.warp.sync -1;\nbra $end;\n$one:\n"
            "vote.sync.any.pred %p3, %p2, -1;\n$end:",
            "16 wait at `bar.warp.sync -1`, 16 wait at `vote.sync.any",
        ),
        ("setp.ge.s32 %p1, %r4, 8;\n@%p1 bra $end;\nshfl.sync.idx.b32 %r5, %r4, 9, 31, 255;\n$end:", "reads lane 9"),
        ("vote.sync.ballot.b32 %r5, %p2, 1;", "not in its own mask 0x00000001"),
    ],
    ids=["absent_lane", "two_sites", "foreign_source", "not_in_own_mask"],
)
def test_misuse_of_a_warp(body: str, reason: str) -> None:
    assert reason in caught(body, torch.zeros(1)).reason


def test_a_kernel_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajkern.testing.ptx.machine.MOST_STEPS", 100)
    with pytest.raises(KernelFault, match="does not end within 100 steps"):
        launch("$again:\nbra $again;", torch.zeros(1))


@pytest.mark.parametrize("shape", [{"threads": 1025}, {"blocks": 0}, {"shared": 2**20}])
def test_a_launch_that_a_gpu_refuses(shape: dict[str, int]) -> None:
    with pytest.raises(KernelFault, match="a GPU refuses a launch of"):
        launch(ELEMENTS, torch.zeros(1), torch.zeros(1), **shape)


def test_bad_arguments_of_compiled() -> None:
    for options, message in (
        ({"arch": "sm_42"}, "arch must be one of .*'sm_90'.*; got 'sm_42'"),
        ({"arch": "sm_90", "order": "forward"}, "order must be one of 'lowest', 'random'; got 'forward'"),
        ({"arch": "sm_90", "order": "random", "seed": None}, 'order="random" needs a seed'),
    ):
        with pytest.raises(ValueError, match=message), compiled(**options):
            pass
