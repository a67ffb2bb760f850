// The stages of the policy loss over a run of tokens.
#pragma once
#include "policy_loss_metrics.h"
#include "policy_loss_tokens.h"

namespace tk::policy {

// A sum over vectors V in kStep lanes; they are added in double.
template <class V>
struct Sum {
  static constexpr int W = kLanes<V>;
  V parts[kStep / W] = {};

  // i: the index of x's first element, a multiple of the lanes of V, in its step.
  TK_INLINE void add(int i, const V& x) { parts[i / W] += x; }
  TK_INLINE double fold() const { return fold_sum<W>(parts); }
};

template <class V>
struct Block {
  using Real = Scalar<V>;
  using Lane = typename Tokens<V>::Lane;
  static constexpr int W = kLanes<V>;

  Tokens<V> in;
  const Options options = in.options;
  const Params<Real> params{in.job.params};
  const bool corrects =
      options.sampler_correction == Correction::tis || options.sampler_correction == Correction::icepop;
  RunTotals totals;
  alignas(64) Real first[Tokens<V>::kSize], second[Tokens<V>::kSize], third[Tokens<V>::kSize];  // results of a stage

  TK_INLINE explicit Block(const Job<Real>& job) : in(job) {}
  TK_INLINE void open(const Run& run) { in.open(run); }

  static TK_INLINE V at(const Real* x, int i) { return load<W>(x + i); }
  static TK_INLINE V masked(const Lane& x, const V& y) { return Tokens<V>::masked(x.kept, y); }

  TK_INLINE Term<V> policy(const Lane& x, int i) const {
    const Token<V>& t = x.token;
    switch (options.form) {
      case Form::clip:
        return in.selected ? drop(clip(t, params), in.chosen(x, i)) : clip(t, params);
      case Form::cispo:
        return cispo(t, params);
      case Form::sapo:
        return sapo(t, params);
      case Form::reinforce:
        return reinforce(t);
      case Form::dppo_tv:
        return dppo_tv(t, params);
      case Form::dppo_kl:
        return dppo_kl(t, params);
      case Form::kl_cov:
        return kl_cov(t, in.chosen(x, i), params);
      case Form::gmpo:
        return gmpo(t, at(in.value, i), at(in.value_alt, i), params);
      case Form::vespo:
        return vespo(t, at(in.value, i), at(in.value_alt, i));
    }
    __builtin_unreachable();
  }

  // The forms that a branch can have are linear in A > 0, and in A < 0: their sums over the leaves are those of the
  // sums of either.
  TK_INLINE Term<V> policy_of_branch(Lane& x, int i) const {
    Term<V> sum = policy(x, i);
    const V up = in.branch(kPositiveCount, i);
    sum.clipped *= up, sum.beyond *= up;
    x.token.advantage = masked(x, in.branch(kNegative, i));
    const Term<V> down = policy(x, i);
    sum.loss += down.loss, sum.d_log_ratio += down.d_log_ratio, sum.d_logprob += down.d_logprob;
    const V level = options.form == Form::clip ? V{} : in.branch(kZeroCount, i);  // clipped as A < 0 is, or never
    const V below = in.branch(kNegativeCount, i) + level;
    sum.clipped += below * down.clipped, sum.beyond += below * down.beyond;
    return sum;
  }

  // gmpo's derivative in a log-ratio already holds the trajectory's factors.
  TK_INLINE void correct(Term<V>& term, const V& factor) const {
    term.loss *= factor, term.d_logprob *= factor;
    if (options.form != Form::gmpo) term.d_log_ratio *= factor;
  }

  // The weighted loss and the gradients. The options branch inside the loop, always the same way: nothing is stored
  // between stages, and the code is there once. At sequence level the log-ratio's gradient, in `first`, waits for its
  // trajectory's sum.
  TK_INLINE void form() {
    Sum<V> losses, clipped, below, above, log_ratios, ratios, entropies, kls, tokens;
    V largest{};
    in.each([&](int i, int j) TK_INLINE_LAMBDA {
      Lane x = in.lane(i);
      const V ratio = x.token.ratio = exponential(x.token.log_ratio), own = masked(x, ratio), w = at(in.weight, i);
      Term<V> term = in.branches ? policy_of_branch(x, i) : policy(x, i);
      const V times = in.branches ? masked(x, in.rollouts(i)) : V{} + 1;
      const V leaves = in.branches ? in.branch(kLeafCount, i) : V{} + 1;
      clipped.add(j, masked(x, term.clipped));
      const V moved = opaque(x.token.log_ratio);
      below.add(j, moved < 0 ? term.beyond : V{});
      above.add(j, moved > 0 ? term.beyond : V{});
      log_ratios.add(j, times * x.bounded);
      ratios.add(j, times * own);
      if (in.branches) tokens.add(j, times);
      largest = vmax(own, largest);
      if (corrects) correct(term, sampler_factor(options.sampler_correction, in.log_sampler_weight(x, i), params));
      if (options.kl != Kl::none) {
        const Term<V> y = kl(options.kl, x.token.logprob - masked(x, at(in.ref_logprobs, i)), ratio);
        const V coefficient = leaves * params.kl_coef;
        term.loss += coefficient * y.loss, term.d_logprob += coefficient * y.d_logprob;
        if (options.kl == Kl::k3_corrected) term.d_log_ratio += coefficient * y.d_log_ratio;
        kls.add(j, masked(x, times * y.loss));
      }
      if (in.entropy) {
        const V y = masked(x, at(in.entropy, i));
        term.loss -= leaves * params.entropy_coef * y;
        entropies.add(j, times * y);
      }
      losses.add(j, masked(x, w * term.loss));
      if (in.sequence_level)
        store<W>(first + i, masked(x, term.d_log_ratio));
      else
        term.d_logprob += in.through_clamp(x, term.d_log_ratio);
      if (options.need_logprobs) write(in.job.grad_logprobs, i, masked(x, w * term.d_logprob));
      if (options.need_entropy) write(in.job.grad_entropy, i, masked(x, w * leaves * -params.entropy_coef));
    });
    totals.loss = losses.fold(), totals[Metric::clip_fraction] = clipped.fold();
    totals[Metric::clip_low] = below.fold(), totals[Metric::clip_high] = above.fold();
    totals[Metric::approx_kl] = -log_ratios.fold();
    const double ratio = totals[Metric::ratio_mean] = ratios.fold();
    totals[Metric::ratio_max] = std::isnan(ratio) ? ratio : fold_max<W>(largest);
    totals[Metric::entropy] = entropies.fold(), totals[Metric::kl] = kls.fold();
    totals[Metric::num_tokens] = tokens.fold();
  }

  // Of w, the ratio of the old policy to the sampler: a loop of its own, so that the one above is no slower without it.
  TK_INLINE void measure_sampler() {
    Sum<V> ratios, kls, outsides, squares;
    in.each([&](int i, int j) TK_INLINE_LAMBDA {
      const Lane x = in.lane(i);
      const V times = in.branches ? masked(x, in.rollouts(i)) : V{} + 1;
      const V log_w = in.log_sampler_weight(x, i), w = exponential(log_w), share = times * masked(x, w);
      const V low = w < Real(kSamplerLow) ? V{} + 1 : V{}, high = w > Real(kSamplerHigh) ? V{} + 1 : V{};
      ratios.add(j, share);
      kls.add(j, times * exp_above_tangent(log_w));
      outsides.add(j, times * (low + high));
      squares.add(j, share * w);
    });
    totals.sampler_ratio = ratios.fold(), totals[Metric::effective_sample_size] = squares.fold();
    totals[Metric::sampler_kl] = kls.fold(), totals[Metric::sampler_outside] = outsides.fold();
  }

  TK_INLINE void write(Real* to, int i, const V& x) const {
    to += in.begin + i;
    if (i + W <= in.length) return store<W>(to, x);
    Real tail[W];
    store<W>(tail, x);
    for (int l = 0; i + l < in.length; ++l) to[l] = tail[l];
  }

  TK_INLINE void add_sequence_gradient() {
    in.each([&](int i, int) TK_INLINE_LAMBDA {
      const Lane x = in.lane(i);
      store<W>(first + i, masked(x, in.through_clamp(x, at(in.value, i))));
    });
    for (int i = 0; i < in.length; ++i) in.job.grad_logprobs[in.begin + i] += first[i];
  }

  // first = the log-ratio, second = log w of the sampler correction.
  TK_INLINE void statistics() {
    in.each([&](int i, int) TK_INLINE_LAMBDA {
      const Lane x = in.lane(i);
      store<W>(first + i, x.bounded);
      if (in.sampler_logprobs) store<W>(second + i, in.log_sampler_weight(x, i));
    });
  }

  // first = gmpo's bounded log-ratio, second = A, third = the factor of the policy term.
  TK_INLINE void geometric_terms() {
    in.each([&](int i, int) TK_INLINE_LAMBDA {
      const Lane x = in.lane(i);
      const V factor =
          corrects ? sampler_factor(options.sampler_correction, in.log_sampler_weight(x, i), params) : V{} + 1;
      store<W>(first + i, gmpo_log_ratio(x.token.advantage, x.token.log_ratio, params));
      store<W>(second + i, x.token.advantage);
      store<W>(third + i, masked(x, factor));
    });
  }

  // The sum of a trajectory's part of a buffer; its lanes start with the part.
  static TK_INLINE double sum_of(const Real* x, int n) {
    Sum<V> sum;
    int i = 0;
    for (; i + kStep <= n; i += kStep)
      for (int j = 0; j < kStep; j += W) sum.add(j, at(x, i + j));
    Real rest[kStep] = {};
    std::copy_n(x + i, n - i, rest);
    for (int j = 0; j < kStep; j += W) sum.add(j, at(rest, j));
    return sum.fold();
  }
};

}  // namespace tk::policy
