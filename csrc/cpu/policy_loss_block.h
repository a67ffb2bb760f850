// A run of tokens of a packed batch and the stages of the policy loss over it. A masked token, and the padding behind
// the last one, is read as zeros.
#pragma once
#include <algorithm>
#include <vector>

#include "policy_loss_terms.h"

namespace tk::policy {

constexpr int kRun = 512;      // tokens
constexpr int kSumLanes = 16;  // every sum has as many partial sums, whatever the width of a vector

struct Run {
  int64_t begin, trajectory;  // first token, and the trajectory it lies in
  int length;
};

struct Options {
  Form form;
  RatioLevel ratio_level;
  Kl kl;
  Aggregate aggregate;
  Correction sampler_correction;
  bool per_token, need_logprobs, need_entropy;  // the gradients in them

  bool sequence_level() const { return ratio_level == kSequence; }
};

// What the tokens of a trajectory share. Weight 0: no unmasked token, or removed by the sequence mask.
template <class Real>
struct Shared {
  Real weight = 1, log_ratio = 0, value = 0, value_alt = 0;  // the values: what gmpo() and vespo() take
};

// The rows of a branch's advantages: sums over the leaves below a token, and how many have each sign of advantage.
enum BranchRow { kPositive, kNegative, kLeafWeight, kPositiveCount, kNegativeCount, kZeroCount, kBranchRows };

struct RunTotals {
  double loss = 0, clipped = 0, log_ratio = 0, ratio = 0, ratio_max = 0, entropy = 0, kl = 0, tokens = 0;
};

template <class Real>
struct Job {
  const Real *logprobs, *old_logprobs, *advantages, *ref_logprobs, *sampler_logprobs, *entropy, *normalizer;
  const int64_t* cu_seqlens;
  const uint8_t *mask, *selected;
  Real *loss, *metrics, *grad_logprobs, *grad_entropy;
  int64_t tokens, trajectories, branch_stride;  // between a branch's rows in advantages; 0: there is none
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

// A sum over vectors V in kSumLanes lanes; they are added in double.
template <class V>
struct Sum {
  static constexpr int W = kLanes<V>;
  V parts[kSumLanes / W] = {};

  // i: the index of x's first element, a multiple of the lanes of V, in its step.
  TK_INLINE void add(int i, const V& x) { parts[i / W] += x; }
  TK_INLINE double fold() const { return fold_sum<W>(parts); }
};

// A run of tokens, in vectors V, and the stages over it.
template <class V>
struct Block {
  using Real = Scalar<V>;
  static constexpr int W = kLanes<V>, kStep = kSumLanes, kSize = kRun + kStep;  // room for a whole step
  using Bits = Vec<std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>, W>;

  const Job<Real>& job;
  const Options options = job.options;
  const Params<Real> params{job.params};
  const bool corrects = options.sampler_correction == kTis || options.sampler_correction == kIcepop;
  const bool branches = job.branch_stride, sequence_level = options.sequence_level();
  const int rows = branches ? kBranchRows : 1;
  int64_t begin = 0;
  int length = 0;
  RunTotals totals;
  const Real *logprobs, *old_logprobs, *ref_logprobs, *sampler_logprobs, *entropy;  // of the run
  const uint8_t *mask, *selected;
  alignas(64) Real advantages[kBranchRows][kSize];  // the first row without a branch
  alignas(64) Real weight[kSize], level[kSize], value[kSize], value_alt[kSize];
  alignas(64) Real first[kSize], second[kSize], third[kSize];  // results of a stage
  Real copies[5][kSize];
  uint8_t flag_copies[2][kSize];

  TK_INLINE explicit Block(const Job<Real>& job) : job(job) {}

  // f(index in the buffers, index in the step) for every vector.
  template <class F>
  TK_INLINE void each(const F& f) const {
    const int n = length;
    for (int i = 0; i < n; i += kStep)
      for (int j = 0; j < kStep; j += W) f(i + j, j);
  }

  static TK_INLINE V at(const Real* x, int i) { return load<W>(x + i); }
  static TK_INLINE V masked(const Bits& kept, const V& x) { return bit_cast<V>(bit_cast<Bits>(x) & kept); }
  static TK_INLINE Bits flags(const uint8_t* x, int i) {
    Vec<uint8_t, W> bytes;
    std::memcpy(&bytes, x + i, sizeof(bytes));
    const auto words = __builtin_convertvector(bytes, Vec<uint16_t, W>);  // g++ 12 widens past double lane by lane
    return __builtin_convertvector(__builtin_convertvector(words, Vec<int32_t, W>), Bits);
  }
  // All bits set where the token takes part, else none.
  TK_INLINE Bits unmasked(int i) const {
    Bits all = at(weight, i) == 0 ? Bits{} : Bits{} - 1;
    if (branches) all = rollouts(i) == 0 ? Bits{} : all;
    if (!mask) return all;
    return flags(mask, i) == 0 ? Bits{} : all;
  }
  static TK_INLINE void fill(Real* to, Real x, int n) {
    for (int i = 0; i < n; i += W) store<W>(to + i, V{} + x);
  }

  // The run's part of x, readable up to a whole step: a copy at the pack's end.
  template <class T>
  TK_INLINE const T* part(const T* x, T* copy) const {
    if (!x || begin + (length + kStep - 1) / kStep * kStep <= job.tokens) return x ? x + begin : x;
    std::fill(std::copy_n(x + begin, length, copy), copy + kSize, T(0));
    return copy;
  }

  TK_INLINE void open(const Run& run) {
    begin = run.begin, length = run.length;
    logprobs = part(job.logprobs, copies[0]), old_logprobs = part(job.old_logprobs, copies[1]);
    ref_logprobs = part(job.ref_logprobs, copies[2]), sampler_logprobs = part(job.sampler_logprobs, copies[3]);
    entropy = part(job.entropy, copies[4]);
    mask = part(job.mask, flag_copies[0]), selected = part(job.selected, flag_copies[1]);
    spread(run);
  }

  TK_INLINE const Real* row_of(int row) const { return job.advantages + row * job.branch_stride; }

  // What the trajectories share, to their tokens; weight 0 behind the last.
  TK_INLINE void spread(const Run& run) {
    const bool has_values = options.form == kGmpo || options.form == kVespo;
    for_parts(job.cu_seqlens, run, [&](int64_t n, int offset, int count) TK_INLINE_LAMBDA {
      const Shared<Real> x = job.shared[n];
      fill(weight + offset, x.weight, count);
      for (int row = 0; row < rows && !options.per_token; ++row) fill(advantages[row] + offset, row_of(row)[n], count);
      if (sequence_level) fill(level + offset, x.log_ratio, count);
      if (sequence_level || has_values) fill(value + offset, x.value, count);
      if (has_values) fill(value_alt + offset, x.value_alt, count);
    });
    fill(weight + length, 0, kStep);
    for (int row = 0; row < rows && options.per_token; ++row) std::copy_n(row_of(row) + begin, length, advantages[row]);
  }

  // The rollouts that share a token.
  TK_INLINE V rollouts(int i) const {
    return at(advantages[kPositiveCount], i) + at(advantages[kNegativeCount], i) + at(advantages[kZeroCount], i);
  }

  // Of a token, with zeros where it is masked.
  struct Lane {
    Bits kept;
    Token<V> token;
    V difference, bounded;  // logprob - old_logprob
  };
  TK_INLINE Lane lane(int i) const {
    Lane x;
    x.kept = unmasked(i);
    x.token.logprob = masked(x.kept, at(logprobs, i)), x.token.old_logprob = masked(x.kept, at(old_logprobs, i));
    x.difference = x.token.logprob - x.token.old_logprob;
    x.bounded = clamp(x.difference, -kLogRatioBound, kLogRatioBound);
    x.token.log_ratio = sequence_level ? masked(x.kept, at(level, i)) : x.bounded;
    x.token.advantage = masked(x.kept, at(advantages[0], i));
    return x;
  }
  TK_INLINE V chosen(const Lane& x, int i) const {
    if (!selected) return V{};
    return masked(x.kept, flags(selected, i) == 0 ? V{} : V{} + 1);
  }
  TK_INLINE V log_sampler_weight(const Lane& x, int i) const {
    const V d = x.token.old_logprob - masked(x.kept, at(sampler_logprobs, i));
    return clamp(d, -kLogRatioBound, kLogRatioBound);
  }

  TK_INLINE Term<V> policy(const Lane& x, int i) const {
    const Token<V>& t = x.token;
    switch (options.form) {
      case kClip:
        return selected ? drop(clip(t, params), chosen(x, i)) : clip(t, params);
      case kCispo:
        return cispo(t, params);
      case kSapo:
        return sapo(t, params);
      case kReinforce:
        return reinforce(t);
      case kDppoTv:
        return dppo_tv(t, params);
      case kDppoKl:
        return dppo_kl(t, params);
      case kKlCov:
        return kl_cov(t, chosen(x, i), params);
      case kGmpo:
        return gmpo(t, at(value, i), at(value_alt, i), params);
      case kVespo:
        return vespo(t, at(value, i), at(value_alt, i));
    }
    __builtin_unreachable();
  }

  // The forms that a branch can have are linear in A > 0, and in A < 0: their sums over the leaves are those of the
  // sums of either.
  TK_INLINE Term<V> policy_of_branch(Lane& x, int i) const {
    Term<V> sum = policy(x, i);
    sum.clipped *= at(advantages[kPositiveCount], i);
    x.token.advantage = masked(x.kept, at(advantages[kNegative], i));
    const Term<V> down = policy(x, i);
    sum.loss += down.loss, sum.d_log_ratio += down.d_log_ratio, sum.d_logprob += down.d_logprob;
    const V level = options.form == kClip ? V{} : at(advantages[kZeroCount], i);  // clipped as A < 0 is, or never
    sum.clipped += (at(advantages[kNegativeCount], i) + level) * down.clipped;
    return sum;
  }

  // gmpo's derivative in a log-ratio already holds the trajectory's factors.
  TK_INLINE void correct(Term<V>& term, const V& factor) const {
    term.loss *= factor, term.d_logprob *= factor;
    if (options.form != kGmpo) term.d_log_ratio *= factor;
  }

  // The weighted loss and the gradients. The options branch inside the loop, always the same way: nothing is stored
  // between stages, and the code is there once. At sequence level the log-ratio's gradient, in `first`, waits for its
  // trajectory's sum.
  TK_INLINE void form() {
    Sum<V> losses, clipped, log_ratios, ratios, entropies, kls, tokens;
    V largest{};
    each([&](int i, int j) TK_INLINE_LAMBDA {
      Lane x = lane(i);
      const V ratio = x.token.ratio = exponential(x.token.log_ratio), own = masked(x.kept, ratio), w = at(weight, i);
      Term<V> term = branches ? policy_of_branch(x, i) : policy(x, i);
      const V times = branches ? masked(x.kept, rollouts(i)) : V{} + 1;
      const V leaves = branches ? at(advantages[kLeafWeight], i) : V{} + 1;
      clipped.add(j, masked(x.kept, term.clipped));
      log_ratios.add(j, times * x.bounded);
      ratios.add(j, times * own);
      if (branches) tokens.add(j, times);
      largest = vmax(own, largest);
      if (corrects) correct(term, sampler_factor(options.sampler_correction, log_sampler_weight(x, i), params));
      if (options.kl != kNone) {
        const Term<V> y = kl(options.kl, x.token.logprob - masked(x.kept, at(ref_logprobs, i)), ratio);
        const V coefficient = leaves * params.kl_coef;
        term.loss += coefficient * y.loss, term.d_logprob += coefficient * y.d_logprob;
        if (options.kl == kK3Corrected) term.d_log_ratio += coefficient * y.d_log_ratio;
        kls.add(j, masked(x.kept, times * y.loss));
      }
      if (entropy) {
        const V y = masked(x.kept, at(entropy, i));
        term.loss -= leaves * params.entropy_coef * y;
        entropies.add(j, times * y);
      }
      losses.add(j, masked(x.kept, w * term.loss));
      if (sequence_level)
        store<W>(first + i, masked(x.kept, term.d_log_ratio));
      else
        term.d_logprob += through_clamp(x, term.d_log_ratio);
      if (options.need_logprobs) write(job.grad_logprobs, i, masked(x.kept, w * term.d_logprob));
      if (options.need_entropy) write(job.grad_entropy, i, masked(x.kept, w * leaves * -params.entropy_coef));
    });
    totals.loss = losses.fold(), totals.clipped = clipped.fold(), totals.log_ratio = log_ratios.fold();
    totals.ratio = ratios.fold(), totals.ratio_max = fold_max<W>(largest);
    totals.entropy = entropies.fold(), totals.kl = kls.fold(), totals.tokens = tokens.fold();
  }

  TK_INLINE void write(Real* to, int i, const V& x) const {
    to += begin + i;
    if (i + W <= length) return store<W>(to, x);
    Real tail[W];
    store<W>(tail, x);
    for (int l = 0; i + l < length; ++l) to[l] = tail[l];
  }

  // The gradient in logprob - old_logprob of what has this gradient in the clamped value.
  static TK_INLINE V through_clamp(const Lane& x, const V& grad) { return x.difference == x.bounded ? grad : V{}; }

  TK_INLINE void add_sequence_gradient() {
    each([&](int i, int) TK_INLINE_LAMBDA {
      const Lane x = lane(i);
      store<W>(first + i, masked(x.kept, through_clamp(x, at(value, i))));
    });
    for (int i = 0; i < length; ++i) job.grad_logprobs[begin + i] += first[i];
  }

  // first = the log-ratio, second = log w of the sampler correction.
  TK_INLINE void statistics() {
    each([&](int i, int) TK_INLINE_LAMBDA {
      const Lane x = lane(i);
      store<W>(first + i, x.bounded);
      if (sampler_logprobs) store<W>(second + i, log_sampler_weight(x, i));
    });
  }

  // first = gmpo's bounded log-ratio, second = A, third = the factor of the policy term.
  TK_INLINE void geometric_terms() {
    each([&](int i, int) TK_INLINE_LAMBDA {
      const Lane x = lane(i);
      const V factor =
          corrects ? sampler_factor(options.sampler_correction, log_sampler_weight(x, i), params) : V{} + 1;
      store<W>(first + i, directed_log_ratio(x.token.advantage, x.token.log_ratio, params));
      store<W>(second + i, x.token.advantage);
      store<W>(third + i, masked(x.kept, factor));
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
