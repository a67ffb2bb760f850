"""docs/speed.md's table of times is the committed results', and so are the README's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajkern._bench import readme
from trajkern._bench.case import BARE

RESULTS = readme.ROOT / "bench" / "results"


def test_the_page_is_up_to_date() -> None:
    text = readme.PAGE.read_text()
    assert readme.replaced(text, readme.section(RESULTS)) == text, "make readme"


def case(op: str, work: str, **seconds: float) -> dict[str, Any]:
    taken = {name: {"median": x} for name, x in seconds.items()}
    return {"op": op, "work": work, "shape": "7 rows", "host": False, "bytes": 1, "seconds": taken}


def report(date: str, cases: list[dict[str, Any]], **machine: str) -> dict[str, Any]:
    return {
        "date": f"{date}T00:00:00+00:00",
        "versions": {"torch": "2.99"},
        "cases": cases,
        "machine": {"cpu": "A Processor", "threads": 3, **machine},
        "peers": {"trl": "1.2", "liger": "0.1", "quack": "not installed", "torch": "2.99"},
    }


def test_a_gpu_comes_first_and_what_it_has_not_measured_is_named(tmp_path: Path) -> None:
    both = case("spread", "forward", trajkern=2e-3, eager=4e-3, trl=7e-3, liger=6e-3, **{BARE: 1e-3})
    both |= {"memory_of": {"name": "x", "bytes": 1}, "peak_bytes": {"trajkern": 2**11, "eager": 3 * 2**20, "trl": 7}}
    for folder, name, content in (
        ("a-cpu", "2026-01-01", report("2026-01-01", [case("gae", "old", trajkern=1.0, eager=1.0)])),
        ("a-cpu", "2026-01-02", report("2026-01-02", [both, case("gae", "forward", trajkern=1.0, eager=3.0)])),
        ("b-gpu", "20260103-000000", {"stages": {"benchmark": {"results": report("2026-01-03", [both], gpu="H9")}}}),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(content))
    text = readme.section(tmp_path)
    heads = [line for line in text.splitlines() if line.endswith(":")]
    assert heads[0].startswith("H9, 2026-01-03, torch 2.99, trl 1.2, liger 0.1;")
    assert heads[1].startswith("A Processor, 3 threads, 2026-01-02, torch 2.99, trl 1.2, liger 0.1;")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert cells[0] == ["`spread`", "forward: 7 rows", "2 ms", "4 ms", "–", "6 ms (liger)", "2 KiB; 3 MiB"]
    assert cells[2] == ["`gae`", "forward: 7 rows", "1 s", "3 s", "–", "–", ""]
    assert text.endswith("Not measured on a GPU yet: `gae`.")


def test_no_gpu_is_said(tmp_path: Path) -> None:
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu" / "2026-01-01.json").write_text(json.dumps(report("2026-01-01", [])))
    assert readme.section(tmp_path).endswith("**None of these figures has been measured on a GPU yet.**")


def test_the_readmes_figures() -> None:
    text = " ".join((readme.ROOT / "README.md").read_text().split())
    report = readme.newest(RESULTS / "xeon-2.8ghz-2-cores")
    of = {(case["op"], case["work"], case["shape"]): case["seconds"] for case in report["cases"]}
    logprobs = of["token_logprobs", "forward + backward", "256 × 151,936 float32"]
    loss = of["policy_loss", "forward + backward, grpo with KL", "1,048,576 tokens, 1,024 trajectories"]
    ms = [f"{1000 * seconds[name]['median']:.2g}" for seconds, name in ((loss, "trajkern"), (loss, "eager"))]
    whole = [f"{1000 * logprobs[name]['median']:.0f}" for name in ("trajkern", "eager", "trl")]
    assert f"take {whole[0]} ms, eager torch {whole[1]}, TRL's function {whole[2]};" in text
    assert f"tokens {ms[0]} ms, eager torch {ms[1]}, verl's {1000 * loss['verl']['median']:.0f}." in text
    assert f"({report['date'][:10]})" in text
