// The module _primitives: the functions of primitives.cu.
#include <pybind11/pybind11.h>

#include "primitives.h"

namespace {

double* doubles(uintptr_t pointer) { return reinterpret_cast<double*>(pointer); }
int64_t* integers(uintptr_t pointer) { return reinterpret_cast<int64_t*>(pointer); }

}  // namespace

PYBIND11_MODULE(_primitives, m) {
  m.def("sums", [](uintptr_t x, int64_t blocks, int threads, uintptr_t warp, uintptr_t block, uintptr_t squares) {
    tk::cuda::run_sums(doubles(x), blocks, threads, doubles(warp), doubles(block), doubles(squares));
  });
  m.def("scan", [](uintptr_t scale, uintptr_t shift, int64_t blocks, uintptr_t out_scale, uintptr_t out_shift) {
    tk::cuda::run_scan(doubles(scale), doubles(shift), blocks, doubles(out_scale), doubles(out_shift));
  });
  m.def("lanes", [](unsigned set, int64_t blocks, int threads, uintptr_t out) {
    tk::cuda::run_lanes(set, blocks, threads, integers(out));
  });
  m.def("neighbour", [](bool synchronised, uintptr_t out) { tk::cuda::run_neighbour(synchronised, integers(out)); });
  m.def("misuse", [](int misuse) { tk::cuda::run_misuse(tk::cuda::Misuse(misuse)); });
}
