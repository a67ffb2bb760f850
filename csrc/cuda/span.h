// The launches of span.cu, asynchronous on `stream`. T is float or double; pointers are to device memory.
#pragma once
#include "../common/span.h"

namespace tk {
namespace cuda {

template <class T>
void span_reduce(const T* x, const SpanRanges& spans, int op, T* out, void* stream);
// `grad_x` is zero everywhere before.
template <class T>
void span_extreme_backward(const T* grads, const T* x, const T* extreme, const SpanRanges& spans, T* grad_x,
                           void* stream);

template <class T>
void spread(const T* values, const SpanRanges& spans, T* out, void* stream);

}  // namespace cuda
}  // namespace tk
