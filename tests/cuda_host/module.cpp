// The module _C_cuda_host: _C_cuda's functions, executed on the host, and those of primitives.cu.
#include <pybind11/pybind11.h>

#include "cuda_host.h"
#include "primitives.h"

void bind_advantage(pybind11::module_& m);
void bind_span(pybind11::module_& m);
void bind_tree(pybind11::module_& m);

namespace {

double* doubles(uintptr_t pointer) { return reinterpret_cast<double*>(pointer); }
int64_t* integers(uintptr_t pointer) { return reinterpret_cast<int64_t*>(pointer); }

}  // namespace

PYBIND11_MODULE(_C_cuda_host, m) {
  bind_advantage(m);
  bind_span(m);
  bind_tree(m);
  m.def("set_order", [](int order, unsigned seed) { cuda_host::set_order(cuda_host::Order(order), seed); });
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
