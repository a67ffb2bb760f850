// The launches of tree.cu, asynchronous on `stream`. T is float or double; pointers are to device memory.
// `scratch`: 96 bytes a leaf, and 8 a node.
#pragma once
#include "../common/tree.h"

namespace tk {
namespace cuda {

template <class T>
void subtree_reduce(const T* leaf_values, const TreeNodes& tree, int op, T* out, void* scratch, void* stream);
template <class T>
void subtree_reduce_backward(const T* grads, const T* leaf_values, const TreeNodes& tree, int op, T* grad_leaves,
                             void* scratch, void* stream);

template <class T>
void sibling_advantages(const T* values, const TreeNodes& tree, const SiblingRule& rule, T* advantages, void* stream);
template <class T>
void sibling_advantages_backward(const T* grads, const T* values, const TreeNodes& tree, const SiblingRule& rule,
                                 T* grad_values, void* stream);

// weights may be null.
template <class T>
void branch_coefficients(const T* advantages, const T* weights, const TreeNodes& tree, T* const* out, void* scratch,
                         void* stream);
template <class T>
void branch_coefficients_backward(const T* grad_positive, const T* grad_negative, const T* advantages, const T* weights,
                                  const TreeNodes& tree, T* grad_advantages, void* stream);

}  // namespace cuda
}  // namespace tk
