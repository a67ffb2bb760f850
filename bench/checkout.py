"""``python bench/checkout.py MODULE ...``: a module of this checkout before anything is installed.

Packages whose folder bears another name there are put in their places; an installation needs none of this.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"trajkern._bench": ROOT / "bench", "trajkern._triton": ROOT / "triton_kernels"}


def place_packages() -> None:
    sys.path[0] = str(ROOT)  # not this folder, whose files have names that others may import
    for name, folder in ELSEWHERE.items():
        if importlib.util.find_spec(name) is None:
            spec = importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None and spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            setattr(sys.modules["trajkern"], name.rpartition(".")[2], module)


if __name__ == "__main__":
    place_packages()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
