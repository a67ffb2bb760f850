// Python's view of the advantage kernels, the same in both modules.
#include "arguments.h"

namespace tk {
namespace {

using Rule = std::tuple<int, int, double, double, int>;

GroupRule group_rule(const Rule& x) {
  const auto [baseline, scale, ddof, eps, singleton] = x;
  return {choice<Baseline>("baseline", baseline), choice<Scale>("scale", scale), ddof, eps,
          choice<Singleton>("singleton", singleton)};
}

using Rows = Pointers<4>;  // rewards, ids, gate, weights

template <class T>
GroupRows<T> group_rows(const Rows& x, int64_t n) {
  return {as<const T>(x[0]), as<const int64_t>(x[1]), as<const bool>(x[2]), as<const T>(x[3]), n};
}

bool group_advantages(int dtype, const Rows& rows, int64_t n, const Rule& rule, uintptr_t advantages,
                      const Where& where) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return AdvantageKernels<T>::group_advantages(group_rows<T>(rows, n), group_rule(rule), as<T>(advantages),
                                                 launch_of(where));
  });
}

void group_advantages_backward(int dtype, const Rows& rows, int64_t n, const Rule& rule, uintptr_t grads,
                               uintptr_t grad_rewards, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    AdvantageKernels<T>::group_advantages_backward(group_rows<T>(rows, n), group_rule(rule), as<const T>(grads),
                                                   as<T>(grad_rewards), launch_of(where));
  });
}

using Pack = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;

Trajectories trajectories(const Pack& x) {
  const auto [cu_seqlens, mask, count, tokens] = x;
  return {as<const int64_t>(cu_seqlens), as<const bool>(mask), count, tokens};
}

int64_t gae(int dtype, const Pack& pack, uintptr_t rewards, uintptr_t values, uintptr_t bootstrap, double gamma,
            double lam, uintptr_t advantages, const Where& where) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return AdvantageKernels<T>::gae(as<const T>(rewards), as<const T>(values), trajectories(pack),
                                    as<const T>(bootstrap), gamma, lam, as<T>(advantages), launch_of(where));
  });
}

int64_t gae_backward(int dtype, const Pack& pack, uintptr_t grads, double gamma, double lam, uintptr_t grad_rewards,
                     uintptr_t grad_values, uintptr_t grad_bootstrap, const Where& where) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return AdvantageKernels<T>::gae_backward(as<const T>(grads), trajectories(pack), gamma, lam, as<T>(grad_rewards),
                                             as<T>(grad_values), as<T>(grad_bootstrap), launch_of(where));
  });
}

void whiten(int dtype, uintptr_t x, uintptr_t mask, int64_t n, bool shift_mean, double ddof, double eps, uintptr_t out,
            uintptr_t stats, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    AdvantageKernels<T>::whiten({as<const T>(x), as<const bool>(mask), n}, shift_mean, ddof, eps, as<T>(out),
                                as<double>(stats), launch_of(where));
  });
}

void whiten_backward(int dtype, uintptr_t grads, uintptr_t x, uintptr_t mask, int64_t n, uintptr_t stats,
                     bool shift_mean, double ddof, uintptr_t grad_x, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    AdvantageKernels<T>::whiten_backward(as<const T>(grads), {as<const T>(x), as<const bool>(mask), n},
                                         as<const double>(stats), shift_mean, ddof, as<T>(grad_x), launch_of(where));
  });
}

}  // namespace
}  // namespace tk

void bind_advantage(pybind11::module_& m) {
  m.def("group_advantages", &tk::group_advantages, tk::Unlocked());
  m.def("group_advantages_backward", &tk::group_advantages_backward, tk::Unlocked());
  m.def("gae", &tk::gae, tk::Unlocked());
  m.def("gae_backward", &tk::gae_backward, tk::Unlocked());
  m.def("whiten", &tk::whiten, tk::Unlocked());
  m.def("whiten_backward", &tk::whiten_backward, tk::Unlocked());
  m.def("group_scratch", &tk::group_scratch);
  m.def("whiten_scratch", &tk::whiten_scratch);
}
