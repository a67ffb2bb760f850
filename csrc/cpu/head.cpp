// A tile of the head's logits [rows, columns], a slice of the vocabulary: folded into its rows' statistics, and turned
// into their gradient.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "huge_pages.h"
#include "logprob_row.h"
#include "simd.h"

namespace tk::head {
namespace {

using logprob::Sums;

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread

template <class T>
struct Tile {
  T* z;
  int64_t stride, rows, columns;

  T* row(int64_t r) const { return z + r * stride; }
  template <class F>
  void each_row(F f) const {
    parallel_for(rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
      dispatch([&](auto width) TK_INLINE_LAMBDA {
        for (int64_t r = begin; r < end; ++r) f(width, r);
      });
    });
  }
};

// scale: 1 / temperature of each row. state: Sums of each row, its products only where they are asked for.
template <class T>
void fold(const Tile<T>& tile, const double* scale, bool moments, Sums* state) {
  tile.each_row([&](auto width, int64_t r) TK_INLINE_LAMBDA {
    constexpr int W = width();
    const T* z = tile.row(r);
    state[r] = moments ? logprob::row_sums<W, true>(z, tile.columns, scale[r], state[r])
                       : logprob::row_sums<W, false>(z, tile.columns, scale[r], state[r]);
  });
}

// The pairs of row r are offsets[r]:offsets[r+1], ordered by target; a target is numbered from the tile's first column.
// factors: what p is multiplied by at the row's targets, and exp(z - max) / (1 + rest) at all others; null: the sum of
// grad_logprobs, at both.
template <class A>
struct Pairs {
  const int64_t *offsets, *targets;
  const A *logprobs, *grad_logprobs, *entropy, *grad_entropy, *factors;  // the last three may be null
};

// d logit / d (h w) at a logit: logit_scale (1 - z^2 / softcap^2), its difference of squares as a product.
struct Chain {
  double softcap, logit_scale;  // 0: no softcap

  bool is_one() const { return softcap == 0 && logit_scale == 1; }
  double gain() const { return softcap > 0 ? logit_scale / (softcap * softcap) : logit_scale; }
  double at(double z) const {
    z = std::max(z, -softcap);  // a token that the row was not sampled from, at -inf, has no slope
    return softcap > 0 ? gain() * (softcap - z) * (softcap + z) : logit_scale;
  }
};

template <class A>
logprob::Upstream upstream(const Pairs<A>& pairs, const A* norm, double scale, int64_t r) {
  logprob::Upstream up{norm[2 * r], std::log1p(double(norm[2 * r + 1])), scale, 0, 0, 0, 0};
  for (int64_t i = pairs.offsets[r]; i < pairs.offsets[r + 1]; ++i) {
    up.grad_logprob += pairs.grad_logprobs[i];
    if (pairs.grad_entropy) up.entropy = pairs.entropy[i], up.grad_entropy += pairs.grad_entropy[i];
  }
  return up;
}

struct Placed {
  int64_t column;
  double grad;
};

// The gradients of the columns that are targets, from log p itself, which is precise where p is near 1.
template <class T, class A>
void collect_targets(const Tile<T>& tile, const Pairs<A>& pairs, logprob::Upstream up, const Chain& chain, int64_t r,
                     std::vector<Placed>& placed) {
  placed.clear();
  const double grad_sum = up.grad_logprob;
  const int64_t end = pairs.offsets[r + 1];
  for (int64_t i = pairs.offsets[r], next; i < end; i = next) {
    const int64_t target = pairs.targets[i];
    double own = 0;
    for (next = i; next < end && pairs.targets[next] == target; ++next) own += pairs.grad_logprobs[next];
    if (target < 0 || target >= tile.columns) continue;
    up.logprob = pairs.logprobs[i], up.grad_logprob = own;
    const double grad = up.target_gradient() - up.scale * std::exp(up.logprob) * (grad_sum - own);
    placed.push_back({target, grad * chain.at(logprob::widen(tile.row(r)[target]))});
  }
}

template <int W, class T>
TK_INLINE void chained_gradient(T* z, int64_t columns, const logprob::Upstream& up, const Chain& chain) {
  using A = Accumulator<T>;
  const A softcap = A(chain.softcap), gain = A(chain.gain());
  if (softcap > 0)
    logprob::row_gradient<W, true>(z, z, columns, up, [=](const auto& x) TK_INLINE_LAMBDA {
      const auto inside = vmax(x, broadcast<W>(-softcap));
      return gain * (softcap - inside) * (softcap + inside);
    });
  else
    logprob::row_gradient<W, true>(z, z, columns, up, [=](const auto&) TK_INLINE_LAMBDA { return gain; });
}

// z becomes d loss / d (h w).
template <class T, class A>
void gradient(const Tile<T>& tile, const A* norm, const double* scale, const Pairs<A>& pairs, const Chain& chain) {
  tile.each_row([&](auto width, int64_t r) TK_INLINE_LAMBDA {
    constexpr int W = width();
    static thread_local std::vector<Placed> placed;
    T* z = tile.row(r);
    logprob::Upstream up = upstream(pairs, norm, scale[r], r);
    if (pairs.factors) up.grad_logprob = pairs.factors[2 * r];
    collect_targets(tile, pairs, up, chain, r, placed);
    if (pairs.factors) up.grad_logprob = pairs.factors[2 * r + 1];
    if (up.grad_logprob == 0 && up.grad_entropy == 0)
      logprob::row_zero(z, tile.columns);
    else if (!chain.is_one())
      chained_gradient<W>(z, tile.columns, up, chain);
    else if (up.grad_entropy == 0)
      logprob::row_gradient<W, false>(z, z, tile.columns, up);
    else
      logprob::row_gradient<W, true>(z, z, tile.columns, up);
    for (const Placed& x : placed) logprob::narrow(x.grad, z + x.column);
  });
}

void bound_fold(uintptr_t z, int dtype, int64_t stride, int64_t rows, int64_t columns, uintptr_t scale, bool moments,
                uintptr_t state) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    fold(Tile<T>{as<T>(z), stride, rows, columns}, as<double>(scale), moments, as<Sums>(state));
  });
}

// of_pairs: in the order of Pairs' members.
void bound_gradient(uintptr_t z, int dtype, int64_t stride, int64_t rows, int64_t columns, uintptr_t norm,
                    uintptr_t scale, const std::array<uintptr_t, 7>& of_pairs, double softcap, double logit_scale) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto [offsets, targets, logprobs, grad_logprobs, entropy, grad_entropy, factors] = of_pairs;
    const Pairs<A> pairs{as<int64_t>(offsets), as<int64_t>(targets), as<A>(logprobs), as<A>(grad_logprobs),
                         as<A>(entropy),       as<A>(grad_entropy),  as<A>(factors)};
    gradient(Tile<T>{as<T>(z), stride, rows, columns}, as<A>(norm), as<double>(scale), pairs,
             Chain{softcap, logit_scale});
  });
}

}  // namespace
}  // namespace tk::head

void bind_head(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("head_fold", &tk::head::bound_fold, unlocked());
  m.def("head_gradient", &tk::head::bound_gradient, unlocked());
  m.def("prefer_huge_pages",
        [](uintptr_t begin, int64_t bytes) { tk::prefer_huge_pages(reinterpret_cast<void*>(begin), bytes); });
}
