// Passes over a tree's nodes on the CPU: up from the leaves, and down from the roots. One pass each, in an order that
// is the tree's own: no depth costs more, and no other tree or thread changes a bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "../common/tree.h"
#include "huge_pages.h"

namespace tk {

template <class T>
std::unique_ptr<T[]> unwritten(int64_t n) {
  std::unique_ptr<T[]> made(new T[n]);
  prefer_huge_pages(made.get(), n * int64_t(sizeof(T)));
  return made;
}

template <class T>
inline bool all_squarable(const T* x, int64_t n) {
  int bad = 0;  // no early exit, so that it vectorises
  for (int64_t i = 0; i < n; ++i) bad |= !(std::abs(x[i]) <= kLargest<T>);
  return !bad;
}

// A node, and the number of the first leaf from it on.
struct Cut {
  int64_t node, leaf;
};

// The first root from `node` on before which all of the earlier trees' nodes lie, or the end. Their leaves are the
// first of the depth-first order, so they all lie before it where as many leaves do, and the nodes above them with
// them.
inline Cut next_cut(const TreeNodes& tree, int64_t node) {
  int64_t leaf = node;
  for (int64_t n = node; n < tree.nodes; ++n) {
    if (tree.parent[n] >= 0) continue;
    for (leaf = std::max(leaf, n); !tree.is_leaf(leaf);) ++leaf;
    const int32_t before = tree.order[tree.leaf_begin[leaf]];
    if (before == tree.leaf_begin[n]) return {n, before};
  }
  return {tree.nodes, tree.leaves};
}

// f(begin, end) on ranges that cut no tree, in parallel where there are some.
template <class F>
inline void each_part(const TreeNodes& tree, const F& f) {
  constexpr int64_t kNodes = 8192;  // worth a thread
  parallel_for(tree.nodes, kNodes, [&](int64_t begin, int64_t end) {
    const Cut first = begin == 0 ? Cut{0, 0} : next_cut(tree, begin), last = next_cut(tree, end);
    if (first.node < last.node) f(first, last);
  });
}

// Bottom up: leaves(n, l, count) for so many leaves from number l at node n on, inner(n, begin, end) once its children
// child[begin:end] are done.
template <class Leaves, class Inner>
inline void upwards(const TreeNodes& tree, const Leaves& leaves, const Inner& inner) {
  each_part(tree, [&](const Cut& first, const Cut& last) {
    int64_t l = last.leaf, n = last.node;
    while (n > first.node) {
      const int32_t end = tree.child_begin[n];
      int64_t run = 0;
      while (n > first.node && tree.child_begin[n - 1] == end) --n, ++run;
      if (run) leaves(n, l -= run, run);
      if (n == first.node) break;
      --n;
      inner(n, tree.child + tree.child_begin[n], tree.child + end);
    }
  });
}

// Children that follow each other in memory, the usual case, need no indices; the sum's order is the same.
template <class F>
inline double sum_children(const int32_t* begin, const int32_t* end, const F& value) {
  const int64_t first = *begin, count = end - begin;
  double sum = 0;
  if (end[-1] - first == count - 1) {
    for (int64_t c = first; c < first + count; ++c) sum += value(c);
  } else {
    for (const int32_t* c = begin; c < end; ++c) sum += value(*c);
  }
  return sum;
}

// `sums` are kept in double; out[n] = of(n, sum), a leaf's being its value.
template <class T, class Of>
void subtree_sums(const T* leaf_values, const TreeNodes& tree, double* sums, T* out, const Of& of) {
  upwards(
      tree,
      [&](int64_t n, int64_t l, int64_t count) {
        for (int64_t i = 0; i < count; ++i) sums[n + i] = double(leaf_values[l + i]);
        std::copy_n(leaf_values + l, count, out + n);
      },
      [&](int64_t n, const int32_t* begin, const int32_t* end) {
        out[n] = T(of(n, sums[n] = sum_children(begin, end, [&](int64_t c) { return sums[c]; })));
      });
}

struct Moments {
  double mean, squares;  // the mean of the leaves below, less the tree's first leaf, and the sum of squares about it
};

// Means measured from the first child's, so that equal leaves have a variance of exactly 0.
template <class T>
void subtree_moments(const T* leaf_values, const TreeNodes& tree, Moments* found) {
  const auto first = [&](int64_t n) { return double(leaf_values[tree.order[tree.tree_begin[tree.leaf_begin[n]]]]); };
  upwards(
      tree,
      [&](int64_t n, int64_t l, int64_t count) {
        for (int64_t i = 0; i < count; ++i) found[n + i] = {double(leaf_values[l + i]) - first(n + i), 0};
      },
      [&](int64_t n, const int32_t* begin, const int32_t* end) {
        const double origin = found[*begin].mean;
        const double sum =
            sum_children(begin, end, [&](int64_t c) { return double(tree.leaf_count(c)) * (found[c].mean - origin); });
        const double mean = sum / double(tree.leaf_count(n));
        const double squares = sum_children(begin, end, [&](int64_t c) {
          const double apart = (found[c].mean - origin) - mean;
          return found[c].squares + double(tree.leaf_count(c)) * (apart * apart);
        });
        found[n] = {origin + mean, squares};
      });
}

// The leaf of the greatest or the least value below each node; of equal ones the first.
template <class T>
void subtree_extremes(const T* leaf_values, const TreeNodes& tree, bool greatest, int32_t* found) {
  upwards(
      tree,
      [&](int64_t n, int64_t l, int64_t count) {
        for (int64_t i = 0; i < count; ++i) found[n + i] = int32_t(l + i);
      },
      [&](int64_t n, const int32_t* begin, const int32_t* end) {
        int32_t best = found[*begin];
        for (const int32_t* c = begin + 1; c < end; ++c) {
          const int32_t other = found[*c];
          const T a = leaf_values[other], b = leaf_values[best];
          if ((greatest ? a > b : a < b) || (a == b && other < best)) best = other;
        }
        found[n] = best;
      });
}

template <class F>
inline void each_node(const TreeNodes& tree, const F& f) {
  constexpr int64_t kNodes = 32768;
  parallel_for(tree.nodes, kNodes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

// Top down: step(n, above) is what n hands on, `above` its parent's; leaf(l, it) what leaf l ends with.
template <class S, class Step, class Leaf>
inline void downwards(const TreeNodes& tree, const Step& step, const Leaf& leaf) {
  const auto found = unwritten<S>(tree.nodes);
  each_part(tree, [&](const Cut& first, const Cut& last) {
    int64_t l = first.leaf;
    for (int64_t n = first.node; n < last.node; ++n) {
      const int32_t p = tree.parent[n];
      found[n] = step(n, p < 0 ? nullptr : &found[p]);
      if (tree.is_leaf(n)) leaf(l++, found[n]);
    }
  });
}

}  // namespace tk
