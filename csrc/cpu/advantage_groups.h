// Which rows form a group, and the rows copied apart by group, for the CPU's group statistics.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "../common/advantage.h"
#include "../common/parallel.h"

namespace tk {

constexpr int64_t kChunk = 8192;  // rows or tokens: the unit of work of a thread

inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Row i belongs to group slot[i] in [1, count], or is not counted and has slot 0.
struct Groups {
  std::unique_ptr<int32_t[]> slot;
  int64_t count;
};

// Slots by the bits in which an id differs from the first one; returns the union of those bits.
template <class T>
uint64_t number_chunk(const GroupRows<T>& in, int64_t begin, int64_t end, int32_t* slot) {
  const uint64_t origin = uint64_t(in.ids[0]);
  uint64_t all = 0;
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t id = uint64_t(in.ids[i]) ^ origin;
    all |= id;
    slot[i] = int32_t(id + 1);
  }
  if (in.gate == nullptr && in.weights == nullptr) return all;
  for (int64_t i = begin; i < end; ++i)
    if (!in.counted(i)) slot[i] = 0;
  return all;
}

// Ids that differ in a few low bits only are numbered by those bits.
template <class T>
bool number_directly(const GroupRows<T>& in, Groups& groups) {
  const auto differing = uninitialised<uint64_t>(chunks_of(in.n));
  parallel_for(chunks_of(in.n), 2, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      differing[chunk] = number_chunk(in, chunk * kChunk, std::min(in.n, (chunk + 1) * kChunk), groups.slot.get());
  });
  uint64_t all = 0;
  for (int64_t chunk = 0; chunk < chunks_of(in.n); ++chunk) all |= differing[chunk];
  if (all >= uint64_t(2 * in.n + 1024)) return false;
  for (groups.count = 1; uint64_t(groups.count) <= all;) groups.count *= 2;
  return true;
}

inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
  return x ^ (x >> 33);
}

// Any ids: an open-addressing table, at most half full, numbers them in the order of their appearance.
template <class T>
void number_by_hash(const GroupRows<T>& in, Groups& groups) {
  uint64_t size = 16;
  while (size < 2 * uint64_t(in.n)) size *= 2;
  const auto ids = uninitialised<int64_t>(size);
  const auto numbers = uninitialised<int32_t>(size);
  std::fill_n(numbers.get(), size, 0);
  groups.count = 0;
  for (int64_t i = 0; i < in.n; ++i) {
    groups.slot[i] = 0;
    if (!in.counted(i)) continue;
    uint64_t at = mixed(uint64_t(in.ids[i])) & (size - 1);
    while (numbers[at] != 0 && ids[at] != in.ids[i]) at = (at + 1) & (size - 1);
    if (numbers[at] == 0) ids[at] = in.ids[i], numbers[at] = int32_t(++groups.count);
    groups.slot[i] = numbers[at];
  }
}

template <class T>
Groups find_groups(const GroupRows<T>& in) {
  Groups groups{uninitialised<int32_t>(in.n), 0};
  if (!number_directly(in, groups)) number_by_hash(in, groups);
  return groups;
}

// Per group: W and, in turn, sum w d, then its mean; sum w (d - mean)^2. What is not `present` is not initialised.
struct GroupTable {
  struct Sums {
    double weight, mean;
  };
  std::unique_ptr<Sums[]> sums;
  std::unique_ptr<double[]> squares, origin;  // origin null: measured from 0
  std::unique_ptr<int32_t[]> present;         // the groups with a counted row, ascending
  int64_t size = 0;

  GroupStats stats(const GroupRule& rule, int32_t g) const {
    return {origin == nullptr ? 0 : origin[g], sums[g].weight, sums[g].mean,
            group_std(rule, sums[g].weight, squares[g])};
  }
  // f(group, stats) for every group that is present.
  template <class F>
  void each(const GroupRule& rule, F f) const {
    parallel_for(size, 1024, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) f(present[k], stats(rule, present[k]));
    });
  }
};

struct Constant {
  double value;
  double operator[](int64_t) const { return value; }
};

// The table's sums, row by row in pack order: on one thread, as sharing the rows out costs more than it saves.
template <class T, class W, class O>
void add_up(const GroupRows<T>& in, const Groups& groups, W weights, O origin, bool squares, GroupTable& table) {
  const int32_t* slot = groups.slot.get();
  GroupTable::Sums* sums = table.sums.get();
  for (int64_t i = 0; i < in.n; ++i) {
    const double w = double(weights[i]);
    sums[slot[i]].weight += w;
    sums[slot[i]].mean += w * (double(in.rewards[i]) - origin[slot[i]]);
  }
  for (int32_t g = 1; g <= groups.count; ++g) {
    table.present[table.size] = g;
    table.size += sums[g].weight != 0;  // no branch: nobody could predict it
  }
  for (int64_t k = 0; k < table.size; ++k) {
    const int32_t g = table.present[k];
    sums[g].mean /= sums[g].weight;
    table.squares[g] = 0;
  }
  if (!squares) return;
  for (int64_t i = 0; i < in.n; ++i) {
    const double centred = (double(in.rewards[i]) - origin[slot[i]]) - sums[slot[i]].mean;
    table.squares[slot[i]] += double(weights[i]) * (centred * centred);
  }
}

// Sums of equal float32 rewards round nowhere in float64, so they need not be measured from the group's first one.
template <class T>
GroupTable tabulate(const GroupRows<T>& in, const Groups& groups, const GroupRule& rule) {
  GroupTable table;
  table.sums = uninitialised<GroupTable::Sums>(groups.count + 1);
  table.squares = uninitialised<double>(groups.count + 1);
  table.present = uninitialised<int32_t>(groups.count + 1);
  std::fill_n(table.sums.get(), groups.count + 1, GroupTable::Sums{0, 0});
  const bool squares = rule.scale == kStd;
  if (sizeof(T) == 4 && in.weights == nullptr) {
    add_up(in, groups, Constant{1}, Constant{0}, squares, table);
    return table;
  }
  table.origin = uninitialised<double>(groups.count + 1);
  for (int64_t i = in.n; i-- > 0;) table.origin[groups.slot[i]] = double(in.rewards[i]);  // the first row writes last
  if (in.weights == nullptr)
    add_up(in, groups, Constant{1}, table.origin.get(), squares, table);
  else
    add_up(in, groups, in.weights, table.origin.get(), squares, table);
  return table;
}

}  // namespace tk
