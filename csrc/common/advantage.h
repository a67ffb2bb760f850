// The maths of the advantage family, once for the CPU and the CUDA kernels. Statistics are float64 throughout.
#pragma once
#include <cmath>
#include <cstdint>

#include "choice.h"
#include "hostdevice.h"

namespace tk {

enum class Baseline : int { mean, leave_one_out, none };
enum class Scale : int { std, none };
enum class Singleton : int { raw, zero };
constexpr int members(Baseline) { return 3; }
constexpr int members(Scale) { return 2; }
constexpr int members(Singleton) { return 2; }

// The rewards to group. A row is counted where its gate, if any, is true and its weight, if any, is not 0.
template <class T>
struct GroupRows {
  const T* rewards;
  const int64_t* ids;
  const bool* gate;
  const T* weights;
  int64_t n;

  TK_HD bool counted(int64_t i) const {
    return (gate == nullptr || gate[i]) && (weights == nullptr || weights[i] != 0);
  }
  TK_HD double weight(int64_t i) const { return weights == nullptr ? 1 : double(weights[i]); }
};

// Trajectory n is the tokens cu_seqlens[n]:cu_seqlens[n+1]. A token whose mask is false takes no part.
struct Trajectories {
  const int64_t* cu_seqlens;
  const bool* mask;
  int64_t count, tokens;

  TK_HD bool active(int64_t t) const { return mask == nullptr || mask[t]; }
};

// The values to whiten; those whose mask is false are not read.
template <class T>
struct Masked {
  const T* x;
  const bool* mask;
  int64_t n;

  TK_HD bool kept(int64_t i) const { return mask == nullptr || mask[i]; }
};

// A bijection of the ids that spreads them over all 64 bits.
TK_HD uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
  return x ^ (x >> 33);
}

struct GroupRule {
  Baseline baseline;
  Scale scale;
  double ddof, eps;
  Singleton singleton;

  TK_HD bool centred() const {
    switch (baseline) {
      case Baseline::mean:
      case Baseline::leave_one_out:
        return true;
      case Baseline::none:
        return false;
    }
    __builtin_unreachable();
  }
  TK_HD bool by_std() const {
    switch (scale) {
      case Scale::std:
        return true;
      case Scale::none:
        return false;
    }
    __builtin_unreachable();
  }
};

// Of a group's counted rows, measured from the first one's reward: W = sum w, sum w d / W, the standard deviation.
struct GroupStats {
  double origin, weight, mean, std;

  // In two steps: a rounding of origin + mean would be one of the reward, however small the spread.
  TK_HD double centred(double reward) const { return (reward - origin) - mean; }
};

// advantage = ((r - centre) - rest) * gain, where centre + rest is the baseline to twice T's precision; gain 0 gives 0
// whatever r is. A constant group's centre is its reward exactly.
template <class T>
struct alignas(4 * sizeof(T)) AdvantageMap {
  T centre, rest, gain;
};

// grad_r = gain * g - w * (offset + slope * ((r - origin) - mean)); gain 0 gives 0 likewise.
struct GradientMap {
  double origin, mean, gain, offset, slope;
};

TK_HD bool needs_group(const GroupRule& rule) { return rule.centred() || rule.by_std(); }

// Too small a group for the statistic that the rule asks for.
TK_HD bool is_alone(const GroupRule& rule, double weight) {
  return needs_group(rule) && (weight <= 1 || (rule.by_std() && weight <= rule.ddof));
}

// NaN where the squares have overflown: an infinite deviation would turn every advantage into a plausible 0.
TK_HD double group_std(const GroupRule& rule, double weight, double squares) {
  if (!rule.by_std() || !(weight > rule.ddof)) return 0;
  return sqrt(squares / (weight - rule.ddof)) + (squares - squares);
}

// 1 / (std + eps), or 1 where that is 1 / 0.
TK_HD double inverse_scale(const GroupRule& rule, double std) {
  const double divisor = rule.by_std() ? std + rule.eps : 1;
  return divisor == 0 ? 1 : 1 / divisor;
}

TK_HD double singleton_gain(const GroupRule& rule) {
  switch (rule.singleton) {
    case Singleton::zero:
      return 0;
    case Singleton::raw:
      return rule.by_std() ? 1 / (1 + rule.eps) : 1;
  }
  __builtin_unreachable();
}

// The mean of the others is (W mean - d) / (W - 1), so d less it is (d - mean) W / (W - 1).
TK_HD double baseline_gain(const GroupRule& rule, double weight) {
  switch (rule.baseline) {
    case Baseline::leave_one_out:
      return weight / (weight - 1);
    case Baseline::mean:
    case Baseline::none:
      return 1;
  }
  __builtin_unreachable();
}

template <class T>
TK_HD AdvantageMap<T> advantage_map(const GroupRule& rule, const GroupStats& group) {
  if (is_alone(rule, group.weight)) return {0, 0, T(singleton_gain(rule))};
  const double gain = inverse_scale(rule, group.std);
  if (!rule.centred()) return {0, 0, T(gain)};
  const double centre = group.origin + group.mean;
  return {T(centre), T((group.origin - T(centre)) + group.mean), T(gain * baseline_gain(rule, group.weight))};
}

template <class T>
TK_HD T advantage(const AdvantageMap<T>& map, T reward) {
  return map.gain == 0 ? 0 : ((reward - map.centre) - map.rest) * map.gain;
}

// With G = sum g and C = sum g (d - mean) over the group's rows:
// the baseline's part is gain (g - w G / W), the standard deviation's -(sum g centred / divisor^2) d std / d r,
// where d std / d r = w (d - mean) / ((W - ddof) std), taken as 0 where std is 0.
TK_HD GradientMap gradient_map(const GroupRule& rule, const GroupStats& group, double sum_g, double sum_gc) {
  if (is_alone(rule, group.weight)) return {0, 0, singleton_gain(rule), 0, 0};
  const double inverse = inverse_scale(rule, group.std);
  const double gain = inverse * baseline_gain(rule, group.weight);
  const double sum_ga = gain * (rule.centred() ? sum_gc : sum_gc + (group.origin + group.mean) * sum_g);
  const double slope = group.std > 0 ? sum_ga * inverse / ((group.weight - rule.ddof) * group.std) : 0;
  return {group.origin, group.mean, gain, rule.centred() ? gain * sum_g / group.weight : 0, slope};
}

TK_HD double reward_gradient(const GradientMap& map, double grad, double weight, double reward) {
  return map.gain == 0 ? 0 : map.gain * grad - weight * (map.offset + map.slope * ((reward - map.origin) - map.mean));
}

// A step of generalised advantage estimation before its recursion A = delta + gamma lam A_next.
TK_HD double td_error(double reward, double value, double next_value, double gamma) {
  return reward + gamma * next_value - value;
}

// NaN where the squares have overflown, likewise.
TK_HD double whiten_rstd(double count, double squares, double ddof, double eps) {
  return 1 / sqrt(squares / (count - ddof > 1 ? count - ddof : 1) + eps) + (squares - squares);
}

TK_HD double whitened(double x, double mean, double rstd, bool shift_mean) {
  return (x - mean) * rstd + (shift_mean ? 0 : mean);
}

// grad_x = rstd * (grad - mean_g) + kept + slope * (x - mean): no product is added to a rounded one of its own factor,
// so that a compiler which fuses them still cancels a constant gradient exactly.
// d var / d x = 2 (x - mean) / (count - ddof); sum_g and sum_gc are sum g and sum g (x - mean) over the unmasked.
struct WhitenGradient {
  double mean, rstd, mean_g, kept, slope;
};

TK_HD WhitenGradient whiten_gradient(double mean, double rstd, double count, double sum_g, double sum_gc,
                                     bool shift_mean, double ddof) {
  const double divisor = count - ddof > 1 ? count - ddof : 1;
  const double mean_g = count > 0 ? sum_g / count : 0;
  return {mean, rstd, mean_g, shift_mean ? 0 : mean_g, -rstd * rstd * rstd * sum_gc / divisor};
}

TK_HD double whitened_gradient(const WhitenGradient& map, double grad, double x) {
  return map.rstd * (grad - map.mean_g) + map.kept + map.slope * (x - map.mean);
}

}  // namespace tk
