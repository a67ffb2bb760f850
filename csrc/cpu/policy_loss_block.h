// A run of tokens of a packed batch and the stages of the policy loss over it, in buffers that stay in the first-level
// cache. A masked token, and the padding behind the last one, is read as zeros.
#pragma once
#include <algorithm>
#include <vector>

#include "policy_loss_terms.h"

namespace tk::policy {

constexpr int kRun = 512;     // tokens
constexpr int kSumLanes = 8;  // every sum has as many partial sums, whatever the width of a vector

struct Run {
  int64_t begin, trajectory;  // first token, and the trajectory it lies in
  int length;
};

struct Options {  // in the order of the launcher's
  int form, sequence_level, kl, aggregate, correction, per_token, need_grad_logprobs, need_grad_entropy;
};

// What the tokens of a trajectory share. Weight 0: no unmasked token, or removed by the sequence mask.
template <class Real>
struct Shared {
  Real weight = 1, log_ratio = 0, value = 0, value_alt = 0;  // the values as in Token
};

struct RunTotals {
  double loss = 0, clipped = 0, log_ratio = 0, ratio = 0, ratio_max = 0, entropy = 0, kl = 0;
};

template <class Real>
struct Job {
  const Real *logprobs, *old_logprobs, *advantages, *ref_logprobs, *sampler_logprobs, *entropy, *normalizer;
  const int64_t* cu_seqlens;
  const uint8_t *mask, *selected;
  Real *loss, *metrics, *grad_logprobs, *grad_entropy;
  int64_t tokens, trajectories;
  Options options;
  std::array<double, 15> params;
  std::vector<Run> runs;
  std::vector<Shared<Real>> shared;
};

// f(trajectory, offset in the run, length) for every trajectory's part of a run.
template <class F>
TK_INLINE void for_parts(const int64_t* cu_seqlens, const Run& run, const F& f) {
  int64_t n = run.trajectory;
  for (int offset = 0; offset < run.length; ++n) {
    const int end = std::min<int64_t>(cu_seqlens[n + 1] - run.begin, run.length);
    if (end > offset) f(n, offset, end - offset);
    offset = end;
  }
}

// A sum over vectors V, in kSumLanes lanes of double; half a vector fills a vector of doubles.
template <class V>
struct Sum {
  static constexpr int kHalf = kLanes<V> / 2, kParts = kSumLanes / kHalf;
  using Wide = Vec<double, kHalf>;
  Wide parts[kParts] = {};

  // i: the index of x's first element, a multiple of the lanes of V.
  TK_INLINE void add(int i, const V& x) {
    const auto wide = __builtin_convertvector(x, Vec<double, kLanes<V>>);
    Wide half[2];
    std::memcpy(half, &wide, sizeof(half));
    for (int h = 0; h < 2; ++h) parts[(i / kHalf + h) % kParts] += half[h];
  }
  TK_INLINE double fold() const {
    double lane[kSumLanes];
    std::memcpy(lane, parts, sizeof(lane));
    for (int half = kSumLanes / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
  }
};

// A run of tokens, in vectors V, and the stages over it.
template <class V>
struct Block {
  using Real = Scalar<V>;
  static constexpr int W = kLanes<V>, kStep = std::max(W, kSumLanes), kSize = kRun + kStep;  // room for a whole step
  using Int = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  using Bits = Vec<Int, W>;

  const Job<Real>& job;
  const Options options = job.options;
  const Params<Real> params{job.params};
  const bool corrects = options.correction == kTis || options.correction == kIcepop;
  int64_t begin = 0;
  int length = 0;
  RunTotals totals;
  alignas(64) Int unmasked[kSize];  // all bits set, or none
  alignas(64) Real weight[kSize], advantage[kSize], selected[kSize], level[kSize], value[kSize], value_alt[kSize];
  alignas(64) Real difference[kSize], log_ratio[kSize], ratio[kSize], loss[kSize], d_log_ratio[kSize], d_logprob[kSize];

  TK_INLINE explicit Block(const Job<Real>& job) : job(job) {}

  // f(index in the buffers, the same for sums) for every vector.
  template <class F>
  TK_INLINE void each(const F& f) const {
    const int n = length;
    for (int i = 0; i < n; i += kStep)
      for (int j = 0; j < kStep; j += W) f(i + j, j);
  }

  static TK_INLINE V at(const Real* x, int i) { return load<W>(x + i); }
  TK_INLINE V masked(int i, const V& x) const {
    Bits bits;
    std::memcpy(&bits, unmasked + i, sizeof(bits));
    return bit_cast<V>(bit_cast<Bits>(x) & bits);
  }
  // Of n tokens in the pack.
  TK_INLINE V read(const Real* from, int i, int n) const {
    if (i + W <= n) return masked(i, at(from, i));
    V x{};
    for (int l = 0; i + l < n; ++l) x[l] = from[i + l];
    return masked(i, x);
  }
  static TK_INLINE void write(Real* to, int i, int n, const V& x) {
    if (i + W <= n) return store<W>(to + i, x);
    for (int l = 0; i + l < n; ++l) to[i + l] = x[l];
  }
  static TK_INLINE void fill(Real* to, Real x, int n) {
    for (int i = 0; i < n; i += W) store<W>(to + i, V{} + x);
  }

  TK_INLINE void open(const Run& run) {
    begin = run.begin, length = run.length, totals = {};
    spread(run);
    read_mask();
    const int n = length;
    const Real *now = job.logprobs + begin, *old = job.old_logprobs + begin;
    Sum<V> sum;
    each([&](int i, int j) TK_INLINE_LAMBDA {
      const V d = read(now, i, n) - read(old, i, n), l = clamp(d, -kLogRatioBound, kLogRatioBound);
      store<W>(difference + i, d);
      store<W>(log_ratio + i, l);
      sum.add(j, l);
    });
    totals.log_ratio = sum.fold();
  }

  // What the trajectories share, to their tokens.
  TK_INLINE void spread(const Run& run) {
    const bool has_values = options.form == kGmpo || options.form == kVespo;
    for_parts(job.cu_seqlens, run, [&](int64_t n, int offset, int count) TK_INLINE_LAMBDA {
      const Shared<Real> x = job.shared[n];
      fill(weight + offset, x.weight, count);
      if (!options.per_token) fill(advantage + offset, job.advantages[n], count);
      if (options.sequence_level) fill(level + offset, x.log_ratio, count);
      if (options.sequence_level || has_values) fill(value + offset, x.value, count);
      if (has_values) fill(value_alt + offset, x.value_alt, count);
    });
    if (options.per_token) std::copy_n(job.advantages + begin, length, advantage);
  }

  TK_INLINE void read_mask() {
    const int n = length;
    std::fill_n(unmasked, n, Int(-1));
    if (job.mask) {
      const uint8_t* mask = job.mask + begin;
      for (int i = 0; i < n; ++i) unmasked[i] = mask[i] ? -1 : 0;
    }
    std::fill_n(unmasked + n, kStep, Int(0));
    for (int i = 0; i < n; ++i) unmasked[i] = weight[i] == 0 ? 0 : unmasked[i];
  }

  template <class F>
  TK_INLINE void policy(const F& term) {
    const int n = length;
    const Real *now = job.logprobs + begin, *old = job.old_logprobs + begin;
    const Real* logs = options.sequence_level ? level : log_ratio;
    Sum<V> ratios, clipped;
    V largest{};
    each([&](int i, int j) TK_INLINE_LAMBDA {
      const V l = at(logs, i), r = exponential(l), own = masked(i, r);
      const Term<V> x = term(Token<V>{masked(i, at(advantage, i)), l, r, read(now, i, n), read(old, i, n),
                                      masked(i, at(selected, i)), at(value, i), at(value_alt, i)});
      store<W>(ratio + i, r);
      store<W>(loss + i, x.loss);
      store<W>(d_log_ratio + i, x.d_log_ratio);
      store<W>(d_logprob + i, x.d_logprob);
      clipped.add(j, masked(i, x.clipped));
      ratios.add(j, own);
      largest = vmax(own, largest);
    });
    totals.clipped = clipped.fold(), totals.ratio = ratios.fold(), totals.ratio_max = fold_max<W>(largest);
  }

  TK_INLINE void read_selected() {
    const int n = length;
    std::fill_n(selected, n, Real(0));
    if (!job.selected) return;
    const uint8_t* flags = job.selected + begin;
    for (int i = 0; i < n; ++i) selected[i] = flags[i] ? 1 : 0;
  }

  TK_INLINE void policy() {
    using T = Token<V>;
    const Params<Real> p = params;
    if (job.selected || options.form == kKlCov) read_selected();
    switch (options.form) {
      case kClip:
        if (job.selected) return policy([&](const T& t) TK_INLINE_LAMBDA { return clip_selected(t, p); });
        return policy([&](const T& t) TK_INLINE_LAMBDA { return clip(t, p); });
      case kCispo: return policy([&](const T& t) TK_INLINE_LAMBDA { return cispo(t, p); });
      case kSapo: return policy([&](const T& t) TK_INLINE_LAMBDA { return sapo(t, p); });
      case kReinforce: return policy([&](const T& t) TK_INLINE_LAMBDA { return reinforce(t); });
      case kDppoTv: return policy([&](const T& t) TK_INLINE_LAMBDA { return dppo_tv(t, p); });
      case kDppoKl: return policy([&](const T& t) TK_INLINE_LAMBDA { return dppo_kl(t, p); });
      case kKlCov: return policy([&](const T& t) TK_INLINE_LAMBDA { return kl_cov(t, p); });
      case kGmpo: return policy([&](const T& t) TK_INLINE_LAMBDA { return gmpo(t, p); });
      default: return policy([&](const T& t) TK_INLINE_LAMBDA { return vespo(t); });
    }
  }

  TK_INLINE V log_sampler_weight(int i) const {
    const V d = read(job.old_logprobs + begin, i, length) - read(job.sampler_logprobs + begin, i, length);
    return clamp(d, -kLogRatioBound, kLogRatioBound);
  }

  TK_INLINE void correct() {
    const bool own = options.form != kGmpo;  // gmpo's derivative already holds the trajectory's factors
    each([&](int i, int) TK_INLINE_LAMBDA {
      const V factor = sampler_factor(options.correction, log_sampler_weight(i), params);
      store<W>(loss + i, at(loss, i) * factor);
      store<W>(d_logprob + i, at(d_logprob, i) * factor);
      if (own) store<W>(d_log_ratio + i, at(d_log_ratio, i) * factor);
    });
  }

  template <int estimator>
  TK_INLINE void add_kl() {
    const int n = length;
    const Real *now = job.logprobs + begin, *ref = job.ref_logprobs + begin;
    const Real coef = params.kl_coef;
    Sum<V> sum;
    each([&](int i, int j) TK_INLINE_LAMBDA {
      const Term<V> x = kl<estimator>(read(now, i, n) - read(ref, i, n), at(ratio, i));
      store<W>(loss + i, at(loss, i) + coef * x.loss);
      store<W>(d_logprob + i, at(d_logprob, i) + coef * x.d_logprob);
      if (estimator == kK3Corrected) store<W>(d_log_ratio + i, at(d_log_ratio, i) + coef * x.d_log_ratio);
      sum.add(j, masked(i, x.loss));
    });
    totals.kl = sum.fold();
  }

  TK_INLINE void add_kl() {
    switch (options.kl) {
      case kNoKl: return;
      case kK1: return add_kl<kK1>();
      case kK2: return add_kl<kK2>();
      case kK3: return add_kl<kK3>();
      default: return add_kl<kK3Corrected>();
    }
  }

  TK_INLINE void add_entropy() {
    const int n = length;
    const Real* entropy = job.entropy + begin;
    const Real coef = params.entropy_coef;
    Sum<V> sum;
    each([&](int i, int j) TK_INLINE_LAMBDA {
      const V x = read(entropy, i, n);
      store<W>(loss + i, at(loss, i) - coef * x);
      sum.add(j, x);
    });
    totals.entropy = sum.fold();
  }

  // The weighted loss and the gradients. At sequence level the log-ratio's gradient waits for its trajectory's sum.
  TK_INLINE void finish() {
    const int n = length;
    const bool own = !options.sequence_level;
    Real* grad_logprobs = options.need_grad_logprobs ? job.grad_logprobs + begin : nullptr;
    Real* grad_entropy = options.need_grad_entropy ? job.grad_entropy + begin : nullptr;
    const Real coef = -params.entropy_coef;
    Sum<V> sum;
    each([&](int i, int j) TK_INLINE_LAMBDA {
      const V w = at(weight, i), through = own ? through_clamp(i, at(d_log_ratio, i)) : V{};
      sum.add(j, masked(i, w * at(loss, i)));
      if (grad_logprobs) write(grad_logprobs, i, n, masked(i, w * (through + at(d_logprob, i))));
      if (grad_entropy) write(grad_entropy, i, n, masked(i, w * coef));
    });
    totals.loss = sum.fold();
  }

  // The gradient in logprob - old_logprob of what has this gradient in the clamped value.
  TK_INLINE V through_clamp(int i, const V& grad) const { return at(difference, i) == at(log_ratio, i) ? grad : V{}; }

  TK_INLINE void add_sequence_gradient() {
    each([&](int i, int) TK_INLINE_LAMBDA { store<W>(loss + i, masked(i, through_clamp(i, at(value, i)))); });
    for (int i = 0; i < length; ++i) job.grad_logprobs[begin + i] += loss[i];
  }

  // loss = log w of the sampler correction; 0 where masked.
  TK_INLINE void sampler_terms() {
    each([&](int i, int) TK_INLINE_LAMBDA { store<W>(loss + i, log_sampler_weight(i)); });
  }

  // loss = gmpo's bounded log-ratio, advantage = A, ratio = the factor of the policy term; 0 where masked.
  TK_INLINE void geometric_terms() {
    const Real* logs = options.sequence_level ? level : log_ratio;
    each([&](int i, int) TK_INLINE_LAMBDA {
      const V a = masked(i, at(advantage, i));
      const V factor = corrects ? sampler_factor(options.correction, log_sampler_weight(i), params) : V{} + 1;
      store<W>(loss + i, directed_log_ratio(a, at(logs, i), params));
      store<W>(advantage + i, a);
      store<W>(ratio + i, masked(i, factor));
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
