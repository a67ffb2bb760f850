// The launches of advantage.cu, asynchronous on `stream`. T is float or double; pointers are to device memory.
#pragma once
#include "../common/advantage.h"

namespace tk {
namespace cuda {

template <class T>
void group_advantages(const GroupRows<T>& in, const GroupRule& rule, T* advantages, void* stream);
template <class T>
void group_advantages_backward(const GroupRows<T>& in, const GroupRule& rule, const T* grads, T* grad_rewards,
                               void* stream);

// values and bootstrap may be null, and so may the last two gradients.
template <class T>
void gae(const T* rewards, const T* values, const Trajectories& in, const T* bootstrap, double gamma, double lam,
         T* advantages, void* stream);
template <class T>
void gae_backward(const T* grads, const Trajectories& in, double gamma, double lam, T* grad_rewards, T* grad_values,
                  T* grad_bootstrap, void* stream);

// Two launches each, of `blocks` blocks, with `partials` [3 * blocks] between them.
template <class T>
void whiten(const Masked<T>& in, bool shift_mean, double ddof, double eps, T* out, double* stats, double* partials,
            int64_t blocks, void* stream);
template <class T>
void whiten_backward(const T* grads, const Masked<T>& in, const double* stats, bool shift_mean, double ddof, T* grad_x,
                     double* partials, int64_t blocks, void* stream);

}  // namespace cuda
}  // namespace tk
