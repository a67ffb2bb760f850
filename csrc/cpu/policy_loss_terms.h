// The policy loss of one token: each form's value, its derivatives, and what multiplies or joins it. The functions of a
// form bear its name.
//
// V is a vector of floats or doubles (simd.h); every function works lane by lane. A condition only ever picks between
// two vectors (g++ 12 takes 16-lane conditions that are combined with & or | apart into scalars), and is false for a
// NaN, which so reaches the loss instead of being clipped or dropped.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../common/choice.h"
#include "simd.h"

namespace tk::policy {

enum class Form : int { clip, cispo, sapo, reinforce, dppo_tv, dppo_kl, kl_cov, gmpo, vespo };
enum class RatioLevel : int { token, sequence };
enum class Kl : int { none, k1, k2, k3, k3_corrected };
enum class Aggregate : int { token_mean, token_sum, seq_mean_token_sum, seq_mean_token_sum_norm, seq_mean_token_mean };
enum class Correction : int { none, tis, icepop, sequence_mask };

constexpr int members(Form) { return 9; }
constexpr int members(RatioLevel) { return 2; }
constexpr int members(Kl) { return 5; }
constexpr int members(Aggregate) { return 5; }
constexpr int members(Correction) { return 4; }

constexpr int kParameters = 15;
using Parameters = std::array<double, kParameters>;  // as Python passes them

// The ratio's bounds follow from the others in double.
template <class Real>
struct Params {
  Real clip_low, clip_high, clip_dual, kl_coef, entropy_coef, max_length, sampler_low, sampler_high, sapo_tau_pos,
      sapo_tau_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, cov_coef, ratio_low, ratio_high;

  explicit Params(const Parameters& x)
      : clip_low(x[0]),
        clip_high(x[1]),
        clip_dual(x[2]),
        kl_coef(x[3]),
        entropy_coef(x[4]),
        max_length(x[5]),
        sampler_low(x[6]),
        sampler_high(x[7]),
        sapo_tau_pos(x[8]),
        sapo_tau_neg(x[9]),
        vespo_k_pos(x[10]),
        vespo_lambda_pos(x[11]),
        vespo_k_neg(x[12]),
        vespo_lambda_neg(x[13]),
        cov_coef(x[14]),
        ratio_low(1 - x[0]),
        ratio_high(1 + x[1]) {}
};

constexpr int kLogRatioBound = 20;  // exp of it is finite in float32, so 0 * inf cannot arise

template <class V>
struct Token {
  V advantage, log_ratio, ratio, logprob, old_logprob;
};
// clipped: 1 where the ratio is clipped or the token dropped; beyond: where that is a bound of the ratio's.
template <class V>
struct Term {
  V loss, d_log_ratio, d_logprob, clipped, beyond;
};

template <class V>
using Scalar = std::decay_t<decltype(V{}[0])>;
template <class V>
constexpr int kLanes = sizeof(V) / sizeof(Scalar<V>);

// NaN stays NaN.
template <class V>
TK_INLINE V clamp(const V& x, Scalar<V> low, Scalar<V> high) {
  const V bounded = x < low ? low : x;
  return bounded > high ? high : bounded;
}
template <class V>
TK_INLINE V magnitude(const V& x) {
  using Bits = Vec<std::conditional_t<sizeof(Scalar<V>) == 8, uint64_t, uint32_t>, kLanes<V>>;
  return bit_cast<V>(bit_cast<Bits>(x) << 1 >> 1);
}
template <class V>
TK_INLINE V sign(const V& x) {
  return (x > 0 ? V{} + 1 : V{}) - (x < 0 ? V{} + 1 : V{});
}
template <class V>
TK_INLINE V nonzero(const V& x) {
  return magnitude(x) > 0 ? V{} + 1 : V{};
}

// exp(x) = power (1 + r + excess) for abs(x) <= 80; the excess by a shorter chain than vexp's.
template <class V>
struct Expansion : ExpParts<kLanes<V>> {
  V excess;

  TK_INLINE explicit Expansion(const V& x) : ExpParts<kLanes<V>>(x) {
    const V r = this->r, r2 = r * r;
    const V low = fma(r, kExpRest[1], V{} + kExpRest[0]), middle = fma(r, kExpRest[3], V{} + kExpRest[2]);
    excess = r2 * fma(r2, fma(r2, kExpRest[4], middle), low);
  }

 private:
  static TK_INLINE V fma(const V& a, float b, const V& c) { return vfma<kLanes<V>>(a, V{} + b, c); }
  static TK_INLINE V fma(const V& a, const V& b, const V& c) { return vfma<kLanes<V>>(a, b, c); }
};

// exp(x), for |x| <= 80.
template <class V>
TK_INLINE V exponential(const V& x) {
  if constexpr (std::is_same_v<Scalar<V>, double>)
    return vexp<kLanes<V>>(x);
  else {
    const Expansion<V> e(x);
    return vfma<kLanes<V>>(e.power, e.r + e.excess, e.power);
  }
}

// exp(x) - 1 - x to full relative precision near 0, for |x| <= 80.
template <class V>
TK_INLINE V exp_above_tangent(const V& x) {
  if constexpr (std::is_same_v<Scalar<V>, double>) {
    V y;
    for (int l = 0; l < kLanes<V>; ++l) y[l] = std::expm1(x[l]);
    return y - x;
  } else {
    const Expansion<V> e(x);
    return vfma<kLanes<V>>(e.power, e.excess, vfma<kLanes<V>>(e.power, e.r, -x) + (e.power - 1));
  }
}

// log(x) for normal x; NaN for x <= 0. With m = x 2^-e in [2/3, 4/3): log m = 2 atanh((m - 1) / (m + 1)).
template <class V>
TK_INLINE V logarithm(const V& x) {
  V y;
  if constexpr (std::is_same_v<Scalar<V>, double>) {
    for (int l = 0; l < kLanes<V>; ++l) y[l] = std::log(x[l]);
  } else {
    using I = Vec<int32_t, kLanes<V>>;
    const I bits = bit_cast<I>(x), e = (bits - 0x3f2aaaab) >> 23;
    const V m = bit_cast<V>(bits - (e << 23)), s = (m - 1) / (m + 1), z = s * s;
    const V series = ((z * (1.0f / 9) + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3;
    y = __builtin_convertvector(e, V) * 0.693147181f + (2 * s + 2 * s * z * series);
  }
  return x > 0 ? y : std::numeric_limits<Scalar<V>>::quiet_NaN();
}

template <class V>
TK_INLINE V probability(const V& logprob) {
  return exponential(clamp(logprob, -80, 80));
}

// 1 - exp(x), also near x = 0.
template <class V>
TK_INLINE V one_minus_exp(const V& x) {
  const V bounded = clamp(x, -40, 40);
  return -(bounded + exp_above_tangent(bounded));
}

// -min(r A, clip(r) A), and with A < 0 at most -clip_dual A; clipped where that is not -r A.
template <class V>
TK_INLINE Term<V> clip(const Token<V>& t, const Params<Scalar<V>>& p) {
  const V a = -t.advantage, free = t.ratio * a, bounded = clamp(t.ratio, p.ratio_low, p.ratio_high) * a;
  const V ceiling = a > 0 ? p.clip_dual * a : V{} + std::numeric_limits<Scalar<V>>::infinity();
  const V upper = bounded > free ? bounded : free, loss = ceiling < upper ? ceiling : upper;
  const V clipped = nonzero(loss - free);
  return {loss, clipped > 0 ? V{} : free, V{}, clipped, nonzero(upper - free)};
}

// No loss where the token is selected.
template <class V>
TK_INLINE Term<V> drop(const Term<V>& x, const V& selected) {
  const V kept = 1 - selected;
  return {kept * x.loss, kept * x.d_log_ratio, V{}, kept * x.clipped + selected, kept * x.beyond};
}

template <class V>
TK_INLINE Term<V> cispo(const Token<V>& t, const Params<Scalar<V>>& p) {
  const V bounded = clamp(t.ratio, p.ratio_low, p.ratio_high), slope = -bounded * t.advantage;
  const V clipped = bounded == t.ratio ? V{} : V{} + 1;
  return {slope * t.logprob, V{}, slope, clipped, clipped};
}

template <class V>
TK_INLINE Term<V> sapo(const Token<V>& t, const Params<Scalar<V>>& p) {
  const V tau = t.advantage > 0 ? V{} + p.sapo_tau_pos : V{} + p.sapo_tau_neg;
  const V decay = exponential(clamp(tau * (1 - t.ratio), -80, 80)), sigmoid = 1 / (1 + decay);
  const V scale = -4 * t.advantage * sigmoid;
  return {scale / tau, scale * (decay * sigmoid) * t.ratio, V{}, V{}, V{}};
}

template <class V>
TK_INLINE Term<V> reinforce(const Token<V>& t) {
  return {-t.advantage * t.logprob, V{}, -t.advantage, V{}, V{}};
}

// Valid unless past the threshold.
template <class V>
TK_INLINE Term<V> dppo(const Token<V>& t, const V& excess) {
  const V slope = excess > 0 ? V{} : -t.advantage * clamp(t.ratio, 0, 20), clipped = excess > 0 ? V{} + 1 : V{};
  return {slope * t.logprob, V{}, slope, clipped, clipped};
}

// How far p - q is past the threshold in the direction A pushes it.
template <class V>
TK_INLINE Term<V> dppo_tv(const Token<V>& t, const Params<Scalar<V>>& p) {
  const V moved = probability(t.logprob) - probability(t.old_logprob);
  return dppo(t, t.advantage > 0 ? moved - p.clip_high : -p.clip_low - moved);
}

// The same for the binary KL divergence of p from q; a move the other way is never too far.
template <class V>
TK_INLINE Term<V> dppo_kl(const Token<V>& t, const Params<Scalar<V>>& p) {
  const V now = t.logprob, old = t.old_logprob, rest = one_minus_exp(old);
  const V odds = (rest + Scalar<V>(1e-8)) / (one_minus_exp(now) + Scalar<V>(1e-8));
  const V divergence = probability(old) * (old - now) + rest * logarithm(odds);
  const V threshold = t.advantage > 0 ? V{} + p.clip_high : V{} + p.clip_low;
  const V moved = t.advantage > 0 ? now - old : old - now;
  return dppo(t, moved <= 0 ? V{} : divergence - threshold);
}

template <class V>
TK_INLINE Term<V> kl_cov(const Token<V>& t, const V& selected, const Params<Scalar<V>>& p) {
  const V penalty = selected * p.cov_coef, free = -t.ratio * t.advantage;
  return {free + penalty * magnitude(t.log_ratio), free + penalty * sign(t.log_ratio), V{}, selected, V{}};
}

// gmpo's log-ratio, bounded in the direction of A; 0 where A is 0.
template <class V>
TK_INLINE V gmpo_log_ratio(const V& advantage, const V& log_ratio, const Params<Scalar<V>>& p) {
  const V up = log_ratio > p.clip_high ? p.clip_high : log_ratio;
  const V down = log_ratio < -p.clip_low ? -p.clip_low : log_ratio;
  return (advantage > 0 ? up : V{}) + (advantage < 0 ? down : V{});
}

// Of its trajectory: the loss, and its derivative in one bounded log-ratio.
template <class V>
TK_INLINE Term<V> gmpo(const Token<V>& t, const V& loss, const V& derivative, const Params<Scalar<V>>& p) {
  const V directed = nonzero(t.advantage), slope = directed * derivative;
  const V clipped = nonzero(directed * t.log_ratio - gmpo_log_ratio(t.advantage, t.log_ratio, p));
  return {loss, clipped > 0 ? V{} : slope, V{}, clipped, clipped};
}

// vespo's weights of a trajectory for A >= 0 and A < 0, from the sum of its log-ratios.
struct VespoWeights {
  double pos, neg;
};
inline VespoWeights vespo_weights(double sum, const Params<double>& p) {
  const double log_w = std::clamp<double>(sum, -kLogRatioBound, kLogRatioBound);
  const auto weight = [&](double k, double decay) { return std::exp(decay + k * log_w - decay * std::exp(log_w)); };
  return {weight(p.vespo_k_pos, p.vespo_lambda_pos), weight(p.vespo_k_neg, p.vespo_lambda_neg)};
}

// Of its trajectory: the weights for A >= 0 and A < 0.
template <class V>
TK_INLINE Term<V> vespo(const Token<V>& t, const V& weight_pos, const V& weight_neg) {
  const V slope = -(t.advantage >= 0 ? weight_pos : weight_neg) * t.advantage;
  return {slope * t.logprob, V{}, slope, V{}, V{}};
}

// What tis or icepop multiplies the policy term by, w = exp(log_w).
template <class V>
TK_INLINE V sampler_factor(Correction correction, const V& log_w, const Params<Scalar<V>>& p) {
  const V w = exponential(log_w), kept = w < p.sampler_low ? V{} : w;
  switch (correction) {
    case Correction::tis:
      return w > p.sampler_high ? p.sampler_high : w;
    case Correction::icepop:
      return kept > p.sampler_high ? V{} : kept;
    case Correction::none:
    case Correction::sequence_mask:
      return V{} + 1;
  }
  __builtin_unreachable();
}

// The KL estimate of d = logprob - ref, and its derivatives.
template <class V>
TK_INLINE Term<V> kl(Kl estimator, const V& d, const V& ratio) {
  switch (estimator) {
    case Kl::none:
      return {V{}, V{}, V{}, V{}, V{}};
    case Kl::k1:
      return {d, V{}, V{} + 1, V{}, V{}};
    case Kl::k2:
      return {Scalar<V>(0.5) * d * d, V{}, d, V{}, V{}};
    case Kl::k3:
    case Kl::k3_corrected: {
      const V x = clamp(-d, -kLogRatioBound, kLogRatioBound), k3 = exp_above_tangent(x);
      const V slope = x == -d ? -(k3 + x) : V{};
      if (estimator == Kl::k3) return {k3, V{}, slope, V{}, V{}};
      return {ratio * k3, ratio * k3, ratio * slope, V{}, V{}};
    }
  }
  __builtin_unreachable();
}

}  // namespace tk::policy
