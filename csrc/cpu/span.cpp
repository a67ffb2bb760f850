// Reductions over spans and values spread to tokens, on the CPU.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/kernels.h"
#include "../common/parallel.h"
#include "huge_pages.h"
#include "lanes.h"

namespace tk {
namespace {

constexpr int64_t kGrain = 32768;  // tokens worth a thread

// A span's tokens are dealt to eight lanes: step(k, x) for the vectors of W lanes, number k of kLanes / W, of tokens
// [begin, end); `rest` fills up the last ones.
template <int W, class T, class Step>
TK_INLINE void each_vector(const T* x, int64_t begin, int64_t end, int64_t tokens, T rest, const Step& step) {
  int64_t t = begin;
  for (; t + kLanes <= end; t += kLanes)
    for (int k = 0; k < kLanes / W; ++k) step(k, load<W>(x + t + k * W));
  if (t == end) return;
  T last[kLanes];
  const T* source = x + t;
  if (t + kLanes > tokens) {  // reading on would leave the pack
    for (int l = 0; l < kLanes; ++l) last[l] = l < end - t ? x[t + l] : rest;
    source = last;
  }
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<Index, W> lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  for (int k = 0; k < kLanes / W; ++k) step(k, lane < Index(end - t - k * W) ? load<W>(source + k * W) : rest);
}

template <int W, class T>
TK_INLINE double span_sum(const T* x, int64_t begin, int64_t end, int64_t tokens) {
  Vec<double, W> sums[kLanes / W] = {};
  each_vector<W>(x, begin, end, tokens, T(0),
                 [&](int k, const auto& v) TK_INLINE_LAMBDA { sums[k] += __builtin_convertvector(v, Vec<double, W>); });
  return fold_sum<W>(sums);
}

// See greater(), lane by lane.
template <class V>
TK_INLINE V vgreater(const V& x, const V& greatest) {
  return (x > greatest) | (x != x) ? x : greatest;
}

template <int W, class T>
TK_INLINE T span_greatest(const T* x, int64_t begin, int64_t end, int64_t tokens, T sign) {
  const T none = -std::numeric_limits<T>::infinity();
  Vec<T, W> best[kLanes / W];
  for (auto& b : best) b = broadcast<W>(none);
  each_vector<W>(x, begin, end, tokens, sign * none,
                 [&](int k, const auto& v) TK_INLINE_LAMBDA { best[k] = vgreater(Vec<T, W>(v * sign), best[k]); });
  return fold<W, kLanes / W, T>(best, [](const auto& a, const auto& b) TK_INLINE_LAMBDA { return vgreater(b, a); });
}

// f(s, e) on ranges of spans that hold about as many tokens each.
template <class F>
void each_share(const SpanRanges& spans, const F& f) {
  const int64_t* all = spans.start + spans.count;
  parallel_for(spans.tokens + 1, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t* first = std::lower_bound(spans.start, all, begin);
    f(first - spans.start, std::lower_bound(first, all, end) - spans.start);
  });
}

template <class T>
void span_totals(const T* x, const SpanRanges& spans, bool mean, T* out) {
  each_share(spans, [&](int64_t first, int64_t last) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      for (int64_t s = first; s < last; ++s) {
        const int64_t begin = spans.start[s], end = spans.end[s];
        out[s] = span_total<T>(span_sum<width() / 2>(x, begin, end, spans.tokens), end - begin, mean);
      }
    });
  });
}

// The least, with sign -1, is the greatest of the negatives.
template <class T>
void span_extremes(const T* x, const SpanRanges& spans, T sign, T* out) {
  each_share(spans, [&](int64_t first, int64_t last) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr int W = sizeof(T) == 8 ? width() / 2 : std::min(width(), kLanes);
      for (int64_t s = first; s < last; ++s)
        out[s] = sign * span_greatest<W>(x, spans.start[s], spans.end[s], spans.tokens, sign);
    });
  });
}

// The first extreme token of each span takes the span's gradient.
template <class T>
void share_extremes(const T* grads, const T* x, const T* extreme, const SpanRanges& spans, T* grad_x) {
  each_share(spans, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      int64_t t = spans.start[s];
      while (t < spans.end[s] && !is_extreme(x[t], extreme[s])) ++t;
      if (t < spans.end[s]) grad_x[t] = grads[s];
    }
  });
}

}  // namespace

template <class T>
void SpanKernels<T>::span_reduce(const T* x, const SpanRanges& spans, SpanOp op, T* out, const Launch&) {
  switch (op) {
    case SpanOp::sum:
      return span_totals(x, spans, false, out);
    case SpanOp::mean:
      return span_totals(x, spans, true, out);
    case SpanOp::max:
      return span_extremes(x, spans, T(1), out);
    case SpanOp::min:
      return span_extremes(x, spans, T(-1), out);
  }
}

template <class T>
void SpanKernels<T>::span_reduce_backward(const T* grads, const T* x, const T* reduced, const SpanRanges& spans,
                                          SpanOp op, T* grad_x, const Launch&) {
  switch (op) {
    case SpanOp::sum:
    case SpanOp::mean:
      throw std::invalid_argument(kSpreadGradient);
    case SpanOp::max:
    case SpanOp::min:
      return share_extremes(grads, x, reduced, spans, grad_x);
  }
}

template <class T>
void SpanKernels<T>::spread(const T* values, const SpanRanges& spans, T* out, const Launch&) {
  prefer_huge_pages(out, spans.tokens * int64_t(sizeof(T)));
  parallel_for(spans.tokens, kGrain, [&](int64_t begin, int64_t end) {
    int64_t s = std::upper_bound(spans.end, spans.end + spans.count, begin) - spans.end, t = begin;
    for (; t < end && s < spans.count; ++s) {
      const int64_t from = std::clamp(spans.start[s], t, end), to = std::clamp(spans.end[s], from, end);
      std::fill(out + t, out + from, T(0));
      std::fill(out + from, out + to, values[s]);
      t = to;
    }
    std::fill(out + t, out + end, T(0));
  });
}

template struct SpanKernels<float>;
template struct SpanKernels<double>;

}  // namespace tk
