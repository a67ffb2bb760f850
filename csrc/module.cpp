// trajkern._C: the CPU kernels. Each file binds its own functions; csrc/bind those that trajkern._C_cuda has too.
#include <pybind11/pybind11.h>

void bind_advantage(pybind11::module_& m);
void bind_divergence(pybind11::module_& m);
void bind_head(pybind11::module_& m);
void bind_logprob(pybind11::module_& m);
void bind_policy_loss(pybind11::module_& m);
void bind_reflection(pybind11::module_& m);
void bind_span(pybind11::module_& m);
void bind_span_layout(pybind11::module_& m);
void bind_srl(pybind11::module_& m);
void bind_topk(pybind11::module_& m);
void bind_tree(pybind11::module_& m);
void bind_tree_layout(pybind11::module_& m);

PYBIND11_MODULE(_C, m) {
  bind_advantage(m);
  bind_divergence(m);
  bind_head(m);
  bind_logprob(m);
  bind_policy_loss(m);
  bind_reflection(m);
  bind_span(m);
  bind_span_layout(m);
  bind_srl(m);
  bind_topk(m);
  bind_tree(m);
  bind_tree_layout(m);
}
