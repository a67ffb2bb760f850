// One row of logits z: the sums behind its softmax statistics, and its gradient.
//
// With m = max z, u_j = (z_j - m) / temperature and rest = sum exp u_j over all but one place of the maximum, whose own
// term is exactly 1:  log p_j = u_j - log1p(rest),  H = log1p(rest) - (sum exp(u_j) u_j) / (1 + rest): nothing cancels,
// so both keep their relative precision where one token has all the mass.
//
// A row is staged in blocks that stay in the L1 cache. Sums run over kLanes fixed lanes inside a block, of float32 for
// logits of 32 bits or fewer, and in double between blocks.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/dtype.h"
#include "simd.h"

namespace tk::logprob {

constexpr int kLanes = 32;    // of every sum, whatever the width of a vector
constexpr int kBlock = 4096;  // elements of a stage
constexpr int kAhead = 2048;  // elements between the backward's prefetch and its use

// The row's sums over every place but one of the maximum.
struct Sums {
  double max = -std::numeric_limits<double>::infinity();
  double rest = 0;  // sum e_j,  e_j = exp u_j
  double eu = 0;    // sum e_j u_j
  double ee = 0;    // sum e_j^2

  // Measures the sums from a larger maximum; the old one's place becomes one of the rest.
  void raise(double new_max, double scale) {
    if (max > -std::numeric_limits<double>::infinity()) {
      const double u = (max - new_max) * scale, e = std::exp(u);
      eu = e == 0 ? 0 : e * (eu + u * (rest + 1));
      ee = e * e * (ee + 1);
      rest = e * (rest + 1);
    }
    max = new_max;
  }
};

template <class A>
constexpr A kNegInf = -std::numeric_limits<A>::infinity();
constexpr float kNegligible = -1e5f;  // a log p whose p is 0, and whose product with that 0 is not NaN

template <class T>
TK_INLINE T negative_infinity() {
  return kNegInf<T>;
}
template <>
TK_INLINE Half negative_infinity() {
  return {0xfc00};
}
template <>
TK_INLINE BFloat16 negative_infinity() {
  return {0xff80};
}

template <class T>
TK_INLINE Accumulator<T> widen(const T& x) {
  const T lanes[4] = {x};
  return load<4>(lanes)[0];
}

template <class T>
TK_INLINE void narrow(double x, T* to) {
  T lanes[4];
  store<4>(lanes, broadcast<4>(static_cast<Accumulator<T>>(x)));
  *to = lanes[0];
}

// Widens n elements into stage, padded with -inf to whole lane groups; the maximum, NaN ignored.
template <int W, class T, class A>
TK_INLINE A fill_stage(const T* z, int64_t n, A* stage) {
  Vec<A, W> largest[kLanes / W];
  for (auto& x : largest) x = broadcast<W>(kNegInf<A>);
  const auto group = [&](const T* from, A* to) TK_INLINE_LAMBDA {
    for (int k = 0; k < kLanes / W; ++k) {
      const auto x = load<W>(from + k * W);
      largest[k] = vmax(x, largest[k]);
      store<W>(to + k * W, x);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) group(z + i, stage + i);
  if (i < n) {
    T tail[kLanes];
    std::fill_n(tail, kLanes, negative_infinity<T>());
    std::memcpy(tail, z + i, (n - i) * sizeof(T));
    group(tail, stage + i);
  }
  for (int k = 1; k < kLanes / W; ++k) largest[0] = vmax(largest[k], largest[0]);
  return fold_max<W>(largest[0]);
}

// Replaces every place of the maximum by -inf and returns their number.
template <int W, class A>
TK_INLINE int64_t strike(A* stage, int64_t n, A max) {
  auto count = Vec<A, W>{} != Vec<A, W>{};
  for (int64_t i = 0; i < n; i += W) {
    const auto x = load<W>(stage + i);
    const auto is_max = x == max;
    count -= is_max;
    store<W>(stage + i, is_max ? broadcast<W>(kNegInf<A>) : x);
  }
  int64_t total = 0;
  for (int l = 0; l < W; ++l) total += count[l];
  return total;
}

template <class T>
TK_INLINE void prefetch_group(const T* p) {
  for (size_t byte = 0; byte < kLanes * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

// Adds exp u_j, and with kMoments its products, over a stage, while the memory at `next` is fetched.
template <int W, bool kMoments, class T, class A>
TK_INLINE void accumulate(const A* stage, int64_t n, A max, A scale, const T* next, Sums& sums) {
  Vec<A, W> rest[kLanes / W] = {}, eu[kLanes / W] = {}, ee[kLanes / W] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    prefetch_group(next + i);
    for (int k = 0; k < kLanes / W; ++k) {
      const auto u = (load<W>(stage + i + k * W) - max) * scale;
      const auto e = vexp<W>(u);
      rest[k] += e;
      if constexpr (kMoments) {
        eu[k] += e * vmax(u, broadcast<W>(A(kNegligible)));
        ee[k] += e * e;
      }
    }
  }
  sums.rest += fold_sum<W>(rest);
  if constexpr (kMoments) {
    sums.eu += fold_sum<W>(eu);
    sums.ee += fold_sum<W>(ee);
  }
}

// The sums of a row, or of a further part of one.
template <int W, bool kMoments, class T>
TK_INLINE Sums row_sums(const T* z, int64_t V, double scale, Sums sums = {}) {
  using A = Accumulator<T>;
  alignas(64) A stage[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, V - begin), padded = (n + kLanes - 1) / kLanes * kLanes;
    const A max = fill_stage<W>(z + begin, n, stage);
    if (max > sums.max) {
      sums.raise(max, scale);
      const double others = strike<W>(stage, padded, max) - 1;
      sums.rest += others;
      sums.ee += others;
    }
    const A from = std::max<A>(sums.max, std::numeric_limits<A>::lowest());  // -inf - -inf would be NaN
    accumulate<W, kMoments>(stage, padded, from, static_cast<A>(scale), z + begin + kBlock, sums);
  }
  return sums;
}

// The saved statistics of a row and the gradients that reach it.
struct Upstream {
  double max, log_sum, scale, logprob, entropy;
  double grad_logprob, grad_entropy;

  // Of the target's own logit: 1 - p from log p, which is precise where p is near 1.
  double target_gradient() const {
    const double p = std::exp(logprob);
    const double from_entropy = grad_entropy == 0 || p == 0 ? 0 : grad_entropy * p * (logprob + entropy);
    return scale * (-grad_logprob * std::expm1(logprob) - from_entropy);
  }
};

template <class T>
void row_zero(T* grad, int64_t V) {
  std::memset(static_cast<void*>(grad), 0, V * sizeof(T));
}

struct Linear {};  // the logits are what the gradient is taken in

// grad_j = -scale p_j (g + g_H (log p_j + H)) for every j, the target included; grad may be z. `chain`, if it is a
// function, gives what a logit's gradient is multiplied with.
template <int W, bool kEntropy, class T, class Chain = Linear>
TK_INLINE void row_gradient(T* grad, const T* z, int64_t V, const Upstream& up, const Chain& chain = {}) {
  using A = Accumulator<T>;
  const double inverse_sum = std::exp(-up.log_sum);  // a factor rounds p less than log_sum in an exponent would
  const A max = up.max, log_sum = up.log_sum, scale = up.scale;
  const A gain = -up.scale * (up.grad_logprob + (kEntropy ? up.grad_entropy * up.entropy : 0)) * inverse_sum;
  const A slope = -up.scale * up.grad_entropy * inverse_sum;
  const auto group = [&](T* to, const T* from) TK_INLINE_LAMBDA {
    for (int k = 0; k < kLanes; k += W) {
      const auto x = load<W>(from + k);
      const auto u = (x - max) * scale;
      auto g = broadcast<W>(gain);
      if constexpr (kEntropy) g += slope * vmax(u - log_sum, broadcast<W>(A(kNegligible)));
      if constexpr (!std::is_same_v<Chain, Linear>) g *= chain(x);
      store<W>(to + k, vexp<W>(u) * g);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) {
    prefetch_group(z + i + kAhead);
    prefetch_group(grad + i + kAhead);
    group(grad + i, z + i);
  }
  if (i < V) {
    T tail[kLanes] = {};
    std::memcpy(tail, z + i, (V - i) * sizeof(T));
    group(tail, tail);
    std::memcpy(grad + i, tail, (V - i) * sizeof(T));
  }
}

}  // namespace tk::logprob
