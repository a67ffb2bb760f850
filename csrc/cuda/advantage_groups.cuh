// Group-relative advantages on a GPU: the groups of each bucket, one by one, by as many threads as their rows ask for.
#pragma once
#include "advantage_runs.cuh"

namespace tk {
namespace cuda {
namespace {

constexpr int kOctet = 8, kOctetRows = 64;  // lanes that share a small group, and how many rows make one

// The threads that share a group: their number depends on the group's size alone, and so does the order of its sums.
struct Octet {
  static constexpr int kThreads = kOctet;
  __device__ int rank() const { return lane() % kOctet; }
  __device__ double sum(double x) const {
    for (int offset = kOctet / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
  }
};
struct WholeBlock {
  static constexpr int kThreads = kSortThreads;
  double* scratch;
  __device__ int rank() const { return int(threadIdx.x); }
  __device__ double sum(double x) const { return block_sum(x, scratch); }
};

// A bucket's runs, sorted. ranks: how many of the bucket's rows lie before each; groups: each one's first run.
struct Bucket {
  const Run* runs;
  const int32_t *ranks, *groups;

  __device__ int rows(int g) const { return ranks[groups[g + 1]] - ranks[groups[g]]; }
};

// The rows of a group in pack order, which threads of the team take by turns; a group that is not there has none.
template <class Team>
class Members {
 public:
  __device__ __forceinline__ Members(const Team& team, const Bucket& bucket, int g, bool there)
      : team_(team), bucket_(bucket) {
    if (there) begin_ = bucket.groups[g], end_ = bucket.groups[g + 1], rows_ = bucket.rows(g);
  }

  template <class F>
  __device__ __forceinline__ void each(F visit) const {
    for (int r = team_.rank(); r < rows_; r += Team::kThreads) visit(row(r));
  }
  __device__ double sum(double x) const { return team_.sum(x); }
  __device__ bool none() const { return rows_ == 0; }

  __device__ __forceinline__ int64_t row(int r) const {
    const int wanted = bucket_.ranks[begin_] + r;
    int low = begin_, high = end_ - 1;  // the last run that begins no later
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (bucket_.ranks[middle] <= wanted)
        low = middle;
      else
        high = middle - 1;
    }
    return int64_t(bucket_.runs[low].first) + (wanted - bucket_.ranks[low]);
  }

 private:
  Team team_;
  Bucket bucket_;
  int begin_ = 0, end_ = 0, rows_ = 0;
};

template <class T, class M>
__device__ __forceinline__ GroupStats group_stats(const GroupRows<T>& in, const GroupRule& rule, const M& members) {
  if (!needs_group(rule)) return {0, 0, 0, 0};
  const double origin = members.none() ? 0 : double(in.rewards[members.row(0)]);
  double weight = 0, sum = 0, squares = 0;
  members.each([&](int64_t j) {
    weight += in.weight(j);
    sum += in.weight(j) * (double(in.rewards[j]) - origin);
  });
  weight = members.sum(weight);
  const double mean = members.sum(sum) / weight;
  if (!rule.by_std()) return {origin, weight, mean, 0};
  members.each([&](int64_t j) {
    const double centred = (double(in.rewards[j]) - origin) - mean;
    squares += in.weight(j) * (centred * centred);
  });
  return {origin, weight, mean, group_std(rule, weight, members.sum(squares))};
}

// What is done with a group.
template <class T>
struct WriteAdvantages {
  GroupRows<T> in;
  GroupRule rule;
  T* advantages;

  template <class M>
  __device__ __forceinline__ void operator()(const M& members) const {
    const AdvantageMap<T> map = advantage_map<T>(rule, group_stats(in, rule, members));
    members.each([&](int64_t j) { advantages[j] = advantage(map, in.rewards[j]); });
  }
};

template <class T>
struct WriteGradients {
  GroupRows<T> in;
  GroupRule rule;
  const T* grads;
  T* grad_rewards;

  template <class M>
  __device__ __forceinline__ void operator()(const M& members) const {
    const GroupStats stats = group_stats(in, rule, members);
    double sum_g = 0, sum_gc = 0;
    members.each([&](int64_t j) {
      sum_g += double(grads[j]);
      sum_gc += double(grads[j]) * stats.centred(double(in.rewards[j]));
    });
    sum_g = members.sum(sum_g);
    const GradientMap map = gradient_map(rule, stats, sum_g, members.sum(sum_gc));
    members.each([&](int64_t j) {
      grad_rewards[j] = T(reward_gradient(map, double(grads[j]), in.weight(j), double(in.rewards[j])));
    });
  }
};

// Fills ranks and groups from the sorted runs, both with one element more at their end; returns how many groups.
__device__ inline int find_groups(const Run* runs, int count, int32_t* ranks, int32_t* groups, int* scratch) {
  int rows = 0, heads = 0;
  for (int base = 0; base < count; base += kSortThreads) {
    const int i = base + int(threadIdx.x);
    const bool head = i < count && (i == 0 || runs[i].key != runs[i - 1].key);
    const Prefix sizes = block_prefix(i < count ? runs[i].end - runs[i].first : 0, scratch);
    const Prefix found = block_prefix(int(head), scratch);
    if (i < count) ranks[i] = rows + sizes.before;
    if (head) groups[heads + found.before] = i;
    rows += sizes.all, heads += found.all;
  }
  if (threadIdx.x == 0) ranks[count] = rows, groups[heads] = count;
  __syncthreads();
  return heads;
}

template <class Of>
__device__ __forceinline__ void each_group(const Bucket& bucket, int groups, const Of& of, BucketShared& shared) {
  constexpr int kTeams = kWarp / kOctet;
  const int me = int(threadIdx.x);
  for (int base = warp_in_block() * kTeams; base < groups; base += kSortThreads / kOctet) {
    const int g = base + lane() / kOctet;
    of(Members<Octet>({}, bucket, g, g < groups && bucket.rows(g) <= kOctetRows));
  }
  for (int base = 0; base < groups; base += kSortThreads) {
    const int g = base + me;
    const bool large = g < groups && bucket.rows(g) > kOctetRows;
    const Prefix found = block_prefix(int(large), shared.scratch);
    if (large) shared.begins[found.before] = g;
    __syncthreads();
    for (int i = 0; i < found.all; ++i) of(Members<WholeBlock>({shared.sums}, bucket, shared.begins[i], true));
  }
}

template <class Of>
__global__ void bucket_kernel(Tiles tiles, Of of) {
  BucketShared& shared = *reinterpret_cast<BucketShared*>(tk_shared_memory);
  int lower = 0, mine = 0;
  for (int t = int(threadIdx.x); t < tiles.count; t += kSortThreads) {
    const Range part = bucket_in_tile(tiles, t);
    lower += part.begin, mine += part.end - part.begin;
  }
  lower = block_sum(lower, shared.scratch);  // runs of the buckets before
  const int count = block_sum(mine, shared.scratch);
  if (count == 0) return;
  Run* runs = tiles.gathered + lower;
  gather(tiles, shared, runs);
  if (!in_order(runs, count, shared.scratch)) runs = sort_runs(runs, tiles.spare + lower, count, shared.runs);
  int32_t *const ranks = tiles.ranks + lower + blockIdx.x, *const firsts = tiles.groups + lower + blockIdx.x;
  const int groups = find_groups(runs, count, ranks, firsts, shared.scratch);
  each_group({runs, ranks, firsts}, groups, of, shared);
}

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

inline int bucket_bits(int64_t n) {
  int bits = 0;
  while ((int64_t{1} << bits) < kMostBuckets && (n >> bits) > kBucketRows) ++bits;
  return bits;
}

inline int64_t scratch_doubles(int64_t n) {
  constexpr int64_t kRun = sizeof(Run) / sizeof(double);
  const int64_t buckets = n == 0 ? 0 : int64_t{1} << bucket_bits(n);
  return kRun * (tiles_of(n) * kTile + 2 * n) + (2 * (n + buckets) + tiles_of(n) + 1) / 2;
}

inline Tiles tiles_in(double* scratch, int64_t n) {
  Run* const runs = reinterpret_cast<Run*>(scratch);
  Run *const gathered = runs + tiles_of(n) * kTile, *const spare = gathered + n;
  int32_t* const ranks = reinterpret_cast<int32_t*>(spare + n);
  const int64_t size = n + (int64_t{1} << bucket_bits(n));
  return {runs, ranks + 2 * size, int(tiles_of(n)), bucket_bits(n), gathered, spare, ranks, ranks + size};
}

// Two launches. `out`: what rows that are not counted get their 0 in.
template <class T, class Of>
void for_each_group(const GroupRows<T>& in, T* out, const Of& of, double* scratch, void* stream) {
  if (in.n > kMostRows)
    throw std::invalid_argument("rewards must be at most 2^30 on a GPU, got " + std::to_string(in.n));
  const Tiles tiles = tiles_in(scratch, in.n);
  launch(tile_kernel<T>, tiles.count, kSortThreads, sizeof(TileShared), stream, in, out, tiles.runs, tiles.counts);
  launch(bucket_kernel<Of>, in.n == 0 ? 0 : int64_t{1} << tiles.bits, kSortThreads, sizeof(BucketShared), stream, tiles,
         of);
}

}  // namespace
}  // namespace cuda
}  // namespace tk
