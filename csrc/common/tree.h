// The maths of the tree family, once for the CPU and the CUDA kernels. Statistics are float64 throughout.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

#include "choice.h"
#include "hostdevice.h"

namespace tk {

// The nodes of a forest; a parent's index is below its children's, and a root's parent is -1. The children of node p
// are child[child_begin[p]:child_begin[p+1]], ascending. In depth-first order, the leaves below a node are a range:
// leaf number order[i] for i in leaf_begin[n]:leaf_end[n]; those of its whole tree begin at tree_begin[i].
// Leaves are numbered in the order of their nodes.
struct TreeNodes {
  const int32_t *parent, *child_begin, *child, *leaf_begin, *leaf_end, *order, *tree_begin;
  int64_t nodes, leaves;

  TK_HD int64_t leaf_count(int64_t n) const { return leaf_end[n] - leaf_begin[n]; }
  TK_HD bool is_leaf(int64_t n) const { return child_begin[n] == child_begin[n + 1]; }
};

enum class SubtreeOp : int { sum, mean, max, min, var };
enum class SiblingBaseline : int { mean, leave_one_out, parent, none };
constexpr int members(SubtreeOp) { return 5; }
constexpr int members(SiblingBaseline) { return 4; }

struct SiblingRule {
  SiblingBaseline baseline;
  bool by_std, zero_singleton;
  double ddof, eps;

  // Whether it subtracts a mean of siblings.
  TK_HD bool centred() const {
    switch (baseline) {
      case SiblingBaseline::mean:
      case SiblingBaseline::leave_one_out:
        return true;
      case SiblingBaseline::parent:
      case SiblingBaseline::none:
        return false;
    }
    __builtin_unreachable();
  }
  // The mean of the others is (k mean - d) / (k - 1), so d less it is (d - mean) k / (k - 1).
  TK_HD double gain(double inverse, double count) const {
    switch (baseline) {
      case SiblingBaseline::leave_one_out:
        return inverse * count / (count - 1);
      case SiblingBaseline::mean:
      case SiblingBaseline::parent:
      case SiblingBaseline::none:
        return inverse;
    }
    __builtin_unreachable();
  }
};

// Of k siblings, measured from the first one's value: their mean, and the sum of squares about it.
struct SiblingStats {
  double origin, mean, squares;
  int64_t count;

  // In two steps: a rounding of origin + mean would be one of the value, however small the spread.
  TK_HD double centre(double value) const { return (value - origin) - mean; }
};

// advantage = gain * (centred by the siblings' mean, or the value less `shift`); inverse is 1 / (std + eps).
struct SiblingMap {
  double gain, inverse, std;
  bool by_mean;
};

TK_HD SiblingMap sibling_map(const SiblingRule& rule, const SiblingStats& group) {
  if (group.count == 1) {
    const double inverse = rule.by_std ? 1 / (1 + rule.eps) : 1;
    return {rule.centred() && rule.zero_singleton ? 0 : inverse, inverse, 0, false};
  }
  const double overflown = group.squares - group.squares;  // NaN then, else 0
  const double count = double(group.count);
  const double std = rule.by_std ? sqrt(group.squares / (count - rule.ddof)) + overflown : 0;
  const double divisor = rule.by_std ? std + rule.eps : 1, inverse = divisor == 0 ? 1 : 1 / divisor;
  return {rule.gain(inverse, count), inverse, std, rule.centred()};
}

TK_HD double sibling_advantage(const SiblingMap& map, const SiblingStats& group, double value, double shift) {
  return map.gain == 0 ? 0 : map.gain * (map.by_mean ? group.centre(value) : value - shift);
}

// grad_v = gain * (g - offset) - slope * centre(v). With G = sum g: the mean's part is G / k, and the standard
// deviation's (sum g advantage) * inverse * d std / d v, where d std / d v = centre(v) / ((k - ddof) std), 0 at std 0.
struct SiblingGradient {
  double gain, offset, slope;
};

TK_HD SiblingGradient sibling_gradient(const SiblingRule& rule, const SiblingMap& map, const SiblingStats& group,
                                       double sum_g, double sum_ga) {
  const double count = double(group.count);
  return {map.gain, map.by_mean ? sum_g / count : 0,
          map.std > 0 ? sum_ga * map.inverse / ((count - rule.ddof) * map.std) : 0};
}

TK_HD double value_gradient(const SiblingGradient& map, const SiblingStats& group, double grad, double value) {
  return map.gain * (grad - map.offset) - map.slope * group.centre(value);
}

// What a leaf, or the leaves below a node, give to a branch. A leaf of weight 0 counts nowhere.
struct BranchSums {
  double positive, negative, weight, positive_count, negative_count, zero_count;

  TK_HD void add(const BranchSums& x) {
    positive += x.positive, negative += x.negative, weight += x.weight;
    positive_count += x.positive_count, negative_count += x.negative_count, zero_count += x.zero_count;
  }
};

// Where they go, in the order of the members.
constexpr int kBranchRows = 6;
template <class T>
using BranchRows = std::array<T*, kBranchRows>;

TK_HD BranchSums branch_leaf(double advantage, double weight) {
  const bool up = advantage > 0 && weight != 0, down = advantage < 0 && weight != 0;
  const bool neither = weight != 0 && !up && !down;
  return {
      up ? weight * advantage : 0, down ? weight * advantage : 0, weight, double(up), double(down), double(neither)};
}

}  // namespace tk
