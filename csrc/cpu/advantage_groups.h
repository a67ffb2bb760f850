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

// The counted rows, copied apart by group into parts: a part's statistics fit a cache, and threads take whole parts.
// A part holds its rows in pack order, in one list per chunk of the input.
class Parts {
 public:
  template <class T>
  Parts(const GroupRows<T>& in, const T* grads, const Groups& groups) : count_(groups.count), chunks_(chunks_of(in.n)) {
    constexpr int64_t kGroups = 1024;
    while (count_ >> shift_ >= kMost || kGroups >> shift_ > 1) ++shift_;
    const int64_t room = size() * chunks_ * kChunk;
    lengths_ = uninitialised<int32_t>(size() * chunks_);
    slots_ = uninitialised<int32_t>(room);
    rewards_ = uninitialised<double>(room);
    if (in.weights != nullptr) weights_ = uninitialised<double>(room);
    if (grads != nullptr) grads_ = uninitialised<double>(room);
    parallel_for(chunks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) fill(in, grads, groups, chunk);
    });
  }

  int64_t size() const { return (count_ >> shift_) + 1; }
  int64_t first_group(int64_t part) const { return part << shift_; }
  int64_t last_group(int64_t part) const { return std::min(count_ + 1, (part + 1) << shift_); }

  // f(slot, k) in pack order, where k finds the row in rewards(), weights(), grads().
  template <class F>
  void each_row(int64_t part, F f) const {
    for (int64_t list = part; list < chunks_ * size(); list += size())
      for (int64_t k = list * kChunk; k < list * kChunk + lengths_[list]; ++k) f(slots_[k], k);
  }
  template <class F>
  void each_row_reversed(int64_t part, F f) const {
    for (int64_t list = (chunks_ - 1) * size() + part; list >= 0; list -= size())
      for (int64_t k = list * kChunk + lengths_[list]; k-- > list * kChunk;) f(slots_[k], k);
  }
  const double* rewards() const { return rewards_.get(); }
  const double* weights() const { return weights_.get(); }  // null: all 1
  const double* grads() const { return grads_.get(); }

 private:
  static constexpr int64_t kMost = 16;

  template <class T>
  void fill(const GroupRows<T>& in, const T* grads, const Groups& groups, int64_t chunk) {
    int64_t at[kMost];
    for (int64_t part = 0; part < size(); ++part) at[part] = (chunk * size() + part) * kChunk;
    for (int64_t i = chunk * kChunk; i < std::min(in.n, (chunk + 1) * kChunk); ++i) {
      if (groups.slot[i] == 0) continue;
      const int64_t k = at[groups.slot[i] >> shift_]++;
      slots_[k] = groups.slot[i];
      rewards_[k] = double(in.rewards[i]);
      if (in.weights != nullptr) weights_[k] = double(in.weights[i]);
      if (grads != nullptr) grads_[k] = double(grads[i]);
    }
    for (int64_t part = 0; part < size(); ++part)
      lengths_[chunk * size() + part] = int32_t(at[part] - (chunk * size() + part) * kChunk);
  }

  int64_t count_, chunks_;
  int shift_ = 0;
  std::unique_ptr<int32_t[]> lengths_, slots_;
  std::unique_ptr<double[]> rewards_, weights_, grads_;
};

}  // namespace tk
