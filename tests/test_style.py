"""What a reader can count on in every source file: its size, and what it never does."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import trajkern as tk

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("trajkern", "triton_kernels", "csrc", "bench", "docs", "examples", "tests")
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
SOURCES = sorted(
    [ROOT / "setup.py", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.*") if p.suffix in CODE)]
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
TEXT = [*SOURCES, *sorted(p for p in ROOT.glob("*") if p.suffix in {".md", ".toml", ".in"} or p.name == "Makefile")]

MAX_FILE_LINES = 400  # one sitting
MAX_PARAMETERS = 12  # where no one else's signature or a kernel's launch decides
MAX_FMT_SKIPS = 20
MAX_FUNCTION_LINES = 60  # one screen of code; a docstring of maths is counted apart

# file -> functions that bear another library's signature
OTHERS_SIGNATURES = {
    "trajkern/integrations/liger.py": {"__init__", "forward"},
    "tests/integrations/flash_reference.py": {"of_lengths"},
}

SHIPPED = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("trajkern", "triton_kernels", "csrc")]
HOT = [
    path
    for path in PYTHON
    if path.relative_to(ROOT).parts[:2] in {("trajkern", "ops"), ("trajkern", "_native")}
    or path.relative_to(ROOT).parts[0] == "triton_kernels"
]
LIBRARY = [
    path
    for path in PYTHON
    if (parts := path.relative_to(ROOT).parts)[0] in ("trajkern", "triton_kernels")
    and parts[1] not in ("testing", "trainer")  # at their entrances the default device is the CPU
]
FLOAT_FACTORIES = {"zeros", "ones", "empty", "rand", "randn", "linspace", "eye", "empty_strided"}
FACTORIES = {*FLOAT_FACTORIES, "full", "tensor", "as_tensor", "arange", "randint", "randperm"}
HOST_READS = {"item", "tolist", "nonzero", "numpy", "cpu", "synchronize"}
# file -> (function, read): the ones that may wait for the device, because they only run where that was asked for
HOST_READS_ALLOWED: dict[str, set[tuple[str, str]]] = {
    "trajkern/ops/_library.py": {("_of_packed_numbers", "tolist"), ("launch_on", "tolist")},  # of a CPU tensor
    "trajkern/ops/_agreement.py": {("agreed", "tolist"), ("_bytes", "numpy")},  # of other hosts' numbers; of the CPU's
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def _functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def _code_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def _parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    named = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    return named + (arguments.vararg is not None) + (arguments.kwarg is not None)


def test_file_length() -> None:
    long = {_name(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long, f"longer than {MAX_FILE_LINES} lines: {long}"


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_functions(path: Path) -> None:
    """Public ops, their twins in the reference and launched Triton kernels (``*_kernel``) may have more parameters."""
    long = {f.name: lines for f in _functions(path) if (lines := _code_lines(f)) > MAX_FUNCTION_LINES}
    assert not long, f"{_name(path)}: longer than {MAX_FUNCTION_LINES} lines: {long}"
    legal = {*tk.__all__, *OTHERS_SIGNATURES.get(_name(path), ())}
    many = {f.name: n for f in _functions(path) if (n := _parameters(f)) > MAX_PARAMETERS and f.name not in legal}
    many = {name: n for name, n in many.items() if not name.endswith("_kernel")}
    assert not many, f"{_name(path)}: more than {MAX_PARAMETERS} parameters: {many}"


def test_few_lines_are_laid_out_by_hand() -> None:
    skips = [(_name(path), n) for path in PYTHON if (n := path.read_text().count("# fmt: " + "skip"))]
    assert sum(n for _, n in skips) <= MAX_FMT_SKIPS, skips


def test_no_environment_variables() -> None:
    """What a call does is decided by its arguments; the one knob is the build's TRAJKERN_CUDA."""
    reads = re.compile(r"\bos\.environ\b|\bgetenv\b|\bimport environ\b")
    assert not [_name(path) for path in SHIPPED if reads.search(path.read_text())]


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_new_tensors_heed_no_default(path: Path) -> None:
    """``torch.set_default_device`` and ``set_default_dtype`` are a user's; a kernel's memory is where it runs."""
    lacking = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
                named = {keyword.arg for keyword in node.keywords}
                wanted = {"device", "dtype"} if node.func.attr in FLOAT_FACTORIES else {"device"}
                lacking += [(node.lineno, node.func.attr, x) for x in sorted(wanted - named)]
    assert not lacking, f"{_name(path)}: (line, factory, what it lacks): {lacking}"


CONVERTED = {"check_choice", "check_number", "check_count", "check_flag"}  # what they return is what was checked


@pytest.mark.parametrize("path", [x for x in LIBRARY if x.name != "_checks.py"], ids=_name)
def test_what_was_checked_is_what_is_used(path: Path) -> None:
    """No argument is read on as it came: it may be an array of one text, or a subclass that compares as it likes."""
    dropped = []
    for function in _functions(path):
        parameters = {x.arg for x in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and len(node.value.args) > 1:
                check, given = ast.unparse(node.value.func), ast.unparse(node.value.args[1])
                if check in CONVERTED and (given in parameters or given.startswith("self.")):
                    dropped.append((node.lineno, ast.unparse(node)))
    assert not dropped, f"{_name(path)}: {dropped}"


@pytest.mark.parametrize("path", HOT, ids=_name)
def test_no_host_reads(path: Path) -> None:
    """An op never waits for the device to learn a value."""
    reads = {
        (function.name, node.attr)
        for function in _functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in HOST_READS and ast.unparse(node.value) != "_ext"
    }
    assert reads == HOST_READS_ALLOWED.get(_name(path), set())


def test_no_leftovers() -> None:
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"])
    places = "|".join(["work", "root", "home", "tmp"])
    mark = re.compile(rf"\b(?:{marks})\b|(?<![\w.])/(?:{places})/[a-z]\S*")
    left = {_name(path): found for path in TEXT if (found := mark.findall(path.read_text()))}
    assert not left, left
