// Sums over the leaves below every node. They are a range of the depth-first order; summaries of 32 and of 1,024
// leaves, counted from where their tree begins, bound what a node reads. So a node's sum has an order that is its
// tree's own, and the number of launches does not grow with the depth.
#pragma once
#include <algorithm>

#include "../common/tree.h"
#include "block.cuh"

namespace tk {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarpsPerBlock = kThreads / kWarp;
constexpr int kNodesPerWarp = 4, kFewLeaves = 8;
constexpr int64_t kSegment = 32, kStretch = 1024;  // leaves in a summary

inline int64_t blocks_for(int64_t n, int64_t per_block) { return (n + per_block - 1) / per_block; }
__device__ __forceinline__ int64_t thread_in_grid() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ __forceinline__ double lower(double x, int offset) {
  return __shfl_down_sync(kAllLanes, x, unsigned(offset));
}

struct Total {
  double sum;
  __device__ static Total none() { return {0}; }
  __device__ void add(const Total& x) { sum += x.sum; }
  __device__ Total from(int offset) const { return {lower(sum, offset)}; }
};

struct Moments {
  double count, mean, squares;
  __device__ static Moments none() { return {0, 0, 0}; }
  __device__ void add(const Moments& x) {
    if (x.count == 0) return;
    const double all = count + x.count, apart = x.mean - mean;
    mean = count == 0 ? x.mean : mean + apart * (x.count / all);
    squares += x.squares + (count == 0 ? 0 : apart * apart * (count * x.count / all));
    count = all;
  }
  __device__ Moments from(int offset) const {
    return {lower(count, offset), lower(mean, offset), lower(squares, offset)};
  }
};

struct Extreme {
  double value, leaf;  // the greatest; of equal ones the first leaf; leaf -1: none yet
  __device__ static Extreme none() { return {0, -1}; }
  __device__ void add(const Extreme& x) {
    if (x.leaf >= 0 && (leaf < 0 || x.value > value || (x.value == value && x.leaf < leaf))) *this = x;
  }
  __device__ Extreme from(int offset) const { return {lower(value, offset), lower(leaf, offset)}; }
};

struct Branches : BranchSums {
  __device__ static Branches none() { return {{0, 0, 0, 0, 0, 0}}; }
  __device__ Branches from(int offset) const {
    return {{lower(positive, offset), lower(negative, offset), lower(weight, offset), lower(positive_count, offset),
             lower(negative_count, offset), lower(zero_count, offset)}};
  }
};

// Doubles in any of them.
constexpr int64_t kLargestSum =
    std::max({sizeof(Total), sizeof(Moments), sizeof(Extreme), sizeof(Branches)}) / sizeof(double);

template <class Of>
__device__ typename Of::Sum leaf_at(const TreeNodes& tree, const Of& of, int64_t place) {
  return of(tree, tree.order[place], tree.order[tree.tree_begin[place]]);
}

// The 32 parts (leaves, or the summaries `below`) of each full stretch of `size` leaves, into above[where it begins].
template <class Of>
__global__ void summarise(TreeNodes tree, Of of, int64_t size, const typename Of::Sum* below, typename Of::Sum* above) {
  const int64_t begin = thread_in_grid();
  if (begin + size > tree.leaves) return;
  const int32_t first = tree.tree_begin[begin];
  if ((begin - first) % size != 0 || tree.tree_begin[begin + size - 1] != first) return;
  typename Of::Sum sum = Of::Sum::none();
#pragma unroll 8
  for (int k = 0; k < kWarp; ++k) {
    const int64_t at = begin + k * (size / kWarp);
    sum.add(below == nullptr ? leaf_at(tree, of, at) : below[at]);
  }
  above[begin] = sum;
}

// The sum of the leaves begin:end, which belong to one tree, in lane 0 of the warp.
template <class Of>
__device__ typename Of::Sum warp_range(const TreeNodes& tree, const Of& of, const typename Of::Sum* segments,
                                       const typename Of::Sum* stretches, int64_t begin, int64_t end) {
  typename Of::Sum sum = Of::Sum::none();
  const int64_t first = tree.tree_begin[begin];
  const auto up = [&](int64_t at, int64_t size) { return first + (at - first + size - 1) / size * size; };
  const auto down = [&](int64_t at, int64_t size) { return first + (at - first) / size * size; };
  const auto each = [&](int64_t from, int64_t to, int64_t size, const typename Of::Sum* summaries) {
    for (int64_t at = from + lane() * size; at < to; at += kWarp * size)
      sum.add(summaries == nullptr ? leaf_at(tree, of, at) : summaries[at]);
  };
  const auto parts = [&](int64_t from, int64_t to) {  // whole segments
    const int64_t head = up(from, kStretch), tail = down(to, kStretch);
    if (head >= tail) return each(from, to, kSegment, segments);
    each(from, head, kSegment, segments), each(head, tail, kStretch, stretches), each(tail, to, kSegment, segments);
  };
  const int64_t head = up(begin, kSegment), tail = down(end, kSegment);
  if (head >= tail)
    each(begin, end, 1, nullptr);
  else
    each(begin, head, 1, nullptr), parts(head, tail), each(tail, end, 1, nullptr);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum.add(sum.from(offset));
  return sum;
}

template <class Of, class Write>
__global__ void reduce_nodes(TreeNodes tree, Of of, const typename Of::Sum* segments, const typename Of::Sum* stretches,
                             Write write) {
  const int64_t base = warp_in_grid() * kNodesPerWarp, mine = base + lane();
  if (lane() < kNodesPerWarp && mine < tree.nodes && tree.leaf_count(mine) <= kFewLeaves) {
    typename Of::Sum sum = Of::Sum::none();
    for (int64_t at = tree.leaf_begin[mine]; at < tree.leaf_end[mine]; ++at) sum.add(leaf_at(tree, of, at));
    write(tree, mine, sum);
  }
  for (int64_t n = base; n < base + kNodesPerWarp && n < tree.nodes; ++n) {
    if (tree.leaf_count(n) <= kFewLeaves) continue;
    const auto sum = warp_range(tree, of, segments, stretches, tree.leaf_begin[n], tree.leaf_end[n]);
    if (lane() == 0) write(tree, n, sum);
  }
}

// Three launches. `scratch`: two summaries a leaf.
template <class Of, class Write>
void reduce(const TreeNodes& tree, const Of& of, const Write& write, double* scratch, void* stream) {
  using Sum = typename Of::Sum;
  static_assert(sizeof(Sum) <= kLargestSum * sizeof(double), "tree_scratch would be too small");
  Sum *segments = reinterpret_cast<Sum*>(scratch), *stretches = segments + tree.leaves;
  const int64_t blocks = blocks_for(tree.leaves, kThreads);
  launch(summarise<Of>, tree.leaves < kSegment ? 0 : blocks, kThreads, 0, stream, tree, of, kSegment,
         static_cast<const Sum*>(nullptr), segments);
  launch(summarise<Of>, tree.leaves < kStretch ? 0 : blocks, kThreads, 0, stream, tree, of, kStretch, segments,
         stretches);
  launch(reduce_nodes<Of, Write>, blocks_for(tree.nodes, kWarpsPerBlock * kNodesPerWarp), kThreads, 0, stream, tree, of,
         segments, stretches, write);
}

}  // namespace
}  // namespace cuda
}  // namespace tk
