// The tokens of a run, in vectors: a masked one, and the padding behind the last, is read as zeros.
#pragma once
#include "policy_loss_job.h"

namespace tk::policy {

constexpr int kStep = 16;  // tokens; every sum has as many partial sums, whatever the width of a vector

template <class V>
struct Tokens {
  using Real = Scalar<V>;
  static constexpr int W = kLanes<V>, kSize = kRun + kStep;  // room for a whole step
  using Bits = Vec<std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>, W>;

  const Job<Real>& job;
  const Options options = job.options;
  const bool branches = job.branch_stride, sequence_level = options.sequence_level();
  const int rows = branches ? kBranchRows : 1;
  int64_t begin = 0;
  int length = 0;
  const Real *logprobs, *old_logprobs, *ref_logprobs, *sampler_logprobs, *entropy;  // of the run
  const uint8_t *mask, *selected;
  alignas(64) Real advantages[kBranchRows][kSize];  // the first row without a branch
  alignas(64) Real weight[kSize], level[kSize], value[kSize], value_alt[kSize];
  Real copies[5][kSize];
  uint8_t flag_copies[2][kSize];

  TK_INLINE explicit Tokens(const Job<Real>& job) : job(job) {}

  TK_INLINE void open(const Run& run) {
    begin = run.begin, length = run.length;
    logprobs = part(job.logprobs, copies[0]), old_logprobs = part(job.old_logprobs, copies[1]);
    ref_logprobs = part(job.ref_logprobs, copies[2]), sampler_logprobs = part(job.sampler_logprobs, copies[3]);
    entropy = part(job.entropy, copies[4]);
    mask = part(job.mask, flag_copies[0]), selected = part(job.selected, flag_copies[1]);
    spread(run);
  }

  // f(index in the buffers, index in the step) for every vector.
  template <class F>
  TK_INLINE void each(const F& f) const {
    const int n = length;
    for (int i = 0; i < n; i += kStep)
      for (int j = 0; j < kStep; j += W) f(i + j, j);
  }

  static TK_INLINE V at(const Real* x, int i) { return load<W>(x + i); }
  static TK_INLINE V masked(const Bits& kept, const V& x) { return bit_cast<V>(bit_cast<Bits>(x) & kept); }

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
    x.token.advantage = masked(x.kept, at(advantages[kPositive], i));
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
  // The gradient in logprob - old_logprob of what has this gradient in the clamped value.
  static TK_INLINE V through_clamp(const Lane& x, const V& grad) { return x.difference == x.bounded ? grad : V{}; }

  TK_INLINE V branch(BranchRow row, int i) const { return at(advantages[row], i); }
  // The rollouts that share a token.
  TK_INLINE V rollouts(int i) const {
    return branch(kPositiveCount, i) + branch(kNegativeCount, i) + branch(kZeroCount, i);
  }

 private:
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

  // The run's part of x, readable up to a whole step: a copy at the pack's end.
  template <class T>
  TK_INLINE const T* part(const T* x, T* copy) const {
    if (!x || begin + (length + kStep - 1) / kStep * kStep <= job.tokens) return x ? x + begin : x;
    std::fill(std::copy_n(x + begin, length, copy), copy + kSize, T(0));
    return copy;
  }

  static TK_INLINE void fill(Real* to, Real x, int n) {
    for (int i = 0; i < n; i += W) store<W>(to + i, V{} + x);
  }
  TK_INLINE const Real* row_of(int row) const { return job.advantages + row * job.branch_stride; }

  // What the trajectories share, to their tokens; weight 0 behind the last.
  TK_INLINE void spread(const Run& run) {
    const bool has_values = options.form == Form::gmpo || options.form == Form::vespo;
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
};

}  // namespace tk::policy
