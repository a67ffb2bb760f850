// Python's view of the tree kernels, the same in both modules.
#include "arguments.h"

namespace tk {
namespace {

using Nodes = std::tuple<Pointers<7>, int64_t, int64_t>;  // Tree.arrays, in the order of TreeNodes' members

TreeNodes tree_nodes(const Nodes& tree) {
  using I = const int32_t;
  const auto& [x, nodes, leaves] = tree;
  return {as<I>(x[0]), as<I>(x[1]), as<I>(x[2]), as<I>(x[3]), as<I>(x[4]), as<I>(x[5]), as<I>(x[6]), nodes, leaves};
}

bool subtree_reduce(int dtype, uintptr_t leaf_values, const Nodes& tree, int op, uintptr_t out, const Where& where) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return TreeKernels<T>::subtree_reduce(as<const T>(leaf_values), tree_nodes(tree), choice<SubtreeOp>("op", op),
                                          as<T>(out), launch_of(where));
  });
}

void subtree_reduce_backward(int dtype, uintptr_t grads, uintptr_t leaf_values, const Nodes& tree, int op,
                             uintptr_t grad_leaves, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    TreeKernels<T>::subtree_reduce_backward(as<const T>(grads), as<const T>(leaf_values), tree_nodes(tree),
                                            choice<SubtreeOp>("op", op), as<T>(grad_leaves), launch_of(where));
  });
}

using Rule = std::tuple<int, bool, double, double, bool>;

SiblingRule sibling_rule(const Rule& x) {
  const auto [baseline, by_std, ddof, eps, zero_singleton] = x;
  return {choice<SiblingBaseline>("baseline", baseline), by_std, zero_singleton, ddof, eps};
}

bool sibling_advantages(int dtype, uintptr_t values, const Nodes& tree, const Rule& rule, uintptr_t advantages,
                        const Where& where) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    return TreeKernels<T>::sibling_advantages(as<const T>(values), tree_nodes(tree), sibling_rule(rule),
                                              as<T>(advantages), launch_of(where));
  });
}

void sibling_advantages_backward(int dtype, uintptr_t grads, uintptr_t values, const Nodes& tree, const Rule& rule,
                                 uintptr_t grad_values, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    TreeKernels<T>::sibling_advantages_backward(as<const T>(grads), as<const T>(values), tree_nodes(tree),
                                                sibling_rule(rule), as<T>(grad_values), launch_of(where));
  });
}

bool branch_coefficients(int dtype, uintptr_t advantages, uintptr_t weights, const Nodes& tree,
                         const Pointers<kBranchRows>& out, const Where& where) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    BranchRows<T> rows;
    for (int k = 0; k < kBranchRows; ++k) rows[k] = as<T>(out[k]);
    return TreeKernels<T>::branch_coefficients(as<const T>(advantages), as<const T>(weights), tree_nodes(tree), rows,
                                               launch_of(where));
  });
}

void branch_coefficients_backward(int dtype, const Pointers<2>& grads, uintptr_t advantages, uintptr_t weights,
                                  const Nodes& tree, uintptr_t grad_advantages, const Where& where) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    TreeKernels<T>::branch_coefficients_backward(as<const T>(grads[0]), as<const T>(grads[1]), as<const T>(advantages),
                                                 as<const T>(weights), tree_nodes(tree), as<T>(grad_advantages),
                                                 launch_of(where));
  });
}

}  // namespace
}  // namespace tk

void bind_tree(pybind11::module_& m) {
  m.def("subtree_reduce", &tk::subtree_reduce, tk::Unlocked());
  m.def("subtree_reduce_backward", &tk::subtree_reduce_backward, tk::Unlocked());
  m.def("sibling_advantages", &tk::sibling_advantages, tk::Unlocked());
  m.def("sibling_advantages_backward", &tk::sibling_advantages_backward, tk::Unlocked());
  m.def("branch_coefficients", &tk::branch_coefficients, tk::Unlocked());
  m.def("branch_coefficients_backward", &tk::branch_coefficients_backward, tk::Unlocked());
  m.def("tree_scratch", &tk::tree_scratch);
}
