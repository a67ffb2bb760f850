// The maths of the span family, once for the CPU and the CUDA kernels.
#pragma once
#include <cstdint>
#include <limits>

#include "dtype.h"
#include "hostdevice.h"

namespace tk {

enum SpanOp : int { kSpanSum, kSpanMean, kSpanMax, kSpanMin };

// Ranges [start, end) of tokens, ascending and disjoint.
struct SpanRanges {
  const int64_t *start, *end;
  int64_t count, tokens;
};

inline SpanRanges span_ranges(uintptr_t start, uintptr_t end, int64_t count, int64_t tokens) {
  return {as<const int64_t>(start), as<const int64_t>(end), count, tokens};
}

// The least is the greatest of the negatives.
inline int span_sign(int op) { return op == kSpanMin ? -1 : 1; }

// The greatest so far, once x is seen; a NaN takes its place and stays.
template <class T>
TK_HD T greater(T x, T greatest) {
  return x > greatest || x != x ? x : greatest;
}

template <class T>
TK_HD bool is_extreme(T x, T extreme) {
  return x == extreme || (x != x && extreme != extreme);
}

template <class T>
TK_HD T span_total(double sum, int64_t length, int op) {
  return T(op == kSpanMean && length > 0 ? sum / double(length) : sum);
}

}  // namespace tk
