// The kernels that the CPU and the GPU both have, for float and for double: csrc/cpu/<family>.cpp and
// csrc/cuda/<family>.cu implement them, and csrc/bind/<family>.cpp hands them to Python, in either module.
//
// What tells of a bad value never does so of a GPU's, which nobody reads.
#pragma once
#include <array>
#include <cstdint>

#include "advantage.h"
#include "span.h"
#include "tree.h"

namespace tk {

// Where a CUDA kernel runs, asynchronously, and what it keeps between its launches, in as many doubles as
// <family>_scratch says. Empty on the CPU.
struct Launch {
  double* scratch;
  int64_t doubles;
  void* stream;
};

template <class T>
struct AdvantageKernels {
  // False where a reward or a weight is illegal: nothing is written then.
  static bool group_advantages(const GroupRows<T>& in, const GroupRule& rule, T* advantages, const Launch& where);
  static void group_advantages_backward(const GroupRows<T>& in, const GroupRule& rule, const T* grads, T* grad_rewards,
                                        const Launch& where);

  // The first boundary that is out of order, or -1; nothing is written then. values and bootstrap may be null, and so
  // may their gradients.
  static int64_t gae(const T* rewards, const T* values, const Trajectories& in, const T* bootstrap, double gamma,
                     double lam, T* advantages, const Launch& where);
  static int64_t gae_backward(const T* grads, const Trajectories& in, double gamma, double lam, T* grad_rewards,
                              T* grad_values, T* grad_bootstrap, const Launch& where);

  // stats: the mean, and 1 / sqrt(var + eps).
  static void whiten(const Masked<T>& in, bool shift_mean, double ddof, double eps, T* out, double* stats,
                     const Launch& where);
  static void whiten_backward(const T* grads, const Masked<T>& in, const double* stats, bool shift_mean, double ddof,
                              T* grad_x, const Launch& where);
};
int64_t group_scratch(int64_t n);
int64_t whiten_scratch(int64_t n);

template <class T>
struct SpanKernels {
  static void span_reduce(const T* x, const SpanRanges& spans, SpanOp op, T* out, const Launch& where);
  // Of a reduction whose gradient reads x: one that is spread is refused. `grad_x` is zero everywhere before;
  // `reduced`: the forward's results.
  static void span_reduce_backward(const T* grads, const T* x, const T* reduced, const SpanRanges& spans, SpanOp op,
                                   T* grad_x, const Launch& where);
  static void spread(const T* values, const SpanRanges& spans, T* out, const Launch& where);
};

template <class T>
struct TreeKernels {
  // False where a value is not finite: nothing is written then.
  static bool subtree_reduce(const T* leaf_values, const TreeNodes& tree, SubtreeOp op, T* out, const Launch& where);
  static void subtree_reduce_backward(const T* grads, const T* leaf_values, const TreeNodes& tree, SubtreeOp op,
                                      T* grad_leaves, const Launch& where);
  static bool sibling_advantages(const T* values, const TreeNodes& tree, const SiblingRule& rule, T* advantages,
                                 const Launch& where);
  static void sibling_advantages_backward(const T* grads, const T* values, const TreeNodes& tree,
                                          const SiblingRule& rule, T* grad_values, const Launch& where);
  // False where an advantage or a weight is illegal: nothing is written then. weights may be null.
  static bool branch_coefficients(const T* advantages, const T* weights, const TreeNodes& tree,
                                  const BranchRows<T>& out, const Launch& where);
  static void branch_coefficients_backward(const T* grad_positive, const T* grad_negative, const T* advantages,
                                           const T* weights, const TreeNodes& tree, T* grad_advantages,
                                           const Launch& where);
};
int64_t tree_scratch(int64_t nodes, int64_t leaves);

}  // namespace tk
