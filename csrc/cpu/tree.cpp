// Reductions over subtrees, siblings and branches on the CPU.
#include <algorithm>

#include "../common/kernels.h"
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
  return rule.baseline == SiblingBaseline::parent ? double(values[p]) : 0;
}

template <class T>
double weight_of(const T* weights, int64_t l) {
  return weights == nullptr ? 1 : double(weights[l]);
}

// `of(n, sum)`: node n's result.
template <class T, class Of>
void reduce_sums(const T* leaf_values, const TreeNodes& tree, T* out, const Of& of) {
  const auto sums = unwritten<double>(tree.nodes);
  subtree_sums(leaf_values, tree, sums.get(), out, of);
}

template <class T>
void reduce_extremes(const T* leaf_values, const TreeNodes& tree, bool greatest, T* out) {
  const auto best = unwritten<int32_t>(tree.nodes);
  subtree_extremes(leaf_values, tree, greatest, best.get());
  each_node(tree, [&](int64_t n) { out[n] = leaf_values[best[n]]; });
}

template <class T>
void reduce_variances(const T* leaf_values, const TreeNodes& tree, T* out) {
  const auto moments = unwritten<Moments>(tree.nodes);
  subtree_moments(leaf_values, tree, moments.get());
  each_node(tree, [&](int64_t n) { out[n] = T(moments[n].squares / double(tree.leaf_count(n))); });
}

// A leaf's gradient is the sum along its path of each node's share for that leaf. A sum's is g and a mean's g / count:
// share(n).
template <class T, class Share>
void share_sums(const TreeNodes& tree, T* grad_leaves, const Share& share) {
  downwards<double>(
      tree, [&](int64_t n, const double* above) { return (above ? *above : 0) + share(n); },
      [&](int64_t l, double sum) { grad_leaves[l] = T(sum); });
}

// g where the leaf is the extreme one: those nodes are the lower end of its path.
template <class T>
void share_extremes(const T* grads, const T* leaf_values, const TreeNodes& tree, bool greatest, T* grad_leaves) {
  const auto best = unwritten<int32_t>(tree.nodes);
  subtree_extremes(leaf_values, tree, greatest, best.get());
  downwards<double>(
      tree,
      [&](int64_t n, const double* above) {
        return double(grads[n]) + (above && best[n] == best[tree.parent[n]] ? *above : 0);
      },
      [&](int64_t l, double sum) { grad_leaves[l] = T(sum); });
}

// 2 g / count times the leaf's distance from the node's mean.
template <class T>
void share_variances(const T* grads, const T* leaf_values, const TreeNodes& tree, T* grad_leaves) {
  struct Slope {
    double sum, at;  // sum of s over the path, and of s (mean here - mean there), with s = 2 g / count
  };
  const auto moments = unwritten<Moments>(tree.nodes);
  subtree_moments(leaf_values, tree, moments.get());
  downwards<Slope>(
      tree,
      [&](int64_t n, const Slope* above) {
        const double s = 2 * double(grads[n]) / double(tree.leaf_count(n));
        if (!above) return Slope{s, 0};
        return Slope{above->sum + s, above->at + above->sum * (moments[n].mean - moments[tree.parent[n]].mean)};
      },
      [&](int64_t l, const Slope& slope) { grad_leaves[l] = T(slope.at); });
}

}  // namespace

template <class T>
bool TreeKernels<T>::subtree_reduce(const T* leaf_values, const TreeNodes& tree, SubtreeOp op, T* out, const Launch&) {
  if (!all_squarable(leaf_values, tree.leaves)) return false;
  switch (op) {
    case SubtreeOp::sum:
      return reduce_sums(leaf_values, tree, out, [](int64_t, double sum) { return sum; }), true;
    case SubtreeOp::mean:
      reduce_sums(leaf_values, tree, out, [&](int64_t n, double sum) { return sum / double(tree.leaf_count(n)); });
      return true;
    case SubtreeOp::max:
      return reduce_extremes(leaf_values, tree, true, out), true;
    case SubtreeOp::min:
      return reduce_extremes(leaf_values, tree, false, out), true;
    case SubtreeOp::var:
      return reduce_variances(leaf_values, tree, out), true;
  }
  __builtin_unreachable();
}

template <class T>
void TreeKernels<T>::subtree_reduce_backward(const T* grads, const T* leaf_values, const TreeNodes& tree, SubtreeOp op,
                                             T* grad_leaves, const Launch&) {
  switch (op) {
    case SubtreeOp::sum:
      return share_sums(tree, grad_leaves, [&](int64_t n) { return double(grads[n]); });
    case SubtreeOp::mean:
      return share_sums(tree, grad_leaves, [&](int64_t n) { return double(grads[n]) / double(tree.leaf_count(n)); });
    case SubtreeOp::max:
      return share_extremes(grads, leaf_values, tree, true, grad_leaves);
    case SubtreeOp::min:
      return share_extremes(grads, leaf_values, tree, false, grad_leaves);
    case SubtreeOp::var:
      return share_variances(grads, leaf_values, tree, grad_leaves);
  }
}

template <class T>
bool TreeKernels<T>::sibling_advantages(const T* values, const TreeNodes& tree, const SiblingRule& rule, T* advantages,
                                        const Launch&) {
  if (!all_squarable(values, tree.nodes)) return false;
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
void TreeKernels<T>::sibling_advantages_backward(const T* grads, const T* values, const TreeNodes& tree,
                                                 const SiblingRule& rule, T* grad_values, const Launch&) {
  const bool by_parent = rule.baseline == SiblingBaseline::parent;
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
bool TreeKernels<T>::branch_coefficients(const T* advantages, const T* weights, const TreeNodes& tree,
                                         const BranchRows<T>& out, const Launch&) {
  for (int64_t l = 0; l < tree.leaves; ++l) {
    const T weight = weights == nullptr ? T(1) : weights[l];
    if (!(weight >= 0) || !(weight - weight == 0)) return false;
    if (weight != 0 && !(advantages[l] - advantages[l] == 0)) return false;
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
  return true;
}

template <class T>
void TreeKernels<T>::branch_coefficients_backward(const T* grad_positive, const T* grad_negative, const T* advantages,
                                                  const T* weights, const TreeNodes& tree, T* grad_advantages,
                                                  const Launch&) {
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

int64_t tree_scratch(int64_t, int64_t) { return 0; }

template struct TreeKernels<float>;
template struct TreeKernels<double>;

}  // namespace tk
