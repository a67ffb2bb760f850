"""``make sanitize``: trajkern._C built with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer,
under the tests that reach every kernel and layout.

OpenMP's runtime is no instrumented code: ThreadSanitizer sees none of its barriers, and would report every pair of
accesses before and after one. Under it the kernels' loops therefore run in std::threads (csrc/common/parallel.h), whose
start and end it sees, and torch has one thread. A process forked beside threads that starts others it does not follow:
the test of a DataLoader that forks is left out. What other libraries read and write is not looked at.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from trajkern._bench.reliability.page import ROOT, Row, record, row

BUILD = ROOT / "build" / "sanitize"


class Build(NamedTuple):
    """A sanitized _C, and what runs under it."""

    title: str
    flags: str
    library: str  # loaded before Python is
    options: str  # of its runtime
    tests: tuple[str, ...]
    chosen: str = ""  # pytest's -k
    threads: str = "2"  # of OpenMP


LAYOUTS = ("test_tree_layout.py", "test_span_layout.py", "test_owned_layouts.py", "test_threads.py")
BUILDS = {
    "address": Build(
        "AddressSanitizer and UndefinedBehaviorSanitizer",
        # Python's types of another library have no C++ type to compare with
        "-fsanitize=address,undefined -fno-sanitize=vptr",
        "libasan.so",
        "detect_leaks=0:halt_on_error=1:print_stacktrace=1",
        ("test_contract.py", "test_bad_input.py", "test_fuzz.py", "recipes/test_srl.py", *LAYOUTS),
    ),
    "thread": Build(
        "ThreadSanitizer",
        "-fsanitize=thread",
        "libtsan.so",
        "ignore_noninstrumented_modules=1:halt_on_error=0:exitcode=0:report_signal_unsafe=0",
        ("test_threads.py", "recipes/test_srl.py"),
        chosen="not forks",
        threads="1",
    ),
}


def built(name: str) -> Path:
    """A folder in which the package is this one but for its sanitized _C."""
    build, folder = BUILDS[name], BUILD / name
    environment = os.environ | {"CFLAGS": build.flags, "TRAJKERN_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    package = folder / "package" / "trajkern"
    shutil.rmtree(package.parent, ignore_errors=True)
    package.mkdir(parents=True)
    (module,) = (folder / "lib" / "trajkern").glob("_C.*")
    for path in (*(x for x in (ROOT / "trajkern").iterdir() if not x.name.startswith("_C.")), module):
        (package / path.name).symlink_to(path)
    for link, source in (("_bench", "bench"), ("_triton", "triton_kernels")):  # which an editable build has linked
        if not (package / link).exists():
            (package / link).symlink_to(ROOT / source)
    return package.parent


def libraries(build: Build) -> str:
    """The paths of the compiler's runtimes: the sanitizer's, and C++'s, which it must find when it begins."""
    compiler, paths = os.environ.get("CXX", "c++"), []
    for name in (build.library, "libstdc++.so.6"):
        asked = [compiler, f"-print-file-name={name}"]
        paths.append(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
        if not os.path.isabs(paths[-1]):
            raise SystemExit(f"{compiler} has no {name}: install the sanitizers' runtimes, or set CXX to GCC")
    return ":".join(paths)


def attacked(name: str, chosen: str) -> Row:
    """Build, run, and count the reports."""
    build, package = BUILDS[name], built(name)
    reports = BUILD / name / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    options = f"{build.options}:log_path={reports}/report"
    environment = os.environ | {
        "LD_PRELOAD": libraries(build),
        "OMP_NUM_THREADS": build.threads,
        "PYTHONPATH": str(package),
        **{f"{kind}_OPTIONS": options for kind in ("ASAN", "UBSAN", "TSAN")},
    }
    asked = "import trajkern._C as c, trajkern; print(c.__file__)"
    found = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, cwd=package)
    if Path(found.stdout.strip()).parent.parent != package:
        raise SystemExit(f"the sanitized _C must be loaded from {package}; got {found.stdout} {found.stderr[-2000:]}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={package} {ROOT}"]
    command += [f"tests/{x}" for x in build.tests]
    if parts := [f"({x})" for x in (build.chosen, chosen) if x]:
        command += ["-k", " and ".join(parts)]
    done = subprocess.run([*command, "-m", "not slow"], cwd=ROOT, env=environment, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(f"{build.title}: {last}", flush=True)
    count = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", last)}
    texts = [path.read_text() for path in reports.iterdir()]
    summaries = sorted({line for text in texts for line in re.findall(r"(?:SUMMARY|runtime error): .*", text)})
    problems = count.get("failed", 0) + count.get("error", 0) + len(summaries)
    if done.returncode and not problems:  # it died in the middle of a test
        problems, summaries = 1, [done.stderr.strip()[-300:]]
    if problems:
        print(*texts, done.stdout[-6000:], done.stderr[-3000:], sep="\n", flush=True)
    reason = "; ".join(summaries[:3]) or ("tests failed" if problems else "")
    area = f"{build.title}: tests of ops, layouts and threads" + (f" ({chosen})" if chosen else "")
    return row(area, max(count.get("passed", 0) + problems, 1), problems, "make sanitize", reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("builds", nargs="*", help=f"of {', '.join(BUILDS)}; by default all")
    parser.add_argument("-k", dest="chosen", default="", help="a part of the tests, as pytest's")
    arguments = parser.parse_args()
    if unknown := set(arguments.builds) - set(BUILDS):
        parser.error(f"builds must be of {', '.join(BUILDS)}; got {', '.join(unknown)}")
    rows = [attacked(name, arguments.chosen) for name in arguments.builds or BUILDS]
    record("sanitize", rows)
    if any(x.fell_short for x in rows):
        raise SystemExit("\n".join(f"{x.area}: {x.reason}" for x in rows if x.fell_short))


if __name__ == "__main__":
    main()
