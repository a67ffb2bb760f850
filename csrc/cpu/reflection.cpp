// DRO's reflection rewards on the CPU; trajkern/ops/reflection.py has the maths. A group's sums are float64, over its
// rollouts in pack order and over its tokens in eight lanes, so that nothing else in the batch can change them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "lanes.h"

namespace tk::reflection {

// Trajectories 0 to count, where cu_seqlens cuts up the tokens.
bool cuts_up(const int64_t* cu_seqlens, int64_t count, int64_t tokens) {
  if (cu_seqlens[0] != 0 || cu_seqlens[count] != tokens) return false;
  return std::is_sorted(cu_seqlens, cu_seqlens + count + 1);
}

// By ascending id, equal ones in pack order: stable passes over the bytes in which ids differ.
void sort_rollouts(const int64_t* ids, int64_t n, int64_t* order) {
  std::iota(order, order + n, 0);
  if (std::is_sorted(ids, ids + n)) return;
  uint64_t differing = 0;
  for (int64_t i = 0; i < n; ++i) differing |= uint64_t(ids[i]) ^ uint64_t(ids[0]);
  const std::unique_ptr<int64_t[]> other(new int64_t[n]);
  int64_t *from = order, *to = other.get();
  for (int shift = 0; shift < 64; shift += 8) {
    if ((differing >> shift & 255) == 0) continue;
    const auto byte = [&](int64_t i) { return (uint64_t(ids[i]) ^ uint64_t{1} << 63) >> shift & 255; };
    int64_t place[257] = {};
    for (int64_t i = 0; i < n; ++i) ++place[byte(i) + 1];
    std::partial_sum(place, place + 257, place);
    for (int64_t i = 0; i < n; ++i) to[place[byte(from[i])]++] = from[i];
    std::swap(from, to);
  }
  if (from != order) std::copy(from, from + n, order);
}

// False where cu_seqlens is no cut of the tokens or a group's lengths differ.
bool find_groups(const int64_t* ids, const int64_t* cu_seqlens, int64_t n, int64_t tokens, int64_t* order,
                 int64_t* rank, int64_t* bounds) {
  if (!cuts_up(cu_seqlens, n, tokens)) return false;
  sort_rollouts(ids, n, order);
  const auto length = [&](int64_t i) { return cu_seqlens[order[i] + 1] - cu_seqlens[order[i]]; };
  int64_t count = 0;
  bool even = true;
  for (int64_t i = 0; i < n; ++i) {
    const bool first = i == 0 || ids[order[i]] != ids[order[i - 1]];
    if (first) bounds[count++] = i;
    even &= first || length(i) == length(i - 1);
    rank[i] = count - 1;
  }
  std::fill(bounds + count, bounds + n + 1, n);
  return even;
}

template <class T>
struct Problem {
  const T* x;  // [P]
  const int64_t *cu_seqlens, *order, *rank, *bounds;
  const T* baseline;  // [P] or null
  int64_t rollouts;
  int ddof;
  bool normalize;

  int64_t groups() const { return rollouts == 0 ? 0 : rank[rollouts - 1] + 1; }
  double freedom(int64_t members) const { return std::max<int64_t>(members - ddof, 1); }  // one rollout's squares are 0
  // Of the weights, from the sum of the standard deviations; where that is 0 each of them is, and stays so.
  double divisor(double total) const { return normalize && total != 0 ? total : 1; }
};

template <class T>
struct Results {
  T *rewards, *weights, *std, *scores;  // [N], [P], [P], [G]; all but the weights null where they are not wanted
};

template <class T>
struct Gradients {
  const T *rewards, *weights, *std, *scores;  // those of the results, null where there is none
  T *x, *baseline;                            // to be written; null where not wanted
};

// One group: `members` rollouts of `length` tokens, whose k-th starts at token at[k] and is rollout order[k].
struct Group {
  const int64_t* order;
  int64_t members, length;
  std::vector<int64_t> at;

  template <class T>
  Group(const Problem<T>& in, int64_t g) : order(in.order + in.bounds[g]), members(in.bounds[g + 1] - in.bounds[g]) {
    at.reserve(members);
    for (int64_t k = 0; k < members; ++k) at.push_back(in.cu_seqlens[order[k]]);
    length = in.cu_seqlens[order[0] + 1] - at[0];
  }
};

// What a thread needs of a group, reused from one to the next.
template <class T>
struct Scratch {
  std::vector<double> std, mean, slope, direct;  // one number a column
  std::vector<double> dots;                      // eight numbers a rollout
  std::vector<T> row;
};

// f(begin, end) for so many columns that their rows stay in the cache: each is read several times, along its row, as
// memory is fastest.
template <class F>
TK_INLINE void each_block(const Group& group, const F& f) {
  constexpr int64_t kColumns = 512;
  for (int64_t j = 0; j < group.length; j += kColumns) f(j, std::min(j + kColumns, group.length));
}

// For the first pass over what lies in memory: rows are too short for the machine to see that they are taken in order.
constexpr int64_t kAhead = 8192;  // bytes
template <int W, class T, class Count>
TK_INLINE Lanes8<W> read_ahead(const T* x, Count count) {
  __builtin_prefetch(reinterpret_cast<const char*>(x) + kAhead);
  return read<W>(x, count);
}
template <class T>
TK_INLINE void expect_write(T* x) {
  __builtin_prefetch(reinterpret_cast<char*>(x) + kAhead, 1);
}

// to[j] = scale * sum_k of(j, count, token j of row k, x_0j). Measured from the first rollout's x a constant column is
// exactly 0, and a common offset costs nothing.
template <int W, class T, class F>
TK_INLINE void add_rows(const Problem<T>& in, const Group& group, int64_t begin, int64_t end, double scale, double* to,
                        const F& of) {
  const T* first = in.x + group.at[0];
  std::fill(to + begin, to + end, 0.0);
  const auto add = [&](int64_t k, auto rows) TK_INLINE_LAMBDA {
    each_step(begin, end, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> origin = read<W>(first + j, count);
      Lanes8<W> sum = read<W>(to + j, count);
      for (int r = 0; r < rows; ++r) sum += of(j, count, group.at[k + r] + j, origin);
      write(to + j, count, sum);
    });
  };
  int64_t k = 0;
  for (; k + 4 <= group.members; k += 4) add(k, std::integral_constant<int, 4>{});
  for (; k < group.members; ++k) add(k, std::integral_constant<int, 1>{});
  each_step(begin, end, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
    write(to + j, count, read<W>(to + j, count) * Lanes8<W>(scale));
  });
}

// The columns' means, as measured from the first rollout's x, and their variances.
template <int W, class T>
TK_INLINE void measure(const Problem<T>& in, const Group& group, int64_t begin, int64_t end, double* mean,
                       double* variance) {
  add_rows<W>(in, group, begin, end, 1 / double(group.members), mean,
              [&](int64_t, auto count, int64_t at, const Lanes8<W>& origin)
                  TK_INLINE_LAMBDA { return read_ahead<W>(in.x + at, count) - origin; });
  add_rows<W>(in, group, begin, end, 1 / in.freedom(group.members), variance,
              [&](int64_t j, auto count, int64_t at, const Lanes8<W>& origin) TK_INLINE_LAMBDA {
                const Lanes8<W> centred = (read<W>(in.x + at, count) - origin) - read<W>(mean + j, count);
                return centred * centred;
              });
}

// x_kj - b_kj, of a rollout that starts at token `at`.
template <int W, class T, class Count>
TK_INLINE Lanes8<W> above_baseline(const Problem<T>& in, int64_t at, Count count) {
  const Lanes8<W> x = read<W>(in.x + at, count);
  return in.baseline == nullptr ? x : x - read_ahead<W>(in.baseline + at, count);
}

// Adds s_j (x_kj - b_kj) to each rollout's eight partial sums.
template <int W, class T>
TK_INLINE void add_dots(const Problem<T>& in, const Group& group, int64_t begin, int64_t end, const double* s,
                        double* dots) {
  for (int64_t k = 0; k < group.members; ++k) {
    Lanes8<W> dot = read<W>(dots + k * kLanes, kLanes);
    each_step(begin, end, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
      dot += read<W>(s + j, count) * above_baseline<W>(in, group.at[k] + j, count);
    });
    write(dots + k * kLanes, kLanes, dot);
  }
}

template <int W, class T>
TK_INLINE void write_rows(const Group& group, const double* s, double divisor, T* row, T* out) {
  if (group.length == 0) return;  // memcpy wants pointers even then
  each_step(0, group.length, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
    const Lanes8<W> x = read<W>(s + j, count);
    write(row + j, count, divisor == 1 ? x : x / divisor);
  });
  for (const int64_t at : group.at) {
    for (int64_t j = 0; j < group.length; j += kLanes) expect_write(out + at + j);
    std::memcpy(out + at, row, group.length * sizeof(T));
  }
}

// False where a log-prob or a baseline is not finite: its results are not, either.
template <int W, class T>
TK_INLINE bool reward_group(const Problem<T>& in, const Results<T>& out, int64_t g, Scratch<T>& scratch) {
  const Group group(in, g);
  scratch.std.resize(group.length), scratch.mean.resize(group.length), scratch.row.resize(group.length);
  scratch.dots.assign(group.members * kLanes, 0.0);
  double *s = scratch.std.data(), *dots = scratch.dots.data();
  Lanes8<W> totals{}, largest{};
  each_block(group, [&](int64_t begin, int64_t end) TK_INLINE_LAMBDA {
    measure<W>(in, group, begin, end, scratch.mean.data(), s);
    each_step(begin, end, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> std = vsqrt(read<W>(s + j, count));
      write(s + j, count, std);
      totals += std;
      largest = vmax(std, largest);
    });
    if (out.rewards != nullptr) add_dots<W>(in, group, begin, end, s, dots);
  });
  const double total = fold(totals), divisor = in.divisor(total);
  write_rows<W>(group, s, divisor, scratch.row.data(), out.weights);
  bool finite = total - total == 0;
  if (out.rewards == nullptr) return finite;
  write_rows<W>(group, s, 1, scratch.row.data(), out.std);
  out.scores[g] = T(fold_max(largest));
  for (int64_t k = 0; k < group.members; ++k) {
    const double reward = fold(read<W>(dots + k * kLanes, kLanes)) / divisor;
    out.rewards[group.order[k]] = T(reward);
    finite &= reward - reward == 0;
  }
  return finite;
}

// Of each column: A_j in `weighed`, what reaches the standard deviation by way of the weights, and in `direct` what
// reaches it directly.
template <int W, class T>
TK_INLINE void add_upstream(const Problem<T>& in, const Gradients<T>& grads, const Group& group, int64_t begin,
                            int64_t end, double* weighed, double* direct) {
  std::fill(weighed + begin, weighed + end, 0.0), std::fill(direct + begin, direct + end, 0.0);
  for (int64_t k = 0; k < group.members; ++k) {
    const double g = grads.rewards == nullptr ? 0 : double(grads.rewards[group.order[k]]);
    each_step(begin, end, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
      const int64_t at = group.at[k] + j;
      Lanes8<W> sum = read<W>(weighed + j, count);
      if (grads.rewards != nullptr) sum += g * above_baseline<W>(in, at, count);
      if (grads.weights != nullptr) sum += read_ahead<W>(grads.weights + at, count);
      write(weighed + j, count, sum);
      if (grads.std != nullptr)
        write(direct + j, count, read<W>(direct + j, count) + read_ahead<W>(grads.std + at, count));
    });
  }
}

// Turns the columns' slopes from A_j into ds_j / ((K - ddof) s_j), and their standard deviations into weights.
template <class T>
TK_INLINE void settle(const Problem<T>& in, const Gradients<T>& grads, const Group& group, int64_t g, double total,
                      double weighed, Scratch<T>& scratch) {
  double *s = scratch.std.data(), *slope = scratch.slope.data();
  if (grads.scores != nullptr && group.length > 0)
    scratch.direct[std::max_element(s, s + group.length) - s] += double(grads.scores[g]);
  const double divisor = in.divisor(total), freedom = in.freedom(group.members);
  const double shared = in.normalize ? weighed / divisor : 0;  // sum_j A_j w_j
  for (int64_t j = 0; j < group.length; ++j) {
    const double ds = (slope[j] - shared) / divisor + scratch.direct[j];
    slope[j] = s[j] > 0 ? ds / (freedom * s[j]) : 0;
    s[j] /= divisor;
  }
}

template <int W, class T>
TK_INLINE void write_gradients(const Problem<T>& in, const Gradients<T>& grads, const Group& group,
                               const Scratch<T>& scratch) {
  for (int64_t k = 0; k < group.members; ++k) {
    const int64_t at = group.at[k];
    const double g = grads.rewards == nullptr ? 0 : double(grads.rewards[group.order[k]]);
    each_step(0, group.length, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> direct = g * read<W>(&scratch.std[j], count);
      if (grads.baseline != nullptr) {
        expect_write(grads.baseline + at + j);
        write(grads.baseline + at + j, count, -direct);
      }
      if (grads.x == nullptr) return;
      expect_write(grads.x + at + j);
      const Lanes8<W> d = read<W>(in.x + at + j, count) - read<W>(in.x + group.at[0] + j, count);
      const Lanes8<W> centred = d - read<W>(&scratch.mean[j], count);
      write(grads.x + at + j, count, direct + read<W>(&scratch.slope[j], count) * centred);
    });
  }
}

template <int W, class T>
TK_INLINE void differentiate_group(const Problem<T>& in, const Gradients<T>& grads, int64_t g, Scratch<T>& scratch) {
  const Group group(in, g);
  for (auto* column : {&scratch.std, &scratch.mean, &scratch.slope, &scratch.direct}) column->resize(group.length);
  double *s = scratch.std.data(), *slope = scratch.slope.data();
  Lanes8<W> totals{}, weighed{};
  each_block(group, [&](int64_t begin, int64_t end) TK_INLINE_LAMBDA {
    measure<W>(in, group, begin, end, scratch.mean.data(), s);
    add_upstream<W>(in, grads, group, begin, end, slope, scratch.direct.data());
    each_step(begin, end, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
      const Lanes8<W> std = vsqrt(read<W>(s + j, count));
      write(s + j, count, std);
      totals += std;
      weighed += read<W>(slope + j, count) * std;
    });
  });
  settle(in, grads, group, g, fold(totals), fold(weighed), scratch);
  write_gradients<W>(in, grads, group, scratch);
}

// f(width, g, scratch) for every group, compiled for this machine's vectors, which hold `width` doubles; the threads
// share the tokens, not the groups.
template <class T, class F>
void each_group(const Problem<T>& in, const F& f) {
  std::vector<int64_t> work(in.groups() + 1);
  for (int64_t g = 0; g < in.groups(); ++g) {
    const int64_t first = in.order[in.bounds[g]], length = in.cu_seqlens[first + 1] - in.cu_seqlens[first];
    work[g + 1] = work[g] + (in.bounds[g + 1] - in.bounds[g]) * (length + 1);
  }
  const auto group_at = [&](int64_t at) { return std::lower_bound(work.begin(), work.end(), at) - work.begin(); };
  parallel_for(work.back(), 16384, [&](int64_t begin, int64_t end) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr std::integral_constant<int, width() / 2> doubles{};
      Scratch<T> scratch;
      const int64_t last = group_at(end);
      for (int64_t g = group_at(begin); g < last; ++g) f(doubles, g, scratch);
    });
  });
}

using Arguments = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int, bool>;

template <class T>
Problem<T> problem(const Arguments& arguments) {
  const auto [x, cu_seqlens, order, rank, bounds, baseline, rollouts, ddof, normalize] = arguments;
  return {as<const T>(x),
          as<const int64_t>(cu_seqlens),
          as<const int64_t>(order),
          as<const int64_t>(rank),
          as<const int64_t>(bounds),
          as<const T>(baseline),
          rollouts,
          ddof,
          normalize};
}

bool bound_groups(uintptr_t ids, uintptr_t cu_seqlens, int64_t n, int64_t tokens, uintptr_t order, uintptr_t rank,
                  uintptr_t bounds) {
  return find_groups(as<const int64_t>(ids), as<const int64_t>(cu_seqlens), n, tokens, as<int64_t>(order),
                     as<int64_t>(rank), as<int64_t>(bounds));
}

bool bound_rewards(int dtype, const Arguments& arguments, const std::array<uintptr_t, 4>& results) {
  std::atomic<bool> finite{true};
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const auto in = problem<T>(arguments);
    const auto [rewards, weights, std, scores] = results;
    const Results<T> out{as<T>(rewards), as<T>(weights), as<T>(std), as<T>(scores)};
    if (out.scores != nullptr) std::fill(out.scores + in.groups(), out.scores + in.rollouts, T(0));
    each_group(in, [&](auto width, int64_t g, Scratch<T>& scratch) TK_INLINE_LAMBDA {
      if (!reward_group<width()>(in, out, g, scratch)) finite = false;
    });
  });
  return finite;
}

void bound_rewards_backward(int dtype, const Arguments& arguments, const std::array<uintptr_t, 4>& upstreams,
                            const std::array<uintptr_t, 2>& gradients) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const auto in = problem<T>(arguments);
    const auto [rewards, weights, std, scores] = upstreams;
    const Gradients<T> grads{as<const T>(rewards), as<const T>(weights), as<const T>(std),
                             as<const T>(scores),  as<T>(gradients[0]),  as<T>(gradients[1])};
    each_group(in, [&](auto width, int64_t g, Scratch<T>& scratch)
                       TK_INLINE_LAMBDA { differentiate_group<width()>(in, grads, g, scratch); });
  });
}

}  // namespace tk::reflection

void bind_reflection(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("reflection_groups", &tk::reflection::bound_groups, unlocked());
  m.def("reflection_rewards", &tk::reflection::bound_rewards, unlocked());
  m.def("reflection_rewards_backward", &tk::reflection::bound_rewards_backward, unlocked());
}
