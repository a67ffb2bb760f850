// Group-relative advantages, GAE and whitening on the CPU. Every sum is float64 and in an order that neither the number
// of threads nor the rest of the batch can change.
#include <limits>
#include <stdexcept>

#include "../common/kernels.h"
#include "../common/parallel.h"
#include "advantage_groups.h"
#include "lanes.h"

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

// f(width, chunk, begin, end) for every chunk, compiled for this machine's vectors, which hold `width` doubles.
template <class F>
void each_chunk(int64_t n, const F& f) {
  parallel_for(chunks_of(n), 1, [&](int64_t first, int64_t last) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr std::integral_constant<int, width() / 2> doubles{};
      for (int64_t chunk = first; chunk < last; ++chunk)
        f(doubles, chunk, chunk * kChunk, std::min(n, (chunk + 1) * kChunk));
    });
  });
}

}  // namespace

template <class T>
bool AdvantageKernels<T>::group_advantages(const GroupRows<T>& in, const GroupRule& rule, T* advantages,
                                           const Launch&) {
  const Survey found = survey(in);
  if (!found.legal) return false;
  const Groups groups = find_groups(in, found.differing);
  const auto maps = uninitialised<AdvantageMap<T>>(groups.count + 1);
  maps[0] = {0, 0, 0};
  tabulate(in, rule, groups, [&](int64_t g) { maps[g] = advantage_map<T>(rule, groups.tally[g]); });
  parallel_for(in.n, kChunk, [&](int64_t begin, int64_t end) {
    write_advantages(maps.get(), groups.slot.get(), in.rewards, begin, end, advantages);
  });
  return true;
}

template <class T>
void AdvantageKernels<T>::group_advantages_backward(const GroupRows<T>& in, const GroupRule& rule, const T* grads,
                                                    T* grad_rewards, const Launch&) {
  struct Sums {
    double g, gc;
  };
  const Groups groups = find_groups(in, survey(in).differing);
  const int32_t* slot = groups.slot.get();
  const auto sums = uninitialised<Sums>(groups.count + 1);
  const auto maps = uninitialised<GradientMap>(groups.count + 1);
  sums[0] = {}, maps[0] = {};
  tabulate(in, rule, groups, [&](int64_t g) { sums[g] = {}; });
  for (int64_t i = 0; i < in.n; ++i) {
    Sums& sum = sums[slot[i]];
    sum.g += double(grads[i]);
    sum.gc += double(grads[i]) * groups.tally[slot[i]].centred(double(in.rewards[i]));
  }
  parallel_for(groups.count, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin + 1; g <= end; ++g) maps[g] = gradient_map(rule, groups.tally[g], sums[g].g, sums[g].gc);
  });
  parallel_for(in.n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      grad_rewards[i] = T(reward_gradient(maps[slot[i]], double(grads[i]), in.weight(i), double(in.rewards[i])));
    }
  });
}

template <class T>
int64_t AdvantageKernels<T>::gae(const T* rewards, const T* values, const Trajectories& in, const T* bootstrap,
                                 double gamma, double lam, T* advantages, const Launch&) {
  const int64_t bad = first_bad_bound(in);
  if (bad >= 0) return bad;
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
  return -1;
}

// The adjoint runs forward: u = g + gamma lam u_previous is the gradient of the step, whose value is -u + gamma
// u_previous.
template <class T>
int64_t AdvantageKernels<T>::gae_backward(const T* grads, const Trajectories& in, double gamma, double lam,
                                          T* grad_rewards, T* grad_values, T* grad_bootstrap, const Launch&) {
  const int64_t bad = first_bad_bound(in);
  if (bad >= 0) return bad;
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
  return -1;
}

// The moments of each chunk are about its own mean, while it is in the first-level cache.
template <class T>
void AdvantageKernels<T>::whiten(const Masked<T>& in, bool shift_mean, double ddof, double eps, T* out, double* stats,
                                 const Launch&) {
  struct Moments {
    double count, sum, squares;
    double mean() const { return count > 0 ? sum / count : 0; }
  };
  const auto moments = uninitialised<Moments>(chunks_of(in.n));
  each_chunk(in.n, [&](auto width, int64_t chunk, int64_t begin, int64_t end) TK_INLINE_LAMBDA {
    constexpr int W = width();
    Lanes8<W> counts{}, sums{}, squares{};
    each_kept_step<W>(in.mask, begin, end, [&](int64_t i, const auto& kept, auto count) TK_INLINE_LAMBDA {
      counts += keep(kept, Lanes8<W>(1));
      sums += keep(kept, read<W>(in.x + i, count));
    });
    Moments found{in.mask == nullptr ? double(end - begin) : fold(counts), fold(sums), 0};
    const double mean = found.mean();
    each_kept_step<W>(in.mask, begin, end, [&](int64_t i, const auto& kept, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> centred = keep(kept, read<W>(in.x + i, count) - mean);
      squares += centred * centred;
    });
    found.squares = fold(squares);
    moments[chunk] = found;
  });
  Moments all{};
  for (int64_t chunk = 0; chunk < chunks_of(in.n); ++chunk) {
    all.count += moments[chunk].count, all.sum += moments[chunk].sum, all.squares += moments[chunk].squares;
  }
  const double mean = all.mean();
  for (int64_t chunk = 0; chunk < chunks_of(in.n); ++chunk) {
    const double apart = moments[chunk].mean() - mean;
    all.squares += moments[chunk].count * apart * apart;
  }
  if (all.squares == std::numeric_limits<double>::infinity())
    throw std::invalid_argument("x must differ from its mean by less than 1e154, whose squares do not overflow");
  const double rstd = whiten_rstd(all.count, all.squares, ddof, eps);
  each_chunk(in.n, [&](auto width, int64_t, int64_t begin, int64_t end) TK_INLINE_LAMBDA {
    constexpr int W = width();
    each_kept_step<W>(in.mask, begin, end, [&](int64_t i, const auto& kept, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> y = (read<W>(in.x + i, count) - mean) * rstd + (shift_mean ? 0 : mean);
      write(out + i, count, keep(kept, y));
    });
  });
  stats[0] = mean, stats[1] = rstd;
}

template <class T>
void AdvantageKernels<T>::whiten_backward(const T* grads, const Masked<T>& in, const double* stats, bool shift_mean,
                                          double ddof, T* grad_x, const Launch&) {
  struct Sums {
    double count, g, gc;
  };
  const double mean = stats[0];
  const auto sums = uninitialised<Sums>(chunks_of(in.n));
  each_chunk(in.n, [&](auto width, int64_t chunk, int64_t begin, int64_t end) TK_INLINE_LAMBDA {
    constexpr int W = width();
    Lanes8<W> counts{}, sum_g{}, sum_gc{};
    each_kept_step<W>(in.mask, begin, end, [&](int64_t i, const auto& kept, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> g = read<W>(grads + i, count);
      counts += keep(kept, Lanes8<W>(1));
      sum_g += keep(kept, g);
      sum_gc += keep(kept, g * (read<W>(in.x + i, count) - mean));
    });
    sums[chunk] = {in.mask == nullptr ? double(end - begin) : fold(counts), fold(sum_g), fold(sum_gc)};
  });
  Sums all{};
  for (int64_t chunk = 0; chunk < chunks_of(in.n); ++chunk) {
    all.count += sums[chunk].count, all.g += sums[chunk].g, all.gc += sums[chunk].gc;
  }
  const WhitenGradient map = whiten_gradient(mean, stats[1], all.count, all.g, all.gc, shift_mean, ddof);
  each_chunk(in.n, [&](auto width, int64_t, int64_t begin, int64_t end) TK_INLINE_LAMBDA {
    constexpr int W = width();
    each_kept_step<W>(in.mask, begin, end, [&](int64_t i, const auto& kept, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> centred = read<W>(in.x + i, count) - map.mean;
      const Lanes8<W> y = map.rstd * (read<W>(grads + i, count) - map.mean_g) + map.kept + map.slope * centred;
      write(grad_x + i, count, keep(kept, y));
    });
  });
}

int64_t group_scratch(int64_t) { return 0; }
int64_t whiten_scratch(int64_t) { return 0; }

template struct AdvantageKernels<float>;
template struct AdvantageKernels<double>;

}  // namespace tk
