// Rows of equal id brought together without an atomic, in two launches: a block a tile of rows sorts the tile's runs by
// a key of the id, then a block a bucket of keys takes its part of every tile, in the tiles' order, and sorts that.
#pragma once
#include "../common/advantage.h"
#include "block.cuh"

namespace tk {
namespace cuda {
namespace {

constexpr int kSortThreads = 256, kTile = 1024;            // rows of a tile, and runs that a block sorts at a time
constexpr int64_t kBucketRows = 256, kMostBuckets = 1024;  // rows worth a bucket; beyond so many they hold more
constexpr int64_t kMostRows = int64_t{1} << 30;            // twice as many still count in 32 bits

// Consecutive rows first:end of one id, all of them counted. Keys are equal where the ids are.
struct alignas(16) Run {
  uint64_t key;
  int32_t first, end;
};

// How many of the sorted runs begin:end have a smaller key, or one that is no larger.
__device__ __forceinline__ int runs_below(const Run* runs, int begin, int end, uint64_t key, bool or_equal) {
  const int from = begin;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    const uint64_t other = runs[middle].key;
    if (other < key || (or_equal && other == key))
      begin = middle + 1;
    else
      end = middle;
  }
  return begin - from;
}

// Where run i goes when neighbours of `width` sorted runs are merged, two and two; of equal keys the left ones first.
__device__ __forceinline__ int merged_place(const Run* runs, int i, int width, int count) {
  const int both = i & ~(2 * width - 1), right = i & width;
  const int other = right != 0 ? both : both + width, end = other + width < count ? other + width : count;
  return both + (i & (width - 1)) + runs_below(runs, other, end, runs[i].key, right != 0);
}

// Sorts runs of shared memory, kTile of them at most.
__device__ __forceinline__ void sort_tile(Run* runs, int count) {
  constexpr int kMine = kTile / kSortThreads;
  Run mine[kMine];
  int place[kMine];
  for (int width = 1; width < count; width *= 2) {
#pragma unroll
    for (int k = 0; k < kMine; ++k) {
      const int i = int(threadIdx.x) + k * kSortThreads;
      if (i < count) mine[k] = runs[i], place[k] = merged_place(runs, i, width, count);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kMine; ++k)
      if (int(threadIdx.x) + k * kSortThreads < count) runs[place[k]] = mine[k];
    __syncthreads();
  }
}

// Sorts any number of runs of global memory; they end in one of the two places, which is returned.
__device__ inline Run* sort_runs(Run* runs, Run* spare, int count, Run* tile) {
  for (int begin = 0; begin < count; begin += kTile) {
    const int size = count - begin < kTile ? count - begin : kTile;
    for (int i = int(threadIdx.x); i < size; i += kSortThreads) tile[i] = runs[begin + i];
    __syncthreads();
    sort_tile(tile, size);
    for (int i = int(threadIdx.x); i < size; i += kSortThreads) runs[begin + i] = tile[i];
    __syncthreads();
  }
  for (int width = kTile; width < count; width *= 2) {
    for (int i = int(threadIdx.x); i < count; i += kSortThreads) spare[merged_place(runs, i, width, count)] = runs[i];
    __syncthreads();
    Run* const merged = spare;
    spare = runs, runs = merged;
  }
  return runs;
}

__device__ __forceinline__ bool in_order(const Run* runs, int count, int* scratch) {
  int falls = 0;
  for (int i = 1 + int(threadIdx.x); i < count; i += kSortThreads) falls += runs[i].key < runs[i - 1].key;
  return block_sum(falls, scratch) == 0;
}

struct TileShared {
  Run runs[kTile];
  int scratch[kSortThreads / kWarp];
};

// The runs of each tile of rows, sorted, and their number; a row that is not counted gets its 0. Ids that stand in
// runs cost by the run, and not by the row, from here on.
template <class T>
__global__ void tile_kernel(GroupRows<T> in, T* out, Run* tiles, int32_t* counts) {
  constexpr int kMine = kTile / kSortThreads;
  TileShared& shared = *reinterpret_cast<TileShared*>(tk_shared_memory);
  const int64_t begin = int64_t(blockIdx.x) * kTile, end = begin + kTile < in.n ? begin + kTile : in.n;
  const auto joined = [&](int64_t row) {  // to the row before it
    return row > begin && row < end && in.ids[row - 1] == in.ids[row] && in.counted(row - 1) && in.counted(row);
  };
  const int64_t mine = begin + int(threadIdx.x) * kMine;
  int heads = 0;
  for (int64_t row = mine; row < mine + kMine && row < end; ++row) {
    if (in.counted(row))
      heads += !joined(row);
    else
      out[row] = 0;
  }
  const Prefix found = block_prefix(heads, shared.scratch);
  int next = found.before;
  for (int64_t row = mine; row < mine + kMine && row < end; ++row) {
    if (!in.counted(row)) continue;
    if (!joined(row)) {
      shared.runs[next].key = mixed(uint64_t(in.ids[row]));
      shared.runs[next].first = int32_t(row);
      ++next;
    }
    if (!joined(row + 1)) shared.runs[next - 1].end = int32_t(row + 1);
  }
  __syncthreads();
  sort_tile(shared.runs, found.all);
  for (int i = int(threadIdx.x); i < found.all; i += kSortThreads) tiles[begin + i] = shared.runs[i];
  if (threadIdx.x == 0) counts[blockIdx.x] = found.all;
}

// What the first launch leaves, and room for the buckets.
struct Tiles {
  Run* runs;                // [count, kTile]
  int32_t* counts;          // [count]
  int count, bits;          // 2^bits buckets
  Run *gathered, *spare;    // [n]
  int32_t *ranks, *groups;  // [n + buckets]

  __device__ uint64_t first_key(unsigned bucket) const { return bucket == 0 ? 0 : uint64_t(bucket) << (64 - bits); }
};

struct Range {
  int begin, end;
};

// Of tile t, if there is one, the runs that belong to this block's bucket.
__device__ __forceinline__ Range bucket_in_tile(const Tiles& tiles, int t) {
  if (t >= tiles.count) return {0, 0};
  const Run* runs = tiles.runs + int64_t(t) * kTile;
  const int count = tiles.counts[t];
  const int begin = runs_below(runs, 0, count, tiles.first_key(blockIdx.x), false);
  if (blockIdx.x + 1 == gridDim.x) return {begin, count};
  return {begin, begin + runs_below(runs, begin, count, tiles.first_key(blockIdx.x + 1), false)};
}

struct BucketShared {
  Run runs[kTile];
  int begins[kSortThreads], places[kSortThreads];
  int scratch[kSortThreads / kWarp];
  double sums[kSortThreads / kWarp];
};

// This block's bucket, in the order of its rows where the tiles are in theirs.
__device__ __forceinline__ void gather(const Tiles& tiles, BucketShared& shared, Run* out) {
  const int me = int(threadIdx.x);
  for (int base = 0; base < tiles.count; base += kSortThreads) {
    const Range part = bucket_in_tile(tiles, base + me);
    const Prefix sizes = block_prefix(part.end - part.begin, shared.scratch);
    shared.begins[me] = part.begin, shared.places[me] = sizes.before;
    __syncthreads();
    for (int i = me; i < sizes.all; i += kSortThreads) {
      int t = 0;  // the last tile that begins no later
      for (int step = kSortThreads / 2; step > 0; step /= 2)
        if (shared.places[t + step] <= i) t += step;
      out[i] = tiles.runs[int64_t(base + t) * kTile + shared.begins[t] + i - shared.places[t]];
    }
    out += sizes.all;
    __syncthreads();
  }
}

}  // namespace
}  // namespace cuda
}  // namespace tk
