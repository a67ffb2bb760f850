// Python's view of the span kernels, the same in both modules.
#include "arguments.h"

namespace tk {
namespace {

using Ranges = std::tuple<uintptr_t, uintptr_t, int64_t>;

SpanRanges span_ranges(const Ranges& x, int64_t tokens) {
  const auto [start, end, count] = x;
  return {as<const int64_t>(start), as<const int64_t>(end), count, tokens};
}

void span_reduce(int dtype, uintptr_t x, int64_t tokens, const Ranges& ranges, int op, uintptr_t out,
                 const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    SpanKernels<T>::span_reduce(as<const T>(x), span_ranges(ranges, tokens), choice<SpanOp>("op", op), as<T>(out),
                                launch_of(where));
  });
}

void span_reduce_backward(int dtype, uintptr_t grads, uintptr_t x, uintptr_t reduced, int64_t tokens,
                          const Ranges& ranges, int op, uintptr_t grad_x, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    SpanKernels<T>::span_reduce_backward(as<const T>(grads), as<const T>(x), as<const T>(reduced),
                                         span_ranges(ranges, tokens), choice<SpanOp>("op", op), as<T>(grad_x),
                                         launch_of(where));
  });
}

void spread(int dtype, uintptr_t values, int64_t tokens, const Ranges& ranges, uintptr_t out, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    SpanKernels<T>::spread(as<const T>(values), span_ranges(ranges, tokens), as<T>(out), launch_of(where));
  });
}

}  // namespace
}  // namespace tk

void bind_span(pybind11::module_& m) {
  m.def("span_reduce", &tk::span_reduce, tk::Unlocked());
  m.def("span_reduce_backward", &tk::span_reduce_backward, tk::Unlocked());
  m.def("spread", &tk::spread, tk::Unlocked());
}
