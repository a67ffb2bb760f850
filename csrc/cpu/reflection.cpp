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
    for (int64_t k = 0; k < members; ++k) at.push_back(in.cu_seqlens[order[k]]);
    length = in.cu_seqlens[order[0] + 1] - at[0];
  }
};

// Of eight columns, measured from the first rollout's x: a constant column is exactly 0, a common offset costs nothing.
template <int W>
struct Columns {
  Lanes8<W> first, mean, std;
};

// Leaves x - first of the k-th rollout at d[8 k]: to widen a float again takes longer than to read a double.
template <int W, class T, class Count>
TK_INLINE Columns<W> columns(const Problem<T>& in, const Group& group, int64_t j, Count count, double* d) {
  const Lanes8<W> first = read<W>(in.x + group.at[0] + j, count);
  Lanes8<W> sum{}, squares{};
  for (int64_t k = 0; k < group.members; ++k) {
    const Lanes8<W> apart = read<W>(in.x + group.at[k] + j, count) - first;
    sum += apart;
    write(d + k * kLanes, kLanes, apart);
  }
  const Lanes8<W> mean = sum * (1 / double(group.members));
  for (int64_t k = 0; k < group.members; ++k) {
    const Lanes8<W> centred = read<W>(d + k * kLanes, kLanes) - mean;
    squares += centred * centred;
  }
  return {first, mean, vsqrt(squares * (1 / in.freedom(group.members)))};
}

// What a thread needs of a group, reused from one to the next.
template <class T>
struct Scratch {
  std::vector<double> std, mean, slope, direct;  // one number a column
  std::vector<double> d, dots;                   // eight numbers a rollout
  std::vector<T> row;
};

// Adds s_j (x_nj - b_nj) of eight columns to each rollout's eight partial sums.
template <int W, class T, class Count>
TK_INLINE void add_dots(const Problem<T>& in, const Group& group, int64_t j, Count count, const Columns<W>& found,
                        Scratch<T>& scratch) {
  for (int64_t k = 0; k < group.members; ++k) {
    Lanes8<W> value = read<W>(&scratch.d[k * kLanes], kLanes) + found.first;
    if (in.baseline != nullptr) value -= read<W>(in.baseline + group.at[k] + j, count);
    double* dot = &scratch.dots[k * kLanes];
    write(dot, kLanes, read<W>(dot, kLanes) + found.std * value);
  }
}

template <int W, class T>
TK_INLINE void write_rows(const Group& group, const double* s, double divisor, T* row, T* out) {
  if (group.length == 0) return;  // memcpy wants pointers even then
  each_step(0, group.length,
            [&](int64_t j, auto count) TK_INLINE_LAMBDA { write(row + j, count, read<W>(s + j, count) / divisor); });
  for (const int64_t at : group.at) std::memcpy(out + at, row, group.length * sizeof(T));
}

// False where a log-prob or a baseline is not finite: its results are not, either.
template <int W, class T>
TK_INLINE bool reward_group(const Problem<T>& in, const Results<T>& out, int64_t g, Scratch<T>& scratch) {
  const Group group(in, g);
  scratch.std.resize(group.length), scratch.row.resize(group.length);
  scratch.d.resize(group.members * kLanes), scratch.dots.assign(group.members * kLanes, 0.0);
  double* s = scratch.std.data();
  Lanes8<W> totals{}, largest{};
  each_step(0, group.length, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
    const Columns<W> found = columns<W>(in, group, j, count, scratch.d.data());
    write(s + j, count, found.std);
    totals += found.std;
    largest = vmax(found.std, largest);
    if (out.rewards != nullptr) add_dots(in, group, j, count, found, scratch);
  });
  const double total = fold(totals), divisor = in.divisor(total);
  write_rows<W>(group, s, divisor, scratch.row.data(), out.weights);
  bool finite = total - total == 0;
  if (out.rewards == nullptr) return finite;
  write_rows<W>(group, s, 1, scratch.row.data(), out.std);
  out.scores[g] = T(fold_max(largest));
  for (int64_t k = 0; k < group.members; ++k) {
    const double reward = fold(read<W>(&scratch.dots[k * kLanes], kLanes)) / divisor;
    out.rewards[group.order[k]] = T(reward);
    finite &= reward - reward == 0;
  }
  return finite;
}

// Of eight columns: A_j, what reaches the standard deviation by way of the weights, and what reaches it directly.
template <int W>
struct Upstream {
  Lanes8<W> weighed, direct;
};

template <int W, class T, class Count>
TK_INLINE Upstream<W> upstream(const Problem<T>& in, const Gradients<T>& grads, const Group& group, int64_t j,
                               Count count, const Lanes8<W>& first, const double* d) {
  Upstream<W> up{};
  for (int64_t k = 0; k < group.members; ++k) {
    const int64_t at = group.at[k] + j;
    if (grads.rewards != nullptr) {
      Lanes8<W> value = read<W>(d + k * kLanes, kLanes) + first;
      if (in.baseline != nullptr) value -= read<W>(in.baseline + at, count);
      up.weighed += double(grads.rewards[group.order[k]]) * value;
    }
    if (grads.weights != nullptr) up.weighed += read<W>(grads.weights + at, count);
    if (grads.std != nullptr) up.direct += read<W>(grads.std + at, count);
  }
  return up;
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
      if (grads.baseline != nullptr) write(grads.baseline + at + j, count, -direct);
      if (grads.x == nullptr) return;
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
  scratch.d.resize(group.members * kLanes);
  Lanes8<W> totals{}, weighed{};
  each_step(0, group.length, [&](int64_t j, auto count) TK_INLINE_LAMBDA {
    const Columns<W> found = columns<W>(in, group, j, count, scratch.d.data());
    const Upstream<W> up = upstream<W>(in, grads, group, j, count, found.first, scratch.d.data());
    totals += found.std;
    weighed += up.weighed * found.std;
    write(&scratch.std[j], count, found.std), write(&scratch.mean[j], count, found.mean);
    write(&scratch.slope[j], count, up.weighed), write(&scratch.direct[j], count, up.direct);
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
