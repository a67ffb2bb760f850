// Reductions over spans, values spread to tokens, and the turns of a packed batch, on the CPU.
#include "../common/span.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/dtype.h"
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
void span_reduce(const T* x, const SpanRanges& spans, int op, T* out) {
  each_share(spans, [&](int64_t first, int64_t last) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr int kWide = width() / 2, kOwn = sizeof(T) == 8 ? kWide : std::min(width(), kLanes);
      if (op == kSpanSum || op == kSpanMean) {
        for (int64_t s = first; s < last; ++s) {
          const int64_t begin = spans.start[s], end = spans.end[s];
          out[s] = span_total<T>(span_sum<kWide>(x, begin, end, spans.tokens), end - begin, op);
        }
      } else {
        const T sign = T(span_sign(op));
        for (int64_t s = first; s < last; ++s)
          out[s] = sign * span_greatest<kOwn>(x, spans.start[s], spans.end[s], spans.tokens, sign);
      }
    });
  });
}

// `grad_x` is zero everywhere; the first extreme token of each span takes the span's gradient.
template <class T>
void span_extreme_backward(const T* grads, const T* x, const T* extreme, const SpanRanges& spans, T* grad_x) {
  each_share(spans, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      int64_t t = spans.start[s];
      while (t < spans.end[s] && !is_extreme(x[t], extreme[s])) ++t;
      if (t < spans.end[s]) grad_x[t] = grads[s];
    }
  });
}

template <class T>
void spread(const T* values, const SpanRanges& spans, T* out) {
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

// A pack's scored tokens; `before`: the turns that begin before each block of tokens, and all of them.
struct Scored {
  const uint8_t* mask;
  const int64_t* cu_seqlens;
  int64_t trajectories, tokens, block;
  int64_t* before;

  int64_t blocks() const { return (tokens + block - 1) / block; }
  // The first token from t on that is scored or not, or `end`.
  int64_t next(bool scored, int64_t t, int64_t end) const {
    const void* found = t < end ? std::memchr(mask + t, scored, size_t(end - t)) : nullptr;
    return found ? static_cast<const uint8_t*>(found) - mask : end;
  }
};

// f(start, end, n) for the turns of each trajectory n that begin in block b.
template <class F>
void each_turn(const Scored& in, int64_t b, const F& f) {
  const int64_t* bounds = in.cu_seqlens;
  const int64_t end = std::min(in.tokens, (b + 1) * in.block);
  int64_t t = b * in.block, n = std::upper_bound(bounds, bounds + in.trajectories, t) - bounds - 1;
  if (t > bounds[n] && in.mask[t - 1]) t = in.next(false, t, std::min(end, bounds[n + 1]));  // began before the block
  for (; t < end; ++n) {
    const int64_t stop = std::min(end, bounds[n + 1]);
    while ((t = in.next(true, t, stop)) < stop) {
      const int64_t turn = t;
      t = in.next(false, t, bounds[n + 1]);
      f(turn, t, n);
    }
  }
}

int64_t count_turns(const Scored& in) {
  parallel_for(in.blocks(), 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int64_t count = 0;
      each_turn(in, b, [&](int64_t, int64_t, int64_t) { ++count; });
      in.before[b + 1] = count;
    }
  });
  for (int64_t b = 0; b < in.blocks(); ++b) in.before[b + 1] += in.before[b];
  return in.before[in.blocks()];
}

void turns(const Scored& in, int64_t* start, int64_t* end, int64_t* trajectory, int64_t* index) {
  parallel_for(in.blocks(), 1, [&](int64_t first, int64_t last) {
    int64_t s = in.before[first];
    for (int64_t b = first; b < last; ++b)
      each_turn(in, b, [&](int64_t from, int64_t to, int64_t n) { start[s] = from, end[s] = to, trajectory[s++] = n; });
  });
  const int64_t count = in.before[in.blocks()];
  for (int64_t s = 0; s < count; ++s) index[s] = s && trajectory[s] == trajectory[s - 1] ? index[s - 1] + 1 : 0;
}

Scored scored(uintptr_t mask, uintptr_t cu_seqlens, int64_t trajectories, int64_t tokens, int64_t block,
              uintptr_t before) {
  return {as<const uint8_t>(mask), as<const int64_t>(cu_seqlens), trajectories, tokens, block, as<int64_t>(before)};
}

void bound_span_reduce(uintptr_t x, int dtype, int64_t tokens, uintptr_t start, uintptr_t end, int64_t count, int op,
                       uintptr_t out) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    span_reduce(as<const T>(x), span_ranges(start, end, count, tokens), op, as<T>(out));
  });
}

void bound_span_extreme_backward(uintptr_t grads, uintptr_t x, uintptr_t extreme, int dtype, int64_t tokens,
                                 uintptr_t start, uintptr_t end, int64_t count, uintptr_t grad_x) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    span_extreme_backward(as<const T>(grads), as<const T>(x), as<const T>(extreme),
                          span_ranges(start, end, count, tokens), as<T>(grad_x));
  });
}

void bound_spread(uintptr_t values, int dtype, int64_t tokens, uintptr_t start, uintptr_t end, int64_t count,
                  uintptr_t out) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    spread(as<const T>(values), span_ranges(start, end, count, tokens), as<T>(out));
  });
}

int64_t bound_count_turns(uintptr_t mask, uintptr_t cu_seqlens, int64_t trajectories, int64_t tokens, int64_t block,
                          uintptr_t before) {
  return count_turns(scored(mask, cu_seqlens, trajectories, tokens, block, before));
}

void bound_turns(uintptr_t mask, uintptr_t cu_seqlens, int64_t trajectories, int64_t tokens, int64_t block,
                 uintptr_t before, uintptr_t start, uintptr_t end, uintptr_t trajectory, uintptr_t index) {
  turns(scored(mask, cu_seqlens, trajectories, tokens, block, before), as<int64_t>(start), as<int64_t>(end),
        as<int64_t>(trajectory), as<int64_t>(index));
}

}  // namespace
}  // namespace tk

void bind_span(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("span_reduce", &tk::bound_span_reduce, unlocked());
  m.def("span_extreme_backward", &tk::bound_span_extreme_backward, unlocked());
  m.def("spread", &tk::bound_spread, unlocked());
  m.def("span_count_turns", &tk::bound_count_turns, unlocked());
  m.def("span_turns", &tk::bound_turns, unlocked());
}
