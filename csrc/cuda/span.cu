// Reductions over spans and values spread to tokens on a GPU.
#include "../common/kernels.h"
#include "block.cuh"

namespace tk {
namespace cuda {
namespace {

constexpr int kThreads = 128;

inline int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// A warp a span: its tokens are dealt to the lanes from the span's first on, wherever it stands.
template <class T>
__global__ void total_kernel(SpanRanges spans, const T* x, bool mean, T* out) {
  const int64_t s = warp_in_grid();
  if (s >= spans.count) return;
  const int64_t begin = spans.start[s], end = spans.end[s];
  double sum = 0;
  for (int64_t t = begin + lane(); t < end; t += kWarp) sum += double(x[t]);
  sum = warp_sum(sum);
  if (lane() == 0) out[s] = span_total<T>(sum, end - begin, mean);
}

// The least, with sign -1, is the greatest of the negatives.
template <class T>
__global__ void extreme_kernel(SpanRanges spans, const T* x, T sign, T none, T* out) {
  const int64_t s = warp_in_grid();
  if (s >= spans.count) return;
  T best = none;
  for (int64_t t = spans.start[s] + lane(); t < spans.end[s]; t += kWarp) best = greater(sign * x[t], best);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) best = greater(__shfl_xor_sync(kAllLanes, best, offset), best);
  if (lane() == 0) out[s] = sign * best;
}

// The first extreme token of each span takes the span's gradient.
template <class T>
__global__ void extreme_backward_kernel(SpanRanges spans, const T* grads, const T* x, const T* extreme, T* grad_x) {
  const int64_t s = warp_in_grid();
  if (s >= spans.count) return;
  const int64_t end = spans.end[s];
  for (int64_t begin = spans.start[s]; begin < end; begin += kWarp) {
    const int64_t t = begin + lane();
    const bool here = t < end && is_extreme(x[t], extreme[s]);
    const unsigned found = __ballot_sync(kAllLanes, here);
    if (here && rank_in(found) == 0) grad_x[t] = grads[s];
    if (found != 0) return;
  }
}

// A thread a token, so that no length of a span or of what lies between two makes some warps wait for others.
template <class T>
__global__ void spread_kernel(SpanRanges spans, const T* values, T* out) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= spans.tokens) return;
  int64_t s = 0, last = spans.count;  // the first span that ends behind t lies in [s, last]
  while (s < last) {
    const int64_t middle = s + (last - s) / 2;
    if (spans.end[middle] > t)
      last = middle;
    else
      s = middle + 1;
  }
  out[t] = s < spans.count && spans.start[s] <= t ? values[s] : T(0);
}

}  // namespace
}  // namespace cuda

using namespace cuda;

template <class T>
void SpanKernels<T>::span_reduce(const T* x, const SpanRanges& spans, SpanOp op, T* out, const Launch& where) {
  const int64_t blocks = blocks_for(spans.count * kWarp);
  constexpr T none = -std::numeric_limits<T>::infinity();
  switch (op) {
    case SpanOp::sum:
      return launch(total_kernel<T>, blocks, kThreads, 0, where.stream, spans, x, false, out);
    case SpanOp::mean:
      return launch(total_kernel<T>, blocks, kThreads, 0, where.stream, spans, x, true, out);
    case SpanOp::max:
      return launch(extreme_kernel<T>, blocks, kThreads, 0, where.stream, spans, x, T(1), none, out);
    case SpanOp::min:
      return launch(extreme_kernel<T>, blocks, kThreads, 0, where.stream, spans, x, T(-1), none, out);
  }
}

template <class T>
void SpanKernels<T>::span_reduce_backward(const T* grads, const T* x, const T* reduced, const SpanRanges& spans,
                                          SpanOp op, T* grad_x, const Launch& where) {
  const int64_t blocks = blocks_for(spans.count * kWarp);
  switch (op) {
    case SpanOp::sum:
    case SpanOp::mean:
      throw std::invalid_argument(kSpreadGradient);
    case SpanOp::max:
    case SpanOp::min:
      return launch(extreme_backward_kernel<T>, blocks, kThreads, 0, where.stream, spans, grads, x, reduced, grad_x);
  }
}

template <class T>
void SpanKernels<T>::spread(const T* values, const SpanRanges& spans, T* out, const Launch& where) {
  launch(spread_kernel<T>, blocks_for(spans.tokens), kThreads, 0, where.stream, spans, values, out);
}

template struct SpanKernels<float>;
template struct SpanKernels<double>;

}  // namespace tk
