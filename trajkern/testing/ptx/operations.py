"""What an arithmetic instruction does to the lanes that execute it together.

A modifier, a type or an operation that is not known here raises NotImplementedError with the instruction: nothing is
passed over.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trajkern.testing.ptx import exact
from trajkern.testing.ptx.approximations import APPROXIMATIONS, approximate
from trajkern.testing.ptx.exact import UNSIGNED
from trajkern.testing.ptx.parser import SIZE, Instruction, Kernel, Vector
from trajkern.testing.ptx.values import FLOAT, Lanes, dtype, source, target

Step = Callable[[Lanes], None]
Function = Callable[..., np.ndarray]

INTEGERS = {"u16", "s16", "u32", "s32", "u64", "s64"}
FLOATS = set(FLOAT)
WIDE_FLOATS = {"f32", "f64"}
BITS = {"pred", "b16", "b32", "b64"}

# operation -> (function, the types it has here)
PLAIN: dict[str, tuple[Function, set[str]]] = {
    "add": (np.add, INTEGERS | FLOATS),
    "sub": (np.subtract, INTEGERS | FLOATS),
    "neg": (np.negative, INTEGERS | FLOATS),
    "abs": (np.abs, INTEGERS | FLOATS),
    "and": (np.bitwise_and, BITS),
    "or": (np.bitwise_or, BITS),
    "xor": (np.bitwise_xor, BITS),
    "not": (np.invert, BITS),
    "rem": (exact.remainder, INTEGERS),
    "shl": (exact.shift_left, BITS),
    "shr": (exact.shift_right, BITS | INTEGERS),
    "mov": (lambda x: x, set(SIZE)),
    "fma": (exact.fma, FLOATS),
    "sqrt": (np.sqrt, WIDE_FLOATS),
    "rcp": (lambda x: 1 / x, WIDE_FLOATS),
    "popc": (lambda a: np.bitwise_count(a).astype(np.uint32), {"b32", "b64"}),
    "clz": (exact.leading_zeros, {"b32", "b64"}),
    "bfe": (exact.bit_field, {"u32", "u64"}),
    "prmt": (exact.permuted_bytes, {"b32"}),
    "copysign": (lambda sign, x: np.copysign(x, sign), WIDE_FLOATS),
}
# where an operand's type is not the instruction's, by operation: of each operand, the result's first
OTHER_TYPES = {
    "shl": {2: "u32"},
    "shr": {2: "u32"},
    "popc": {0: "u32"},
    "clz": {0: "u32"},
    "bfe": {2: "u32", 3: "u32"},
    "selp": {3: "pred"},
    "setp": {0: "pred", 3: "pred"},
}
COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
UNORDERED_COMPARE = {f"{name}u": name for name in COMPARE}
COMBINE: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
ROUND: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


class Form:
    """An instruction's modifiers, taken one by one: one that nobody takes is unknown."""

    def __init__(self, x: Instruction) -> None:
        self.x, self.left = x, list(x.modifiers[:-1])
        self.kinds = [OTHER_TYPES.get(x.name, {}).get(k, x.type) for k in range(len(x.operands))]

    def take(self, *names: str) -> str | None:
        """The first of these that is there."""
        found = next((name for name in names if name in self.left), None)
        if found is not None:
            self.left.remove(found)
        return found

    def finish(self) -> None:
        if self.left:
            raise self.x.unknown(f"{' '.join('.' + name for name in self.left)} is not known")

    def of(self, types: set[str]) -> None:
        if self.x.type not in types:
            raise self.x.unknown(f"not of the type .{self.x.type}")


def decode(x: Instruction, kernel: Kernel) -> Step:
    """An arithmetic instruction as a function of lanes, its guard left to the caller."""
    if not x.modifiers:
        raise x.unknown()
    if x.name == "mov" and any(isinstance(operand, Vector) for operand in x.operands):
        return _vector_move(x, kernel)
    form = Form(x)
    flush = form.take("ftz") is not None
    approximated = form.take("approx", "full") is not None
    function = _approximated(form) if approximated else _function(form)
    form.finish()
    if flush:
        function = _flushing(function)
    try:
        put = target(x.operands[0], form.kinds[0], kernel)
        get = [source(o, kind, kernel) for o, kind in zip(x.operands[1:], form.kinds[1:], strict=True)]
    except NotImplementedError as error:
        raise x.unknown(str(error)) from error
    if approximated:
        return lambda lanes: put(lanes, function(*[g(lanes) for g in get], seed=lanes.running.seed))
    if len(get) == 1:
        (a,) = get
        return lambda lanes: put(lanes, function(a(lanes)))
    if len(get) == 2:
        a, b = get
        return lambda lanes: put(lanes, function(a(lanes), b(lanes)))
    return lambda lanes: put(lanes, function(*[g(lanes) for g in get]))


def _function(form: Form) -> Function:
    """What the result is of the sources; sets ``form.kinds`` where a type is not the instruction's."""
    x = form.x
    if x.name in ("setp", "selp", "cvt", "mul", "mad", "div", "min", "max"):
        return _SPECIAL[x.name](form)
    if x.name == "cvta" and form.take("to") and form.take("global"):
        return lambda a: a
    if x.name not in PLAIN:
        raise x.unknown()
    function, types = PLAIN[x.name]
    form.of(types)
    if x.type in FLOATS:
        rounds = form.take("rn")
        if x.name in ("fma", "sqrt", "rcp") and not rounds:
            raise x.unknown("only rounding to the nearest is known")
    return function


def _approximated(form: Form) -> Function:
    name = form.x.name
    if name not in APPROXIMATIONS or form.x.type != "f32":
        raise form.x.unknown("no documented error is known")
    return lambda *inputs, seed: approximate(name, seed, *inputs)


def _flushing(function: Function) -> Function:
    """Float32 subnormals among sources and results become zero."""

    def flush(x: np.ndarray) -> np.ndarray:
        return exact.flushed(x) if x.dtype == np.float32 else x

    return lambda *inputs, **seed: flush(function(*map(flush, inputs), **seed))


def _product(form: Form) -> Function:
    x = form.x
    form.of(INTEGERS | (FLOATS if x.name == "mul" else set()))
    if x.type in FLOATS:
        form.take("rn")
        return np.multiply
    part = form.take("wide", "hi", "lo")
    multiply: Function = np.multiply
    if part == "wide":
        form.kinds[0] = f"{x.type[0]}{16 * SIZE[x.type]}"
        form.kinds[3:] = form.kinds[:1] * len(form.kinds[3:])
        result = dtype(form.kinds[0])
        multiply = lambda a, b: a.astype(result) * b.astype(result)  # noqa: E731
    elif part == "hi":
        multiply = exact.high_half
    elif part is None:
        raise x.unknown()
    return multiply if x.name == "mul" else lambda a, b, c: multiply(a, b) + c


def _quotient(form: Form) -> Function:
    form.of(INTEGERS | WIDE_FLOATS)
    if form.x.type not in FLOATS:
        return exact.quotient
    if not form.take("rn"):
        raise form.x.unknown("only rounding to the nearest is known")
    return np.divide


def _selection(form: Form) -> Function:
    form.of(INTEGERS | WIDE_FLOATS | BITS - {"pred"})

    def select(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.where(chosen, a, b)

    return select


def _comparison(form: Form) -> Function:
    x = form.x
    form.of(INTEGERS | FLOATS | BITS - {"pred"})
    name = form.left.pop(0)
    if x.type not in FLOATS:
        function = COMPARE.get(UNSIGNED_COMPARE.get(name, name))
    elif name in ("num", "nan"):
        unordered = name == "nan"
        function = lambda a, b: (np.isnan(a) | np.isnan(b)) == unordered  # noqa: E731
    elif name in UNORDERED_COMPARE:
        test = COMPARE[UNORDERED_COMPARE[name]]
        function = lambda a, b: test(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
    elif name == "ne":
        function = lambda a, b: (a < b) | (a > b)  # noqa: E731
    else:
        function = COMPARE.get(name)
    if function is None:
        raise x.unknown(f".{name} is not known")
    combine = form.take(*COMBINE)
    if combine is None:
        return function
    compare, join = function, COMBINE[combine]

    def combined(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
        return join(compare(a, b), p)

    return combined


def _extreme(form: Form) -> Function:
    x = form.x
    form.of(INTEGERS | WIDE_FLOATS)
    least = x.name == "min"
    if x.type not in FLOATS:
        return np.minimum if least else np.maximum
    nan = form.take("NaN")
    choose: Function = (np.minimum if nan else np.fmin) if least else (np.maximum if nan else np.fmax)
    join = np.bitwise_or if least else np.bitwise_and
    raw = UNSIGNED[SIZE[x.type]]

    def extreme(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = choose(a, b)
        zero = (a == 0) & (b == 0)
        if not zero.any():
            return result
        return np.where(zero, join(a.view(raw), b.view(raw)).view(a.dtype), result)  # -0 is less than +0

    if not form.take("xorsign"):
        return extreme
    if not form.take("abs"):
        raise x.unknown()
    one = np.ones(1, dtype(x.type))
    return lambda a, b: np.copysign(extreme(np.abs(a), np.abs(b)), np.where(np.signbit(a) ^ np.signbit(b), -one, one))


def _conversion(form: Form) -> Function:
    x = form.x
    if len(form.left) < 1:
        raise x.unknown()
    to, of = form.left.pop(), x.type
    form.kinds = [to] + [of] * (len(x.operands) - 1)
    if to in ("bf16x2", "f16x2"):
        return _pair_of_halves(form, to)
    known = INTEGERS | {"u8", "s8"} | FLOATS
    if (to not in known or of not in known) and (to, of) not in (("bf16", "f32"), ("f32", "bf16")):
        raise x.unknown()
    whole = form.take(*ROUND)
    before = ROUND[whole] if whole else lambda v: v
    to_float, of_float = to in FLOATS or to == "bf16", of in FLOATS or of == "bf16"
    if not to_float and of_float:
        if not whole:
            raise x.unknown()
        return _to_integer(before, of, dtype(to))
    if whole and to != of:
        raise x.unknown()
    if to_float and (not of_float or SIZE[to] < SIZE[of]) and not form.take("rn"):
        raise x.unknown("only rounding to the nearest is known")
    if not of_float and to == "f16":  # through float64, which holds these integers
        if SIZE[of] == 8:
            raise x.unknown()
        return lambda v: v.astype(np.float64).astype(np.float16)
    result = dtype("f32" if to == "bf16" else to)
    return lambda v: before(v).astype(result)


def _pair_of_halves(form: Form, to: str) -> Function:
    """Two values into the halves of one register, the first into the upper."""
    if form.x.type != "f32" or not form.take("rn"):
        raise form.x.unknown()
    form.kinds[0] = "b32"
    half: Function = exact.to_bfloat16 if to == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
    return lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low)


def _to_integer(whole: Function, of: str, result: np.dtype) -> Function:
    """Clamped to the integers' range; NaN as the manual's table of cvt says."""
    bounds, bits = np.iinfo(result), 8 * result.itemsize
    nan = np.array([1 << (bits - 1) if of == "f64" or bits == 64 else 0], UNSIGNED[result.itemsize]).view(result)

    def convert(v: np.ndarray) -> np.ndarray:
        v = whole(v).astype(np.float64)
        inside = (v >= float(bounds.min)) & (v < 2.0 ** (bits - (bounds.min < 0)))
        out = np.where(inside, v, 0).astype(result)
        out = np.where(inside, out, np.where(v > 0, result.type(bounds.max), result.type(bounds.min)))
        return np.where(np.isnan(v), nan, out)

    return convert


_SPECIAL: dict[str, Callable[[Form], Function]] = {
    "setp": _comparison,
    "selp": _selection,
    "cvt": _conversion,
    "mul": _product,
    "mad": _product,
    "div": _quotient,
    "min": _extreme,
    "max": _extreme,
}


def _vector_move(x: Instruction, kernel: Kernel) -> Step:
    """A register split into several, or several joined."""
    first, second = x.operands
    if isinstance(first, Vector):
        size, count = SIZE[x.type] // len(first), len(first)
        get = source(second, f"u{8 * SIZE[x.type]}", kernel)
        puts = [target(r, f"b{8 * size}", kernel) for r in first]

        def split(lanes: Lanes) -> None:
            parts = np.ascontiguousarray(get(lanes)).view(UNSIGNED[size]).reshape(-1, count)
            for k, put in enumerate(puts):
                put(lanes, parts[:, k].copy())

        return split
    if not isinstance(second, Vector):
        raise x.unknown()
    size, whole = SIZE[x.type] // len(second), UNSIGNED[SIZE[x.type]]
    gets = [source(r, f"u{8 * size}", kernel) for r in second]
    put_whole = target(first, f"u{8 * SIZE[x.type]}", kernel)

    def join(lanes: Lanes) -> None:
        parts = np.broadcast_arrays(*[g(lanes) for g in gets])
        put_whole(lanes, np.stack(parts, axis=1).view(whole)[:, 0])

    return join
