// Which rows form a group, and the statistics of every group, for the CPU's group advantages.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "../common/advantage.h"
#include "../common/dtype.h"
#include "../common/parallel.h"
#include "simd.h"

namespace tk {

constexpr int64_t kChunk = 8192;  // rows or tokens: the unit of work of a thread

inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// While the rows are added up: mean is sum w d, std is sum w d^2. One line of the cache a row.
struct alignas(32) Tally : GroupStats {
  Tally() = default;
  explicit Tally(double first) : GroupStats{first, 0, 0, 0} {}
};

// Row i belongs to group slot[i] in [1, count], numbered in the order of appearance, or is not counted and has slot 0.
struct Groups {
  std::unique_ptr<int32_t[]> slot;
  std::unique_ptr<Tally[]> tally;  // [count + 1]
  int64_t count = 0;
};

// The bits in which ids differ from the first one; whether the rewards that are counted may be squared, and the weights
// that a gate lets through are finite and at least 0.
struct Survey {
  uint64_t differing = 0;
  bool legal = true;
};

template <class T>
bool legal_rows(const GroupRows<T>& in, int64_t begin, int64_t end) {
  int bad = 0;  // no early exit, so that it vectorises
  if (in.gate == nullptr && in.weights == nullptr) {
    for (int64_t i = begin; i < end; ++i) bad |= !(std::abs(in.rewards[i]) <= kLargest<T>);
    return !bad;
  }
  for (int64_t i = begin; i < end; ++i) {
    const bool read = in.gate == nullptr || in.gate[i];
    const T weight = in.weights == nullptr ? T(1) : in.weights[i];
    bad |= read & (!(weight >= 0) | !(weight - weight == 0));
    bad |= (read & (weight != 0)) & !(std::abs(in.rewards[i]) <= kLargest<T>);
  }
  return !bad;
}

template <class T>
Survey survey(const GroupRows<T>& in) {
  const auto found = uninitialised<Survey>(chunks_of(in.n));
  parallel_for(chunks_of(in.n), 2, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk, end = std::min(in.n, begin + kChunk);
      const uint64_t origin = uint64_t(in.ids[0]);
      uint64_t differing = 0;
      for (int64_t i = begin; i < end; ++i) differing |= uint64_t(in.ids[i]) ^ origin;
      found[chunk] = {differing, legal_rows(in, begin, end)};
    }
  });
  Survey all;
  for (int64_t chunk = 0; chunk < chunks_of(in.n); ++chunk) {
    all.differing |= found[chunk].differing;
    all.legal &= found[chunk].legal;
  }
  return all;
}

// Ids that differ in a few low bits index a table. No branch: nobody could predict which row is a group's first.
template <class T>
void number_directly(const GroupRows<T>& in, uint64_t size, Groups& groups) {
  const auto table = uninitialised<int32_t>(size + 1);
  int32_t *numbers = table.get(), *slot = groups.slot.get(), next = 1;
  std::fill_n(numbers, size, -1);
  numbers[size] = 0;  // of the rows that are not counted
  const auto number = [&](auto counted) {
    for (int64_t i = 0; i < in.n; ++i) {
      const uint64_t id = uint64_t(in.ids[i]) ^ uint64_t(in.ids[0]), at = counted(i) ? id : size;
      const int32_t known = numbers[at];
      groups.tally[next] = Tally(double(in.rewards[i]));
      slot[i] = numbers[at] = known < 0 ? next : known;
      next += known < 0;
    }
  };
  if (in.gate == nullptr && in.weights == nullptr)
    number([](int64_t) { return true; });
  else
    number([&](int64_t i) { return in.counted(i); });
  groups.count = next - 1;
}

// Any ids: an open-addressing table, at most half full.
template <class T>
void number_by_hash(const GroupRows<T>& in, Groups& groups) {
  uint64_t size = 16;
  while (size < 2 * uint64_t(in.n)) size *= 2;
  const auto ids = uninitialised<int64_t>(size);
  const auto numbers = uninitialised<int32_t>(size);
  std::fill_n(numbers.get(), size, 0);
  for (int64_t i = 0; i < in.n; ++i) {
    groups.slot[i] = 0;
    if (!in.counted(i)) continue;
    uint64_t at = mixed(uint64_t(in.ids[i])) & (size - 1);
    while (numbers[at] != 0 && ids[at] != in.ids[i]) at = (at + 1) & (size - 1);
    if (numbers[at] == 0) {
      ids[at] = in.ids[i], numbers[at] = int32_t(++groups.count);
      groups.tally[groups.count] = Tally(double(in.rewards[i]));
    }
    groups.slot[i] = numbers[at];
  }
}

template <class T>
Groups find_groups(const GroupRows<T>& in, uint64_t differing) {
  Groups groups{uninitialised<int32_t>(in.n), uninitialised<Tally>(in.n + 2)};
  if (differing < uint64_t(2 * in.n + 1024))
    number_directly(in, differing + 1, groups);
  else
    number_by_hash(in, groups);
  groups.tally[0] = Tally(0);
  return groups;
}

struct Ones {
  double operator[](int64_t) const { return 1; }
};

// Row by row in pack order, on one thread: sharing the rows out costs more than it saves.
template <class T, class W>
TK_INLINE void add_up(const T* rewards, W weights, const int32_t* slot, int64_t n, Tally* tally) {
  for (int64_t i = 0; i < n; ++i) {
    double* group = &tally[slot[i]].origin;
    const double w = double(weights[i]), d = double(rewards[i]) - group[0];
    store<4>(group, load<4>(group) + Vec<double, 4>{0, w, w * d, w * (d * d)});
  }
}

// Where S2 - S1^2 / W will do for the sum of squares: as (mean - first)^2 <= W var, it loses a factor of W + 1 at most,
// which of 4,096 rows is far below float32's rounding. Weights could lose W / w_first.
template <class T>
bool in_one_pass(const GroupRows<T>& in, const GroupStats& group) {
  return sizeof(T) == 4 && in.weights == nullptr && group.weight <= 4096;
}

// Statistics of every group into groups.tally, each followed by f(group).
template <class T, class F>
void tabulate(const GroupRows<T>& in, const GroupRule& rule, const Groups& groups, F f) {
  Tally* tally = groups.tally.get();
  const int32_t* slot = groups.slot.get();
  dispatch([&](auto) TK_INLINE_LAMBDA {
    if (in.weights == nullptr) return add_up(in.rewards, Ones{}, slot, in.n, tally);
    add_up(in.rewards, in.weights, slot, in.n, tally);
  });
  const auto each = [&](auto settle) {
    parallel_for(groups.count, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin + 1; g <= end; ++g) settle(g, tally[g]);
    });
  };
  each([&](int64_t g, Tally& group) {
    const double sum = group.mean;
    group.mean = sum / group.weight;
    if (!in_one_pass(in, group)) return void(group.std = 0);
    group.std = group_std(rule, group.weight, std::max(0.0, group.std - sum * group.mean));
    f(g);
  });
  bool again = false;
  for (int64_t g = 1; g <= groups.count; ++g) again |= !in_one_pass(in, tally[g]);
  if (!again) return;
  for (int64_t i = 0; i < in.n; ++i) {
    Tally& group = tally[slot[i]];
    const double centred = group.centred(double(in.rewards[i]));
    group.std += in_one_pass(in, group) ? 0 : in.weight(i) * (centred * centred);
  }
  each([&](int64_t g, Tally& group) {
    if (in_one_pass(in, group)) return;
    group.std = group_std(rule, group.weight, group.std);
    f(g);
  });
}

}  // namespace tk
