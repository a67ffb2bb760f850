// What kernels are made of: lanes, sums and scans across a warp or a block, and the launch.
// Every sum runs in a fixed order and nothing is atomic, so that the same input gives the same bits.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

extern __shared__ __align__(16) unsigned char tk_shared_memory[];  // as many bytes as the launch asked for

namespace tk {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_in_block() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ int64_t warp_in_grid() {
  return int64_t(blockIdx.x) * (int(blockDim.x) / kWarp) + warp_in_block();
}

// The highest lane of the set below this one, or -1.
__device__ __forceinline__ int previous_lane(unsigned lanes) { return 31 - __clz(int(lanes & ((1u << lane()) - 1))); }
__device__ __forceinline__ int last_lane(unsigned lanes) { return 31 - __clz(int(lanes)); }
// How many lanes of the set lie below this one.
__device__ __forceinline__ int rank_in(unsigned lanes) { return __popc(lanes & ((1u << lane()) - 1)); }

// The sum over the warp, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// The sum over the block, in every thread. `scratch`: shared, one element a warp.
template <class T>
__device__ T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  __syncthreads();  // the scratch may still be read for the sum before
  if (lane() == 0) scratch[warp_in_block()] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) sum += scratch[warp];
  return sum;
}

struct Prefix {
  int before, all;
};

// The sum over the threads before this one, and that over the block. `scratch`: shared, one element a warp.
__device__ inline Prefix block_prefix(int x, int* scratch) {
  int sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, unsigned(offset));
    if (lane() >= offset) sum += below;
  }
  __syncthreads();  // the scratch may still be read for the sum before
  if (lane() == kWarp - 1) scratch[warp_in_block()] = sum;
  __syncthreads();
  Prefix found{sum - x, 0};
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) {
    if (warp < warp_in_block()) found.before += scratch[warp];
    found.all += scratch[warp];
  }
  return found;
}

// x -> scale * x + shift. Scale 1 and shift 0 pass a value on; scale 0 starts a new segment.
struct Affine {
  double scale, shift;
};

// The composition of the maps of lanes 0 to this one, lane 0's applied first.
__device__ __forceinline__ Affine warp_scan(Affine map) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double scale = __shfl_up_sync(kAllLanes, map.scale, unsigned(offset));
    const double shift = __shfl_up_sync(kAllLanes, map.shift, unsigned(offset));
    if (lane() >= offset) map = {map.scale * scale, map.scale * shift + map.shift};
  }
  return map;
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be found again by whoever asks next
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, void* stream, A... args) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, P(args)...));
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace tk
