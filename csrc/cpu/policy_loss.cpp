// The policy loss of packed trajectories: the scalar loss, its metrics and its gradients.
//
// One pass over the tokens, before it one that counts the unmasked ones, and after it one for the ratio level
// "sequence" and one for terms with weights of their own. Tokens are taken in runs. A run is cut only at a trajectory's
// start or a multiple of kRun tokens from it, so that a trajectory's sums do not depend on what else is in the pack,
// and no sum on the number of threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <utility>

#include "../common/choice.h"
#include "../common/dtype.h"
#include "../common/parallel.h"
#include "policy_loss_streams.h"

namespace tk::policy {
namespace {

constexpr int64_t kGrain = 8192;  // tokens worth a thread

std::vector<Run> cut(const int64_t* cu_seqlens, int64_t trajectories) {
  std::vector<Run> runs;
  runs.reserve(2 * cu_seqlens[trajectories] / kRun + 1);  // any two neighbours hold more than kRun tokens
  for (int64_t n = 0; n < trajectories; ++n)
    for (int64_t begin = cu_seqlens[n]; begin < cu_seqlens[n + 1]; begin += kRun) {
      const int length = std::min<int64_t>(kRun, cu_seqlens[n + 1] - begin);
      if (runs.empty() || runs.back().length + length > kRun) runs.push_back({begin, n, 0});
      runs.back().length += length;
    }
  return runs;
}

// Sums per trajectory, [N, width]. Only a run's first trajectory can have parts in other runs; they are added in order.
struct TrajectorySums {
  int width;
  std::vector<double> total, first;

  TrajectorySums(int width, int64_t trajectories, size_t runs)
      : width(width), total(width * trajectories), first(width * runs) {}
  double* of(int64_t n) { return &total[width * n]; }
  double* part(const std::vector<Run>& runs, size_t r, int64_t n) {
    return n == runs[r].trajectory ? &first[width * r] : of(n);
  }
  void combine(const std::vector<Run>& runs) {
    for (size_t r = 0; r < runs.size(); ++r)
      for (int s = 0; s < width; ++s) of(runs[r].trajectory)[s] += first[width * r + s];
  }
};

// f(block, run index) for every run, in parallel.
template <class Real, class F>
void for_runs(const Job<Real>& job, const F& f) {
  const std::vector<Run>& runs = job.runs;
  parallel_for(job.tokens, kGrain, [&](int64_t begin, int64_t end) {
    const auto work = [&](auto width) TK_INLINE_LAMBDA {
      Block<Vec<Real, width()>> block(job);
      const auto before = [](const Run& run, int64_t token) { return run.begin < token; };
      size_t r = std::lower_bound(runs.begin(), runs.end(), begin, before) - runs.begin();
      for (; r < runs.size() && runs[r].begin < end; ++r) f(block, r);
    };
    if constexpr (std::is_same_v<Real, float>)
      dispatch(work);
    else
      work(std::integral_constant<int, 2>{});  // where std::exp takes the time
  });
}

// How many of at most kRun bytes are not 0.
TK_INLINE int count_flags(const uint8_t* x, int n) {
  constexpr int kBytes = 16;
  static_assert(kRun / kBytes < 256, "a byte counts a run's share");
  Vec<uint8_t, kBytes> sums{}, bytes;
  int i = 0, count = 0;
  for (; i + kBytes <= n; i += kBytes) {
    std::memcpy(&bytes, x + i, kBytes);
    sums += bytes != 0 ? Vec<uint8_t, kBytes>{} + 1 : Vec<uint8_t, kBytes>{};
  }
  for (; i < n; ++i) count += x[i] != 0;
  for (int l = 0; l < kBytes; ++l) count += sums[l];
  return count;
}

enum Statistic { kCount, kLogRatioSum, kLogSamplerSum, kStatistics };

// Unmasked tokens per trajectory, and where something needs them the sums of the log-ratio and of log w.
template <class Real>
TrajectorySums collect(const Job<Real>& job) {
  TrajectorySums sums(kStatistics, job.trajectories, job.runs.size());
  const bool removes = job.options.sampler_correction == Correction::sequence_mask;
  const bool reads = removes || job.options.sequence_level() || job.options.form == Form::vespo;
  for_runs(job, [&](auto& block, size_t r) TK_INLINE_LAMBDA {
    const Run& run = job.runs[r];
    if (reads) {
      block.open(run);
      block.statistics();
    }
    for_parts(job.cu_seqlens, run, [&](int64_t n, int offset, int length) TK_INLINE_LAMBDA {
      double* part = sums.part(job.runs, r, n);
      part[kCount] = job.mask ? count_flags(job.mask + run.begin + offset, length) : length;
      if (reads) part[kLogRatioSum] = block.sum_of(block.first + offset, length);
      if (removes) part[kLogSamplerSum] = block.sum_of(block.second + offset, length);
    });
  });
  sums.combine(job.runs);
  return sums;
}

// What the whole loss is divided by, and whether each trajectory also is by its own tokens.
struct Divisor {
  double whole;
  bool by_length;
};

template <class Real>
Divisor divisor(const Job<Real>& job, double tokens, double trajectories) {
  const auto whole = [&](double count) {
    if (!job.normalizer) return std::max(count, 1.0);
    return *job.normalizer > 0 ? double(*job.normalizer) : std::numeric_limits<double>::quiet_NaN();
  };
  switch (job.options.aggregate) {
    case Aggregate::token_mean:
      return {whole(tokens), false};
    case Aggregate::token_sum:
      return {1, false};
    case Aggregate::seq_mean_token_sum:
      return {whole(trajectories), false};
    case Aggregate::seq_mean_token_sum_norm:
      return {whole(trajectories) * Params<double>(job.params).max_length, false};
    case Aggregate::seq_mean_token_mean:
      return {whole(trajectories), true};
  }
  __builtin_unreachable();
}

// Sets what each trajectory's tokens share; returns the number of unmasked tokens.
template <class Real>
double share(Job<Real>& job, TrajectorySums& sums) {
  const Params<double> p(job.params);
  double tokens = 0, scored = 0;
  for (int64_t n = 0; n < job.trajectories; ++n) {
    double& count = sums.of(n)[kCount];
    if (job.options.sampler_correction == Correction::sequence_mask) {
      const double w = std::exp(sums.of(n)[kLogSamplerSum] / std::max(count, 1.0));
      if (w < p.sampler_low || w > p.sampler_high) count = 0;
    }
    tokens += count;
    scored += count > 0;
  }
  const Divisor by = divisor(job, tokens, scored);
  for (int64_t n = 0; n < job.trajectories; ++n) {
    const double count = sums.of(n)[kCount], sum = sums.of(n)[kLogRatioSum];
    Shared<Real>& x = job.shared[n];
    x.weight = count > 0 ? 1 / (by.by_length ? by.whole * count : by.whole) : 0;
    x.weight += 0 * sums.of(n)[kLogSamplerSum];  // a NaN reaches the loss
    x.log_ratio = sum / std::max(count, 1.0);
    if (job.options.form == Form::vespo) {
      const VespoWeights weights = vespo_weights(sum, p);
      x.value = weights.pos, x.value_alt = weights.neg;
    }
  }
  return tokens;
}

// Where the normaliser is not positive NaN, but 0 where no token has a weight.
template <class Real>
double unit_of(const Job<Real>& job, const Stream<Real>& stream) {
  if (!stream.weights) return 0;
  if (stream.normalizer && *stream.normalizer > 0) return 1 / double(*stream.normalizer);
  std::vector<int> counts(job.runs.size());
  for_runs(job, [&](auto&, size_t r) TK_INLINE_LAMBDA {
    const Real* x = stream.weights + job.runs[r].begin;
    int count = 0;
    for (int i = 0; i < job.runs[r].length; ++i) count += x[i] != 0;
    counts[r] = count;
  });
  const double count = std::accumulate(counts.begin(), counts.end(), 0.0);
  if (stream.normalizer) return count > 0 ? std::numeric_limits<double>::quiet_NaN() : 0;
  return 1 / std::max(count, 1.0);
}

// gmpo's loss of a trajectory, -mean(A) exp(mean of the bounded log-ratios), and its derivative in one of them.
template <class Real>
void share_geometric_means(Job<Real>& job, TrajectorySums& statistics) {
  TrajectorySums sums(3, job.trajectories, job.runs.size());
  for_runs(job, [&](auto& block, size_t r) TK_INLINE_LAMBDA {
    block.open(job.runs[r]);
    block.geometric_terms();
    for_parts(job.cu_seqlens, job.runs[r], [&](int64_t n, int offset, int length) TK_INLINE_LAMBDA {
      double* part = sums.part(job.runs, r, n);
      part[0] = block.sum_of(block.first + offset, length);
      part[1] = block.sum_of(block.second + offset, length);
      part[2] = block.sum_of(block.third + offset, length);
    });
  });
  sums.combine(job.runs);
  for (int64_t n = 0; n < job.trajectories; ++n) {
    const double count = std::max(statistics.of(n)[kCount], 1.0), *x = sums.of(n);
    const double loss = -x[1] / count * std::exp(x[0] / count);
    job.shared[n].value = loss;
    job.shared[n].value_alt = loss * x[2] / count;
  }
}

// The pass that forms the loss and the gradients.
template <class Real>
std::vector<RunTotals> form(Job<Real>& job, TrajectorySums& statistics) {
  std::vector<RunTotals> totals(job.runs.size());
  const bool waits = job.options.sequence_level() && job.options.need_logprobs;
  TrajectorySums slopes(1, waits ? job.trajectories : 0, waits ? job.runs.size() : 0);
  for_runs(job, [&](auto& block, size_t r) TK_INLINE_LAMBDA {
    block.open(job.runs[r]);
    block.form();
    if (job.sampler_logprobs) block.measure_sampler();
    totals[r] = block.totals;
    if (!waits) return;
    for_parts(job.cu_seqlens, job.runs[r], [&](int64_t n, int offset, int length) TK_INLINE_LAMBDA {
      *slopes.part(job.runs, r, n) = block.sum_of(block.first + offset, length);
    });
  });
  if (!waits) return totals;
  slopes.combine(job.runs);
  for (int64_t n = 0; n < job.trajectories; ++n)
    job.shared[n].value = job.shared[n].weight * *slopes.of(n) / std::max(statistics.of(n)[kCount], 1.0);
  for_runs(job, [&](auto& block, size_t r) TK_INLINE_LAMBDA {
    block.open(job.runs[r]);
    block.add_sequence_gradient();
  });
  return totals;
}

// The pass that adds the terms with weights of their own.
template <class Real>
StreamTotals streams(Job<Real>& job) {
  StreamTotals sum;
  if (!job.supervised.weights && !job.kl.weights) return sum;
  job.supervised.unit = unit_of(job, job.supervised), job.kl.unit = unit_of(job, job.kl);
  std::vector<StreamTotals> totals(job.runs.size());
  for_runs(job, [&](auto& block, size_t r) TK_INLINE_LAMBDA { totals[r] = add_streams(block, job.runs[r]); });
  for (const StreamTotals& run : totals) sum.logprobs += run.logprobs, sum.kl += run.kl;
  return sum;
}

template <class Real>
void policy_loss(Job<Real> job) {
  job.runs = cut(job.cu_seqlens, job.trajectories);
  job.shared.resize(job.trajectories);
  TrajectorySums statistics = collect(job);
  const double tokens = share(job, statistics);
  if (job.options.form == Form::gmpo) share_geometric_means(job, statistics);
  const std::vector<RunTotals> totals = form(job, statistics);
  write_results(job, totals, streams(job), tokens);
}

template <class Real>
void scale(Real* x, int64_t length, Real factor) {
  if (factor == 1) return;
  parallel_for(length, 4 * kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) x[i] *= factor;
  });
}

// From 0 to tokens, never decreasing.
bool covers(const int64_t* cu_seqlens, int64_t trajectories, int64_t tokens) {
  if (trajectories < 0 || cu_seqlens[0] != 0 || cu_seqlens[trajectories] != tokens) return false;
  return std::is_sorted(cu_seqlens, cu_seqlens + trajectories + 1);
}

Options options_of(const std::array<int, 8>& x) {
  return {choice<Form>("form", x[0]),
          choice<RatioLevel>("ratio_level", x[1]),
          choice<Kl>("kl", x[2]),
          choice<Aggregate>("aggregate", x[3]),
          choice<Correction>("sampler_correction", x[4]),
          bool(x[5]),
          bool(x[6]),
          bool(x[7])};
}

using Pointers = std::array<uintptr_t, 18>;  // in the order of Job's members, each stream's behind the others

template <class Real>
void run(const Pointers& p, int64_t tokens, int64_t trajectories, int64_t branch_stride, Options options,
         const Parameters& params) {
  const Kl weighted_kl = p[16] ? std::exchange(options.kl, Kl::none) : Kl::none;
  policy_loss(Job<Real>{as<Real>(p[0]),
                        as<Real>(p[1]),
                        as<Real>(p[2]),
                        as<Real>(p[3]),
                        as<Real>(p[4]),
                        as<Real>(p[5]),
                        as<Real>(p[6]),
                        as<int64_t>(p[7]),
                        as<uint8_t>(p[8]),
                        as<uint8_t>(p[9]),
                        as<Real>(p[10]),
                        as<Real>(p[11]),
                        as<Real>(p[12]),
                        as<Real>(p[13]),
                        tokens,
                        trajectories,
                        branch_stride,
                        options,
                        params,
                        {},
                        {},
                        {as<Real>(p[14]), as<Real>(p[15])},
                        {as<Real>(p[16]), as<Real>(p[17])},
                        weighted_kl});
}

}  // namespace
}  // namespace tk::policy

void bind_policy_loss(pybind11::module_& m) {
  using namespace tk::policy;
  using tk::as;
  namespace py = pybind11;
  m.def("policy_loss", [](int dtype, const Pointers& pointers, int64_t tokens, int64_t trajectories,
                          int64_t branch_stride, const std::array<int, 8>& o, const Parameters& params) {
    if (!covers(as<int64_t>(pointers[7]), trajectories, tokens)) return false;
    const Options options = options_of(o);
    py::gil_scoped_release release;
    tk::with_float(dtype, [&](auto element) {
      run<decltype(element)>(pointers, tokens, trajectories, branch_stride, options, params);
    });
    return true;
  });
  m.def("scale_gradient_", [](int dtype, uintptr_t x, int64_t length, uintptr_t factor) {
    py::gil_scoped_release release;
    tk::with_float(dtype, [&](auto element) {
      using Real = decltype(element);
      scale(as<Real>(x), length, *as<Real>(factor));
    });
  });
}
