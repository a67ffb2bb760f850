"""Functions of a user beside trajkern's op, eager torch and the bare pass: what ``trajkern.bench.compare`` is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trajkern._bench import bare, results
from trajkern._bench import peers as packages
from trajkern._bench.case import BARE, COMPILED, OPS, OURS, Function, Problem, TimedCase
from trajkern._bench.memory import hold
from trajkern._bench.run import Settings
from trajkern._bench.session import measure
from trajkern._bench.sizes import BACKWARD, SIZES, cases
from trajkern._bench.table import peers_of, seconds
from trajkern._bench.text import size, wrapped
from trajkern._checks import check_callable, check_choice, check_flag, check_number, check_sequence, describe
from trajkern._dtypes import FLOATS
from trajkern.testing.numerics import Outcome
from trajkern.testing.own import called, check_arguments, kept, outputs_of, put_back, untaken, written

TAKEN = (OURS, "eager", COMPILED, BARE)  # names that a function may not have
MOST_SECONDS = 1e6  # of measuring


def compare(
    functions: Mapping[str, Callable[..., Any]],
    *,
    like: str,
    shapes: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backward: bool = True,
    compiled: bool = False,
    peers: bool = False,
    seconds: float = 1.0,
    progress: bool = True,
) -> Comparison:
    """Time functions of your own beside trajkern's op, eager torch's form of it and the bare pass, in one process.

    Each is called with the op's keyword arguments and returns what the op returns, or a dict of those of its outputs
    that it computes, such as ``{"loss": loss}``. It is first compared with the float64 reference: one that is off by
    more than 16 times the op's error budget gets no time (:func:`trajkern.testing.check` is stricter, and tries every
    case). The calls take turns, so that a change of the machine's speed meets all of them; with ``backward`` a call is
    the forward and its gradients.

    The bare pass is torch's own sum, copy or matrix product over the same data. It computes nothing of the op, and is
    no bound: a fused kernel may take less.

    Args:
        functions: name -> function. None may be called "trajkern", "eager", "torch.compile" or "bare pass".
        like: the name of an op, as in ``trajkern.token_logprobs``.
        shapes: of the inputs, a tuple each: ``(T, V)`` for the ops on logits, ``(T, H, V)`` for the heads, ``(T, N)``
            tokens and trajectories, ``(N, G)`` trajectories in groups of G, ``(N, L)`` rollouts of L tokens, ``(M,)``
            nodes, ``(T,)`` tokens. By default a small one; ``trajkern.bench.shapes_of(like)`` names the letters.
        dtype: of the logits, or of the hidden states and the weight; the other ops' inputs are float32.
        device: "cpu" or "cuda".
        backward: time forward and backward where the op has one that is timed; else the forward alone.
        compiled: let ``torch.compile`` contend, whose compilation takes longer than the measuring.
        peers: let the packages contend that do the same work and are installed.
        seconds: of measuring each shape, unless the fewest rounds take longer.
        progress: tell on stderr which shape is being measured.

    Returns:
        A :class:`Comparison`, which prints as a table.

    Raises:
        ValueError: there is no such op, dtype or device, a shape is not one of the op's, or a name is taken.
        TypeError: an argument of another kind, or a function that does not take the op's arguments by name.
    """
    like, device = check_choice("like", like, tuple(SIZES)), check_choice("device", device, ("cpu", "cuda"))
    dtype, seconds = check_choice("dtype", dtype, FLOATS), check_number("seconds", seconds, low=0, high=MOST_SECONDS)
    backward, compiled = check_flag("backward", backward), check_flag("compiled", compiled)
    peers, progress = check_flag("peers", peers), check_flag("progress", progress)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda: torch {torch.__version__} sees no NVIDIA GPU")
    functions = _checked_functions(functions, like)
    chosen = [
        _with(functions, case)
        for shape in ([SIZES[like].quick] if shapes is None else _checked_shapes(shapes))
        for case in _works(cases(like, shape, dtype, device, "shapes"), backward)
    ]
    hold()
    report = results.new_report(device) | {"own": list(functions)}
    if peers:
        report["peers"] = packages.versions()
    with torch.inference_mode(False), torch.enable_grad():  # whatever stands around the call
        measure(report, chosen, Settings(device, seconds, (5, 300), compiled, peers), progress=progress)
    report["complete"] = True
    return Comparison(report)


class Comparison:
    """Times of functions beside an op's; prints as a table a shape.

    Attributes:
        report: every number, as ``trajkern bench --json`` writes it.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report

    @property
    def cases(self) -> list[dict[str, Any]]:
        """What was measured of each shape and kind of work."""
        return self.report["cases"]

    @property
    def passed(self) -> bool:
        """Whether each of the user's functions was right, and so has times, in every case."""
        own = self.report["own"]
        return all(case["gate"].get(name, {"passed": False})["passed"] for case in self.cases for name in own)

    def times(self, name: str, beside: str = OURS) -> list[float | None]:
        """How many times as long it takes as another, a number a case; None where one of the two has no time."""
        known = {name: None for case in self.cases for name in (*case["gate"], BARE)}
        for which in (name, beside):
            check_choice("contender", which, tuple(known))
        taken = [(case["seconds"].get(name), case["seconds"].get(beside)) for case in self.cases]
        return [a["median"] / b["median"] if a and b else None for a, b in taken]

    def save(self, path: str | Path) -> None:
        """Write the numbers, which ``trajkern bench --load``, ``--compare`` and ``--html`` read."""
        results.save(Path(path), self.report)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self.report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    copy = report["ceilings"]["copy_bytes_per_second"] / 1e9
    yield from wrapped(f"{where}, torch {report['versions']['torch']}, copies at {copy:.3g} GB/s; medians", "")
    for case in report["cases"]:
        yield ""
        yield from wrapped(f"{case['op']}, {case['work']}: {case['shape']}", "")
        yield from _rows(case, peers_of(report))


def _rows(case: dict[str, Any], usable: list[str]) -> Iterator[str]:
    """A line a contender: its time, how many times trajkern's that is, and the most memory that it takes."""
    ours = case["seconds"].get(OURS)
    wide = max(map(len, (*case["gate"], BARE)))
    for name in (*case["gate"], BARE):
        taken = case["seconds"].get(name)
        if taken is None and name == BARE:  # where trajkern itself could not run
            continue
        if taken is None:
            yield from wrapped(f"{name:<{wide}}  not timed: {case['gate'][name]['why']}", "  ")
            continue
        times = f"{taken['median'] / ours['median']:>7.2f} ×" if ours else ""
        peak = f"   peak {size(case['peak_bytes'][name])}" if name in case["peak_bytes"] else ""
        yield f"  {name:<{wide}}  {seconds(taken['median']):>8} ± {taken['spread']:>3.0%}{times}{peak}".rstrip()
    yield from (f"  {name}: {why}" for name, why in case["unable"].items() if name in usable)
    yield from wrapped(f"bare pass: {bare.what(case)}", "  ")
    if why := bare.why_less(case):
        yield from wrapped(f"trajkern takes less than it: {why}", "  ")


def shapes_of(like: str) -> tuple[str, ...]:
    """The letters of an op's shapes, such as ``("T", "H", "V")``. Raises ValueError with the list of ops."""
    check_choice("like", like, tuple(SIZES))
    return SIZES[like].letters


def _checked_functions(functions: Mapping[str, Callable[..., Any]], like: str) -> dict[str, Callable[..., Any]]:
    if not isinstance(functions, Mapping) or not functions:
        raise TypeError(
            f"functions must be a dict of a name and a function, such as {{'mine': f}}; got {describe(functions)}"
        )
    functions = dict(functions)
    for name, function in functions.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise TypeError(f"functions must have names that can be shown in a line, got {describe(name)}")
        if name in (*TAKEN, *packages.PEERS):
            raise ValueError(f"functions: {name!r} is the name of another contender; call it otherwise")
        check_callable(f"functions[{name!r}]", function, "a function of the op's arguments")
        check_arguments(OPS[like], function)
    return functions


def _checked_shapes(shapes: Any) -> list[tuple[Any, ...]]:
    found = check_sequence("shapes", shapes, "shapes")
    if not found:
        raise ValueError("shapes must hold at least one shape, got none")
    return [check_sequence("shapes", shape, "shapes, each a sequence of numbers") for shape in found]


def _works(found: list[TimedCase], backward: bool) -> list[TimedCase]:
    """The kind of work that is asked for, or the one there is."""
    with_it = [case for case in found if case.work == BACKWARD]
    return (with_it if backward else [case for case in found if case not in with_it]) or found


def _with(functions: Mapping[str, Callable[..., Any]], case: TimedCase) -> TimedCase:
    """The case with these functions among its contenders, right after trajkern."""

    def make(device: str) -> Problem:
        problem = case.make(device)
        own = {name: _form(name, function, problem) for name, function in functions.items()}
        problem.rivals = own | problem.rivals
        return problem

    return replace(case, make=make)


def _form(name: str, function: Callable[..., Any], problem: Problem) -> Function:
    """It as the benchmark calls a contender: outputs by their names."""
    spec = OPS[problem.op]
    strange, call = untaken(spec, function, problem.inputs), called(spec, function)
    tried: list[bool] = []

    def form(**inputs: Any) -> Outcome:
        if strange:
            raise TypeError(f"{name} does not take {', '.join(strange)}, which {spec.name} is given here")
        if tried:
            return outputs_of(spec, call(**inputs))
        before = kept(inputs)  # in the first call, which is the gate's
        outputs = outputs_of(spec, put_back(call)(**inputs))
        if spoilt := written(before, inputs):
            with torch.no_grad():
                for k in spoilt:
                    inputs[k].copy_(before[k])
            raise ValueError(f"{name} writes into its argument {', '.join(spoilt)}")
        tried.append(True)
        if lacking := problem.upstream.keys() - outputs.keys():
            raise TypeError(f"{name} returned no {', '.join(sorted(lacking))}, whose gradient is timed here")
        return outputs

    return form
