// trajkern._C_cuda: the CUDA kernels, as csrc/bind hands them to Python.
#include <pybind11/pybind11.h>

void bind_advantage(pybind11::module_& m);
void bind_span(pybind11::module_& m);
void bind_tree(pybind11::module_& m);

PYBIND11_MODULE(_C_cuda, m) {
  bind_advantage(m);
  bind_span(m);
  bind_tree(m);
}
