// The launches of primitives.cu.
#pragma once
#include <cstdint>

namespace tk {
namespace cuda {

// What a kernel must not do.
enum class Misuse {
  absent_lane,
  two_sites,
  divergent_barrier,
  two_barriers,
  foreign_source,
  not_in_own_mask,
  shared_overrun
};

void run_sums(const double* x, int64_t blocks, int threads, double* warp, double* block, double* squares);
void run_scan(const double* scale, const double* shift, int64_t blocks, double* out_scale, double* out_shift);
void run_lanes(unsigned set, int64_t blocks, int threads, int64_t* out);
void run_neighbour(bool synchronised, int64_t* out);
void run_misuse(Misuse misuse);

}  // namespace cuda
}  // namespace tk
