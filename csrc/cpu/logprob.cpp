// Log-probs of targets and softmax statistics, from one read of the logits; the gradient recomputes p.
//
// With m = max z, u_j = (z_j - m) / temperature and rest = sum exp u_j over all but one place of the maximum, whose own
// term is exactly 1:  log p_j = u_j - log1p(rest),  H = log1p(rest) - (sum exp(u_j) u_j) / (1 + rest): nothing cancels,
// so both keep their relative precision where one token has all the mass.
//
// A row is staged in blocks that stay in the L1 cache. Sums run over kLanes fixed lanes of float32 inside a block and in
// double between blocks, so that bits depend neither on the vector width nor on the number of threads.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "simd.h"

namespace tk {
namespace {

constexpr int kLanes = 32;           // of every sum, whatever the width of a vector
constexpr int kBlock = 4096;         // elements of a stage
constexpr int kAhead = 2048;         // elements between the backward's prefetch and its use
constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

// Row r = o * inner + i begins at o * outer + i * inner elements.
struct Strides {
  int64_t outer, inner;
};

struct Problem {
  int64_t outer, inner, V;
  const int64_t* targets;
  double temperature;
  const void* temperatures;  // of the accumulator's type, or null
  const uint8_t* mask;       // or null

  int64_t rows() const { return outer * inner; }
  int64_t offset(Strides s, int64_t r) const { return r / inner * s.outer + r % inner * s.inner; }
  bool masked(int64_t r) const { return mask && !mask[r]; }
  bool target_valid(int64_t r) const { return targets[r] >= 0 && targets[r] < V; }
  template <class A>
  double inverse_temperature(int64_t r) const {
    return 1 / (temperatures ? static_cast<const A*>(temperatures)[r] : temperature);
  }
};

template <class A>
struct Stats {
  A *logprobs, *norm, *entropy, *sum_sq_probs;  // the last two may be null
  uint8_t* is_top1;                             // or null
};

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
        eu[k] += e * vmax(u, broadcast<W>(std::numeric_limits<A>::lowest()));  // 0, not NaN, at u = -inf
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

template <int W, bool kMoments, class T>
TK_INLINE Sums row_sums(const T* z, int64_t V, double scale) {
  using A = Accumulator<T>;
  alignas(64) A stage[kBlock];
  Sums sums;
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
  sums.rest += sums.max - sums.max;  // NaN where the maximum is not finite
  return sums;
}

template <class A>
void clear_row(const Stats<A>& out, int64_t r) {
  out.logprobs[r] = out.norm[2 * r] = out.norm[2 * r + 1] = 0;
  if (out.entropy) out.entropy[r] = 0;
  if (out.sum_sq_probs) out.sum_sq_probs[r] = 0;
  if (out.is_top1) out.is_top1[r] = 0;
}

template <class A>
void finish_row(const Sums& sums, double z_target, double scale, int64_t r, const Stats<A>& out) {
  const double log_sum = std::log1p(sums.rest);
  out.logprobs[r] = static_cast<A>((z_target - sums.max) * scale - log_sum);
  out.norm[2 * r] = static_cast<A>(sums.max);
  out.norm[2 * r + 1] = static_cast<A>(log_sum);
  if (out.entropy) out.entropy[r] = static_cast<A>(log_sum - sums.eu / (1 + sums.rest));
  if (out.sum_sq_probs) out.sum_sq_probs[r] = static_cast<A>((1 + sums.ee) / ((1 + sums.rest) * (1 + sums.rest)));
  if (out.is_top1) out.is_top1[r] = sums.rest >= 0 && z_target >= sums.max;  // a tie counts, NaN does not
}

template <class T>
void token_stats(const T* logits, Strides strides, const Problem& p, const Stats<Accumulator<T>>& out) {
  using A = Accumulator<T>;
  parallel_for(p.rows(), std::max<int64_t>(1, kGrain / p.V), [&](int64_t begin, int64_t end) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr int W = width();
      for (int64_t r = begin; r < end; ++r) {
        if (p.masked(r)) {
          clear_row(out, r);
          continue;
        }
        const T* z = logits + p.offset(strides, r);
        const double scale = p.inverse_temperature<A>(r);
        const bool moments = out.entropy || out.sum_sq_probs;
        const Sums sums = moments ? row_sums<W, true>(z, p.V, scale) : row_sums<W, false>(z, p.V, scale);
        finish_row(sums, widen(z[p.targets[r]]), scale, r, out);
      }
    });
  });
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

// grad_j = -scale p_j (g + g_H (log p_j + H)) for every j, the target included; grad may be z.
template <int W, bool kEntropy, class T>
TK_INLINE void row_gradient(T* grad, const T* z, int64_t V, const Upstream& up) {
  using A = Accumulator<T>;
  const A max = up.max, log_sum = up.log_sum, scale = up.scale;
  const A gain = -up.scale * (up.grad_logprob + (kEntropy ? up.grad_entropy * up.entropy : 0));
  const A slope = -up.scale * up.grad_entropy;
  const auto group = [&](T* to, const T* from) TK_INLINE_LAMBDA {
    for (int k = 0; k < kLanes; k += W) {
      const auto logp = (load<W>(from + k) - max) * scale - log_sum;
      auto g = broadcast<W>(gain);
      if constexpr (kEntropy) g += slope * vmax(logp, broadcast<W>(std::numeric_limits<A>::lowest()));
      store<W>(to + k, vexp<W>(logp) * g);
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

template <class A>
struct Gradients {
  const A* logprobs;
  int64_t logprobs_stride;
  const A* entropy;  // or null
  int64_t entropy_stride;
};

template <class A>
Upstream upstream(const Problem& p, const Gradients<A>& grads, const Stats<const A>& saved, int64_t r) {
  Upstream up{saved.norm[2 * r], saved.norm[2 * r + 1], p.inverse_temperature<A>(r), saved.logprobs[r], 0,
              grads.logprobs[r * grads.logprobs_stride], 0};
  if (grads.entropy) {
    up.entropy = saved.entropy[r];
    up.grad_entropy = grads.entropy[r * grads.entropy_stride];
  }
  return up;
}

template <class T>
void token_stats_backward(T* grad_logits, Strides grad_strides, const T* logits, Strides strides, const Problem& p,
                          const Gradients<Accumulator<T>>& grads, const Stats<const Accumulator<T>>& saved) {
  parallel_for(p.rows(), std::max<int64_t>(1, kGrain / p.V), [&](int64_t begin, int64_t end) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr int W = width();
      for (int64_t r = begin; r < end; ++r) {
        T* grad = grad_logits + p.offset(grad_strides, r);
        const T* z = logits + p.offset(strides, r);
        const Upstream up = p.masked(r) ? Upstream{} : upstream(p, grads, saved, r);
        if (up.grad_logprob == 0 && up.grad_entropy == 0) {
          std::memset(static_cast<void*>(grad), 0, p.V * sizeof(T));
          continue;
        }
        if (up.grad_entropy == 0)
          row_gradient<W, false>(grad, z, p.V, up);
        else
          row_gradient<W, true>(grad, z, p.V, up);
        if (p.target_valid(r)) narrow(up.target_gradient(), grad + p.targets[r]);
      }
    });
  });
}

template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

int64_t first_bad_target(const Problem& p) {
  for (int64_t r = 0; r < p.rows(); ++r)
    if (!p.masked(r) && !p.target_valid(r)) return r;
  return -1;
}

int64_t bound_token_stats(uintptr_t logits, int dtype, int64_t outer, int64_t inner, int64_t stride_outer,
                          int64_t stride_inner, int64_t V, uintptr_t targets, double temperature,
                          uintptr_t temperatures, uintptr_t mask, int outputs, uintptr_t logprobs, uintptr_t norm,
                          uintptr_t entropy, uintptr_t sum_sq_probs, uintptr_t is_top1) {
  const Problem p{outer, inner, V, as<int64_t>(targets), temperature, as<void>(temperatures), as<uint8_t>(mask)};
  const int64_t bad = first_bad_target(p);
  if (bad >= 0) return bad;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Stats<A> out{as<A>(logprobs), as<A>(norm), as<A>(outputs & 1 ? entropy : 0),
                       as<A>(outputs & 2 ? sum_sq_probs : 0), as<uint8_t>(outputs & 4 ? is_top1 : 0)};
    token_stats(as<T>(logits), {stride_outer, stride_inner}, p, out);
  });
  return -1;
}

void bound_token_stats_backward(uintptr_t grad_logits, int64_t grad_stride_outer, int64_t grad_stride_inner,
                                uintptr_t logits, int dtype, int64_t outer, int64_t inner, int64_t stride_outer,
                                int64_t stride_inner, int64_t V, uintptr_t targets, double temperature,
                                uintptr_t temperatures, uintptr_t mask, uintptr_t grad_logprobs,
                                int64_t grad_logprobs_stride, uintptr_t grad_entropy, int64_t grad_entropy_stride,
                                uintptr_t logprobs, uintptr_t norm, uintptr_t entropy) {
  const Problem p{outer, inner, V, as<int64_t>(targets), temperature, as<void>(temperatures), as<uint8_t>(mask)};
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = const Accumulator<T>;
    const Gradients<Accumulator<T>> grads{as<A>(grad_logprobs), grad_logprobs_stride, as<A>(grad_entropy),
                                          grad_entropy_stride};
    const Stats<A> saved{as<A>(logprobs), as<A>(norm), as<A>(entropy), nullptr, nullptr};
    token_stats_backward(as<T>(grad_logits), {grad_stride_outer, grad_stride_inner}, as<T>(logits),
                         {stride_outer, stride_inner}, p, grads, saved);
  });
}

}  // namespace
}  // namespace tk

void bind_logprob(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("token_stats", &tk::bound_token_stats, unlocked());
  m.def("token_stats_backward", &tk::bound_token_stats_backward, unlocked());
}
