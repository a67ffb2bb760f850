"""Who may import whom, read from the sources; and what `import trajkern` does not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import trajkern as tk
from trajkern._backends import OWNERS

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {"trajkern"}

# layer -> the layers it may import ("trajkern" is the public names); a layer may always import itself
ARROWS = {
    "__init__": {"_backends", "_lazy", "_results", "_start", "layouts", "losses", "ops", "recipes"},
    "__main__": {"cli"},
    "_backends": {"_checks", "_ext"},
    "_checks": {"_dtypes", "_memory", "_suggest"},
    "_values": {"_checks"},
    "_lazy": set(),
    "_files": set(),
    "_no_memory": set(),
    "_start": set(),
    "_suggest": set(),
    "_memory": set(),
    "_parser": {"_start", "_suggest"},
    "_dtypes": set(),
    "_ext": set(),
    "_extras": set(),
    "_results": set(),
    "losses": {"_checks", "_dtypes"},
    "layouts": {"_checks", "_dtypes", "_ext", "_values", "losses"},
    "_tiles": {"_dtypes", "losses"},
    "_native": {"_checks", "_dtypes", "_ext", "_tiles", "_values", "losses"},
    "_triton": {"_dtypes", "_tiles", "losses"},
    "reference": {"_dtypes", "_results", "losses"},
    "ops": {"_backends", "_checks", "_dtypes", "_results", "_tiles", "_values", "layouts", "losses"},
    "recipes": {"_checks", "_dtypes", "_ext", "_lazy", "_results", "_values", "layouts", "ops", *PUBLIC},
    "credit": {"_checks", "_dtypes", "_lazy", "_results", "_values", "layouts", "losses", "ops", "recipes"},
    "integrations": {
        "_checks",
        "_dtypes",
        "_extras",
        "_lazy",
        "_values",
        "credit",
        "layouts",
        "losses",
        "ops",
        "recipes",
        *PUBLIC,
    },
    "testing": {
        "_dtypes",
        "_backends",
        "_checks",
        "_lazy",
        "_native",
        "_results",
        "layouts",
        "losses",
        "ops",
        "reference",
        *PUBLIC,
    },
    "trainer": {
        "_checks",
        "_extras",
        "_files",
        "_no_memory",
        "_start",
        "_suggest",
        "credit",
        "recipes",
        "integrations",
        *PUBLIC,
    },
    "bench": {"_bench"},
    "cli": {
        "_backends",
        "_bench",
        "_ext",
        "_no_memory",
        "_parser",
        "_start",
        "testing",
        "trainer",
        "validate",
        *PUBLIC,
    },
    "validate": {"_files", "_parser", "_start", "testing", *PUBLIC},
}
# What only runs when a function is called: the chosen backend, by name.
LAZY = {
    "__init__": {"bench", "credit", "integrations", "testing"},  # on attribute access
    "_backends": {"_native", "_triton", "reference"},
    "integrations": {"_triton"},
    "trainer": {"_bench"},  # what the eager head costs, measured as the benchmark does
}
THIRD_PARTY = {  # else torch and numpy
    "_triton": {"torch", "triton"},
    "_backends": {"torch", "triton"},
}
FREE = {"cli", "integrations", "testing", "trainer", "validate"}  # import what they need

PYTHON = sorted([*(ROOT / "trajkern").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "_triton" if parts[0] == "triton_kernels" else parts[1]


class Import(NamedTuple):
    module: str
    name: str | None  # of `from module import name`
    lazy: bool  # inside a function, or read by type checkers alone

    @property
    def layer(self) -> str:
        """The layer reached; "trajkern" is the public names."""
        if self.module != "trajkern":
            return self.module.split(".")[1]
        return self.name if self.name in ARROWS and self.name not in tk.__all__ else "trajkern"


def _imports(path: Path) -> Iterator[Import]:
    """Every import statement, and every string that names a module of ours (`importlib` takes those)."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) or _unrun(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # the kernels name themselves relatively: their folder's name is not their package's
            assert node.level == 0 or _layer(path) == "_triton" and node.level == 1, f"{_name(path)}: relative import"
            module = f"trajkern._triton.{node.module}" if node.level else node.module or ""
            yield from (Import(module, alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"trajkern(\.\w+)+", str(node.value)):
            yield Import(str(node.value), None, True)


def _unrun(node: ast.AST) -> bool:
    """What only type checkers read."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _public_attributes(path: Path) -> Iterator[str]:
    """What is read off `import trajkern as tk`."""
    tree = ast.parse(path.read_text())
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names = {alias.asname or alias.name for alias in aliases if alias.name == "trajkern"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield node.attr


def test_every_file_has_a_layer() -> None:
    assert {_layer(path) for path in PYTHON} <= set(ARROWS)


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_arrows(path: Path) -> None:
    layer = _layer(path)
    lazy = LAZY.get(layer, set())
    libraries = THIRD_PARTY.get(layer, {"torch", "numpy"})
    wrong = []
    for imported in _imports(path):
        top = imported.module.split(".")[0]
        if top == "trajkern":
            if imported.layer not in ARROWS[layer] | {layer} | (lazy if imported.lazy else set()):
                wrong.append(imported)
        elif layer not in FREE and top not in libraries and top not in sys.stdlib_module_names:
            wrong.append(imported)
    assert not wrong, f"{_name(path)} ({layer}) may not import {wrong}"


def test_no_circle() -> None:
    """Modules can be put in an order in which each imports only those before it."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PYTHON}
    modules = {name.replace("triton_kernels", "trajkern._triton"): path for name, path in modules.items()}
    order = TopologicalSorter[str]()
    for module, path in modules.items():
        for imported in (imported for imported in _imports(path) if not imported.lazy):
            target = f"{imported.module}.{imported.name}"
            target = target if target in modules else imported.module
            if target in modules and target != module:
                order.add(module, target)
    order.prepare()  # raises where there is one


@pytest.mark.parametrize("path", [p for p in PYTHON if _layer(p) in ("integrations", "trainer")], ids=_name)
def test_users_of_the_package_see_public_names_only(path: Path) -> None:
    names = {imported.name for imported in _imports(path) if imported.module == "trajkern" and imported.name}
    private = (names | set(_public_attributes(path))) - {*tk.__all__, "__version__", "credit", "recipes"}
    assert not private, f"{_name(path)} uses {sorted(private)}"


@pytest.mark.parametrize("path", NATIVE, ids=_name)
def test_includes(path: Path) -> None:
    """A folder of csrc knows csrc/common and itself; nobody knows torch; nvcc never sees pybind11."""
    folder = path.parent.name
    for include in re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text()):
        assert not include.startswith(("torch/", "ATen/", "c10/")), f"{_name(path)} includes {include}"
        ours = [p for p in (path.parent / include, ROOT / "csrc" / include) if p.exists()]
        for target in ours:
            assert target.resolve().parent.name in {"common", folder}, f"{_name(path)} includes {include}"
        if folder == "common" or path.suffix in {".cu", ".cuh"}:
            assert "pybind11" not in include, f"{_name(path)} includes {include}"


@pytest.mark.parametrize("family", sorted(OWNERS))
def test_one_name_per_family(family: str) -> None:
    gpu = {"triton": "triton_kernels/{}.py", "cuda": "csrc/cuda/{}.cu"}[OWNERS[family]["cuda"]]
    layers = ["trajkern/ops/{}.py", "trajkern/reference/{}.py", "trajkern/_native/{}.py", "csrc/cpu/{}.cpp", gpu]
    missing = [name for name in (layer.format(family) for layer in layers) if not (ROOT / name).is_file()]
    assert not missing, f"{family} has no {missing}"


def test_every_kernel_file_bears_a_family_name() -> None:
    helpers = {"__init__", "primitives", "configs"}
    helpers |= {
        "_agreement",
        "_autograd",
        "_head_arguments",
        "_library",
        "_loss_arguments",
        "_rank_moments",
        "_temperature",
    }
    folders = ("csrc/cpu", "csrc/cuda", "triton_kernels", "trajkern/ops")
    files = [p for folder in folders for p in (ROOT / folder).iterdir() if p.suffix in {".cpp", ".cu", ".py"}]
    stems = {p.stem.removeprefix("bind_") for p in files}
    strangers = {stem for stem in stems - helpers if not stem.startswith(tuple(OWNERS))}
    assert not strangers, f"no family in {sorted(OWNERS)} bears the names {sorted(strangers)}"


def test_import_loads_no_optional_package() -> None:
    optional = ["triton", "transformers", "reasoning_gym", "matplotlib", "tyro", "trajkern._C_cuda", "trajkern.trainer"]
    code = f"import sys, trajkern; print(*[name for name in {optional} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []
