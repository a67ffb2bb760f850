"""Each instruction against exact results: rationals for floats, Python's integers for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.text import launch
from trajkern.testing.ptx.approximations import APPROXIMATIONS, approximate
from trajkern.testing.ptx.exact import fma

REGISTER = {"f32": "%f", "f64": "%e", "16": "%h", "32": "%r", "64": "%d"}


def _name(kind: str, number: int) -> str:
    return f"{REGISTER.get(kind) or REGISTER[kind.lstrip('bsuf')]}{number}"


def evaluate(instruction: str, result: str, *sources: tuple[str, np.ndarray]) -> np.ndarray:
    """``instruction`` of the sources, given by type and values; ``{0}`` is the result, ``{1}`` the first."""
    count = sources[0][1].size
    names = [_name(result, 9), *(_name(kind, 10 + k) for k, (kind, _) in enumerate(sources))]
    body, tensors = [], []
    for k, (_, values) in enumerate(sources):
        size = values.dtype.itemsize
        body.append(f"mad.wide.s32 %d90, %r1, {size}, %d{k + 1};\nld.global.b{8 * size} {names[k + 1]}, [%d90];")
        tensors.append(torch.from_numpy(values.view(f"i{size}").copy()))
    width = int(result.lstrip("bsuf"))
    body.append(instruction.format(*names) + ";")
    body.append(f"mad.wide.s32 %d90, %r1, {width // 8}, %d{len(sources) + 1};\nst.global.b{width} [%d90], {names[0]};")
    out = torch.zeros(count, dtype=getattr(torch, f"int{width}"))
    launch("\n".join(body), *tensors, out, threads=32, blocks=count // 32)
    kinds = {"f": f"f{width // 8}", "s": f"i{width // 8}"}
    return out.numpy().view(kinds.get(result[0], f"u{width // 8}"))


def rounded(x: Fraction, kind: type) -> float:
    """The nearest value of the type, ties to even."""
    guess = kind(float(x))
    if not np.isfinite(guess):
        return float(guess)
    near = [np.nextafter(guess, kind(-np.inf)), guess, np.nextafter(guess, kind(np.inf))]
    near = [v for v in near if np.isfinite(v)]
    raw = {np.float16: np.uint16, np.float32: np.uint32, np.float64: np.uint64}[kind]
    return float(min(near, key=lambda v: (abs(Fraction(float(v)) - x), int(v.view(raw)) & 1)))


def _floats(kind: type, count: int = 1024, spread: int = 20, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal(count) * 2.0 ** random.integers(-spread, spread, count)).astype(kind)


@pytest.mark.parametrize(("kind", "type_"), [("f32", np.float32), ("f64", np.float64)])
@pytest.mark.parametrize(
    ("instruction", "exact"),
    [
        ("add.{0}", lambda a, b, c: a + b),
        ("sub.{0}", lambda a, b, c: a - b),
        ("mul.{0}", lambda a, b, c: a * b),
        ("div.rn.{0}", lambda a, b, c: a / b),
        ("fma.rn.{0}", lambda a, b, c: a * b + c),
    ],
)
def test_float_arithmetic_is_rounded_once(kind: str, type_: type, instruction: str, exact: Callable) -> None:
    a, b, c = (_floats(type_, seed=k) for k in range(3))
    c[::2] = -(a * b)[::2] * type_(1 + 2.0**-20)  # what is left is the product's rounding
    count = 3 if "fma" in instruction else 2
    operands = ", ".join(f"{{{k}}}" for k in range(count + 1))
    text = f"{instruction.format(kind)} {operands}"
    got = evaluate(text, kind, *((kind, x) for x in (a, b, c)[:count]))
    want = [rounded(exact(*(Fraction(float(v)) for v in row)), type_) for row in zip(a, b, c, strict=True)]
    assert got.astype(np.float64).tolist() == want


@pytest.mark.parametrize("type_", [np.float16, np.float32, np.float64])
def test_fma_at_extreme_exponents_and_halfway(type_: type) -> None:
    """Ties that a sum rounded twice would lose, underflow, overflow, zeros and infinities."""
    tiny, huge, eps = (float(x) for x in (np.finfo(type_).tiny, np.finfo(type_).max, np.finfo(type_).eps))
    rows = [
        (1.0 + eps, 1.0 + eps, -1.0),
        (1.0, 1.0, eps / 2),
        (1.0 + eps, 1.0, eps / 2),
        (1.0 + eps, 1.0 + eps, eps * eps / 4),
        (tiny, 0.5, tiny / 4),
        (tiny, eps, tiny * eps),
        (math.sqrt(tiny), math.sqrt(tiny) * eps, tiny),
        (huge, 1.0, huge * eps / 4),
        (huge, 2.0, -huge),
        (3.0, 1.0 / 3, -1.0),
    ]
    a, b, c = (np.array(column, type_) for column in zip(*rows, strict=True))
    with np.errstate(all="ignore"):
        got = fma(a, b, c)
    for x, y, z, value in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert float(value) == rounded(exact, type_), (x, y, z)
    inf, nan = type_(np.inf), type_(np.nan)
    with np.errstate(all="ignore"):
        special = fma(
            np.array([inf, inf, 0, -0.0], type_), np.array([2, 0, 5, 3], type_), np.array([1, 1, -0.0, -0.0], type_)
        )
    assert special[0] == inf and np.isnan(special[1]) and not np.signbit(special[2]) and np.signbit(special[3])
    assert np.isnan(fma(np.array([nan]), np.array([type_(1)]), np.array([type_(1)]))[0])


def test_float32_fma_of_random_bits() -> None:
    random = np.random.default_rng(5)
    a, b = (random.integers(0, 2**24, 20000).astype(np.float32) for _ in range(2))
    c = (-(a.astype(np.float64) * b) * (1 + random.integers(-3, 4, 20000) * 2.0**-24)).astype(np.float32)
    want = [
        rounded(Fraction(int(x) * int(y)) + Fraction(float(z)), np.float32) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert fma(a, b, c).astype(np.float64).tolist() == want


def _integers(bits: int, signed: bool, seed: int, count: int = 1024) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=np.uint64, endpoint=False)
    raw >>= np.random.default_rng(seed + 9).integers(0, bits, count).astype(np.uint64)  # short ones, too
    raw[:4] = 0, 1, (1 << bits) - 1, 1 << (bits - 1)
    return raw.astype(f"u{bits // 8}").view(f"{'i' if signed else 'u'}{bits // 8}")


def _wrap(x: int, bits: int, signed: bool) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if signed and x >> (bits - 1) else x


def _towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add": lambda a, b, w: a + b,
    "sub": lambda a, b, w: a - b,
    "mul.lo": lambda a, b, w: a * b,
    "mul.hi": lambda a, b, w: a * b >> w,
    "div": lambda a, b, w: _towards_zero(a, b),
    "rem": lambda a, b, w: a - b * _towards_zero(a, b),
    "min": lambda a, b, w: min(a, b),
    "max": lambda a, b, w: max(a, b),
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_arithmetic(kind: str, name: str) -> None:
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b = _integers(bits, signed, 1), _integers(bits, signed, 2)
    if name in ("div", "rem"):
        b[b == 0] = 3
    got = evaluate(f"{name}.{kind} {{0}}, {{1}}, {{2}}", kind, (kind, a), (kind, b))
    want = [_wrap(INTEGER[name](int(x), int(y), bits), bits, signed) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products(kind: str) -> None:
    signed = kind[0] == "s"
    a, b, c = _integers(32, signed, 1), _integers(32, signed, 2), _integers(64, signed, 3)
    wide = f"{kind[0]}64"
    product = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert evaluate(f"mul.wide.{kind} {{0}}, {{1}}, {{2}}", wide, (kind, a), (kind, b)).tolist() == product
    got = evaluate(f"mad.wide.{kind} {{0}}, {{1}}, {{2}}, {{3}}", wide, (kind, a), (kind, b), (wide, c))
    assert got.tolist() == [_wrap(p + int(z), 64, signed) for p, z in zip(product, c, strict=True)]


@pytest.mark.parametrize("kind", ["b32", "b64", "s32", "u32", "s64", "u64"])
def test_shifts_beyond_the_width(kind: str) -> None:
    bits, signed = int(kind[1:]), kind[0] == "s"
    a = _integers(bits, signed, 1)
    count = np.random.default_rng(3).integers(0, 80, a.size).astype(np.uint32)
    rows = [(int(x), int(n)) for x, n in zip(a, count, strict=True)]
    got = evaluate(f"shr.{kind} {{0}}, {{1}}, {{2}}", kind, (kind, a), ("u32", count))
    assert got.tolist() == [x >> n for x, n in rows]
    if kind[0] == "b":
        got = evaluate(f"shl.{kind} {{0}}, {{1}}, {{2}}", kind, (kind, a), ("u32", count))
        assert got.tolist() == [_wrap(x << n, bits, False) for x, n in rows]


def test_bits() -> None:
    a, b = _integers(32, False, 1), _integers(32, False, 2)
    wide = _integers(64, False, 3)
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    assert evaluate("popc.b32 {0}, {1}", "u32", ("b32", a)).tolist() == [x.bit_count() for x in a.tolist()]
    assert evaluate("clz.b32 {0}, {1}", "u32", ("b32", a)).tolist() == [32 - x.bit_length() for x in a.tolist()]
    assert evaluate("clz.b64 {0}, {1}", "u32", ("b64", wide)).tolist() == [64 - x.bit_length() for x in wide.tolist()]
    assert evaluate("not.b32 {0}, {1}", "u32", ("b32", a)).tolist() == [x ^ 0xFFFFFFFF for x in a.tolist()]
    got = evaluate("bfe.u32 {0}, {1}, 5, 9", "u32", ("u32", a))
    assert got.tolist() == [x >> 5 & 511 for x in a.tolist()]
    for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        got = evaluate(f"{name}.b32 {{0}}, {{1}}, {{2}}", "u32", ("b32", a), ("b32", b))
        assert got.tolist() == [function(x, y) for x, y in rows]
    got = evaluate("prmt.b32 {0}, {1}, {2}, 0x7610", "u32", ("b32", a), ("b32", b))
    assert got.tolist() == [y & 0xFFFF0000 | x & 0xFFFF for x, y in rows]


def test_vectors_of_registers() -> None:
    a, b = _integers(32, False, 1), _integers(32, False, 2)
    joined = evaluate("mov.b64 {0}, {{{1}, {2}}}", "u64", ("b32", a), ("b32", b))
    assert joined.tolist() == [x | y << 32 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert evaluate("mov.b64 {{_, {0}}}, {1}", "u32", ("b64", joined.copy())).tolist() == b.tolist()


CUTS = np.resize(
    np.array([0.5, 1.5, -0.5, -1.5, 2.5, 1e20, -1e20, np.inf, -np.inf, np.nan, 2147483520.0, -7.99, 0.0, -0.0]), 32
)


def test_floats_to_integers_clamp() -> None:
    x = CUTS.astype(np.float32)

    def whole(function: Callable[[float], float], low: int, high: int, nan: int) -> list[int]:
        return [nan if math.isnan(v) else int(min(max(function(v), low), high)) for v in x.astype(float).tolist()]

    def to_even(v: float) -> float:
        return v if math.isinf(v) else round(v)

    def cut(v: float) -> float:
        return v if math.isinf(v) else math.trunc(v)

    bounds = -(2**31), 2**31 - 1
    assert evaluate("cvt.rni.s32.f32 {0}, {1}", "s32", ("f32", x)).tolist() == whole(to_even, *bounds, 0)
    assert evaluate("cvt.rzi.u32.f32 {0}, {1}", "u32", ("f32", x)).tolist() == whole(cut, 0, 2**32 - 1, 0)
    got = evaluate("cvt.rzi.s64.f32 {0}, {1}", "s64", ("f32", x)).tolist()
    assert got == whole(cut, -(2**63), 2**63 - 1, -(2**63))


def test_conversions_between_floats() -> None:
    x = _floats(np.float32, spread=30)
    x[:64] = (np.arange(64) + 0.5).astype(np.float32) * np.float32(2.0**-7) + np.float32(1)  # halfway for bfloat16
    want = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (evaluate("cvt.rn.bf16.f32 {0}, {1}", "b16", ("f32", x)) == want).all()
    pair = evaluate("cvt.rn.bf16x2.f32 {0}, {1}, {2}", "b32", ("f32", x), ("f32", x[::-1].copy()))
    assert (pair >> 16 == want).all() and (pair & 0xFFFF == want[::-1]).all()
    assert (
        evaluate("cvt.f32.bf16 {0}, {1}", "f32", ("b16", want)).view(np.uint32) == want.astype(np.uint32) << 16
    ).all()
    half = evaluate("cvt.rn.f16.f32 {0}, {1}", "b16", ("f32", x)).view(np.float16)
    with np.errstate(over="ignore"):
        exact = [rounded(Fraction(float(v)), np.float16) for v in x]
    assert half.astype(float).tolist() == exact
    wide = _floats(np.float64)
    got = evaluate("cvt.rn.f32.f64 {0}, {1}", "f32", ("f64", wide))
    assert got.astype(float).tolist() == [rounded(Fraction(float(v)), np.float32) for v in wide]


def test_comparisons_with_nan() -> None:
    a = np.resize(np.array([1.0, 2.0, np.nan, 2.0]), 32).astype(np.float32)
    b = np.resize(np.array([2.0, 2.0, 2.0, np.nan]), 32).astype(np.float32)
    holds = {"lt": [1, 0, 0, 0], "le": [1, 1, 0, 0], "eq": [0, 1, 0, 0], "ne": [1, 0, 0, 0], "gt": [0, 0, 0, 0]}
    holds |= {"ltu": [1, 0, 1, 1], "neu": [1, 0, 1, 1], "geu": [0, 1, 1, 1], "num": [1, 1, 0, 0], "nan": [0, 0, 1, 1]}
    for name, want in holds.items():
        text = f"setp.{name}.f32 %p1, {{1}}, {{2}};\nselp.b32 {{0}}, 1, 0, %p1"
        assert evaluate(text, "u32", ("f32", a), ("f32", b)).tolist()[:4] == want, name
    text = "setp.eq.f32 %p1, {1}, {1};\nsetp.lt.and.f32 %p2, {1}, {2}, %p1;\nselp.b32 {0}, 1, 0, %p2"
    assert evaluate(text, "u32", ("f32", a), ("f32", b)).tolist()[:4] == [1, 0, 0, 0]


def test_extremes() -> None:
    a = np.resize(np.array([1.0, np.nan, 0.0, -0.0, -3.0]), 32).astype(np.float32)
    b = np.resize(np.array([2.0, 2.0, -0.0, 0.0, 2.0]), 32).astype(np.float32)
    sources = ("f32", a), ("f32", b)
    least = evaluate("min.f32 {0}, {1}, {2}", "f32", *sources)[:5]
    assert least.tolist() == [1, 2, 0, 0, -3] and np.signbit(least[2:4]).all()
    most = evaluate("max.NaN.f32 {0}, {1}, {2}", "f32", *sources)[:5]
    assert np.isnan(most[1]) and not np.signbit(most[2:4]).any()
    xor = evaluate("min.xorsign.abs.f32 {0}, {1}, {2}", "f32", *sources)[:5]
    assert xor[0] == 1 and xor[4] == -2


def test_subnormal_float32_flush_where_asked() -> None:
    x = np.resize(np.array([1e-39, -1e-39, 1e-30], np.float32), 32)
    one = np.ones(32, np.float32)
    kept = evaluate("fma.rn.f32 {0}, {1}, {2}, 0f00000000", "f32", ("f32", x), ("f32", one))
    assert (kept == x).all()
    flushed = evaluate("fma.rn.ftz.f32 {0}, {1}, {2}, 0f00000000", "f32", ("f32", x), ("f32", one))
    assert flushed[:3].tolist() == [0, 0, float(x[2])]


BOUNDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # of the PTX manual: error by input and result
    "ex2": lambda x, y: 2.0**-22 * np.abs(y),
    "lg2": lambda x, y: 2.0**-22 * np.where((x > 0.5) & (x < 2), 1, np.abs(y)),
    "rcp": lambda x, y: 2.0**-23 * np.abs(y),
    "div": lambda x, y: 2.0**-22 * np.abs(y),
    "sqrt": lambda x, y: 2.0**-23 * np.abs(y),
    "rsqrt": lambda x, y: 2.0**-22.9 * np.abs(y),
    "tanh": lambda x, y: 2.0**-11 * np.abs(y),
    "sin": lambda x, y: 2.0**-20.5 + 0 * y,
    "cos": lambda x, y: 2.0**-20.5 + 0 * y,
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_err_within_the_manuals_bounds(name: str) -> None:
    x = np.linspace(0.01, 3.1, 50_000).astype(np.float32)
    inputs = (x, x[::-1].copy()) if name == "div" else (x,)
    exact = APPROXIMATIONS[name].exact(*(v.astype(np.float64) for v in inputs))
    first, again, other = (approximate(name, seed, *inputs) for seed in (0, 0, 1))
    share = np.abs(first - exact) / BOUNDS[name](x.astype(np.float64), exact)
    assert share.max() <= 1 and share.max() > 0.6
    assert (first == again).all() and (first != other).any()
    assert (approximate(name, None, *inputs) == exact.astype(np.float32)).all()


def test_approximations_keep_special_values() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        assert approximate("ex2", 3, x)[:4].tolist() == [1, 1, np.inf, 0]
        assert approximate("lg2", 3, x)[:3].tolist() == [-np.inf, -np.inf, np.inf]
        assert approximate("rcp", 3, x)[:4].tolist() == [np.inf, -np.inf, 0, 0]
        assert all(np.isnan(approximate(name, 3, x)[4]) for name in ("ex2", "lg2", "rcp", "sqrt"))


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 %f1, %f2, %f3",
        "add.sat.f32 %f1, %f2, %f3",
        "fma.f32 %f1, %f2, %f3, %f4",
        "add.bf16 %h1, %h2, %h3",
        "ex2.approx.f16 %h1, %h2",
        "rcp.approx.ftz.f64 %e1, %e2",
        "dp4a.u32.u32 %r1, %r2, %r3, %r4",
        "atom.global.add.u32 %r1, [%d1], %r2",
        "ld.const.b32 %r1, [%d1]",
        "ld.b32 %r1, [%d1]",
        "ld.volatile.global.b32 %r1, [%d1]",
        "cvt.rz.f16.f32 %h1, %f1",
        "cvt.sat.u8.s32 %r1, %r2",
        "shfl.bfly.b32 %r1, %r2, 1, 31",
        "bar.sync 1, 64",
        "mov.u32 %r1, %clock",
        "mov.u32 %r1, some_symbol",
        "call (%r1), f, (%r2)",
        "cp.async.ca.shared.global [%r1], [%d1], 16",
    ],
)
def test_what_is_unknown_is_refused_by_name(instruction: str) -> None:
    with pytest.raises(NotImplementedError) as refused:
        launch(f".loc 1 7 3\n{instruction};", torch.zeros(32))
    assert instruction in str(refused.value) and "written.py:7" in str(refused.value)
