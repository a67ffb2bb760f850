// Tiles of a student's and a teacher's logits [rows, V]: the divergence of each row, and its gradient in the student.
//
// With s and t the two softmaxes, d = log s - log t and m = (1 - beta) s + beta t. A row's sum is over terms that are
// zero where s = t and of second order in d near it, so neither the roundings of the log-sums nor those of d show:
//   beta 0: s - t - t d           beta 1: t - s + s d           between: beta t log(t / m) + (1 - beta) s log(s / m)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "logprob_row.h"
#include "simd.h"

namespace tk::divergence {
namespace {

using logprob::kBlock;
using logprob::kLanes;
using logprob::negative_infinity;

constexpr int64_t kGrain = 1 << 13;  // elements worth a thread

enum Kind { kForward, kReverse, kMixture };  // beta 0, beta 1, between

// What the backward needs to know of a row: each softmax's maximum and its sum without one place of the maximum;
// log(s / t), or log(s / m), at the largest s, and from there to its mean over s, which is precise where that s is
// near 1.
struct Saved {
  double max_s, rest_s, max_t, rest_t, anchor, center;
};

template <int W>
TK_INLINE Vec<float, W> multiply_add(const Vec<float, W>& a, const Vec<float, W>& b, const Vec<float, W>& c) {
  return vfma<W>(a, b, c);
}
template <int W>
TK_INLINE Vec<double, W> multiply_add(const Vec<double, W>& a, const Vec<double, W>& b, const Vec<double, W>& c) {
  return a * b + c;
}

// The polynomials' loops must unroll: in a loop the compiler takes vfma's lanes one by one.
//
// log x for normal x > 0 (Cephes' polynomial on [sqrt(1/2), sqrt(2)], within 2 ulp).
template <int W>
TK_INLINE Vec<float, W> vlog(const Vec<float, W>& x) {
  using V = Vec<float, W>;
  constexpr float c[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                         -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const auto shifted = bit_cast<Vec<int32_t, W>>(x) - 0x3f3504f3;  // sqrt(1/2)
  const V exponent = __builtin_convertvector(shifted >> 23, V);
  const V f = bit_cast<V>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  V q = broadcast<W>(c[0]);
#pragma GCC unroll 32
  for (int k = 1; k < 9; ++k) q = vfma<W>(q, f, broadcast<W>(c[k]));
  V y = vfma<W>(exponent, broadcast<W>(-2.12194440e-4f), q * f * (f * f));
  y = vfma<W>(f * f, broadcast<W>(-0.5f), y);
  return vfma<W>(exponent, broadcast<W>(0.693359375f), f + y);
}
template <int W>
TK_INLINE Vec<double, W> vlog(const Vec<double, W>& x) {
  Vec<double, W> y;
  for (int l = 0; l < W; ++l) y[l] = std::log(x[l]);
  return y;
}

// e^x - 1 - x for abs(x) <= 1, by its series.
template <int W, class V>
TK_INLINE V series(const V& x) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(x[0])>>;
  constexpr int terms = std::is_same_v<A, float> ? 10 : 18;
  A c[terms] = {A(0.5)};
#pragma GCC unroll 32
  for (int k = 1; k < terms; ++k) c[k] = c[k - 1] / (k + 2);
  auto y = broadcast<W>(c[terms - 1]);
#pragma GCC unroll 32
  for (int k = terms - 2; k >= 0; --k) y = multiply_add<W>(y, x, broadcast<W>(c[k]));
  return y * (x * x);
}

// 2 artanh z - 2 z for abs(z) <= 0.47, by its series.
template <int W, class V>
TK_INLINE V artanh_rest(const V& z) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(z[0])>>;
  constexpr int terms = std::is_same_v<A, float> ? 9 : 22;
  const V z2 = z * z;
  V y = broadcast<W>(A(2) / (2 * terms + 1));
#pragma GCC unroll 32
  for (int k = terms - 1; k >= 1; --k) y = multiply_add<W>(y, z2, broadcast<W>(A(2) / (2 * k + 1)));
  return y * (z2 * z);
}

template <class V>
TK_INLINE V vabs(const V& x) {
  return x < 0 ? -x : x;
}

// One place of both rows.
template <int W, class A>
struct Place {
  using V = Vec<A, W>;
  V s, t, d;
};

template <class A>
struct Row {
  A max_s, max_t, share_s, share_t, scale, shift;
  A of_t, of_s;  // in the mixture

  Row(const Saved& x, double scale_, double beta)
      : max_s(x.max_s),
        max_t(x.max_t),
        share_s(1 / (1 + x.rest_s)),
        share_t(1 / (1 + x.rest_t)),
        scale(scale_),
        shift(std::log1p(x.rest_t) - std::log1p(x.rest_s)),
        of_t(beta),
        of_s(1 - beta) {}

  template <int W>
  TK_INLINE Place<W, A> at(const Vec<A, W>& z_s, const Vec<A, W>& z_t) const {
    const auto u_s = (z_s - max_s) * scale, u_t = (z_t - max_t) * scale;
    return {vexp<W>(u_s) * share_s, vexp<W>(u_t) * share_t, (u_s - u_t) + shift};
  }
};

// The term of KL(a || b), d = log b - log a: b - a - a d >= 0. Far from 0 its parts are added up apart.
template <int W, class V>
TK_INLINE void add_kl(const V& a, const V& b, const V& d, V& divergence, V& masses) {
  const auto near = vabs(d) < 1;
  divergence += a == 0 ? V{} : near ? a * series<W>(d) : -a * d;
  masses += near ? V{} : b - a;
}

// log(s / m), and the term of both divergences from m.
template <int W, class A>
struct Mixture {
  using V = Vec<A, W>;
  V log_ratio, term;

  TK_INLINE Mixture(const Place<W, A>& x, const Row<A>& row) {
    const auto above = x.d > 0;  // s is the larger
    const V larger = above ? x.s : x.t, other = above ? broadcast<W>(row.of_t) : broadcast<W>(row.of_s);
    const V own = above ? broadcast<W>(row.of_s) : broadcast<W>(row.of_t);
    const V magnitude = vabs(x.d), gap = magnitude < A(1e4) ? magnitude : broadcast<W>(A(1e4));
    const V e = vexp<W>(-gap), bend = series<W>(-gap), fall = bend - gap;  // e - 1, precisely where it is near 0
    const auto near = gap < 1;
    const V w = near ? other * fall : V{}, z = w / (2 + w);  // m / larger = 1 + w = (1 + z) / (1 - z)
    const V cubic = artanh_rest<W>(z);
    const V y = vmax(own + other * e, broadcast<W>(std::numeric_limits<A>::min()));
    const V log_m = near ? 2 * z + cubic : vlog<W>(y);  // log(m / larger)
    const V close = other * (-bend - gap * fall) - (w * z + cubic * (1 + w)), far = -y * log_m - other * e * gap;
    log_ratio = above ? -log_m : -log_m - gap;
    term = larger == 0 ? V{} : larger * (near ? close : far);
  }
};

// A block of both rows, padded with -inf, whose terms are 0.
template <class A>
struct Stage {
  alignas(64) A s[kLanes], t[kLanes];

  Stage(const A* z_s, const A* z_t, int64_t n) {
    std::fill_n(s, kLanes, negative_infinity<A>());
    std::fill_n(t, kLanes, negative_infinity<A>());
    std::memcpy(s, z_s, n * sizeof(A));
    std::memcpy(t, z_t, n * sizeof(A));
  }
};

// log(s / t), or log(s / m).
template <int W, Kind kKind, class A>
TK_INLINE Vec<A, W> log_ratio(const Place<W, A>& x, const Row<A>& row) {
  if constexpr (kKind == kMixture)
    return Mixture<W, A>(x, row).log_ratio;
  else
    return x.d;
}

struct Sum {
  double divergence = 0, masses = 0, center = 0;
};

template <int W, Kind kKind, class A>
TK_INLINE void add_block(const A* z_s, const A* z_t, int64_t n, const Row<A>& row, A anchor, Sum& sum) {
  using V = Vec<A, W>;
  V divergence[kLanes / W] = {}, masses[kLanes / W] = {}, center[kLanes / W] = {};
  const auto group = [&](const A* from_s, const A* from_t) TK_INLINE_LAMBDA {
    for (int k = 0; k < kLanes / W; ++k) {
      const auto x = row.template at<W>(load<W>(from_s + k * W), load<W>(from_t + k * W));
      if constexpr (kKind == kForward) add_kl<W>(x.t, x.s, x.d, divergence[k], masses[k]);
      if constexpr (kKind == kReverse) {
        add_kl<W>(x.s, x.t, -x.d, divergence[k], masses[k]);
        center[k] += x.s == 0 ? V{} : x.s * (x.d - anchor);
      }
      if constexpr (kKind == kMixture) {
        const Mixture<W, A> mixture(x, row);
        divergence[k] += mixture.term;
        center[k] += x.s == 0 ? V{} : x.s * (mixture.log_ratio - anchor);
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) group(z_s + i, z_t + i);
  if (i < n) {
    const Stage<A> tail(z_s + i, z_t + i, n - i);
    group(tail.s, tail.t);
  }
  sum.divergence += fold_sum<W>(divergence);
  sum.masses += fold_sum<W>(masses);
  sum.center += fold_sum<W>(center);
}

// Of x in z, or the last place where x is NaN.
template <int W, class A>
TK_INLINE int64_t first_place(const A* z, int64_t V, A x) {
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) {
    auto found = load<W>(z + i) == x;
    for (int k = W; k < kLanes; k += W) found |= load<W>(z + i + k) == x;
    bool any = false;
    for (int l = 0; l < W; ++l) any |= found[l] != 0;
    if (any) break;
  }
  while (i < V - 1 && z[i] != x) ++i;
  return i;
}

template <int W, Kind kKind, class A>
TK_INLINE Sum add_row(const A* z_s, const A* z_t, int64_t V, const Row<A>& row, double& anchor) {
  if constexpr (kKind != kForward) {
    const int64_t at = first_place<W>(z_s, V, row.max_s);
    const Stage<A> alone(z_s + at, z_t + at, 1);
    anchor = log_ratio<4, kKind>(row.template at<4>(load<4>(alone.s), load<4>(alone.t)), row)[0];
  }
  Sum sum;
  for (int64_t i = 0; i < V; i += kBlock)
    add_block<W, kKind>(z_s + i, z_t + i, std::min<int64_t>(kBlock, V - i), row, A(anchor), sum);
  return sum;
}

template <int W, Kind kKind, class A>
TK_INLINE Vec<A, W> slope(const Place<W, A>& x, const Row<A>& row, A anchor, A center) {
  if constexpr (kKind == kForward) return vabs(x.d) < 1 ? x.t * (x.d + series<W>(x.d)) : x.s - x.t;
  if constexpr (kKind != kForward)
    return x.s == 0 ? Vec<A, W>{} : x.s * ((log_ratio<W, kKind>(x, row) - anchor) - center);
}

// What a row's gradient is multiplied with: gain, and with a softcap, whose tanh the tile then holds, 1 - tanh^2.
template <class A>
struct Chain {
  A gain, softcap;
};

// z_s becomes the slope in what the student's logits were made of.
template <int W, Kind kKind, bool kBends, class A>
TK_INLINE void row_gradient(A* z_s, const A* z_t, int64_t V, const Row<A>& row, const Saved& saved,
                            const Chain<A>& chain) {
  const A anchor = saved.anchor, center = saved.center;
  const auto group = [&](A* to, const A* from_s, const A* from_t) TK_INLINE_LAMBDA {
    for (int k = 0; k < kLanes; k += W) {
      const auto x = load<W>(from_s + k);
      auto factor = broadcast<W>(chain.gain);
      if constexpr (kBends) factor *= (1 - x) * (1 + x);
      const auto z = kBends ? chain.softcap * x : x;  // rounded as the forward's
      store<W>(to + k, factor * slope<W, kKind>(row.template at<W>(z, load<W>(from_t + k)), row, anchor, center));
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) group(z_s + i, z_s + i, z_t + i);
  if (i < V) {
    Stage<A> tail(z_s + i, z_t + i, V - i);
    group(tail.s, tail.s, tail.t);
    std::memcpy(z_s + i, tail.s, (V - i) * sizeof(A));
  }
}

template <class A>
struct Tile {
  A *student, *teacher;
  int64_t stride_s, stride_t, rows, columns;

  template <class F>
  void each_row(double beta, F f) const {
    parallel_for(rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
      const auto run = [&](auto kind) {
        dispatch([&](auto width) TK_INLINE_LAMBDA {
          for (int64_t r = begin; r < end; ++r) f(width, kind, r, student + r * stride_s, teacher + r * stride_t);
        });
      };
      if (beta == 0) return run(std::integral_constant<Kind, kForward>{});
      if (beta == 1) return run(std::integral_constant<Kind, kReverse>{});
      run(std::integral_constant<Kind, kMixture>{});
    });
  }
};

// scale: 1 / temperature of each row.
template <class A>
void rows(const Tile<A>& tile, const double* scale, double beta, A* divergence, Saved* saved) {
  tile.each_row(beta, [&](auto width, auto kind, int64_t r, const A* z_s, const A* z_t) TK_INLINE_LAMBDA {
    constexpr int W = width();
    const logprob::Sums s = logprob::row_sums<W, false>(z_s, tile.columns, scale[r]);
    const logprob::Sums t = logprob::row_sums<W, false>(z_t, tile.columns, scale[r]);
    Saved& known = saved[r] = {s.max, s.rest + (s.max - s.max), t.max, t.rest + (t.max - t.max), 0, 0};  // inf: NaN
    const Row<A> row(known, scale[r], beta);
    const Sum sum = add_row<W, kind()>(z_s, z_t, tile.columns, row, known.anchor);
    known.center = sum.center;
    const double total = sum.divergence + sum.masses;
    divergence[r] = total < 0 ? 0 : total;
  });
}

// softcap 0: none; else the student's tile holds the tanh alone
template <class A>
void gradient(const Tile<A>& tile, const double* scale, double beta, const Saved* saved, const A* upstream,
              double softcap, double logit_scale) {
  tile.each_row(beta, [&](auto width, auto kind, int64_t r, A* z_s, const A* z_t) TK_INLINE_LAMBDA {
    const Row<A> row(saved[r], scale[r], beta);
    const double gain = (kind() == kMixture ? 1 - beta : 1) * scale[r] * upstream[r] * logit_scale;
    const Chain<A> chain{A(gain), A(softcap)};
    if (softcap > 0)
      row_gradient<width(), kind(), true>(z_s, z_t, tile.columns, row, saved[r], chain);
    else
      row_gradient<width(), kind(), false>(z_s, z_t, tile.columns, row, saved[r], chain);
  });
}

template <class F>
void with_tile(bool is_double, uintptr_t student, uintptr_t teacher, int64_t stride_s, int64_t stride_t, int64_t rows,
               int64_t columns, F f) {
  if (is_double) return f(Tile<double>{as<double>(student), as<double>(teacher), stride_s, stride_t, rows, columns});
  f(Tile<float>{as<float>(student), as<float>(teacher), stride_s, stride_t, rows, columns});
}

void bound_rows(uintptr_t student, uintptr_t teacher, bool is_double, int64_t stride_s, int64_t stride_t, int64_t rows_,
                int64_t columns, uintptr_t scale, double beta, uintptr_t divergence, uintptr_t saved) {
  with_tile(is_double, student, teacher, stride_s, stride_t, rows_, columns, [&](const auto& tile) {
    using A = std::remove_pointer_t<decltype(tile.student)>;
    rows(tile, as<double>(scale), beta, as<A>(divergence), as<Saved>(saved));
  });
}

// chain: softcap, logit_scale.
void bound_gradient(uintptr_t student, uintptr_t teacher, bool is_double, int64_t stride_s, int64_t stride_t,
                    int64_t rows_, int64_t columns, uintptr_t scale, double beta, uintptr_t saved, uintptr_t upstream,
                    const std::array<double, 2>& chain) {
  with_tile(is_double, student, teacher, stride_s, stride_t, rows_, columns, [&](const auto& tile) {
    using A = std::remove_pointer_t<decltype(tile.student)>;
    gradient(tile, as<double>(scale), beta, as<Saved>(saved), as<A>(upstream), chain[0], chain[1]);
  });
}

}  // namespace
}  // namespace tk::divergence

void bind_divergence(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("divergence_rows", &tk::divergence::bound_rows, unlocked());
  m.def("divergence_gradient", &tk::divergence::bound_gradient, unlocked());
}
