// The metrics of the policy loss: the sums over tokens that they are made of, and how a batch's come of its runs'.
#pragma once
#include <iterator>

#include "policy_loss_job.h"

namespace tk::policy {

enum class Metric : int {
  clip_fraction,
  clip_low,
  clip_high,
  approx_kl,
  ratio_mean,
  ratio_max,
  entropy,
  kl,
  sampler_kl,
  sampler_outside,
  effective_sample_size,
  num_tokens
};
constexpr int members(Metric) { return 12; }
constexpr int kMetrics = members(Metric{});

enum class Reduction : int { mean, largest, sum, effective_share };
constexpr int members(Reduction) { return 4; }
enum class Needs : int { nothing, entropy, ref_logprobs, sampler_logprobs };
struct Rule {
  Reduction reduction;
  Needs needs;
};
constexpr Rule kRules[] = {
    {Reduction::mean, Needs::nothing},                      // clip_fraction
    {Reduction::mean, Needs::nothing},                      // clip_low
    {Reduction::mean, Needs::nothing},                      // clip_high
    {Reduction::mean, Needs::nothing},                      // approx_kl
    {Reduction::mean, Needs::nothing},                      // ratio_mean
    {Reduction::largest, Needs::nothing},                   // ratio_max
    {Reduction::mean, Needs::entropy},                      // entropy
    {Reduction::mean, Needs::ref_logprobs},                 // kl
    {Reduction::mean, Needs::sampler_logprobs},             // sampler_kl
    {Reduction::mean, Needs::sampler_logprobs},             // sampler_outside
    {Reduction::effective_share, Needs::sampler_logprobs},  // effective_sample_size
    {Reduction::sum, Needs::nothing},                       // num_tokens
};
static_assert(std::size(kRules) == kMetrics, "a rule a metric");

constexpr double kSamplerLow = 0.5, kSamplerHigh = 2;  // outside, a ratio to the sampler counts as sampler_outside

// Of a run: of each metric the sum of its values, of ratio_max the largest, of effective_sample_size the squares'.
struct RunTotals {
  double loss = 0, sampler_ratio = 0;
  double of[kMetrics] = {};

  double& operator[](Metric m) { return of[int(m)]; }
  void add(const RunTotals& x) {
    loss += x.loss, sampler_ratio += x.sampler_ratio;
    for (int m = 0; m < kMetrics; ++m) {
      if (kRules[m].reduction != Reduction::largest)
        of[m] += x.of[m];
      else if (!(x.of[m] <= of[m]))  // a NaN stays
        of[m] = x.of[m];
    }
  }
};

// Of the terms with weights of their own, the weighted log-probs and the weighted estimates of the KL.
struct StreamTotals {
  double logprobs = 0, kl = 0;
};

template <class Real>
bool given(const Job<Real>& job, Needs needs) {
  switch (needs) {
    case Needs::nothing:
      return true;
    case Needs::entropy:
      return job.entropy;
    case Needs::ref_logprobs:
      return job.ref_logprobs;
    case Needs::sampler_logprobs:
      return job.sampler_logprobs;
  }
  __builtin_unreachable();
}

inline double reduced(Reduction reduction, double total, double ratios, double count) {
  switch (reduction) {
    case Reduction::mean:
      return total / std::max(count, 1.0);
    case Reduction::effective_share:
      return ratios * ratios / (count > 0 ? count * total : 1);
    case Reduction::largest:
    case Reduction::sum:
      return total;
  }
  __builtin_unreachable();
}

template <class Real>
void write_results(const Job<Real>& job, const std::vector<RunTotals>& runs, const StreamTotals& streams,
                   double tokens) {
  RunTotals sum;
  for (const RunTotals& run : runs) sum.add(run);
  if (!job.branch_stride) sum[Metric::num_tokens] = tokens;
  const double count = sum[Metric::num_tokens];
  double loss = sum.loss;
  for (int m = 0; m < kMetrics; ++m)
    job.metrics[m] = given(job, kRules[m].needs) ? reduced(kRules[m].reduction, sum.of[m], sum.sampler_ratio, count)
                                                 : std::numeric_limits<double>::quiet_NaN();
  if (job.kl.weights) {
    const double kl = job.kl.unit * streams.kl;
    job.metrics[int(Metric::kl)] = kl, loss += Params<double>(job.params).kl_coef * kl;
  }
  if (job.supervised.weights) {
    const double supervised = -job.supervised.unit * streams.logprobs;
    job.metrics[kMetrics] = supervised, loss += supervised;
  }
  *job.loss = loss;
}

}  // namespace tk::policy
