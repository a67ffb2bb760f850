"""A page an op, made of its docstrings and of what the project holds about it as data."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

import trajkern as tk
from _site import facts
from _site.docstrings import as_rest, summary
from _site.navigation import speaking_of
from _site.rest import code, folded, heading, plain, table, toctree
from trajkern import _backends
from trajkern._bench.case import BARE, COMPILED, OURS
from trajkern._bench.table import peers_of, seconds
from trajkern.testing.launches import BESIDE, HEAD_LAUNCHES, LAUNCHES
from trajkern.testing.registry import OpSpec

LANGUAGES = {"native": "C++", "triton": "Triton", "cuda": "CUDA C++"}
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU"}


def pages() -> dict[str, list[str]]:
    """Page -> its lines."""
    found = {f"ops/{name}": page(name) for names in facts.ops().values() for name in names}
    return {"ops/index": index(), **found}


def index() -> list[str]:
    lines = [
        *heading("Ops"),
        ".. currentmodule:: trajkern",
        "",
        "What each computes, on what, how exactly, and how long it takes.",
        "",
    ]
    for family, names in facts.ops().items():
        rows = [(f":doc:`{name}`", summary(getattr(tk, name).__doc__)) for name in names]
        lines += [*heading(family, 1), *table(("op", "what it computes"), rows)]
    return lines + toctree(name for names in facts.ops().values() for name in names)


def page(name: str) -> list[str]:
    spec, lines = facts.spec(name), heading(name)
    lines += [".. currentmodule:: trajkern", "", f".. autofunction:: trajkern.{name}", ""]
    lines += [*heading("Shapes", 1), *shapes(name)]
    lines += [*heading("Maths of the family", 1), *as_rest(importlib.import_module(facts.module(name)).__doc__ or "")]
    if spec is not None:
        lines += [*heading("Backends", 1), *backends(spec)]
        lines += [*heading("Error budget", 1), *budget(spec)]
        lines += [*heading("Bits", 1), *bits(spec)]
        lines += [*heading("Launches", 1), *launches(spec)]
        lines += [*heading("Cases", 1), *cases(spec)]
    figures, pages = figures_of(name), speaking_of(name)
    lines += [*heading("Figures", 1), *figures] if figures else []
    told = ", ".join(f":doc:`/{page}`" for page in pages)
    return lines + ([*heading("Used in", 1), told, ""] if pages else [])


def shapes(name: str) -> list[str]:
    """Every argument that is a tensor: the comment behind it says its shape."""
    rows = [
        (
            code(field.name),
            code(shape.group()) if (shape := re.search(r"\[.*\]", field.comment)) else "any",
            plain(field.annotation),
            code(field.default),
        )
        for field in facts.parameters(getattr(tk, name))
        if "Tensor" in field.annotation
    ]
    return table(("argument", "shape", "type", "default"), rows)


def backends(spec: OpSpec) -> list[str]:
    rows = []
    for device, owner in _backends.OWNERS[spec.family].items():
        dtypes = spec.dtypes if owner == "native" else spec.triton_dtypes or spec.dtypes
        rows.append((DEVICES[device], code(owner), LANGUAGES[owner], _names(dtypes)))
    lines = table(("device", "backend", "written in", "tested in"), rows)
    return [
        *lines,
        "On any device and in any float, on request: torch (:func:`trajkern.use_backend`, ``reference``).",
        "",
    ]


def budget(spec: OpSpec) -> list[str]:
    """What :mod:`trajkern.testing.numerics` allows, with this op's numbers."""
    lines = [
        "An error against float64 may be twice that of the same computation in torch at the inputs' precision,",
        "plus one rounding of the result. The inputs are quantised first. Gradients have the same budget:",
        f"{', '.join(code(f'grad_{x}') for x in spec.differentiable)}.",
        "",
    ]
    roundings = [(_names((dtype,)), f"{torch.finfo(dtype).eps:.3g}") for dtype in spec.dtypes]
    lines += table(("precision", "a rounding of 1"), roundings)
    if spec.term_scale:
        sums: dict[float, list[str]] = {}
        for output, size in spec.term_scale.items():
            sums.setdefault(size, []).append(output)
        told = "; ".join(f"{', '.join(map(code, outputs))}: {size:g}" for size, outputs in sums.items())
        lines += [f"A sum whose terms cancel is rounded as its terms are, which are of size: {told}.", ""]
    return lines + used(spec.name)


def used(name: str) -> list[str]:
    """The shares of the budget that the benchmark's gate met."""
    lines = []
    for report in facts.results().values():
        rows = []
        for case in _cases(report, name):
            shares = case["gate"].get(OURS, {}).get("shares", {})
            if shares:
                worst = max(shares, key=shares.__getitem__)
                rows.append((plain(case["work"]), plain(case["shape"]), code(worst), f"{shares[worst]:.0%}"))
        if rows:
            lines += [plain(f"Met at the benchmark's sizes on {_where(report)}:"), ""]
            lines += table(("work", "input", "worst output", "of its budget"), rows)
    return lines


def bits(spec: OpSpec) -> list[str]:
    threads = (
        "for any number of threads"
        if spec.own_sums
        else ("for one number of threads: the products are the BLAS library's")
    )
    lines = [f"The same on every run, and {threads}."]
    if spec.variants:
        told = ", ".join(variant.name.replace("_", " ") for variant in spec.variants)
        lines += [f"Tested to be the same when the same work lies otherwise: {told}."]
    if "batch_invariant" in {field.name for field in facts.parameters(getattr(tk, spec.name))}:
        lines += ["With ``batch_invariant=True`` a row's do not depend on what else is in the call."]
    return [*lines, ""]


def launches(spec: OpSpec) -> list[str]:
    if spec.name in LAUNCHES:
        forward, backward = LAUNCHES[spec.name]
        told = f"At most {_kernels(forward)} forward and {_kernels(backward)} backward, in any case of the registry"
        given = [x for x in BESIDE if x in {field.name for field in facts.parameters(getattr(tk, spec.name))}]
        beside = f" without {' and '.join(map(code, given))}" if given else ""
        lines = [f"{told}{beside}."]
    elif spec.name in HEAD_LAUNCHES:
        lines = [
            "A block of rows takes three matrix products with its gradients, and at most"
            f" {_kernels(HEAD_LAUNCHES[spec.name])} beside them."
        ]
    else:
        lines = ["A block of rows takes its matrix products and the kernels on their tiles; not counted here."]
    return [*lines, "No call waits for the GPU.", ""]


def cases(spec: OpSpec) -> list[str]:
    lines = [
        "The registry's, on which every backend is held against float64; fresh draws of them with"
        f" ``trajkern validate --op {spec.name}``, an implementation of your own with"
        f' ``trajkern.testing.check(f, like="{spec.name}")``.',
        "",
    ]
    rows = [(code(case.name), plain(case.reason)) for case in spec.cases]
    return lines + folded(f"{len(rows)} cases", table(("case", "why"), rows))


def figures_of(name: str) -> list[str]:
    """The times of all who were timed, the fastest of each row in bold; a bare pass over the memory is no rival."""
    lines = []
    for report in facts.results().values():
        found = _cases(report, name)
        timed = {kind for case in found for kind in case["seconds"]}
        kinds = [kind for kind in (OURS, "eager", COMPILED, *peers_of(report), BARE) if kind in timed]
        others = [f"{kind} {report['peers'][kind]}" for kind in kinds if kind != "torch" and kind in peers_of(report)]
        told = ", ".join([f"{_where(report)}; torch {report['versions']['torch']}", *others])
        rows = [(plain(case["work"]), plain(case["shape"]), *times(case, kinds)) for case in found]
        lines += [plain(f"Medians on {told}; {report['date'][:10]}."), ""] if rows else []
        lines += [*table(("work", "input", *kinds), rows), *memory(found, kinds)]
    return lines


def memory(cases: list[dict[str, Any]], kinds: list[str]) -> list[str]:
    """What the calls held at their peak, beside the inputs."""
    weighed = [case for case in cases if case.get("memory_of", {}).get("bytes")]
    kinds = [kind for kind in kinds if any(kind in case["peak_bytes"] for case in weighed)]
    rows = []
    for case in weighed:
        known, unit = case["peak_bytes"], case["memory_of"]["bytes"]
        peaks = [f"{known[kind] / unit:.2f}" if kind in known else "–" for kind in kinds]
        rows.append((plain(case["work"]), plain(case["shape"]), plain(case["memory_of"]["name"]), *peaks))
    if not rows:
        return []
    return ["Peak memory, as a multiple of the size of:", "", *table(("work", "input", "size of", *kinds), rows)]


def times(case: dict[str, Any], kinds: list[str]) -> list[str]:
    medians = {kind: case["seconds"][kind]["median"] for kind in kinds if kind in case["seconds"]}
    best = min((kind for kind in medians if kind != BARE), key=medians.__getitem__, default=None)
    texts = []
    for kind in kinds:
        absent = "gate failed" if kind in case["gate"] else "–"
        text = seconds(medians[kind]).replace(" ", "\N{NO-BREAK SPACE}") if kind in medians else absent
        texts.append(f"**{text}**" if kind == best else text)
    return texts


def _where(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def _cases(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [case for case in report["cases"] if case["op"] == name]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _kernels(count: int) -> str:
    return "1 kernel" if count == 1 else f"{count} kernels"
