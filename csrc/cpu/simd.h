// Explicit vectors of W lanes and the choice of instruction set: the only file that knows the ISA.
//
// Use:
//   tk::dispatch([&](auto width) TK_INLINE_LAMBDA { kernel<width()>(...); });   // width() = 16, 8 or 4 lanes of float
// where kernel, and all that it calls, is TK_INLINE (what is not inlined is compiled for the baseline). A kernel that
// keeps the lanes its sums are spread over fixed (not tied to W) gives the same bits whatever W is: an operation is
// fused only where vfma says so.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/dtype.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a real call: every function is inlined

#define TK_INLINE __attribute__((always_inline)) inline
#define TK_INLINE_LAMBDA __attribute__((always_inline))

namespace tk {

template <class T, int W>
struct Lanes {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vec = typename Lanes<T, W>::type;  // + - * / < ?: work lane by lane, and with a scalar operand

template <class To, class From>
TK_INLINE To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

// Calls f with the number of floats in this machine's widest vectors, as a compile-time number.
#if defined(__x86_64__) && defined(__GNUC__)
template <class F>
__attribute__((target("avx2,fma"), noinline)) void run_avx2(F& f) {
  f(std::integral_constant<int, 8>{});
}
template <class F>
__attribute__((target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq"), noinline)) void run_avx512(F& f) {
  f(std::integral_constant<int, 16>{});
}
inline int float_lanes() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx512 ? 16 : 8;
}
template <class F>
void dispatch(F&& f) {
  static const int lanes = float_lanes();
  if (lanes == 16) return run_avx512(f);
  if (lanes == 8) return run_avx2(f);
  f(std::integral_constant<int, 4>{});
}
#else
template <class F>
void dispatch(F&& f) {
  f(std::integral_constant<int, 4>{});
}
#endif

template <int W, class T>
TK_INLINE Vec<T, W> broadcast(T x) {
  return x - Vec<T, W>{};
}

// Unaligned; 16-bit floats widen to float32, exactly.
template <int W>
TK_INLINE Vec<float, W> load(const float* p) {
  Vec<float, W> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <int W>
TK_INLINE Vec<double, W> load(const double* p) {
  Vec<double, W> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <int W>
TK_INLINE Vec<uint32_t, W> load_bits(const void* p) {
  Vec<uint16_t, W> x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, Vec<uint32_t, W>);
}
template <int W>
TK_INLINE Vec<float, W> load(const BFloat16* p) {
  return bit_cast<Vec<float, W>>(load_bits<W>(p) << 16);
}
template <int W>
TK_INLINE Vec<float, W> load(const Half* p) {
  const auto h = load_bits<W>(p);
  const auto magnitude = (h & 0x7fff) << 13;
  const auto finite = bit_cast<Vec<uint32_t, W>>(bit_cast<Vec<float, W>>(magnitude) * 0x1p112f);  // 2^(127 - 15)
  const auto bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite;
  return bit_cast<Vec<float, W>>(bits | (h & 0x8000) << 16);
}

// Unaligned; 16-bit floats round to nearest even.
template <int W>
TK_INLINE void store(float* p, const Vec<float, W>& x) {
  std::memcpy(p, &x, sizeof(x));
}
template <int W>
TK_INLINE void store(double* p, const Vec<double, W>& x) {
  std::memcpy(p, &x, sizeof(x));
}
template <int W>
TK_INLINE void store_bits(void* p, const Vec<uint32_t, W>& bits) {
  const auto x = __builtin_convertvector(bits, Vec<uint16_t, W>);
  std::memcpy(p, &x, sizeof(x));
}
template <int W>
TK_INLINE void store(BFloat16* p, const Vec<float, W>& x) {
  const auto bits = bit_cast<Vec<uint32_t, W>>(x);
  const auto rounded = (bits + (0x7fff + (bits >> 16 & 1))) >> 16;
  store_bits<W>(p, (bits & 0x7fffffff) > 0x7f800000u ? (bits >> 16 | 0x40) : rounded);  // a NaN stays one
}
template <int W>
TK_INLINE void store(Half* p, const Vec<float, W>& x) {
  using U = Vec<uint32_t, W>;
  const U bits = bit_cast<U>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // normal: round the 13 bits below half's last place, then move the exponent's bias from 127 to 15
  const U normal = (magnitude + (0xfff + (magnitude >> 13 & 1)) - (112u << 23)) >> 13;
  // subnormal: adding 0.5 aligns the last place with 2^-24, and the addition rounds
  const U subnormal = bit_cast<U>(bit_cast<Vec<float, W>>(magnitude) + 0.5f) - 0x3f000000u;
  U half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? broadcast<W>(0x7c00u) : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? broadcast<W>(0x7e00u) : half;
  store_bits<W>(p, half | sign);
}

// Exactly; W: the doubles that the machine has in one vector. g++ 12 takes two steps of half as many.
template <int W>
TK_INLINE Vec<double, W> widen(const Vec<float, W>& x) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (W > 2) {
    Vec<double, W> y;
    asm("vcvtps2pd %1, %0" : "=v"(y) : "vm"(x));
    return y;
  }
#endif
  return __builtin_convertvector(x, Vec<double, W>);
}
template <int W>
TK_INLINE Vec<double, W> widen(const Vec<double, W>& x) {
  return x;
}

// x, of which the compiler forgets where it comes from: g++ 12 shares a comparison of x among all places that have it,
// or joins it with the conditions of what it chooses from, and takes 16 lanes of the result apart into scalars.
template <class V>
TK_INLINE V opaque(const V& x) {
  V y = x;
#if defined(__x86_64__) && defined(__GNUC__)
  asm("" : "+v"(y));
#endif
  return y;
}

// The larger; the second where either is NaN.
template <class V>
TK_INLINE V vmax(const V& a, const V& b) {
  return a > b ? a : b;
}

// K vectors as one row of K * W lanes, halved again and again by `join`: the order depends on K * W alone.
template <int W, int K, class T, class Join>
TK_INLINE T fold(const Vec<T, W> (&x)[K], const Join& join) {
  if constexpr (K > 1) {
    Vec<T, W> half[K / 2];
    for (int k = 0; k < K / 2; ++k) half[k] = join(x[k], x[k + K / 2]);
    return fold<W, K / 2, T>(half, join);
  } else if constexpr (W > 2) {
    Vec<T, W / 2> half[2];
    std::memcpy(half, x, sizeof(half));
    return fold<W / 2, 2, T>(half, join);
  } else {
    const Vec<T, 2> swapped{x[0][1], x[0][0]};
    return join(x[0], swapped)[0];
  }
}
// The sum in double.
template <int W, int K, class V>
TK_INLINE double fold_sum(const V (&x)[K]) {
  Vec<double, W> sum[K];
  for (int k = 0; k < K; ++k) sum[k] = __builtin_convertvector(x[k], Vec<double, W>);
  return fold<W, K, double>(sum, [](const auto& a, const auto& b) TK_INLINE_LAMBDA { return a + b; });
}
template <int W, class V>
TK_INLINE auto fold_max(const V& x) {
  auto largest = x[0];
  for (int l = 1; l < W; ++l) largest = x[l] > largest ? x[l] : largest;
  return largest;
}

constexpr float kExpZero = -87.3365402f;  // log of the smallest normal float32, rounded up

// a * b + c in one rounding; the baseline may have to compute it in software, to the same bits.
template <int W>
TK_INLINE Vec<float, W> vfma(const Vec<float, W>& a, const Vec<float, W>& b, const Vec<float, W>& c) {
  Vec<float, W> y;
  for (int l = 0; l < W; ++l) y[l] = std::fma(a[l], b[l], c[l]);
  return y;
}

// x = n log 2 + r with abs(r) <= log(2) / 2, for x <= 88.37; power = 2^n by its exponent bits, from -126 on.
template <int W>
struct ExpParts {
  Vec<float, W> r, power;

  TK_INLINE explicit ExpParts(const Vec<float, W>& x) {
    const auto all = [](float c) TK_INLINE_LAMBDA { return broadcast<W>(c); };
    constexpr float shift = 0x1.8p23f + 127;  // leaves round(x / log 2) + 127 in the low bits
    const auto t = vfma<W>(x, all(0x1.715476p0f), all(shift));
    const auto n = t - shift;
    r = vfma<W>(n, all(0x1.05c610p-29f), vfma<W>(n, all(-0x1.62e430p-1f), x));
    power = bit_cast<Vec<float, W>>(bit_cast<Vec<uint32_t, W>>(t) << 23);
  }
};

// exp(r) = 1 + r + r^2 q(r): the minimax q's coefficients, of r^0 to r^4.
constexpr float kExpRest[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.123a2p-7f, 0x1.6a23cep-10f};

// exp(x) for x <= 88.37, within 1 ulp: 0 below kExpZero (no subnormal results), NaN for NaN. No branch, no table.
template <int W>
TK_INLINE Vec<float, W> vexp(const Vec<float, W>& x) {
  const ExpParts<W> parts(x);
  const auto r = parts.r;
  auto q = vfma<W>(r, broadcast<W>(kExpRest[4]), broadcast<W>(kExpRest[3]));
  for (int k = 2; k >= 0; --k) q = vfma<W>(q, r, broadcast<W>(kExpRest[k]));
  const auto y = (vfma<W>(r * r, q, r) + 1.0f) * parts.power;
  return x < kExpZero ? Vec<float, W>{} : y;
}
template <int W>
TK_INLINE Vec<double, W> vexp(const Vec<double, W>& x) {
  Vec<double, W> y;
  for (int l = 0; l < W; ++l) y[l] = std::exp(x[l]);
  return y;
}

}  // namespace tk
