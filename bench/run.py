"""Runs one case: the gate first, then the times of those that passed, then what the targets say about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trajkern._bench import peers
from trajkern._bench.case import BARE, COMPILED, OURS, Problem, Target, TimedCase
from trajkern._bench.memory import give_back, peak_bytes
from trajkern._bench.timing import Call, Clock, DeviceClock, Summary, WallClock, race, ratio


@dataclass(frozen=True)
class Settings:
    device: str
    seconds: float  # of measuring a case, unless the fewest rounds take longer
    rounds: tuple[int, int]
    compiled: bool  # whether torch.compile contends; compiling takes longer than measuring
    peers: bool = False  # whether other packages contend
    gated: bool = True  # whether a contender is first compared with the reference

    @classmethod
    def of(cls, device: str, quick: bool, peers: bool = False, gated: bool = True) -> Settings:
        how = (0.3, (2, 20), False) if quick else (6.0, (5, 300), True)
        return cls(device, *how, peers, gated)


def clocks(device: str) -> dict[bool, Clock]:
    """TimedCase.host -> the clock of such cases."""
    if device == "cpu":
        return {False: WallClock(), True: WallClock()}
    return {False: DeviceClock(), True: WallClock(torch.cuda.synchronize)}


def run(case: TimedCase, settings: Settings, clock: Clock, ceilings: dict[str, float]) -> dict[str, Any]:
    """Everything about the case, as plain values; only a contender whose ``gate`` is green has ``seconds``."""
    result: dict[str, Any] = {"family": case.family, "op": case.op, "work": case.work, "shape": case.shape}
    result |= {"host": case.host, "gate": {}, "unable": {}, "seconds": {}, "peak_bytes": {}, "targets": []}
    problem = _attempt(lambda: case.make(settings.device))
    if isinstance(problem, str):
        return result | {"gate": {OURS: {"passed": False, "why": problem}}}
    if settings.peers:
        problem.peers, result["unable"] = peers.contenders(problem, settings.device)
    names = [n for n in problem.functions if n != COMPILED or (settings.compiled and not case.host)]
    result["gate"] = {name: gate(problem, name) if settings.gated else {"passed": True, "shares": {}} for name in names}
    calls = {name: problem.step(name) for name in names if result["gate"][name]["passed"]}
    if case.memory_of:
        result["memory_of"] = {"name": case.memory_of, "bytes": problem.inputs[case.memory_of].nbytes}
    if not case.host:
        result |= peaks(calls, settings.device)
    samples = race({**calls, BARE: problem.bare}, clock, seconds=settings.seconds, rounds=settings.rounds)
    result["seconds"] = {name: asdict(Summary.of(s)) for name, s in samples.items()}
    result |= {"bytes": problem.bytes, "flops": problem.flops}
    result |= shares(result, ceilings)
    targets = [t for t in case.targets if settings.device in t.devices]
    result["targets"] = [verdict(t, result, samples) for t in targets]
    return result


def shares(result: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float]:
    """How much of the copy's and the matrix product's rate trajkern reaches; nothing where its caller was timed."""
    if OURS not in result["seconds"] or result["host"]:
        return {}
    median = result["seconds"][OURS]["median"]
    reached = {"share_of_copy": result["bytes"] / median / ceilings["copy_bytes_per_second"]}
    if result["flops"]:
        reached["share_of_gemm"] = result["flops"] / median / gemm_rate(ceilings)
    return reached


def gemm_rate(ceilings: dict[str, float]) -> float:
    """FLOP per second of the matrix product that was measured."""
    return next(value for name, value in ceilings.items() if name.endswith("flop_per_second"))


def gate(problem: Problem, name: str) -> dict[str, Any]:
    """Whether the contender computes the op within the error budget; an exception is a red gate, too."""
    shares = _attempt(lambda: problem.budget_shares(name))
    if isinstance(shares, str):
        return {"passed": False, "why": shares}
    over = {k: share for k, share in shares.items() if not share <= 1}
    why = ", ".join(f"{k} is off by {share:.3g} of its error budget" for k, share in over.items())
    return {"passed": not over, "shares": shares} | ({"why": why} if over else {})


def peaks(calls: dict[str, Call], device: str) -> dict[str, Any]:
    sizes = _attempt(lambda: {name: peak_bytes(call, device) for name, call in calls.items()})
    return {"peak_bytes": {}, "peak_bytes_problem": sizes} if isinstance(sizes, str) else {"peak_bytes": sizes}


def verdict(target: Target, result: dict[str, Any], samples: dict[str, list[float]]) -> dict[str, Any]:
    """The target's value and whether it is met; None where a contender it needs was not timed."""
    value = None
    if target.unit == "memory":
        peak = result["peak_bytes"].get(OURS)
        value = None if peak is None else peak / result["memory_of"]["bytes"]
    elif OURS in samples and target.unit == "seconds":
        value = result["seconds"][OURS]["median"]
    elif OURS in samples and target.rival in samples:
        pair = samples[OURS], samples[target.rival]
        value = ratio(*pair) if target.unit == "times" else ratio(*reversed(pair))
    return asdict(target) | {"value": value, "met": None if value is None else target.met(value)}


def release() -> None:
    """Give back the memory of the case before."""
    give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _attempt(work: Callable[[], Any]) -> Any:
    """The result, or the error in one line: whatever goes wrong in a contender, the others are still measured."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
