// Python's view of tree.cu: pointers to device memory as integers (0: absent), the stream last.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/dtype.h"
#include "tree.h"

namespace tk {
namespace {

void bound_subtree_reduce(uintptr_t leaf_values, int dtype, const TreeArrays& tree, int64_t nodes, int64_t leaves,
                          int op, uintptr_t out, uintptr_t scratch, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::subtree_reduce(as<const T>(leaf_values), tree_nodes(tree, nodes, leaves), op, as<T>(out), as<void>(scratch),
                         as<void>(stream));
  });
}

void bound_subtree_reduce_backward(uintptr_t grads, uintptr_t leaf_values, int dtype, const TreeArrays& tree,
                                   int64_t nodes, int64_t leaves, int op, uintptr_t grad_leaves, uintptr_t scratch,
                                   uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::subtree_reduce_backward(as<const T>(grads), as<const T>(leaf_values), tree_nodes(tree, nodes, leaves), op,
                                  as<T>(grad_leaves), as<void>(scratch), as<void>(stream));
  });
}

void bound_sibling_advantages(uintptr_t values, int dtype, const TreeArrays& tree, int64_t nodes, int64_t leaves,
                              int baseline, bool by_std, double ddof, double eps, bool zero, uintptr_t advantages,
                              uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::sibling_advantages(as<const T>(values), tree_nodes(tree, nodes, leaves), {baseline, by_std, zero, ddof, eps},
                             as<T>(advantages), as<void>(stream));
  });
}

void bound_sibling_advantages_backward(uintptr_t grads, uintptr_t values, int dtype, const TreeArrays& tree,
                                       int64_t nodes, int64_t leaves, int baseline, bool by_std, double ddof,
                                       double eps, bool zero, uintptr_t grad_values, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::sibling_advantages_backward(as<const T>(grads), as<const T>(values), tree_nodes(tree, nodes, leaves),
                                      {baseline, by_std, zero, ddof, eps}, as<T>(grad_values), as<void>(stream));
  });
}

void bound_branch_coefficients(uintptr_t advantages, int dtype, uintptr_t weights, const TreeArrays& tree,
                               int64_t nodes, int64_t leaves, const std::array<uintptr_t, 6>& out, uintptr_t scratch,
                               uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    T* const results[] = {as<T>(out[0]), as<T>(out[1]), as<T>(out[2]), as<T>(out[3]), as<T>(out[4]), as<T>(out[5])};
    cuda::branch_coefficients(as<const T>(advantages), as<const T>(weights), tree_nodes(tree, nodes, leaves), results,
                              as<void>(scratch), as<void>(stream));
  });
}

void bound_branch_coefficients_backward(uintptr_t grad_positive, uintptr_t grad_negative, uintptr_t advantages,
                                        int dtype, uintptr_t weights, const TreeArrays& tree, int64_t nodes,
                                        int64_t leaves, uintptr_t grad_advantages, uintptr_t stream) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    cuda::branch_coefficients_backward(as<const T>(grad_positive), as<const T>(grad_negative), as<const T>(advantages),
                                       as<const T>(weights), tree_nodes(tree, nodes, leaves), as<T>(grad_advantages),
                                       as<void>(stream));
  });
}

}  // namespace
}  // namespace tk

void bind_tree(pybind11::module_& m) {
  m.def("subtree_reduce", &tk::bound_subtree_reduce);
  m.def("subtree_reduce_backward", &tk::bound_subtree_reduce_backward);
  m.def("sibling_advantages", &tk::bound_sibling_advantages);
  m.def("sibling_advantages_backward", &tk::bound_sibling_advantages_backward);
  m.def("branch_coefficients", &tk::bound_branch_coefficients);
  m.def("branch_coefficients_backward", &tk::bound_branch_coefficients_backward);
}
