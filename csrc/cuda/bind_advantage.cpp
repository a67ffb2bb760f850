// Python's view of advantage.cu: pointers to device memory as integers (0: absent), the stream last.
#include <pybind11/pybind11.h>

#include "../common/dtype.h"
#include "advantage.h"

namespace tk {
namespace {

template <class T>
GroupRows<T> group_rows(uintptr_t rewards, uintptr_t ids, uintptr_t gate, uintptr_t weights, int64_t n) {
  return {as<const T>(rewards), as<const int64_t>(ids), as<const bool>(gate), as<const T>(weights), n};
}

void bound_group_advantages(uintptr_t rewards, int dtype, uintptr_t ids, uintptr_t gate, uintptr_t weights, int64_t n,
                            int baseline, int scale, double ddof, double eps, int singleton, uintptr_t advantages,
                            uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::group_advantages(group_rows<T>(rewards, ids, gate, weights, n), {baseline, scale, ddof, eps, singleton},
                           as<T>(advantages), as<void>(stream));
  });
}

void bound_group_advantages_backward(uintptr_t grads, uintptr_t rewards, int dtype, uintptr_t ids, uintptr_t gate,
                                     uintptr_t weights, int64_t n, int baseline, int scale, double ddof, double eps,
                                     int singleton, uintptr_t grad_rewards, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::group_advantages_backward(group_rows<T>(rewards, ids, gate, weights, n),
                                    {baseline, scale, ddof, eps, singleton}, as<const T>(grads), as<T>(grad_rewards),
                                    as<void>(stream));
  });
}

// -1, as nobody reads device values here: the kernels keep to the tokens whatever the boundaries are.
int64_t bound_gae(uintptr_t rewards, int dtype, uintptr_t values, uintptr_t cu_seqlens, int64_t count, int64_t tokens,
                  uintptr_t bootstrap, uintptr_t mask, double gamma, double lam, uintptr_t advantages,
                  uintptr_t stream) {
  const Trajectories in{as<const int64_t>(cu_seqlens), as<const bool>(mask), count, tokens};
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::gae(as<const T>(rewards), as<const T>(values), in, as<const T>(bootstrap), gamma, lam, as<T>(advantages),
              as<void>(stream));
  });
  return -1;
}

int64_t bound_gae_backward(uintptr_t grads, int dtype, uintptr_t cu_seqlens, int64_t count, int64_t tokens,
                           uintptr_t mask, double gamma, double lam, uintptr_t grad_rewards, uintptr_t grad_values,
                           uintptr_t grad_bootstrap, uintptr_t stream) {
  const Trajectories in{as<const int64_t>(cu_seqlens), as<const bool>(mask), count, tokens};
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::gae_backward(as<const T>(grads), in, gamma, lam, as<T>(grad_rewards), as<T>(grad_values),
                       as<T>(grad_bootstrap), as<void>(stream));
  });
  return -1;
}

void bound_whiten(uintptr_t x, int dtype, uintptr_t mask, int64_t n, bool shift_mean, double ddof, double eps,
                  uintptr_t out, uintptr_t stats, uintptr_t partials, int64_t blocks, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::whiten(Masked<T>{as<const T>(x), as<const bool>(mask), n}, shift_mean, ddof, eps, as<T>(out),
                 as<double>(stats), as<double>(partials), blocks, as<void>(stream));
  });
}

void bound_whiten_backward(uintptr_t grads, uintptr_t x, int dtype, uintptr_t mask, int64_t n, uintptr_t stats,
                           bool shift_mean, double ddof, uintptr_t grad_x, uintptr_t partials, int64_t blocks,
                           uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::whiten_backward(as<const T>(grads), Masked<T>{as<const T>(x), as<const bool>(mask), n},
                          as<const double>(stats), shift_mean, ddof, as<T>(grad_x), as<double>(partials), blocks,
                          as<void>(stream));
  });
}

}  // namespace
}  // namespace tk

void bind_advantage(pybind11::module_& m) {
  m.def("group_advantages", &tk::bound_group_advantages);
  m.def("group_advantages_backward", &tk::bound_group_advantages_backward);
  m.def("gae", &tk::bound_gae);
  m.def("gae_backward", &tk::bound_gae_backward);
  m.def("whiten", &tk::bound_whiten);
  m.def("whiten_backward", &tk::bound_whiten_backward);
}
