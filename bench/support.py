"""``python -m trajkern._bench.support PART ...``: runs a part's tests here, and says in docs/support.md with what."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from trajkern._bench.table import table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- runs: begin (python -m trajkern._bench.support) -->", "<!-- runs: end -->"
COLUMNS = ("part", "with", "passed", "failed", "skipped", "where")


class Part(NamedTuple):
    """Tests that ask the same of their hosts."""

    tests: tuple[str, ...]
    hosts: tuple[str, ...]
    chosen: str = ""  # pytest's -k
    interpreted: bool = False  # Triton, which a host's own code needs


PARTS = {
    "ops": Part(("test_contract.py", "test_head.py", "test_numerics.py"), ("torch", "numpy")),
    "every op and gradient": Part(("test_contract.py",), ("torch", "numpy"), "dtype or no_gradient or every_op"),
    "autograd, defaults, ranks": Part(("test_autograd.py", "test_defaults.py", "test_agreement.py"), ("torch",)),
    "compiled graphs": Part(("test_compile.py",), ("torch",)),
    "models": Part(
        ("integrations/test_transformers.py", "integrations/test_tree_attention.py"), ("torch", "transformers", "peft")
    ),
    "wrappers": Part(("integrations/test_wrapped.py",), ("torch", "transformers", "peft"), "not every_op"),
    "trl": Part(
        ("integrations/test_trl.py", "integrations/test_trl_loss.py", "integrations/test_trl_async.py"),
        ("trl", "torch", "transformers"),
        interpreted=True,
    ),
    "verl": Part(("integrations/test_verl.py", "integrations/test_verl_head.py"), ("verl", "torch")),
    "skyrl": Part(
        ("integrations/test_skyrl_losses.py", "integrations/test_skyrl.py", "integrations/test_skyrl_credit.py"),
        ("skyrl", "torch"),
    ),
    "openrlhf": Part(("integrations/test_openrlhf.py",), ("openrlhf", "torch")),
    "verl on Ray": Part(("integrations/test_verl_ray.py",), ("ray", "verl", "torch")),
    "areal": Part(("integrations/test_areal.py", "integrations/test_areal_credit.py"), ("areal", "torch")),
    "liger": Part(("integrations/test_liger.py",), ("liger-kernel", "torch")),
}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def row(name: str, slow: bool) -> tuple[str, ...]:
    """Runs a part in this environment; its line of the table."""
    part = PARTS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{x}" for x in part.tests)]
    command += ["-k", part.chosen] if part.chosen else []
    command += [] if slow else ["-m", "not slow"]
    environment = os.environ | {"TRITON_INTERPRET": "1"} if part.interpreted else None
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    print(last, flush=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    count = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if "passed" not in count:
        raise SystemExit(f"no test of {name} passed; nothing is written")
    hosts = ", ".join(f"{x} {installed(x)}" for x in part.hosts)
    where = f"Python {platform.python_version()}, {platform.machine()}, no GPU, {time.strftime('%Y-%m-%d')}"
    failed = count.get("failed", 0) + count.get("error", 0)
    return (
        name if slow else f"{name}, quick",
        hosts,
        str(count["passed"]),
        str(failed),
        str(count.get("skipped", 0)),
        where,
    )


def replaced(page: str, new: list[tuple[str, ...]]) -> str:
    """The page with the new lines in the place of older ones of the same part and hosts."""
    before, rest = page.split(BEGIN)
    held, after = rest.split(END)
    lines = [tuple(x.strip() for x in line.strip("| ").split(" | ")) for line in held.strip().splitlines()[2:]]
    kept = {line[:2]: line for line in [*lines, *new]}
    return f"{before}{BEGIN}\n{table(COLUMNS, [kept[key] for key in sorted(kept)])}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--slow", action="store_true", help="also the tests that take long")
    arguments = parser.parse_args()
    for name in arguments.parts:
        new = row(name, arguments.slow)  # takes minutes, in which the page may change
        PAGE.write_text(replaced(PAGE.read_text(), [new]))


if __name__ == "__main__":
    main()
