// The turns of a packed batch: the ranges of its scored tokens.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"
#include "../common/parallel.h"

namespace tk {
namespace {

// A pack's scored tokens; `before`: the turns that begin before each block of tokens, and all of them.
struct Scored {
  const uint8_t* mask;
  const int64_t* cu_seqlens;
  int64_t trajectories, tokens, block;
  int64_t* before;

  int64_t blocks() const { return (tokens + block - 1) / block; }
  // The first token from t on that is scored or not, or `end`.
  int64_t next(bool scored, int64_t t, int64_t end) const {
    const void* found = t < end ? std::memchr(mask + t, scored, size_t(end - t)) : nullptr;
    return found ? static_cast<const uint8_t*>(found) - mask : end;
  }
};

// f(start, end, n) for the turns of each trajectory n that begin in block b.
template <class F>
void each_turn(const Scored& in, int64_t b, const F& f) {
  const int64_t* bounds = in.cu_seqlens;
  const int64_t end = std::min(in.tokens, (b + 1) * in.block);
  int64_t t = b * in.block, n = std::upper_bound(bounds, bounds + in.trajectories, t) - bounds - 1;
  if (t > bounds[n] && in.mask[t - 1]) t = in.next(false, t, std::min(end, bounds[n + 1]));  // began before the block
  for (; t < end; ++n) {
    const int64_t stop = std::min(end, bounds[n + 1]);
    while ((t = in.next(true, t, stop)) < stop) {
      const int64_t turn = t;
      t = in.next(false, t, bounds[n + 1]);
      f(turn, t, n);
    }
  }
}

int64_t count_turns(const Scored& in) {
  parallel_for(in.blocks(), 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int64_t count = 0;
      each_turn(in, b, [&](int64_t, int64_t, int64_t) { ++count; });
      in.before[b + 1] = count;
    }
  });
  for (int64_t b = 0; b < in.blocks(); ++b) in.before[b + 1] += in.before[b];
  return in.before[in.blocks()];
}

void turns(const Scored& in, int64_t* start, int64_t* end, int64_t* trajectory, int64_t* index) {
  parallel_for(in.blocks(), 1, [&](int64_t first, int64_t last) {
    int64_t s = in.before[first];
    for (int64_t b = first; b < last; ++b)
      each_turn(in, b, [&](int64_t from, int64_t to, int64_t n) { start[s] = from, end[s] = to, trajectory[s++] = n; });
  });
  const int64_t count = in.before[in.blocks()];
  for (int64_t s = 0; s < count; ++s) index[s] = s && trajectory[s] == trajectory[s - 1] ? index[s - 1] + 1 : 0;
}

Scored scored(uintptr_t mask, uintptr_t cu_seqlens, int64_t trajectories, int64_t tokens, int64_t block,
              uintptr_t before) {
  return {as<const uint8_t>(mask), as<const int64_t>(cu_seqlens), trajectories, tokens, block, as<int64_t>(before)};
}

int64_t bound_count_turns(uintptr_t mask, uintptr_t cu_seqlens, int64_t trajectories, int64_t tokens, int64_t block,
                          uintptr_t before) {
  return count_turns(scored(mask, cu_seqlens, trajectories, tokens, block, before));
}

void bound_turns(uintptr_t mask, uintptr_t cu_seqlens, int64_t trajectories, int64_t tokens, int64_t block,
                 uintptr_t before, uintptr_t start, uintptr_t end, uintptr_t trajectory, uintptr_t index) {
  turns(scored(mask, cu_seqlens, trajectories, tokens, block, before), as<int64_t>(start), as<int64_t>(end),
        as<int64_t>(trajectory), as<int64_t>(index));
}

}  // namespace
}  // namespace tk

void bind_span_layout(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("span_count_turns", &tk::bound_count_turns, unlocked());
  m.def("span_turns", &tk::bound_turns, unlocked());
}
