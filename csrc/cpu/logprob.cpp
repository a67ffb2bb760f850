// Log-probs of targets and softmax statistics, from one read of the logits, and their gradient, which recomputes p.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "huge_pages.h"
#include "logprob_row.h"
#include "simd.h"

namespace tk::logprob {
namespace {

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
    const double t = temperatures ? static_cast<const A*>(temperatures)[r] : temperature;
    return t > 0 && t - t == 0 ? 1 / t : std::numeric_limits<double>::quiet_NaN();  // a graph has not checked it
  }
};

template <class A>
struct Stats {
  A *logprobs, *norm, *entropy, *sum_sq_probs;  // the last two may be null
  uint8_t* is_top1;                             // or null
};

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
        Sums sums = moments ? row_sums<W, true>(z, p.V, scale) : row_sums<W, false>(z, p.V, scale);
        sums.rest += sums.max - sums.max;  // NaN where the maximum is not finite
        finish_row(sums, widen(z[p.targets[r]]), scale, r, out);
      }
    });
  });
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
  Upstream up{saved.norm[2 * r],
              saved.norm[2 * r + 1],
              p.inverse_temperature<A>(r),
              saved.logprobs[r],
              0,
              grads.logprobs[r * grads.logprobs_stride],
              0};
  if (grads.entropy) {
    up.entropy = saved.entropy[r];
    up.grad_entropy = grads.entropy[r * grads.entropy_stride];
  }
  return up;
}

template <class T>
void token_stats_backward(T* grad_logits, Strides grad_strides, const T* logits, Strides strides, const Problem& p,
                          const Gradients<Accumulator<T>>& grads, const Stats<const Accumulator<T>>& saved) {
  if (p.rows() == 0) return;
  if (grad_logits != logits) prefer_huge_pages(grad_logits, (p.offset(grad_strides, p.rows() - 1) + p.V) * sizeof(T));
  parallel_for(p.rows(), std::max<int64_t>(1, kGrain / p.V), [&](int64_t begin, int64_t end) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr int W = width();
      for (int64_t r = begin; r < end; ++r) {
        T* grad = grad_logits + p.offset(grad_strides, r);
        const T* z = logits + p.offset(strides, r);
        const Upstream up = p.masked(r) ? Upstream{} : upstream(p, grads, saved, r);
        if (up.grad_logprob == 0 && up.grad_entropy == 0) {
          row_zero(grad, p.V);
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

int64_t first_bad_target(const Problem& p) {
  for (int64_t r = 0; r < p.rows(); ++r)
    if (!p.masked(r) && !p.target_valid(r)) return r;
  return -1;
}

using Rows = std::tuple<uintptr_t, int64_t, int64_t>;

template <class T>
T* pointer_of(const Rows& x) {
  return as<T>(std::get<0>(x));
}
Strides strides_of(const Rows& x) { return {std::get<1>(x), std::get<2>(x)}; }

using Arguments = std::tuple<int64_t, int64_t, int64_t, uintptr_t, double, uintptr_t, uintptr_t>;

Problem problem_of(const Arguments& x) {
  const auto [outer, inner, V, targets, temperature, temperatures, mask] = x;
  return {outer, inner, V, as<int64_t>(targets), temperature, as<void>(temperatures), as<uint8_t>(mask)};
}

// The first row whose target is illegal, or -1.
int64_t bound_token_stats(int dtype, const Rows& logits, const Arguments& arguments,
                          const std::array<uintptr_t, 5>& out) {
  const Problem p = problem_of(arguments);
  const int64_t bad = first_bad_target(p);
  if (bad >= 0) return bad;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto [logprobs, norm, entropy, sum_sq_probs, is_top1] = out;
    const Stats<A> stats{as<A>(logprobs), as<A>(norm), as<A>(entropy), as<A>(sum_sq_probs), as<uint8_t>(is_top1)};
    token_stats(pointer_of<T>(logits), strides_of(logits), p, stats);
  });
  return -1;
}

using Upstreams = std::array<std::pair<uintptr_t, int64_t>, 2>;  // of the log-probs and the entropy: pointer, stride

void bound_token_stats_backward(int dtype, const Rows& grad_logits, const Rows& logits, const Arguments& arguments,
                                const Upstreams& upstreams, const std::array<uintptr_t, 3>& saved) {
  const Problem p = problem_of(arguments);
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = const Accumulator<T>;
    const auto& [logprobs, entropy] = upstreams;
    const Gradients<Accumulator<T>> grads{as<A>(logprobs.first), logprobs.second, as<A>(entropy.first), entropy.second};
    const Stats<A> stats{as<A>(saved[0]), as<A>(saved[1]), as<A>(saved[2]), nullptr, nullptr};
    token_stats_backward(pointer_of<T>(grad_logits), strides_of(grad_logits), pointer_of<T>(logits), strides_of(logits),
                         p, grads, stats);
  });
}

}  // namespace
}  // namespace tk::logprob

void bind_logprob(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("token_stats", &tk::logprob::bound_token_stats, unlocked());
  m.def("token_stats_backward", &tk::logprob::bound_token_stats_backward, unlocked());
}
