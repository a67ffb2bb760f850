// Group-relative advantages, GAE and whitening on the CPU. Every sum is float64 and in an order that neither the number
// of threads nor the rest of the batch can change.
#include "../common/advantage.h"

#include <pybind11/pybind11.h>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "advantage_groups.h"
#include "simd.h"

namespace tk {
namespace {

// Four rows' maps are four loads and a transposition; one by one they take twice as long.
void write_advantages(const AdvantageMap<float>* maps, const int32_t* slot, const float* rewards, int64_t begin,
                      int64_t end, float* advantages) {
  using V = Vec<float, 4>;
  using I = Vec<int32_t, 4>;
  const auto map = [&](int64_t i) { return load<4>(&maps[slot[i]].centre); };
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const V a = map(i), b = map(i + 1), c = map(i + 2), d = map(i + 3);
    const V ab = __builtin_shuffle(a, b, I{0, 4, 1, 5}), cd = __builtin_shuffle(c, d, I{0, 4, 1, 5});
    const V centre = __builtin_shuffle(ab, cd, I{0, 1, 4, 5}), rest = __builtin_shuffle(ab, cd, I{2, 3, 6, 7});
    const V gain = __builtin_shuffle(__builtin_shuffle(a, b, I{2, 6, 2, 6}), __builtin_shuffle(c, d, I{2, 6, 2, 6}),
                                     I{0, 1, 4, 5});
    const V y = ((load<4>(rewards + i) - centre) - rest) * gain;
    store<4>(advantages + i, gain == 0 ? V{} : y);
  }
  for (; i < end; ++i) advantages[i] = advantage(maps[slot[i]], rewards[i]);
}

void write_advantages(const AdvantageMap<double>* maps, const int32_t* slot, const double* rewards, int64_t begin,
                      int64_t end, double* advantages) {
  for (int64_t i = begin; i < end; ++i) advantages[i] = advantage(maps[slot[i]], rewards[i]);
}

template <class T>
void group_advantages(const GroupRows<T>& in, const GroupRule& rule, T* advantages) {
  const Groups groups = find_groups(in);
  const GroupTable table = tabulate(in, groups, rule);
  const auto maps = uninitialised<AdvantageMap<T>>(groups.count + 1);
  maps[0] = {0, 0, 0};
  table.each(rule, [&](int32_t g, const GroupStats& stats) { maps[g] = advantage_map<T>(rule, stats); });
  parallel_for(in.n, kChunk, [&](int64_t begin, int64_t end) {
    write_advantages(maps.get(), groups.slot.get(), in.rewards, begin, end, advantages);
  });
}

template <class T>
void group_advantages_backward(const GroupRows<T>& in, const GroupRule& rule, const T* grads, T* grad_rewards) {
  struct Sums {
    double g, gc;
  };
  const Groups groups = find_groups(in);
  const GroupTable table = tabulate(in, groups, rule);
  const auto stats = uninitialised<GroupStats>(groups.count + 1);
  const auto sums = uninitialised<Sums>(groups.count + 1);
  const auto maps = uninitialised<GradientMap>(groups.count + 1);
  stats[0] = {}, maps[0] = {};
  table.each(rule, [&](int32_t g, const GroupStats& found) { stats[g] = found, sums[g] = {0, 0}; });
  for (int64_t i = 0; i < in.n; ++i) {
    const int32_t g = groups.slot[i];
    sums[g].g += double(grads[i]);
    sums[g].gc += double(grads[i]) * stats[g].centred(double(in.rewards[i]));
  }
  table.each(rule, [&](int32_t g, const GroupStats&) { maps[g] = gradient_map(rule, stats[g], sums[g].g, sums[g].gc); });
  parallel_for(in.n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      grad_rewards[i] = T(reward_gradient(maps[groups.slot[i]], double(grads[i]), in.weight(i), double(in.rewards[i])));
    }
  });
}

int64_t first_bad_bound(const Trajectories& in) {
  if (in.cu_seqlens[0] != 0) return 0;
  for (int64_t n = 0; n < in.count; ++n)
    if (in.cu_seqlens[n + 1] < in.cu_seqlens[n] || in.cu_seqlens[n + 1] > in.tokens) return n + 1;
  return in.cu_seqlens[in.count] == in.tokens ? -1 : in.count;
}

// f(n, begin, end) for every trajectory.
template <class F>
void each_trajectory(const Trajectories& in, F f) {
  parallel_for(in.count, 1 + in.count * kChunk / (in.tokens + 1), [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) f(n, in.cu_seqlens[n], in.cu_seqlens[n + 1]);
  });
}

template <class T>
void gae(const T* rewards, const T* values, const Trajectories& in, const T* bootstrap, double gamma, double lam,
         T* advantages) {
  each_trajectory(in, [&](int64_t n, int64_t begin, int64_t end) {
    double advantage = 0, next_value = bootstrap == nullptr ? 0 : double(bootstrap[n]);
    for (int64_t t = end; t-- > begin;) {
      if (!in.active(t)) {
        advantages[t] = 0;
        continue;
      }
      const double value = values == nullptr ? 0 : double(values[t]);
      advantage = td_error(double(rewards[t]), value, next_value, gamma) + gamma * lam * advantage;
      next_value = value;
      advantages[t] = T(advantage);
    }
  });
}

// The adjoint runs forward: u = g + gamma lam u_previous is the gradient of the step, whose value is -u + gamma u_previous.
template <class T>
void gae_backward(const T* grads, const Trajectories& in, double gamma, double lam, T* grad_rewards, T* grad_values,
                  T* grad_bootstrap) {
  each_trajectory(in, [&](int64_t n, int64_t begin, int64_t end) {
    double carried = 0;
    for (int64_t t = begin; t < end; ++t) {
      const bool active = in.active(t);
      const double previous = carried;
      if (active) carried = double(grads[t]) + gamma * lam * previous;
      grad_rewards[t] = active ? T(carried) : T(0);
      if (grad_values != nullptr) grad_values[t] = active ? T(gamma * previous - carried) : T(0);
    }
    if (grad_bootstrap != nullptr) grad_bootstrap[n] = T(gamma * carried);
  });
}

// Sums over a chunk in fixed lanes, which a compiler may hold in vectors of any width.
template <class F>
double chunk_sum(int64_t begin, int64_t end, F f) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {}, sum = 0;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += f(i + lane);
  for (; i < end; ++i) lanes[i % kLanes] += f(i);
  for (double lane : lanes) sum += lane;
  return sum;
}

// The sum of f(i) over the unmasked.
template <class F>
double masked_sum(const bool* mask, int64_t n, F f) {
  const auto partial = uninitialised<double>(chunks_of(n));
  parallel_for(chunks_of(n), 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk, end = std::min(n, begin + kChunk);
      partial[chunk] = mask == nullptr ? chunk_sum(begin, end, f)
                                       : chunk_sum(begin, end, [&](int64_t i) { return mask[i] ? f(i) : 0.0; });
    }
  });
  return chunk_sum(0, chunks_of(n), [&](int64_t chunk) { return partial[chunk]; });
}

template <class T>
double count_kept(const Masked<T>& in) {
  return in.mask == nullptr ? double(in.n) : masked_sum(in.mask, in.n, [](int64_t) { return 1.0; });
}

// out[i] = f(i), and 0 for the masked.
template <class T, class F>
void write_masked(const Masked<T>& in, T* out, F f) {
  parallel_for(in.n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = in.kept(i) ? T(f(i)) : T(0);
  });
}

template <class T>
void whiten(const Masked<T>& in, bool shift_mean, double ddof, double eps, T* out, double* stats) {
  const double count = count_kept(in);
  const double mean = count > 0 ? masked_sum(in.mask, in.n, [&](int64_t i) { return double(in.x[i]); }) / count : 0;
  const double squares = masked_sum(in.mask, in.n, [&](int64_t i) { return (double(in.x[i]) - mean) * (double(in.x[i]) - mean); });
  const double rstd = whiten_rstd(count, squares, ddof, eps);
  write_masked(in, out, [&](int64_t i) { return whitened(double(in.x[i]), mean, rstd, shift_mean); });
  stats[0] = mean, stats[1] = rstd;
}

template <class T>
void whiten_backward(const T* grads, const Masked<T>& in, const double* stats, bool shift_mean, double ddof,
                     T* grad_x) {
  const double mean = stats[0];
  const double count = count_kept(in);
  const double sum_g = masked_sum(in.mask, in.n, [&](int64_t i) { return double(grads[i]); });
  const double sum_gc = masked_sum(in.mask, in.n, [&](int64_t i) { return double(grads[i]) * (double(in.x[i]) - mean); });
  const WhitenGradient map = whiten_gradient(mean, stats[1], count, sum_g, sum_gc, shift_mean, ddof);
  write_masked(in, grad_x, [&](int64_t i) { return whitened_gradient(map, double(grads[i]), double(in.x[i])); });
}

template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

// Calls f with a value of the type: float32 or float64.
template <class F>
void with_float(int dtype, F f) {
  if (static_cast<DType>(dtype) == DType::float64) return f(double{});
  f(float{});
}

template <class T>
GroupRows<T> group_rows(uintptr_t rewards, uintptr_t ids, uintptr_t gate, uintptr_t weights, int64_t n) {
  return {as<const T>(rewards), as<const int64_t>(ids), as<const bool>(gate), as<const T>(weights), n};
}

void bound_group_advantages(uintptr_t rewards, int dtype, uintptr_t ids, uintptr_t gate, uintptr_t weights, int64_t n,
                            int baseline, int scale, double ddof, double eps, int singleton, uintptr_t advantages) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    group_advantages(group_rows<T>(rewards, ids, gate, weights, n), {baseline, scale, ddof, eps, singleton},
                     as<T>(advantages));
  });
}

void bound_group_advantages_backward(uintptr_t grads, uintptr_t rewards, int dtype, uintptr_t ids, uintptr_t gate,
                                     uintptr_t weights, int64_t n, int baseline, int scale, double ddof, double eps,
                                     int singleton, uintptr_t grad_rewards) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    group_advantages_backward(group_rows<T>(rewards, ids, gate, weights, n), {baseline, scale, ddof, eps, singleton},
                              as<const T>(grads), as<T>(grad_rewards));
  });
}

int64_t bound_gae(uintptr_t rewards, int dtype, uintptr_t values, uintptr_t cu_seqlens, int64_t count, int64_t tokens,
                  uintptr_t bootstrap, uintptr_t mask, double gamma, double lam, uintptr_t advantages) {
  const Trajectories in{as<const int64_t>(cu_seqlens), as<const bool>(mask), count, tokens};
  const int64_t bad = first_bad_bound(in);
  if (bad >= 0) return bad;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    gae(as<const T>(rewards), as<const T>(values), in, as<const T>(bootstrap), gamma, lam, as<T>(advantages));
  });
  return -1;
}

int64_t bound_gae_backward(uintptr_t grads, int dtype, uintptr_t cu_seqlens, int64_t count, int64_t tokens,
                           uintptr_t mask, double gamma, double lam, uintptr_t grad_rewards, uintptr_t grad_values,
                           uintptr_t grad_bootstrap) {
  const Trajectories in{as<const int64_t>(cu_seqlens), as<const bool>(mask), count, tokens};
  const int64_t bad = first_bad_bound(in);
  if (bad >= 0) return bad;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    gae_backward(as<const T>(grads), in, gamma, lam, as<T>(grad_rewards), as<T>(grad_values), as<T>(grad_bootstrap));
  });
  return -1;
}

void bound_whiten(uintptr_t x, int dtype, uintptr_t mask, int64_t n, bool shift_mean, double ddof, double eps,
                  uintptr_t out, uintptr_t stats) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    whiten(Masked<T>{as<const T>(x), as<const bool>(mask), n}, shift_mean, ddof, eps, as<T>(out), as<double>(stats));
  });
}

void bound_whiten_backward(uintptr_t grads, uintptr_t x, int dtype, uintptr_t mask, int64_t n, uintptr_t stats,
                           bool shift_mean, double ddof, uintptr_t grad_x) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    whiten_backward(as<const T>(grads), Masked<T>{as<const T>(x), as<const bool>(mask), n}, as<const double>(stats),
                    shift_mean, ddof, as<T>(grad_x));
  });
}

}  // namespace
}  // namespace tk

void bind_advantage(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("group_advantages", &tk::bound_group_advantages, unlocked());
  m.def("group_advantages_backward", &tk::bound_group_advantages_backward, unlocked());
  m.def("gae", &tk::bound_gae, unlocked());
  m.def("gae_backward", &tk::bound_gae_backward, unlocked());
  m.def("whiten", &tk::bound_whiten, unlocked());
  m.def("whiten_backward", &tk::bound_whiten_backward, unlocked());
}
