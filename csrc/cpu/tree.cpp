// Reductions over subtrees, siblings and branches on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "tree_passes.h"

namespace tk {
namespace {

constexpr int64_t kGrain = 8192;

template <class T>
SiblingStats sibling_stats(const T* values, const SiblingRule& rule, const int32_t* begin, const int32_t* end) {
  const double origin = double(values[*begin]), count = double(end - begin);
  const double mean = sum_children(begin, end, [&](int64_t c) { return double(values[c]) - origin; }) / count;
  const double squares = rule.by_std ? sum_children(begin, end,
                                                    [&](int64_t c) {
                                                      const double apart = (double(values[c]) - origin) - mean;
                                                      return apart * apart;
                                                    })
                                     : 0;
  return {origin, mean, squares, end - begin};
}

// f(p, begin, end) for every node with children, and root(n) for every root.
template <class F, class Root>
void each_family(const TreeNodes& tree, const F& f, const Root& root) {
  parallel_for(tree.nodes, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      if (tree.parent[p] < 0) root(p);
      if (!tree.is_leaf(p)) f(p, tree.child + tree.child_begin[p], tree.child + tree.child_begin[p + 1]);
    }
  });
}

template <class T>
double shift_of(const T* values, const SiblingRule& rule, int64_t p) {
  return rule.baseline == kParentValue ? double(values[p]) : 0;
}

template <class T>
bool sibling_advantages(const T* values, const TreeNodes& tree, const SiblingRule& rule, T* advantages) {
  if (!all_finite(values, tree.nodes)) return false;
  each_family(
      tree,
      [&](int64_t p, const int32_t* begin, const int32_t* end) {
        const SiblingStats group = sibling_stats(values, rule, begin, end);
        const SiblingMap map = sibling_map(rule, group);
        const double shift = shift_of(values, rule, p);
        for (const int32_t* c = begin; c < end; ++c)
          advantages[*c] = T(sibling_advantage(map, group, double(values[*c]), shift));
      },
      [&](int64_t n) { advantages[n] = 0; });
  return true;
}

template <class T>
void sibling_advantages_backward(const T* grads, const T* values, const TreeNodes& tree, const SiblingRule& rule,
                                 T* grad_values) {
  const bool by_parent = rule.baseline == kParentValue;
  const auto to_parent = unwritten<double>(by_parent ? tree.nodes : 0);
  each_family(
      tree,
      [&](int64_t p, const int32_t* begin, const int32_t* end) {
        const SiblingStats group = sibling_stats(values, rule, begin, end);
        const SiblingMap map = sibling_map(rule, group);
        const double shift = shift_of(values, rule, p);
        const double sum_g = sum_children(begin, end, [&](int64_t c) { return double(grads[c]); });
        const double sum_ga = sum_children(begin, end, [&](int64_t c) {
          return double(grads[c]) * sibling_advantage(map, group, double(values[c]), shift);
        });
        const SiblingGradient gradient = sibling_gradient(rule, map, group, sum_g, sum_ga);
        for (const int32_t* c = begin; c < end; ++c)
          grad_values[*c] = T(value_gradient(gradient, group, double(grads[*c]), double(values[*c])));
        if (by_parent) to_parent[p] = map.gain * sum_g;
      },
      [&](int64_t n) { grad_values[n] = 0; });
  if (!by_parent) return;
  for (int64_t p = 0; p < tree.nodes; ++p)
    if (!tree.is_leaf(p)) grad_values[p] = T(double(grad_values[p]) - to_parent[p]);
}

template <class T>
double weight_of(const T* weights, int64_t l) {
  return weights == nullptr ? 1 : double(weights[l]);
}

// 0, or 1 where an advantage and 2 where a weight is illegal; nothing is written then.
template <class T>
int branch_coefficients(const T* advantages, const T* weights, const TreeNodes& tree, T* const* out) {
  if (!all_finite(advantages, tree.leaves)) return 1;
  if (weights != nullptr) {
    if (!all_finite(weights, tree.leaves)) return 2;
    for (int64_t l = 0; l < tree.leaves; ++l)
      if (weights[l] < 0) return 2;
  }
  const auto sums = unwritten<BranchSums>(tree.nodes);
  const auto write = [&](int64_t n) {
    const BranchSums& x = sums[n];
    out[0][n] = T(x.positive), out[1][n] = T(x.negative), out[2][n] = T(x.weight);
    out[3][n] = T(x.positive_count), out[4][n] = T(x.negative_count), out[5][n] = T(x.zero_count);
  };
  upwards(
      tree,
      [&](int64_t n, int64_t l, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
          sums[n + i] = branch_leaf(double(advantages[l + i]), weight_of(weights, l + i)), write(n + i);
      },
      [&](int64_t n, const int32_t* begin, const int32_t* end) {
        BranchSums sum{};
        for (const int32_t* c = begin; c < end; ++c) sum.add(sums[*c]);
        sums[n] = sum, write(n);
      });
  return 0;
}

template <class T>
void branch_coefficients_backward(const T* grad_positive, const T* grad_negative, const T* advantages, const T* weights,
                                  const TreeNodes& tree, T* grad_advantages) {
  struct Path {
    double positive, negative;
  };
  downwards<Path>(
      tree,
      [&](int64_t n, const Path* above) {
        const Path here{double(grad_positive[n]), double(grad_negative[n])};
        return above ? Path{above->positive + here.positive, above->negative + here.negative} : here;
      },
      [&](int64_t l, const Path& sum) {
        const T a = advantages[l];
        grad_advantages[l] = T(weight_of(weights, l) * (a > 0 ? sum.positive : a < 0 ? sum.negative : 0));
      });
}

bool bound_subtree_reduce(uintptr_t leaf_values, int dtype, const TreeArrays& tree, int64_t nodes, int64_t leaves,
                          int op, uintptr_t out, uintptr_t /*scratch*/) {
  bool legal = false;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    legal = subtree_reduce(as<const T>(leaf_values), tree_nodes(tree, nodes, leaves), op, as<T>(out));
  });
  return legal;
}

void bound_subtree_reduce_backward(uintptr_t grads, uintptr_t leaf_values, int dtype, const TreeArrays& tree,
                                   int64_t nodes, int64_t leaves, int op, uintptr_t grad_leaves,
                                   uintptr_t /*scratch*/) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    subtree_reduce_backward(as<const T>(grads), as<const T>(leaf_values), tree_nodes(tree, nodes, leaves), op,
                            as<T>(grad_leaves));
  });
}

bool bound_sibling_advantages(uintptr_t values, int dtype, const TreeArrays& tree, int64_t nodes, int64_t leaves,
                              int baseline, bool by_std, double ddof, double eps, bool zero, uintptr_t advantages) {
  bool legal = false;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    legal = sibling_advantages(as<const T>(values), tree_nodes(tree, nodes, leaves),
                               {baseline, by_std, zero, ddof, eps}, as<T>(advantages));
  });
  return legal;
}

void bound_sibling_advantages_backward(uintptr_t grads, uintptr_t values, int dtype, const TreeArrays& tree,
                                       int64_t nodes, int64_t leaves, int baseline, bool by_std, double ddof,
                                       double eps, bool zero, uintptr_t grad_values) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    sibling_advantages_backward(as<const T>(grads), as<const T>(values), tree_nodes(tree, nodes, leaves),
                                {baseline, by_std, zero, ddof, eps}, as<T>(grad_values));
  });
}

int bound_branch_coefficients(uintptr_t advantages, int dtype, uintptr_t weights, const TreeArrays& tree, int64_t nodes,
                              int64_t leaves, const std::array<uintptr_t, 6>& out, uintptr_t /*scratch*/) {
  int bad = 0;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    T* const results[] = {as<T>(out[0]), as<T>(out[1]), as<T>(out[2]), as<T>(out[3]), as<T>(out[4]), as<T>(out[5])};
    bad = branch_coefficients(as<const T>(advantages), as<const T>(weights), tree_nodes(tree, nodes, leaves), results);
  });
  return bad;
}

void bound_branch_coefficients_backward(uintptr_t grad_positive, uintptr_t grad_negative, uintptr_t advantages,
                                        int dtype, uintptr_t weights, const TreeArrays& tree, int64_t nodes,
                                        int64_t leaves, uintptr_t grad_advantages) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    branch_coefficients_backward(as<const T>(grad_positive), as<const T>(grad_negative), as<const T>(advantages),
                                 as<const T>(weights), tree_nodes(tree, nodes, leaves), as<T>(grad_advantages));
  });
}

}  // namespace
}  // namespace tk

void bind_tree(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("subtree_reduce", &tk::bound_subtree_reduce, unlocked());
  m.def("subtree_reduce_backward", &tk::bound_subtree_reduce_backward, unlocked());
  m.def("sibling_advantages", &tk::bound_sibling_advantages, unlocked());
  m.def("sibling_advantages_backward", &tk::bound_sibling_advantages_backward, unlocked());
  m.def("branch_coefficients", &tk::bound_branch_coefficients, unlocked());
  m.def("branch_coefficients_backward", &tk::bound_branch_coefficients_backward, unlocked());
}
