"""A page an op, made of its docstrings and of what the project holds about it as data."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

import trajkern as tk
from _site import facts
from _site.docstrings import as_rest, summary
from _site.rest import code, folded, heading, plain, table, toctree
from trajkern import _backends
from trajkern._bench.case import BARE, COMPILED, OURS
from trajkern._bench.table import memory_text, peer_text, peers_of, time_text
from trajkern.testing.launches import BESIDE, HEAD_LAUNCHES, LAUNCHES
from trajkern.testing.registry import OpSpec

LANGUAGES = {"native": "C++", "triton": "Triton", "cuda": "CUDA C++", "reference": "torch"}
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
    lines += [*heading("Maths", 1), *as_rest(importlib.import_module(facts.module(name)).__doc__ or "")]
    if spec is not None:
        lines += [*heading("Backends", 1), *backends(spec)]
        lines += [*heading("Error budget", 1), *budget(spec)]
        lines += [*heading("Bits", 1), *bits(spec)]
        lines += [*heading("Launches", 1), *launches(spec)]
        lines += [*heading("Cases", 1), *cases(spec)]
    figures = figures_of(name)
    return lines + (heading("Figures", 1) + figures if figures else [])


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
    rows.append(("any", code("reference"), "torch, on request by :func:`trajkern.use_backend`", "any float"))
    return table(("device", "backend", "written in", "tested in"), rows)


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
    rows = []
    for folder, report in facts.results().items():
        for case in _cases(report, name):
            shares = case["gate"].get(OURS, {}).get("shares", {})
            if shares:
                worst = max(shares, key=shares.__getitem__)
                rows.append(
                    (plain(folder), plain(case["work"]), plain(case["shape"]), code(worst), f"{shares[worst]:.0%}")
                )
    if not rows:
        return []
    return [
        "Met at the benchmark's sizes:",
        "",
        *table(("measured on", "work", "input", "worst output", "of its budget"), rows),
    ]


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
    lines = []
    for report in facts.results().values():
        found, peers = _cases(report, name), peers_of(report)
        if not found:
            continue
        machine = report["machine"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
        others = ", ".join(f"{peer} {report['peers'][peer]}" for peer in peers)
        lines += [
            plain(f"{where}; torch {report['versions']['torch']}; {report['date'][:10]}. Beside it {others}."),
            "",
        ]
        kinds = (OURS, "eager", COMPILED, BARE)
        rows = [
            (
                plain(case["work"]),
                plain(case["shape"]),
                *(plain(time_text(case, kind)) for kind in kinds),
                plain(memory_text(case)),
            )
            for case in found
        ]
        lines += table(("work", "input", *kinds, "peak memory"), rows)
        raced = [case for case in found if set(peers) & set(case["gate"])]
        rows = [
            (plain(case["work"]), plain(case["shape"]), *(plain(peer_text(case, peer)) for peer in peers))
            for case in raced
        ]
        if rows:
            lines += ["How many times as long others take:", "", *table(("work", "input", *peers), rows)]
    return lines


def _cases(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [case for case in report["cases"] if case["op"] == name]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _kernels(count: int) -> str:
    return "1 kernel" if count == 1 else f"{count} kernels"
