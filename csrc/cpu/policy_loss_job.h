// What a call of the policy loss is about: the packed batch, the options, and what is shared between the passes.
#pragma once
#include <algorithm>
#include <vector>

#include "policy_loss_terms.h"

namespace tk::policy {

constexpr int kRun = 512;  // tokens

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
  bool per_token, need_logprobs, need_entropy;  // advantages; the gradients in them

  bool sequence_level() const { return ratio_level == RatioLevel::sequence; }
};

// What the tokens of a trajectory share. Weight 0: no unmasked token, or removed by the sequence mask.
template <class Real>
struct Shared {
  Real weight = 1, log_ratio = 0, value = 0, value_alt = 0;  // the values: what gmpo() and vespo() take
};

// The rows of a branch's advantages: sums over the leaves below a token, and how many have each sign of advantage.
enum BranchRow : int { kPositive, kNegative, kLeafCount, kPositiveCount, kNegativeCount, kZeroCount };
constexpr int kBranchRows = 6;

// A term whose tokens have weights of their own, null where it is not there; a token of weight 0 takes no part in it.
template <class Real>
struct Stream {
  const Real *weights, *normalizer;
  double unit = 0;  // 1 / the normaliser
};

template <class Real>
struct Job {
  const Real *logprobs, *old_logprobs, *advantages, *ref_logprobs, *sampler_logprobs, *entropy, *normalizer;
  const int64_t* cu_seqlens;
  const uint8_t *mask, *selected;
  Real *loss, *metrics, *grad_logprobs, *grad_entropy;
  int64_t tokens, trajectories, branch_stride;  // between a branch's rows in advantages; 0: there is none
  Options options;
  Parameters params;
  std::vector<Run> runs;
  std::vector<Shared<Real>> shared;
  // last, so that the stages find the others where they were without them
  Stream<Real> supervised, kl;
  Kl weighted_kl;  // the estimator of the second; the options' is of the unmasked tokens
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

}  // namespace tk::policy
