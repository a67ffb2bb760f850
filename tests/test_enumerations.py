"""What is passed to kernels by place has one order in Python, C++ and Triton, and a form reads what the table says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from trajkern._native._args import DTYPE
from trajkern._results import Branch
from trajkern.losses.kinds import (
    AGGREGATES,
    FORMS,
    KL_ESTIMATORS,
    METRICS,
    OPTIONS,
    PARAMETERS,
    RATIO_LEVELS,
    REDUCTIONS,
    SAMPLER_BAND,
    SAMPLER_CORRECTIONS,
)
from trajkern.ops import advantage, span, tree

ROOT = Path(__file__).resolve().parent.parent
TERMS = (ROOT / "csrc" / "cpu" / "policy_loss_terms.h").read_text()
JOB = (ROOT / "csrc" / "cpu" / "policy_loss_job.h").read_text()
TOLD = (ROOT / "csrc" / "cpu" / "policy_loss_metrics.h").read_text()
LAUNCH = (ROOT / "csrc" / "cpu" / "policy_loss.cpp").read_text()
COMMON = {path.stem: path.read_text() for path in (ROOT / "csrc" / "common").glob("*.h")}
KL = ("none", *KL_ESTIMATORS)

ENUMERATIONS = {  # C++'s -> (where, Python's)
    "Form": (TERMS, tuple(FORMS)),
    "RatioLevel": (TERMS, RATIO_LEVELS),
    "Kl": (TERMS, KL),
    "Aggregate": (TERMS, AGGREGATES),
    "Correction": (TERMS, SAMPLER_CORRECTIONS),
    "Metric": (TOLD, tuple(METRICS)),
    "Reduction": (TOLD, REDUCTIONS),
    "Baseline": (COMMON["advantage"], advantage.BASELINES),
    "Scale": (COMMON["advantage"], advantage.SCALES),
    "Singleton": (COMMON["advantage"], advantage.SINGLETONS),
    "SpanOp": (COMMON["span"], span.REDUCTIONS),
    "SubtreeOp": (COMMON["tree"], tree.REDUCTIONS),
    "SiblingBaseline": (COMMON["tree"], tree.BASELINES),
}
TRITON = {  # a kernel's compile-time option -> its members
    "FORM": tuple(FORMS),
    "KL": KL,
    "AGGREGATE": AGGREGATES,
    "CORRECTION": SAMPLER_CORRECTIONS,
}


def _found(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.DOTALL)
    assert len(found) == 1, f"{len(found)} matches of {pattern}"
    return found[0]


def _names(listed: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", listed))


def _functions(text: str) -> list[tuple[str, str]]:
    """(name, code) of every function at the margin."""
    return re.findall(r"^[A-Za-z][^\n;{]*?\b(\w+)\([^;{]*\) \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_members(name: str) -> None:
    text, expected = ENUMERATIONS[name]
    assert _names(_found(rf"enum class {name} : int \{{(.*?)\}};", text)) == expected
    assert int(_found(rf"members\({name}\) \{{ return (\d+); \}}", text)) == len(expected)


def test_dtypes() -> None:
    members = re.findall(r"(\w+) = (\d)", _found(r"enum class DType : int \{(.*?)\};", COMMON["dtype"]))
    assert {str(dtype).removeprefix("torch."): place for dtype, place in DTYPE.items()} == {
        name: int(place) for name, place in members
    }


def test_parameters() -> None:
    members = _names(_found(r"struct Params \{\s*Real (.*?);", TERMS))
    assert members == (*PARAMETERS, "ratio_low", "ratio_high")
    assert re.findall(r"(\w+)\(x\[(\d+)\]\)", TERMS) == [(name, str(k)) for k, name in enumerate(PARAMETERS)]
    assert int(_found(r"kParameters = (\d+);", TERMS)) == len(PARAMETERS)


def test_options() -> None:
    members = _found(r"struct Options \{(.*?)\n\n", JOB)
    declared = re.findall(r"^ +[\w:]+ (\w+(?:, \w+)*);", members, re.MULTILINE)
    assert _names(" ".join(declared)) == OPTIONS
    chosen = re.findall(r'choice<\w+>\("(\w+)", x\[(\d)\]\)', LAUNCH)
    assert chosen == [(name, str(k)) for k, name in enumerate(OPTIONS[:5])]


def test_metrics() -> None:
    """C++ reduces each as the table says, and Triton's columns bear their names."""
    rules = re.findall(r"\{Reduction::(\w+), Needs::(\w+)\}, +// (\w+)", TOLD)
    assert rules == [(metric.reduction, metric.needs or "nothing", name) for name, metric in METRICS.items()]
    assert {metric.reduction for metric in METRICS.values()} == set(REDUCTIONS)
    low, high = re.findall(r"kSampler(?:Low|High) = ([\d.]+)", TOLD)
    assert (float(low), float(high)) == SAMPLER_BAND
    pytest.importorskip("triton")
    module = importlib.import_module("trajkern._triton.policy_loss")
    columns = {name: getattr(module, {"kl": "KL_MEAN"}.get(name, name.upper())).value for name in METRICS}
    assert list(columns.values()) == list(range(len(METRICS)))
    assert module.FALLS.value < module.COLUMNS.value


def test_rows_of_a_branch() -> None:
    rows = _names(_found(r"enum BranchRow : int \{(.*?)\};", JOB))
    assert tuple(re.sub(r"(?<!^)([A-Z])", r"_\1", row[1:]).lower() for row in rows) == Branch._fields
    sums = _names(_found(r"struct BranchSums \{\s*double (.*?);", COMMON["tree"]))
    assert tuple("leaf_count" if name == "weight" else name for name in sums) == Branch._fields
    for text in (JOB, COMMON["tree"]):
        assert int(_found(r"kBranchRows = (\d+);", text)) == len(Branch._fields)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_reads_its_parameters(form: str) -> None:
    code = [code for name, code in _functions(TERMS) if name == form or name.startswith(f"{form}_")]
    assert code, f"{form} has no function"
    read = {name.replace("ratio_", "clip_") for name in re.findall(r"\bp\.(\w+)", "".join(code))}
    assert read == set(FORMS[form])


@pytest.mark.parametrize("path", sorted((ROOT / "triton_kernels").glob("policy_loss*.py")), ids=lambda path: path.stem)
def test_triton_names_members(path: Path) -> None:
    """A kernel compares an option with a member's name, or with a constant of that name and of the member's place."""
    pytest.importorskip("triton")
    module = importlib.import_module(f"trajkern._triton.{path.stem}")
    for option, members in TRITON.items():
        compared = re.findall(rf'\b{option} [!=]= (?:"(\w+)"|([A-Z]\w*))', path.read_text())
        strangers = {text or constant.lower() for text, constant in compared} - set(members)
        assert not strangers, f"{option} is never {strangers}"
        constants = {name: getattr(module, name.upper(), None) for name in members}
        places = {name: constant.value for name, constant in constants.items() if constant is not None}
        assert places == {name: members.index(name) for name in places}
