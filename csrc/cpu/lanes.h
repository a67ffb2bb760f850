// Eight lanes of double: what a sum is spread over whatever the width of a vector, so that no machine changes a bit.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace tk {

constexpr int kLanes = 8;
using Lanes8 = Vec<double, kLanes>;
using Kept = Vec<int64_t, kLanes>;  // of a lane all bits, or none

TK_INLINE Lanes8 keep(const Kept& kept, const Lanes8& x) { return bit_cast<Lanes8>(bit_cast<Kept>(x) & kept); }

TK_INLINE double fold(const Lanes8& x) {
  const Lanes8 row[1] = {x};
  return fold_sum<kLanes>(row);
}

// The first `count` elements; the other lanes are 0.
template <class T>
TK_INLINE Lanes8 read(const T* x, int64_t count) {
  if (count == kLanes) return __builtin_convertvector(load<kLanes>(x), Lanes8);
  Lanes8 y{};
  for (int64_t l = 0; l < count; ++l) y[l] = x[l];
  return y;
}

template <class T>
TK_INLINE void write(T* x, int64_t count, const Lanes8& y) {
  if (count == kLanes) return store<kLanes>(x, __builtin_convertvector(y, Vec<T, kLanes>));
  for (int64_t l = 0; l < count; ++l) x[l] = T(y[l]);
}

// f(i, count) for every eight of begin:end, the count known to the compiler, and for the rest.
template <class F>
TK_INLINE void each_step(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>{});
  if (i < end) f(i, end - i);
}

// Eight flags, by which a lane is kept or not.
TK_INLINE Kept kept_by(const bool* mask) {
  Kept byte;  // a lane's among eight flags
  for (int l = 0; l < kLanes; ++l) byte[l] = bit_cast<int64_t>(uint64_t{0xff} << 8 * l);
  int64_t flags;
  std::memcpy(&flags, mask, sizeof(flags));
  return (broadcast<kLanes>(flags) & byte) != 0;
}

// f(i, kept, count) likewise; without a mask everything is kept.
template <class F>
TK_INLINE void each_kept_step(const bool* mask, int64_t begin, int64_t end, const F& f) {
  each_step(begin, end, [&](int64_t i, auto count) TK_INLINE_LAMBDA {
    if (count == kLanes) return f(i, mask == nullptr ? Kept{} == 0 : kept_by(mask + i), count);
    Kept kept{};
    for (int64_t l = 0; l < count; ++l) kept[l] = mask == nullptr || mask[i + l] ? -1 : 0;
    f(i, kept, count);
  });
}

}  // namespace tk
