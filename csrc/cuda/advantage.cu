// Group-relative advantages, GAE and whitening on a GPU. Every sum's order follows from the group's or the trajectory's
// own rows: nothing else in the batch can change a bit.
#include <algorithm>

#include "../common/kernels.h"
#include "advantage_groups.cuh"
#include "block.cuh"

namespace tk {
namespace cuda {
namespace {

constexpr int kThreads = 128, kWarpsPerBlock = kThreads / kWarp;

int64_t blocks_for(int64_t warps) { return (warps + kWarpsPerBlock - 1) / kWarpsPerBlock; }

__device__ __forceinline__ int64_t clamped(int64_t t, int64_t tokens) { return t < 0 ? 0 : t > tokens ? tokens : t; }

// Nobody has checked the boundaries: what they leave out becomes NaN, and nothing outside the tokens is touched.
template <class T>
__device__ void fill_uncovered(const Trajectories& in, int64_t n, T* out) {
  const int64_t head = n == 0 ? clamped(in.cu_seqlens[0], in.tokens) : 0;
  const int64_t tail = n == in.count - 1 ? clamped(in.cu_seqlens[in.count], in.tokens) : in.tokens;
  for (int64_t t = lane(); t < head; t += kWarp) out[t] = T(NAN);
  for (int64_t t = tail + lane(); t < in.tokens; t += kWarp) out[t] = T(NAN);
}

constexpr int kTokens = 4, kWindow = kTokens * kWarp;  // tokens that a lane takes at a time, and that its warp takes

// A lane's tokens: rewards, or the gradients that come in their place, and values; 0 where a token takes no part.
template <class T>
struct Steps {
  T given[kTokens], value[kTokens];
  unsigned active;  // bit k: token k takes part
};

// The maps of a lane's active tokens, the first one's applied first.
template <class T>
__device__ __forceinline__ Affine composed(const Steps<T>& steps, const double (&shift)[kTokens], double decay) {
  Affine map{1, 0};
#pragma unroll
  for (int k = 0; k < kTokens; ++k)
    if (steps.active >> k & 1) map = {decay * map.scale, decay * map.shift + shift[k]};
  return map;
}

// What the lanes before this one leave, and the whole warp.
struct Carry {
  double before, all;
};
__device__ __forceinline__ Carry carried_on(const Affine& map, double carried) {
  const Affine here = warp_scan(map);
  const double after = here.scale * carried + here.shift;
  const double below = __shfl_up_sync(kAllLanes, after, 1u);
  return {lane() == 0 ? carried : below, __shfl_sync(kAllLanes, after, kWarp - 1)};
}

// Windows from the trajectory's end, lane 0 at its last tokens; two more windows are loaded ahead.
template <class T>
__global__ void gae_kernel(const T* rewards, const T* values, Trajectories in, const T* bootstrap, double gamma,
                           double lam, T* advantages) {
  const int64_t n = warp_in_grid();
  if (n >= in.count) return;
  fill_uncovered(in, n, advantages);
  const int64_t begin = clamped(in.cu_seqlens[n], in.tokens), end = clamped(in.cu_seqlens[n + 1], in.tokens);
  const auto load = [&](int64_t last) {
    Steps<T> steps{};
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int64_t t = last - k;
      if (t < begin || !in.active(t)) continue;
      steps.active |= 1u << k, steps.given[k] = rewards[t];
      if (values != nullptr) steps.value[k] = values[t];
    }
    return steps;
  };
  const double decay = gamma * lam;
  double advantage = 0, next_value = bootstrap == nullptr ? 0 : double(bootstrap[n]);
  int64_t last = end - 1 - kTokens * lane();
  Steps<T> ahead = load(last), further = load(last - kWindow);
  for (; last + kTokens * lane() >= begin; last -= kWindow) {
    const Steps<T> steps = ahead;
    ahead = further, further = load(last - 2 * kWindow);
    T first_value = 0;  // of the lane's active token that is first in the trajectory
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      if (steps.active >> k & 1) first_value = steps.value[k];
    const unsigned lanes = __ballot_sync(kAllLanes, steps.active != 0);
    const int later = previous_lane(lanes);
    const T later_value = __shfl_sync(kAllLanes, first_value, later < 0 ? 0 : later);
    double value = later < 0 ? next_value : double(later_value), delta[kTokens] = {};
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!(steps.active >> k & 1)) continue;
      delta[k] = td_error(double(steps.given[k]), double(steps.value[k]), value, gamma);
      value = double(steps.value[k]);
    }
    const Carry carry = carried_on(composed(steps, delta, decay), advantage);
    double here = carry.before;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const bool active = steps.active >> k & 1;
      if (active) here = decay * here + delta[k];
      if (last - k >= begin) advantages[last - k] = active ? T(here) : T(0);
    }
    advantage = carry.all;
    const T earliest = __shfl_sync(kAllLanes, first_value, lanes == 0 ? 0 : last_lane(lanes));
    if (lanes != 0) next_value = double(earliest);
  }
}

// The adjoint scan runs from the trajectory's start: u = g + gamma lam u_previous, and a value's gradient is
// gamma u_previous - u.
template <class T>
__global__ void gae_backward_kernel(const T* grads, Trajectories in, double gamma, double lam, T* grad_rewards,
                                    T* grad_values, T* grad_bootstrap) {
  const int64_t n = warp_in_grid();
  if (n >= in.count) return;
  fill_uncovered(in, n, grad_rewards);
  if (grad_values != nullptr) fill_uncovered(in, n, grad_values);
  const int64_t begin = clamped(in.cu_seqlens[n], in.tokens), end = clamped(in.cu_seqlens[n + 1], in.tokens);
  const auto load = [&](int64_t first) {
    Steps<T> steps{};
#pragma unroll
    for (int k = 0; k < kTokens; ++k)
      if (first + k < end && in.active(first + k)) steps.active |= 1u << k, steps.given[k] = grads[first + k];
    return steps;
  };
  const double decay = gamma * lam;
  double carried = 0;
  int64_t first = begin + kTokens * lane();
  Steps<T> ahead = load(first), further = load(first + kWindow);
  for (; first - kTokens * lane() < end; first += kWindow) {
    const Steps<T> steps = ahead;
    ahead = further, further = load(first + 2 * kWindow);
    double given[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) given[k] = double(steps.given[k]);
    const Carry carry = carried_on(composed(steps, given, decay), carried);
    double here = carry.before;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const bool active = steps.active >> k & 1;
      const double previous = here;
      if (active) here = decay * previous + given[k];
      if (first + k >= end) continue;
      grad_rewards[first + k] = active ? T(here) : T(0);
      if (grad_values != nullptr) grad_values[first + k] = active ? T(gamma * previous - here) : T(0);
    }
    carried = carry.all;
  }
  if (grad_bootstrap != nullptr && lane() == 0) grad_bootstrap[n] = T(gamma * carried);
}

constexpr int kWhitenThreads = 256;
constexpr int64_t kWhitenShare = 2048, kWhitenBlocks = 1024;  // elements worth a block; blocks at most
constexpr size_t kWhitenShared = kWhitenThreads / kWarp * sizeof(double);

// f(i) for the unmasked of this block's share, and g(i) for the masked.
template <class T, class F, class G>
__device__ void each_of_share(const Masked<T>& in, F f, G g) {
  const int64_t share = (in.n + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  const int64_t end = begin + share < in.n ? begin + share : in.n;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    if (in.kept(i))
      f(i);
    else
      g(i);
  }
}

__device__ double block_total(double x) { return block_sum(x, reinterpret_cast<double*>(tk_shared_memory)); }

// What a block found in its share: the count, and two sums.
struct Partial {
  double count, a, b;
};
constexpr int64_t kPartial = sizeof(Partial) / sizeof(double);

// f(partial) for every block's, spread over this block's threads.
template <class F>
__device__ void each_partial(const double* partials, F f) {
  const Partial* all = reinterpret_cast<const Partial*>(partials);
  for (int64_t p = threadIdx.x; p < gridDim.x; p += blockDim.x) f(all[p]);
}

__device__ void store_partial(const Partial& x, double* partials) {
  if (threadIdx.x == 0) reinterpret_cast<Partial*>(partials)[blockIdx.x] = x;
}

// Each block's count, mean and sum of squares about that mean.
template <class T>
__global__ void whiten_partials(Masked<T> in, double* partials) {
  double count = 0, sum = 0, squares = 0;
  each_of_share(in, [&](int64_t i) { count += 1, sum += double(in.x[i]); }, [](int64_t) {});
  count = block_total(count), sum = block_total(sum);
  const double mean = count > 0 ? sum / count : 0;
  each_of_share(in, [&](int64_t i) { squares += (double(in.x[i]) - mean) * (double(in.x[i]) - mean); }, [](int64_t) {});
  store_partial({count, mean, block_total(squares)}, partials);
}

template <class T>
__global__ void whiten_kernel(Masked<T> in, const double* partials, bool shift_mean, double ddof, double eps, T* out,
                              double* stats) {
  double count = 0, sum = 0, squares = 0;
  each_partial(partials, [&](const Partial& p) { count += p.count, sum += p.count * p.a; });
  count = block_total(count), sum = block_total(sum);
  const double mean = count > 0 ? sum / count : 0;
  each_partial(partials, [&](const Partial& p) { squares += p.b + p.count * (p.a - mean) * (p.a - mean); });
  const double rstd = whiten_rstd(count, block_total(squares), ddof, eps);
  each_of_share(
      in, [&](int64_t i) { out[i] = T(whitened(double(in.x[i]), mean, rstd, shift_mean)); },
      [&](int64_t i) { out[i] = 0; });
  if (blockIdx.x == 0 && threadIdx.x == 0) stats[0] = mean, stats[1] = rstd;
}

// Each block's count, sum of g and sum of g (x - mean).
template <class T>
__global__ void whiten_backward_partials(const T* grads, Masked<T> in, const double* stats, double* partials) {
  const double mean = stats[0];
  double count = 0, sum_g = 0, sum_gc = 0;
  each_of_share(
      in,
      [&](int64_t i) {
        count += 1, sum_g += double(grads[i]);
        sum_gc += double(grads[i]) * (double(in.x[i]) - mean);
      },
      [](int64_t) {});
  count = block_total(count), sum_g = block_total(sum_g), sum_gc = block_total(sum_gc);
  store_partial({count, sum_g, sum_gc}, partials);
}

template <class T>
__global__ void whiten_backward_kernel(const T* grads, Masked<T> in, const double* stats, const double* partials,
                                       bool shift_mean, double ddof, T* grad_x) {
  double count = 0, sum_g = 0, sum_gc = 0;
  each_partial(partials, [&](const Partial& p) { count += p.count, sum_g += p.a, sum_gc += p.b; });
  count = block_total(count), sum_g = block_total(sum_g), sum_gc = block_total(sum_gc);
  const WhitenGradient map = whiten_gradient(stats[0], stats[1], count, sum_g, sum_gc, shift_mean, ddof);
  each_of_share(
      in, [&](int64_t i) { grad_x[i] = T(whitened_gradient(map, double(grads[i]), double(in.x[i]))); },
      [&](int64_t i) { grad_x[i] = 0; });
}

}  // namespace
}  // namespace cuda

using namespace cuda;

template <class T>
bool AdvantageKernels<T>::group_advantages(const GroupRows<T>& in, const GroupRule& rule, T* advantages,
                                           const Launch& where) {
  for_each_group(in, advantages, WriteAdvantages<T>{in, rule, advantages}, where.scratch, where.stream);
  return true;
}

template <class T>
void AdvantageKernels<T>::group_advantages_backward(const GroupRows<T>& in, const GroupRule& rule, const T* grads,
                                                    T* grad_rewards, const Launch& where) {
  for_each_group(in, grad_rewards, WriteGradients<T>{in, rule, grads, grad_rewards}, where.scratch, where.stream);
}

template <class T>
int64_t AdvantageKernels<T>::gae(const T* rewards, const T* values, const Trajectories& in, const T* bootstrap,
                                 double gamma, double lam, T* advantages, const Launch& where) {
  launch(gae_kernel<T>, blocks_for(in.count), kThreads, 0, where.stream, rewards, values, in, bootstrap, gamma, lam,
         advantages);
  return -1;
}

template <class T>
int64_t AdvantageKernels<T>::gae_backward(const T* grads, const Trajectories& in, double gamma, double lam,
                                          T* grad_rewards, T* grad_values, T* grad_bootstrap, const Launch& where) {
  launch(gae_backward_kernel<T>, blocks_for(in.count), kThreads, 0, where.stream, grads, in, gamma, lam, grad_rewards,
         grad_values, grad_bootstrap);
  return -1;
}

int64_t group_scratch(int64_t n) { return scratch_doubles(n); }

// As many blocks as the length alone asks for: the order of the sums depends on it.
int64_t whiten_scratch(int64_t n) {
  const int64_t blocks = (n + kWhitenShare - 1) / kWhitenShare;
  return kPartial * std::min<int64_t>(std::max<int64_t>(blocks, 1), kWhitenBlocks);
}

template <class T>
void AdvantageKernels<T>::whiten(const Masked<T>& in, bool shift_mean, double ddof, double eps, T* out, double* stats,
                                 const Launch& where) {
  const int64_t blocks = where.doubles / kPartial;
  launch(whiten_partials<T>, blocks, kWhitenThreads, kWhitenShared, where.stream, in, where.scratch);
  launch(whiten_kernel<T>, blocks, kWhitenThreads, kWhitenShared, where.stream, in, where.scratch, shift_mean, ddof,
         eps, out, stats);
}

template <class T>
void AdvantageKernels<T>::whiten_backward(const T* grads, const Masked<T>& in, const double* stats, bool shift_mean,
                                          double ddof, T* grad_x, const Launch& where) {
  const int64_t blocks = where.doubles / kPartial;
  launch(whiten_backward_partials<T>, blocks, kWhitenThreads, kWhitenShared, where.stream, grads, in, stats,
         where.scratch);
  launch(whiten_backward_kernel<T>, blocks, kWhitenThreads, kWhitenShared, where.stream, grads, in, stats,
         where.scratch, shift_mean, ddof, grad_x);
}

template struct AdvantageKernels<float>;
template struct AdvantageKernels<double>;

}  // namespace tk
