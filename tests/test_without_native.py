"""Without the native module: every op runs as the reference, and the layouts find what they find with it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern import _ext, cli
from trajkern.recipes import srl
from trajkern.testing import SPECS, errors


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only the Python files are installed."""

    def refused() -> None:
        raise AssertionError("the native module was asked for")

    monkeypatch.setattr(_ext, "CPU_BUILT", False)
    monkeypatch.setattr(_ext, "cpu", refused)
    monkeypatch.setattr(_ext, "problem", lambda name: f"No module named 'trajkern.{name}'")


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("op", SPECS, ids=lambda op: op.name)
def test_every_op_runs(op: Any) -> None:
    shares = errors(op, getattr(tk, op.name), op.inputs(op.cases[0], torch.float32, "cpu"))
    assert shares and all(share <= 1 for share in shares.values()), shares


@pytest.mark.usefixtures("unbuilt")
def test_info_says_it_once_and_the_backend_is_refused() -> None:
    report = "\n".join(cli.report())
    assert report.count("trajkern._C is not built") == 1
    (line,) = (line for line in report.splitlines() if line.split()[:1] == ["token_logprobs"])
    assert line.split()[1] == "reference"
    with pytest.raises(RuntimeError, match="native.*`pip install .` with a C.*compiler in trajkern's source folder"):
        with tk.use_backend("native"):
            pass


@pytest.mark.slow
def test_a_process_without_the_module_imports_and_runs(tmp_path: Any) -> None:
    """The module's file is hidden before anything of trajkern is imported."""
    code = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "trajkern._C" else found(name, *rest)
import sys
sys.modules["trajkern._C"] = sys.modules["trajkern._C_cuda"] = None
import torch, trajkern as tk
x = torch.randn(3, 9, requires_grad=True)
tk.token_logprobs(x, torch.tensor([0, 1, 2])).sum().backward()
print(tk.backends()["native"].split(" (")[0], "|", x.grad.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "trajkern._C is not built | True\n"), done.stderr


def twice(monkeypatch: pytest.MonkeyPatch, f: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``f`` returns, or the text of its error, by the native module and without."""
    if not _ext.CPU_BUILT:
        pytest.skip("the native module is not built")

    def found() -> Any:
        try:
            return f()
        except ValueError as error:
            return str(error)

    native = found()
    with monkeypatch.context() as patch:
        patch.setattr(_ext, "CPU_BUILT", False)
        patch.setattr(_ext, "cpu", None)
        return native, found()


def drawn_batch(draw: random.Random) -> tk.PackedBatch:
    """Trajectories over two tokens, some of them empty or alike, in up to three groups."""
    rows = [[draw.randrange(2) for _ in range(draw.randrange(7))] for _ in range(draw.randrange(1, 9))]
    tokens = torch.tensor([x for row in rows for x in row], dtype=torch.int64)
    noise = torch.tensor([draw.choice((0.0, 0.0, 0.25, 1.0)) for _ in tokens])
    return tk.PackedBatch(
        tokens,
        torch.tensor([0, *map(len, rows)]).cumsum(0),
        torch.tensor(
            [place > 0 and draw.random() < 0.7 for row in rows for place in range(len(row))], dtype=torch.bool
        ),
        torch.tensor([draw.randrange(3) for _ in rows]),
        old_logprobs=noise if draw.random() < 0.7 else None,
        sampler_logprobs=noise.flip(0) if draw.random() < 0.5 else None,
    )


def arrays_of(layout: Any) -> list[torch.Tensor]:
    if isinstance(layout, tk.Spans):
        return [layout.start, layout.end, layout.trajectory, layout.index]
    return [layout.parent, layout.node_lengths, layout.source, layout.group_ids, layout.flat_index, *layout._nodes]


@pytest.mark.parametrize("seed", range(60))
def test_the_tree_of_a_batch_is_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    batch = drawn_batch(draw)
    options = {"on_mismatch": draw.choice(("raise", "split", "split")), "tolerance": draw.choice((0.0, 0.3))}
    native, plain = twice(monkeypatch, lambda: arrays_of(tk.Tree.from_trajectories(batch, **options)))
    if isinstance(native, str):
        assert plain == native
    else:
        for one, other in zip(native, plain, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("seed", range(20))
def test_turns_and_derived_arrays_are_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    batch = drawn_batch(draw)
    mask = torch.tensor([draw.random() < 0.6 for _ in batch.tokens], dtype=torch.bool)
    nodes = draw.randrange(0, 12)
    parent = torch.tensor([draw.randrange(-1, n + (draw.random() < 0.03)) for n in range(nodes)], dtype=torch.int64)
    lengths = torch.tensor([draw.randrange(4) for _ in range(nodes)], dtype=torch.int64)

    def found() -> list[torch.Tensor]:
        spans = tk.Spans.turns(mask, batch.cu_seqlens)
        tree = tk.Tree(parent, lengths, torch.arange(int((parent < 0).sum())))
        return [*arrays_of(spans), *tree._nodes, tree.flat_index, tree.attention_segments.keys]

    native, plain = twice(monkeypatch, found)
    if isinstance(native, str):
        assert plain == native
    else:
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(native, plain, strict=True))


def test_similarity_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "abcd", "bxd", "x" * 250 + "ab", "ab" + "x" * 250]
    ones, others = zip(*((a, b) for a in texts for b in texts), strict=True)
    for autojunk in (True, False):
        native, plain = twice(monkeypatch, lambda autojunk=autojunk: srl.similarity(ones, others, autojunk=autojunk))
        assert torch.equal(native, plain)
