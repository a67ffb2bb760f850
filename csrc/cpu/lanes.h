// Eight lanes of double: what a sum is spread over whatever the width of a vector, so that no machine changes a bit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace tk {

constexpr int kLanes = 8;

// In vectors of W, the doubles that the machine has in one: a wider vector would be kept in memory, lane by lane.
template <class T, int W>
struct Eight {
  static constexpr int kParts = kLanes / W;
  Vec<T, W> part[kParts];

  TK_INLINE Eight() : Eight(T(0)) {}
  TK_INLINE Eight(T x) {  // NOLINT: a number is eight of it
    for (auto& p : part) p = broadcast<W>(x);
  }

  // f(k) for each part.
  template <class F>
  TK_INLINE static Eight of(const F& f) {
    Eight y;
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) y.part[k] = f(k);
    return y;
  }

  TK_INLINE friend Eight operator+(const Eight& a, const Eight& b) {
    return of([&](int k) TK_INLINE_LAMBDA { return a.part[k] + b.part[k]; });
  }
  TK_INLINE friend Eight operator-(const Eight& a, const Eight& b) {
    return of([&](int k) TK_INLINE_LAMBDA { return a.part[k] - b.part[k]; });
  }
  TK_INLINE friend Eight operator*(const Eight& a, const Eight& b) {
    return of([&](int k) TK_INLINE_LAMBDA { return a.part[k] * b.part[k]; });
  }
  TK_INLINE friend Eight operator/(const Eight& a, const Eight& b) {
    return of([&](int k) TK_INLINE_LAMBDA { return a.part[k] / b.part[k]; });
  }
  TK_INLINE Eight operator-() const {
    return of([&](int k) TK_INLINE_LAMBDA { return -part[k]; });
  }
  TK_INLINE Eight& operator+=(const Eight& b) { return *this = *this + b; }
  TK_INLINE Eight& operator-=(const Eight& b) { return *this = *this - b; }
};
template <int W>
using Lanes8 = Eight<double, W>;
template <int W>
using Kept = Eight<int64_t, W>;  // of a lane all bits, or none

template <int W>
TK_INLINE Lanes8<W> keep(const Kept<W>& kept, const Lanes8<W>& x) {
  return Lanes8<W>::of([&](int k) TK_INLINE_LAMBDA {
    return bit_cast<Vec<double, W>>(bit_cast<Vec<int64_t, W>>(x.part[k]) & kept.part[k]);
  });
}

template <int W>
TK_INLINE Lanes8<W> vmax(const Lanes8<W>& a, const Lanes8<W>& b) {
  return Lanes8<W>::of([&](int k) TK_INLINE_LAMBDA { return vmax(a.part[k], b.part[k]); });
}

template <int W>
TK_INLINE Lanes8<W> vsqrt(const Lanes8<W>& x) {
  Lanes8<W> y;
  for (int k = 0; k < Lanes8<W>::kParts; ++k)
    for (int l = 0; l < W; ++l) y.part[k][l] = std::sqrt(x.part[k][l]);
  return y;
}

template <int W>
TK_INLINE double fold(const Lanes8<W>& x) {
  return fold_sum<W>(x.part);
}

template <int W>
TK_INLINE double fold_max(const Lanes8<W>& x) {
  double largest = x.part[0][0];
  for (int k = 0; k < Lanes8<W>::kParts; ++k)
    for (int l = 0; l < W; ++l) largest = x.part[k][l] > largest ? x.part[k][l] : largest;
  return largest;
}

// The first `count` elements; the other lanes are 0.
template <int W, class T>
TK_INLINE Lanes8<W> read(const T* x, int64_t count) {
  if (count == kLanes) {
    return Lanes8<W>::of([&](int k) TK_INLINE_LAMBDA { return widen<W>(load<W>(x + k * W)); });
  }
  double y[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) y[l] = x[l];
  return read<W>(y, kLanes);
}

template <int W, class T>
TK_INLINE void write(T* x, int64_t count, const Lanes8<W>& y) {
  if (count == kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < Lanes8<W>::kParts; ++k) store<W>(x + k * W, __builtin_convertvector(y.part[k], Vec<T, W>));
    return;
  }
  double all[kLanes];
  write(all, kLanes, y);
  for (int64_t l = 0; l < count; ++l) x[l] = T(all[l]);
}

// f(i, count) for every eight of begin:end, the count known to the compiler, and for the rest.
template <class F>
TK_INLINE void each_step(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>{});
  if (i < end) f(i, end - i);
}

// Eight flags, by which a lane is kept or not.
template <int W>
TK_INLINE Kept<W> kept_by(const bool* mask) {
  int64_t flags;
  std::memcpy(&flags, mask, sizeof(flags));
  return Kept<W>::of([&](int k) TK_INLINE_LAMBDA {
    Vec<int64_t, W> byte;  // a lane's among eight flags
    for (int l = 0; l < W; ++l) byte[l] = bit_cast<int64_t>(uint64_t{0xff} << 8 * (k * W + l));
    const Vec<int64_t, W> flag = broadcast<W>(flags) & byte;
    return (flag | -flag) >> 63;  // g++ 12 fails at flag != 0
  });
}

// f(i, kept, count) likewise; without a mask everything is kept.
template <int W, class F>
TK_INLINE void each_kept_step(const bool* mask, int64_t begin, int64_t end, const F& f) {
  each_step(begin, end, [&](int64_t i, auto count) TK_INLINE_LAMBDA {
    if (count == kLanes) return f(i, mask == nullptr ? Kept<W>(-1) : kept_by<W>(mask + i), count);
    bool flags[kLanes] = {};
    for (int64_t l = 0; l < count; ++l) flags[l] = mask == nullptr || mask[i + l];
    f(i, kept_by<W>(flags), count);
  });
}

}  // namespace tk
