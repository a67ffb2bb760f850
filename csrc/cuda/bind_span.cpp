// Python's view of span.cu: pointers to device memory as integers, the stream last.
#include <pybind11/pybind11.h>

#include "../common/dtype.h"
#include "span.h"

namespace tk {
namespace {

void bound_span_reduce(uintptr_t x, int dtype, int64_t tokens, uintptr_t start, uintptr_t end, int64_t count, int op,
                       uintptr_t out, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::span_reduce(as<const T>(x), span_ranges(start, end, count, tokens), op, as<T>(out), as<void>(stream));
  });
}

void bound_span_extreme_backward(uintptr_t grads, uintptr_t x, uintptr_t extreme, int dtype, int64_t tokens,
                                 uintptr_t start, uintptr_t end, int64_t count, uintptr_t grad_x, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::span_extreme_backward(as<const T>(grads), as<const T>(x), as<const T>(extreme),
                                span_ranges(start, end, count, tokens), as<T>(grad_x), as<void>(stream));
  });
}

void bound_spread(uintptr_t values, int dtype, int64_t tokens, uintptr_t start, uintptr_t end, int64_t count,
                  uintptr_t out, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::spread(as<const T>(values), span_ranges(start, end, count, tokens), as<T>(out), as<void>(stream));
  });
}

}  // namespace
}  // namespace tk

void bind_span(pybind11::module_& m) {
  m.def("span_reduce", &tk::bound_span_reduce);
  m.def("span_extreme_backward", &tk::bound_span_extreme_backward);
  m.def("spread", &tk::bound_spread);
}
