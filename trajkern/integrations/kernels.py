"""The Triton families as a kernel of HuggingFace's ``kernels``: a folder that ``get_local_kernel`` loads.

    from trajkern.integrations import kernels

    kernels.write("kernel")

    from kernels import get_local_kernel

    triton_kernels = get_local_kernel(Path("kernel"))
    logprobs, norm = triton_kernels.logprob.token_stats(logits, targets, None, 1.0, None, 0)

The folder needs nothing of trajkern: the families' files and the tile loops that the head's share are copied, and
their imports made relative. What it offers are the launchers, as the schemas of ``trajkern.ops`` name them; autograd,
argument checks and the choice of a backend are trajkern's own.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import trajkern as tk

FAMILIES = ("divergence", "head", "logprob", "policy_loss", "reflection", "topk")
SHARED = (
    "_dtypes.py",
    "_tiles/*.py",
    "losses/__init__.py",
    "losses/inputs.py",
    "losses/kinds.py",
    "losses/streams.py",
)  # trajkern's modules that they import
VARIANT = "build/torch-universal"


def write(folder: str | Path) -> Path:
    """Make the kernel's folder; returns the variant's in it.

    Args:
        folder: where; made if missing. What an earlier call wrote there is replaced, nothing else is touched.

    Raises:
        FileExistsError: ``folder`` holds a variant that is no kernel of trajkern.
    """
    variant = Path(folder) / VARIANT
    if variant.exists():
        _refuse_others(variant)
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
        package_file.write(f"\nfrom . import {', '.join(FAMILIES)}\n")
    (partial / "metadata.json").write_text(json.dumps(_metadata(), indent=1) + "\n")
    partial.rename(variant)
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
    try:
        name = json.loads((variant / "metadata.json").read_text())["name"]
    except (OSError, ValueError, KeyError):
        name = None
    if name != "trajkern":
        raise FileExistsError(f"folder must hold no other kernel; {variant} is not trajkern's")
