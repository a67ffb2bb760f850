// The terms of the policy loss that have weights of their own, whatever the mask: a cross-entropy, and a KL.
#pragma once
#include "policy_loss_block.h"

namespace tk::policy {

// A run's sums; adds its derivatives to the gradients that are there. Behind the stages of the block and not one of
// them: among them, its code would make theirs slower where there is no such term.
template <class V>
TK_INLINE StreamTotals add_streams(const Block<V>& block, const Run& run) {
  using Real = Scalar<V>;
  const Job<Real>& job = block.in.job;
  constexpr int W = kLanes<V>;
  const Real of_logprob = -job.supervised.unit, of_kl = Params<double>(job.params).kl_coef * job.kl.unit;
  const Kl estimator = job.weighted_kl;
  Sum<V> logprobs, kls;
  enum Input : int { kLogprob, kReference, kSupervised, kApart, kInputs };
  const Real* all[kInputs] = {job.logprobs, job.ref_logprobs, job.supervised.weights, job.kl.weights};

  // Of kStep tokens, with zeros where there is no weight.
  const auto take = [&](const Real* const(&x)[kInputs], Real* grad) TK_INLINE_LAMBDA {
    const auto taken = [](const V& weight, const V& y) TK_INLINE_LAMBDA { return weight == 0 ? V{} : y; };
    for (int j = 0; j < kStep; j += W) {
      const V logprob = load<W>(x[kLogprob] + j);
      V slope{};
      if (x[kApart]) {
        const V weight = load<W>(x[kApart] + j), d = taken(weight, logprob - load<W>(x[kReference] + j));
        const Term<V> y = kl(estimator, d, V{} + 1);
        kls.add(j, weight * y.loss);
        slope += taken(weight, of_kl * weight * y.d_logprob);
      }
      if (x[kSupervised]) {
        const V weight = load<W>(x[kSupervised] + j);
        logprobs.add(j, weight * taken(weight, logprob));
        slope += taken(weight, of_logprob * weight);
      }
      if (grad) store<W>(grad + j, load<W>(grad + j) + slope);
    }
  };
  Real* grads = job.options.need_logprobs ? job.grad_logprobs + run.begin : nullptr;
  const Real* at[kInputs];
  int i = 0;
  for (; i + kStep <= run.length; i += kStep) {
    for (int input = 0; input < kInputs; ++input) at[input] = all[input] ? all[input] + run.begin + i : nullptr;
    take(at, grads ? grads + i : nullptr);
  }
  if (const int rest = run.length - i) {  // padded with tokens of weight 0
    Real padded[kInputs][kStep] = {}, grad[kStep] = {};
    for (int input = 0; input < kInputs; ++input) {
      if (all[input]) std::copy_n(all[input] + run.begin + i, rest, padded[input]);
      at[input] = all[input] ? padded[input] : nullptr;
    }
    take(at, grad);
    for (int l = 0; grads && l < rest; ++l) grads[i + l] += grad[l];
  }
  return {logprobs.fold(), kls.fold()};
}

}  // namespace tk::policy
