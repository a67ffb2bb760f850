// Reductions over subtrees, siblings and branches on a GPU.
#include "../common/kernels.h"
#include "tree_range.cuh"

namespace tk {
namespace cuda {
namespace {

// What leaf l gives to a reduction.
template <class T>
struct TotalOf {
  using Sum = Total;
  const T* x;
  __device__ Total operator()(const TreeNodes&, int64_t l, int64_t) const { return {double(x[l])}; }
};

// Measured from the tree's first leaf.
template <class T>
struct MomentsOf {
  using Sum = Moments;
  const T* x;
  __device__ Moments operator()(const TreeNodes&, int64_t l, int64_t first) const {
    return {1, double(x[l]) - double(x[first]), 0};
  }
};

template <class T>
struct ExtremeOf {
  using Sum = Extreme;
  const T* x;
  double sign;
  __device__ Extreme operator()(const TreeNodes&, int64_t l, int64_t) const { return {sign * double(x[l]), double(l)}; }
};

template <class T>
struct BranchesOf {
  using Sum = Branches;
  const T *advantages, *weights;
  __device__ Branches operator()(const TreeNodes&, int64_t l, int64_t) const {
    return {branch_leaf(double(advantages[l]), weights == nullptr ? 1 : double(weights[l]))};
  }
};

template <class T>
struct WriteTotal {
  T* out;
  bool mean;
  __device__ void operator()(const TreeNodes& tree, int64_t n, const Total& x) const {
    out[n] = T(mean ? x.sum / double(tree.leaf_count(n)) : x.sum);
  }
};

template <class T>
struct WriteVariance {
  T* out;
  __device__ void operator()(const TreeNodes&, int64_t n, const Moments& x) const { out[n] = T(x.squares / x.count); }
};

template <class T>
struct WriteExtreme {
  T* out;
  double sign;
  __device__ void operator()(const TreeNodes&, int64_t n, const Extreme& x) const { out[n] = T(sign * x.value); }
};

template <class T>
struct WriteBranches {
  T *positive, *negative, *weight, *positive_count, *negative_count, *zero_count;
  __device__ void operator()(const TreeNodes&, int64_t n, const Branches& x) const {
    positive[n] = T(x.positive), negative[n] = T(x.negative), weight[n] = T(x.weight);
    positive_count[n] = T(x.positive_count), negative_count[n] = T(x.negative_count);
    zero_count[n] = T(x.zero_count);
  }
};

struct KeepMean {
  double* mean;
  __device__ void operator()(const TreeNodes&, int64_t n, const Moments& x) const { mean[n] = x.mean; }
};

struct KeepLeaf {
  double* leaf;
  __device__ void operator()(const TreeNodes&, int64_t n, const Extreme& x) const { leaf[n] = x.leaf; }
};

// The node of the leaf at a place of the depth-first order: a thread's own, from which it walks up to the root.
template <class Visit>
__device__ void walk_up(const TreeNodes& tree, int64_t n, Visit visit) {
  for (; n >= 0 && visit(n); n = tree.parent[n]) {
  }
}

// `kept`: of each node the mean (variance) or the extreme leaf. See the CPU's for the shares.
template <class T>
__global__ void reduce_backward_kernel(TreeNodes tree, const T* grads, const T* leaf_values, SubtreeOp op,
                                       const double* kept, T* grad_leaves) {
  const int64_t node = thread_in_grid();
  if (node >= tree.nodes || !tree.is_leaf(node)) return;
  const int32_t place = tree.leaf_begin[node], l = tree.order[place];
  const double x = double(leaf_values[l]) - double(leaf_values[tree.order[tree.tree_begin[place]]]);
  double sum = 0;
  walk_up(tree, node, [&](int64_t n) {
    const double g = double(grads[n]);
    switch (op) {
      case SubtreeOp::sum:
        return sum += g, true;
      case SubtreeOp::mean:
        return sum += g / double(tree.leaf_count(n)), true;
      case SubtreeOp::var:
        return sum += 2 * (g / double(tree.leaf_count(n))) * (x - kept[n]), true;
      case SubtreeOp::max:
      case SubtreeOp::min:
        if (kept[n] != double(l)) return false;
        return sum += g, true;
    }
    __builtin_unreachable();
  });
  grad_leaves[l] = T(sum);
}

template <class T>
__global__ void branch_backward_kernel(TreeNodes tree, const T* grad_positive, const T* grad_negative,
                                       const T* advantages, const T* weights, T* grad_advantages) {
  const int64_t node = thread_in_grid();
  if (node >= tree.nodes || !tree.is_leaf(node)) return;
  const int32_t l = tree.order[tree.leaf_begin[node]];
  const T a = advantages[l];
  const T* grads = a > 0 ? grad_positive : grad_negative;
  double sum = 0;
  if (a > 0 || a < 0) walk_up(tree, node, [&](int64_t n) { return sum += double(grads[n]), true; });
  grad_advantages[l] = T(sum * (weights == nullptr ? 1 : double(weights[l])));
}

// f(child) for the children of p, spread over the warp; the sum of what f returns, in every lane.
template <class F>
__device__ double children_sum(const TreeNodes& tree, int64_t p, F f) {
  double sum = 0;
  for (int64_t c = tree.child_begin[p] + lane(); c < tree.child_begin[p + 1]; c += kWarp) sum += f(tree.child[c]);
  return warp_sum(sum);
}

template <class T>
__device__ SiblingStats sibling_stats(const TreeNodes& tree, const T* values, const SiblingRule& rule, int64_t p) {
  const int64_t count = tree.child_begin[p + 1] - tree.child_begin[p];
  const double origin = double(values[tree.child[tree.child_begin[p]]]);
  const double mean = children_sum(tree, p, [&](int64_t c) { return double(values[c]) - origin; }) / double(count);
  if (!rule.by_std) return {origin, mean, 0, count};
  const double squares = children_sum(tree, p, [&](int64_t c) {
    const double apart = (double(values[c]) - origin) - mean;
    return apart * apart;
  });
  return {origin, mean, squares, count};
}

// A warp a family: the children of node p. A root, no node's child, is written by its own warp.
template <class T>
__global__ void sibling_kernel(TreeNodes tree, const T* values, SiblingRule rule, T* advantages) {
  const int64_t p = warp_in_grid();
  if (p >= tree.nodes) return;
  if (tree.parent[p] < 0 && lane() == 0) advantages[p] = 0;
  if (tree.is_leaf(p)) return;
  const SiblingStats group = sibling_stats(tree, values, rule, p);
  const SiblingMap map = sibling_map(rule, group);
  const double shift = rule.baseline == SiblingBaseline::parent ? double(values[p]) : 0;
  for (int64_t i = tree.child_begin[p] + lane(); i < tree.child_begin[p + 1]; i += kWarp)
    advantages[tree.child[i]] = T(sibling_advantage(map, group, double(values[tree.child[i]]), shift));
}

// The children's gradients, or, in a second launch, what they take from their parent's.
template <class T>
__global__ void sibling_backward_kernel(TreeNodes tree, const T* grads, const T* values, SiblingRule rule,
                                        bool of_parents, T* grad_values) {
  const int64_t p = warp_in_grid();
  if (p >= tree.nodes) return;
  if (!of_parents && tree.parent[p] < 0 && lane() == 0) grad_values[p] = 0;
  if (tree.is_leaf(p)) return;
  const SiblingStats group = sibling_stats(tree, values, rule, p);
  const SiblingMap map = sibling_map(rule, group);
  const double shift = rule.baseline == SiblingBaseline::parent ? double(values[p]) : 0;
  const double sum_g = children_sum(tree, p, [&](int64_t c) { return double(grads[c]); });
  if (of_parents) {
    if (lane() == 0) grad_values[p] = T(double(grad_values[p]) - map.gain * sum_g);
    return;
  }
  const double sum_ga = children_sum(
      tree, p, [&](int64_t c) { return double(grads[c]) * sibling_advantage(map, group, double(values[c]), shift); });
  const SiblingGradient gradient = sibling_gradient(rule, map, group, sum_g, sum_ga);
  for (int64_t i = tree.child_begin[p] + lane(); i < tree.child_begin[p + 1]; i += kWarp) {
    const int32_t c = tree.child[i];
    grad_values[c] = T(value_gradient(gradient, group, double(grads[c]), double(values[c])));
  }
}

}  // namespace
}  // namespace cuda

using namespace cuda;

// Two summaries a leaf, and before them, for the backward, one number a node.
int64_t tree_scratch(int64_t nodes, int64_t leaves) { return nodes + 2 * kLargestSum * leaves; }

template <class T>
bool TreeKernels<T>::subtree_reduce(const T* leaf_values, const TreeNodes& tree, SubtreeOp op, T* out,
                                    const Launch& where) {
  const auto total = [&](bool mean) {
    reduce(tree, TotalOf<T>{leaf_values}, WriteTotal<T>{out, mean}, where.scratch, where.stream);
  };
  const auto extreme = [&](double sign) {
    reduce(tree, ExtremeOf<T>{leaf_values, sign}, WriteExtreme<T>{out, sign}, where.scratch, where.stream);
  };
  switch (op) {
    case SubtreeOp::sum:
      return total(false), true;
    case SubtreeOp::mean:
      return total(true), true;
    case SubtreeOp::max:
      return extreme(1), true;
    case SubtreeOp::min:
      return extreme(-1), true;
    case SubtreeOp::var:
      reduce(tree, MomentsOf<T>{leaf_values}, WriteVariance<T>{out}, where.scratch, where.stream);
      return true;
  }
  __builtin_unreachable();
}

template <class T>
void TreeKernels<T>::subtree_reduce_backward(const T* grads, const T* leaf_values, const TreeNodes& tree, SubtreeOp op,
                                             T* grad_leaves, const Launch& where) {
  double *kept = where.scratch, *sums = kept + tree.nodes;  // of the nodes: means or extreme leaves
  switch (op) {
    case SubtreeOp::sum:
    case SubtreeOp::mean:
      break;
    case SubtreeOp::max:
      reduce(tree, ExtremeOf<T>{leaf_values, 1}, KeepLeaf{kept}, sums, where.stream);
      break;
    case SubtreeOp::min:
      reduce(tree, ExtremeOf<T>{leaf_values, -1}, KeepLeaf{kept}, sums, where.stream);
      break;
    case SubtreeOp::var:
      reduce(tree, MomentsOf<T>{leaf_values}, KeepMean{kept}, sums, where.stream);
      break;
  }
  launch(reduce_backward_kernel<T>, blocks_for(tree.nodes, kThreads), kThreads, 0, where.stream, tree, grads,
         leaf_values, op, kept, grad_leaves);
}

template <class T>
bool TreeKernels<T>::sibling_advantages(const T* values, const TreeNodes& tree, const SiblingRule& rule, T* advantages,
                                        const Launch& where) {
  launch(sibling_kernel<T>, blocks_for(tree.nodes, kWarpsPerBlock), kThreads, 0, where.stream, tree, values, rule,
         advantages);
  return true;
}

template <class T>
void TreeKernels<T>::sibling_advantages_backward(const T* grads, const T* values, const TreeNodes& tree,
                                                 const SiblingRule& rule, T* grad_values, const Launch& where) {
  for (const bool of_parents : {false, true})
    if (!of_parents || rule.baseline == SiblingBaseline::parent)
      launch(sibling_backward_kernel<T>, blocks_for(tree.nodes, kWarpsPerBlock), kThreads, 0, where.stream, tree, grads,
             values, rule, of_parents, grad_values);
}

template <class T>
bool TreeKernels<T>::branch_coefficients(const T* advantages, const T* weights, const TreeNodes& tree,
                                         const BranchRows<T>& out, const Launch& where) {
  const auto [positive, negative, weight, positive_count, negative_count, zero_count] = out;
  reduce(tree, BranchesOf<T>{advantages, weights},
         WriteBranches<T>{positive, negative, weight, positive_count, negative_count, zero_count}, where.scratch,
         where.stream);
  return true;
}

template <class T>
void TreeKernels<T>::branch_coefficients_backward(const T* grad_positive, const T* grad_negative, const T* advantages,
                                                  const T* weights, const TreeNodes& tree, T* grad_advantages,
                                                  const Launch& where) {
  launch(branch_backward_kernel<T>, blocks_for(tree.nodes, kThreads), kThreads, 0, where.stream, tree, grad_positive,
         grad_negative, advantages, weights, grad_advantages);
}

template struct TreeKernels<float>;
template struct TreeKernels<double>;

}  // namespace tk
