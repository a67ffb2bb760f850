// The maths of the span family, once for the CPU and the CUDA kernels.
#pragma once
#include <cstdint>
#include <limits>

#include "choice.h"
#include "hostdevice.h"

namespace tk {

enum class SpanOp : int { sum, mean, max, min };
constexpr int members(SpanOp) { return 4; }
constexpr char kSpreadGradient[] = "op must be a reduction whose gradient reads x; this one's is spread";

// Ranges [start, end) of tokens, ascending and disjoint.
struct SpanRanges {
  const int64_t *start, *end;
  int64_t count, tokens;
};

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
TK_HD T span_total(double sum, int64_t length, bool mean) {
  return T(mean && length > 0 ? sum / double(length) : sum);
}

}  // namespace tk
