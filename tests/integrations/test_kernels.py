"""The folder for HuggingFace's kernels: it loads by itself, and computes what the package does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trajkern as tk
from trajkern.integrations import kernels as adapter

pytest.importorskip("triton")
SCRIPT = """
import json, sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

sys.modules["trajkern"] = None  # nothing of the package may be needed
folder = Path(sys.argv[1])
try:
    from kernels import get_local_kernel
except ImportError:
    get_local_kernel = None
if get_local_kernel:
    loaded = get_local_kernel(folder)
else:
    spec = spec_from_file_location("kernel", folder / "build/torch-universal/__init__.py")
    loaded = sys.modules["kernel"] = module_from_spec(spec)
    spec.loader.exec_module(loaded)
import torch
g = torch.Generator().manual_seed(0)
logits, targets = torch.randn(3, 40, generator=g), torch.tensor([0, 39, 7])
print(json.dumps(loaded.logprob.token_stats(logits, targets, None, 1.0, None, 0)[0].tolist()))
print(sorted(name for name in vars(loaded) if hasattr(vars(loaded)[name], "__file__") and name[0] != "_"))
"""


def test_it_loads_and_computes_without_the_package(tmp_path: Path) -> None:
    """In Triton's interpreter, in a process where trajkern cannot be imported."""
    adapter.write(tmp_path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values, families = done.stdout.strip().splitlines()[-2:]
    g = torch.Generator().manual_seed(0)
    expected = tk.token_logprobs(torch.randn(3, 40, generator=g), torch.tensor([0, 39, 7]))
    torch.testing.assert_close(torch.tensor(eval(values)), expected)
    assert set(adapter.FAMILIES) <= set(eval(families))


def test_every_triton_family_is_there() -> None:
    from trajkern._backends import OWNERS

    assert set(adapter.FAMILIES) == {family for family, owners in OWNERS.items() if owners["cuda"] == "triton"}


def test_writing_again_replaces_it(tmp_path: Path) -> None:
    first = adapter.write(tmp_path)
    (first / "stale.py").write_text("")
    again = adapter.write(tmp_path)
    assert again == first and not (first / "stale.py").exists()
    assert [x.name for x in first.parent.iterdir()] == [first.name]


def test_another_kernel_is_not_overwritten(tmp_path: Path) -> None:
    other = tmp_path / adapter.VARIANT
    other.mkdir(parents=True)
    (other / "kernel.py").write_text("precious")
    with pytest.raises(FileExistsError, match="folder must hold no other kernel"):
        adapter.write(tmp_path)
    assert (other / "kernel.py").read_text() == "precious"


OTHERS = [b"", b"{", b"[]", b"null", b'"x"', b"3", b"{}", b'{"name": ["trajkern"]}', b"[" * 100_000, b"\xff\xfe", b"\0"]


@pytest.mark.parametrize("found", OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize("name", [f"{adapter.VARIANT}/metadata.json", adapter.CARD, adapter.BENCHMARK])
def test_whatever_another_file_holds_it_is_not_overwritten(tmp_path: Path, name: str, found: bytes) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(found)
    with pytest.raises(FileExistsError, match="folder must hold no other kernel"):
        adapter.write(tmp_path)
    assert path.read_bytes() == found and [x for x in tmp_path.rglob("*") if x.is_file()] == [path]


TAKEN = ["build", adapter.VARIANT, f"{adapter.VARIANT}/metadata.json", adapter.CARD, "benchmarks", adapter.BENCHMARK]


@pytest.mark.parametrize("taken", ["a file", "a folder", "a link to nowhere"])
@pytest.mark.parametrize("name", TAKEN)
def test_whatever_stands_in_its_place_is_not_overwritten(tmp_path: Path, name: str, taken: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if taken == "a file":
        path.write_text("precious")
    elif taken == "a link to nowhere":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / "precious").write_text("")
    before = sorted(tmp_path.rglob("*"))
    if taken == "a folder" and name in ("build", "benchmarks"):
        assert adapter.write(tmp_path).is_dir() and (path / "precious").exists()
        return
    with pytest.raises(FileExistsError, match="folder must hold no other kernel"):
        adapter.write(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_kernels_card_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / adapter.CARD).write_text("precious")
    with pytest.raises(FileExistsError, match="folder must hold no other kernel's files; .*README.md"):
        adapter.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [adapter.CARD]


def test_metadata_has_a_digest_of_every_file(tmp_path: Path) -> None:
    variant = adapter.write(tmp_path)
    metadata = json.loads((variant / "metadata.json").read_text())
    files = {str(path.relative_to(variant)): path for path in variant.rglob("*") if path.is_file()}
    assert metadata["digest"]["algorithm"] == "sha256"
    assert set(metadata["digest"]["files"]) == set(files) - {"metadata.json"}
    for name, expected in metadata["digest"]["files"].items():
        assert base64.b64decode(expected) == hashlib.sha256(files[name].read_bytes()).digest()
    assert (tmp_path / adapter.CARD).read_text().startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")


VERIFY = """
import sys
from pathlib import Path
from kernels._rust import Digest, Metadata

folder = Path(sys.argv[1])
metadata = Metadata.read_from_file(folder / "metadata.json")
metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))
print(metadata.name, metadata.version, metadata.license)
"""


def test_the_package_reads_the_metadata_and_verifies_the_files(tmp_path: Path) -> None:
    pytest.importorskip("kernels")
    variant = adapter.write(tmp_path)
    told = subprocess.run([sys.executable, "-c", VERIFY, str(variant)], capture_output=True, text=True)
    assert told.returncode == 0 and "Apache-2.0" in told.stdout, told.stderr
    (variant / "logprob.py").write_text("tampered")
    told = subprocess.run([sys.executable, "-c", VERIFY, str(variant)], capture_output=True, text=True)
    assert told.returncode != 0 and "logprob.py" in told.stderr


BENCHMARK = """
import sys
from pathlib import Path
from kernels.cli.benchmark import discover_benchmark_classes, run_benchmark_class

folder = Path(sys.argv[1])
(timed,) = discover_benchmark_classes(folder / "benchmarks/benchmark.py", folder)
results, _ = run_benchmark_class(timed, 1, 0, str(folder), True, "local")
print({name: result.verified for name, result in results.items()})
"""


@pytest.mark.slow
def test_its_benchmark_runs_and_is_verified(tmp_path: Path) -> None:
    """In Triton's interpreter."""
    pytest.importorskip("kernels")
    adapter.write(tmp_path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BENCHMARK, str(tmp_path)]
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert eval(told.stdout.strip().splitlines()[-1]) == {"forward": True, "backward": True}


def test_imports_become_relative() -> None:
    source = "import torch\nfrom trajkern._tiles import head\nfrom trajkern.losses.kinds import X\nfrom . import z\n"
    template = "import torch\nfrom {0}_tiles import head\nfrom {0}losses.kinds import X\nfrom . import z\n"
    assert adapter.relative(source) == template.format(".")
    assert adapter.relative(source, "..") == template.format("..")
