"""The Triton families as a kernel of HuggingFace's ``kernels``: a folder that ``get_local_kernel`` loads::

    from trajkern.integrations import kernels

    kernels.write("kernel")

    from kernels import get_local_kernel

    triton_kernels = get_local_kernel(Path("kernel"))
    logprobs, norm = triton_kernels.logprob.token_stats(logits, targets, None, 1.0, None, 0)

The folder needs nothing of trajkern: the families' files and the tile loops that the head's share are copied, and
their imports made relative. What it offers are the launchers, as the schemas of ``trajkern.ops`` name them; autograd,
argument checks and the choice of a backend are trajkern's own. It is laid out as a kernel repository of the Hub: the
one variant, ``metadata.json`` in it with a digest of its files, ``benchmarks/`` for ``kernels benchmark``, and a card.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import trajkern as tk
from trajkern._checks import describe

FAMILIES = ("divergence", "head", "logprob", "policy_loss", "reflection", "topk")
SHARED = (
    "_dtypes.py",
    "_tiles/*.py",
    "losses/__init__.py",
    "losses/inputs.py",
    "losses/kinds.py",
)  # trajkern's modules that they import
VARIANT = "build/torch-universal"
CARD, BENCHMARK = "README.md", "benchmarks/benchmark.py"


def write(folder: str | Path) -> Path:
    """Make the kernel's folder; returns the variant's in it.

    Args:
        folder: where; made if missing. What an earlier call wrote there is replaced, nothing else is touched.

    Raises:
        FileExistsError: ``folder`` holds a variant, a card or a benchmark that is no kernel's of trajkern, or something
            else in the place of one of these or of a folder that they lie in.
    """
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"folder must be a path, got {describe(folder)}")
    if any(x.exists() and not x.is_dir() for x in (Path(folder), *Path(folder).parents)):
        raise ValueError(f"folder must be a folder, or what one can be made at; got {folder}")
    variant = Path(folder) / VARIANT
    benchmark = Path(str(import_module("trajkern").__file__)).parent / "integrations/_kernels_benchmark.py"
    texts = {CARD: _card(), BENCHMARK: benchmark.read_text()}
    _refuse_others(variant)
    for name, text in texts.items():
        _refuse_other(Path(folder) / name, text)
    if variant.exists():
        shutil.rmtree(variant)
    partial = variant.with_name(variant.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    package = Path(str(import_module("trajkern").__file__)).parent
    kernels = Path(str(import_module("trajkern._triton.configs").__file__)).parent
    for source in sorted(kernels.glob("*.py")):
        (partial / source.name).write_text(relative(source.read_text()))
    for source in (path for pattern in SHARED for path in sorted(package.glob(pattern))):
        copy = partial / source.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(relative(source.read_text(), "." if copy.parent == partial else ".."))
    with (partial / "__init__.py").open("a") as package_file:
        package_file.write(f"\nfrom . import {', '.join(FAMILIES)}\n\n__all__ = {list(FAMILIES)}\n")
    (partial / "metadata.json").write_text(json.dumps(_metadata() | {"digest": _digest(partial)}, indent=1) + "\n")
    partial.rename(variant)
    for name, text in texts.items():
        (Path(folder) / name).parent.mkdir(exist_ok=True)
        (Path(folder) / name).write_text(text)
    return variant


def relative(source: str, top: str = ".") -> str:
    """The same module with its imports of trajkern's own modules relative to ``top``."""
    return re.sub(r"^from trajkern\.([\w.]+) import ", rf"from {top}\1 import ", source, flags=re.M)


def _metadata() -> dict[str, object]:
    major, minor, patch = (int(x) for x in tk.__version__.split("."))
    version = 10_000 * major + 100 * minor + patch
    return {
        "id": f"trajkern_{version}",
        "name": "trajkern",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }


def _refuse_others(variant: Path) -> None:
    _refuse_no_folder(variant)
    if not _is_there(variant):
        return
    try:
        metadata = json.loads((variant / "metadata.json").read_text())
    except (OSError, ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("name") != "trajkern":
        raise FileExistsError(f"folder must hold no other kernel; {variant} is not trajkern's")


def _refuse_other(path: Path, text: str) -> None:
    """A file of ours begins like the one that is to be written."""
    _refuse_no_folder(path.parent)
    if not _is_there(path):
        return
    try:
        found = path.read_text()
    except (OSError, ValueError):
        found = ""
    if not found.startswith(text.partition("\n\n")[0]):
        raise FileExistsError(f"folder must hold no other kernel's files; {path} is not trajkern's")


def _refuse_no_folder(path: Path) -> None:
    """What is to be a folder is none: a file, or a link that leads nowhere."""
    for x in (path, *path.parents):
        if _is_there(x) and not x.is_dir():
            raise FileExistsError(f"folder must hold no other kernel's files; {x} is no folder")


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _digest(variant: Path) -> dict[str, object]:
    """Of all files there so far: what ``kernels verify`` holds them against."""
    files = sorted(path for path in variant.rglob("*") if path.is_file())
    hashes = {str(x.relative_to(variant)): hashlib.sha256(x.read_bytes()).digest() for x in files}
    return {"algorithm": "sha256", "files": {name: base64.b64encode(x).decode() for name, x in hashes.items()}}


def _card() -> str:
    families = "\n".join(f"- `{name}`" for name in FAMILIES)
    return f"""---
library_name: kernels
license: apache-2.0
tags: [trajkern, triton, reinforcement-learning]
---

# trajkern's Triton kernels, version {tk.__version__}

Log-probs and softmax statistics of tokens, from logits or from hidden states, and their gradients; the policy loss in
one pass; divergences and likeliest tokens of a head; DRO's reflection reward. For NVIDIA GPUs of compute capability 8.0
and later, in float32, float16 and bfloat16.

```python
from pathlib import Path

from kernels import get_local_kernel

kernel = get_local_kernel(Path("kernel"))
logprobs, norm = kernel.logprob.token_stats(logits, targets, None, 1.0, None, 0)
```

{families}

Each module has its ops' launchers, which take what the schemas in trajkern's `trajkern/ops` say. The package itself
adds autograd, argument checks and the kernels for CPUs. `kernels benchmark` runs `{BENCHMARK}`.
"""
