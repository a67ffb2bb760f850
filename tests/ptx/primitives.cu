// Kernels for the tests of block.cuh's primitives and of what their execution on a CPU refuses.
#include "../../csrc/cuda/block.cuh"
#include "primitives.h"

namespace tk {
namespace cuda {
namespace {

__global__ void sums_kernel(const double* x, double* warp, double* block, double* squares) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  double* scratch = reinterpret_cast<double*>(tk_shared_memory);
  warp[i] = warp_sum(x[i]);
  block[i] = block_sum(x[i], scratch);
  squares[i] = block_sum(x[i] * x[i], scratch);
}

__global__ void scan_kernel(const double* scale, const double* shift, double* out_scale, double* out_shift) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const Affine map = warp_scan({scale[i], shift[i]});
  out_scale[i] = map.scale, out_shift[i] = map.shift;
}

__global__ void lanes_kernel(unsigned set, int64_t* out) {  // [threads, 6]
  int64_t* mine = out + 6 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  mine[0] = lane(), mine[1] = warp_in_block(), mine[2] = warp_in_grid();
  mine[3] = previous_lane(set), mine[4] = last_lane(set), mine[5] = rank_in(set);
}

// Hands each lane's number to its left neighbour through shared memory.
__global__ void neighbour_kernel(bool synchronised, int64_t* out) {
  int* values = reinterpret_cast<int*>(tk_shared_memory);
  values[lane()] = 100 + lane();
  if (synchronised) __syncwarp();
  out[lane()] = values[(lane() + 1) % kWarp];
}

__global__ void misuse_kernel(Misuse misuse) {
  const int me = int(threadIdx.x);
  switch (misuse) {
    case Misuse::absent_lane:
      if (me != 5) __ballot_sync(kAllLanes, true);
      break;
    case Misuse::two_sites:
      if (me < 16)
        __syncwarp();
      else
        __any_sync(kAllLanes, true);
      break;
    case Misuse::divergent_barrier:
      if (me < 32) __syncthreads();
      break;
    case Misuse::two_barriers:
      if (me < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Misuse::foreign_source:
      if (me < 8) __shfl_sync(0xffu, me, 9);
      break;
    case Misuse::not_in_own_mask:
      __ballot_sync(0x1u, true);
      break;
    case Misuse::shared_overrun:
      tk_shared_memory[64] = 0;
      break;
  }
}

}  // namespace

void run_sums(const double* x, int64_t blocks, int threads, double* warp, double* block, double* squares) {
  launch(sums_kernel, blocks, threads, threads / kWarp * sizeof(double), nullptr, x, warp, block, squares);
}
void run_scan(const double* scale, const double* shift, int64_t blocks, double* out_scale, double* out_shift) {
  launch(scan_kernel, blocks, kWarp, 0, nullptr, scale, shift, out_scale, out_shift);
}
void run_lanes(unsigned set, int64_t blocks, int threads, int64_t* out) {
  launch(lanes_kernel, blocks, threads, 0, nullptr, set, out);
}
void run_neighbour(bool synchronised, int64_t* out) {
  launch(neighbour_kernel, 1, kWarp, kWarp * sizeof(int), nullptr, synchronised, out);
}
void run_misuse(Misuse misuse) { launch(misuse_kernel, 1, 64, 64, nullptr, misuse); }

}  // namespace cuda
}  // namespace tk
