// The k largest of a row of logits, met tile by tile: what enters them changes places with what it displaces, so that
// the tile is left with all others, whose sums are the head's fold.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "simd.h"

namespace tk::topk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread
constexpr int64_t kBlock = 64;       // elements whose maximum is asked first

template <class T>
struct Entry {
  T logit;
  int64_t id;
};

// Larger logits go first, equal ones by id. As a heap's order: the last of all is on top.
struct Before {
  template <class T>
  bool operator()(const Entry<T>& a, const Entry<T>& b) const {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  }
};

template <class T>
struct Tile {
  T* z;
  int64_t stride, rows, columns;
  int64_t seen;      // columns before it
  int64_t first_id;  // of its first column
};

template <class T>
struct Selection {
  T* logits;
  int64_t *ids, k;
};

template <class T>
void swap_in(T* z, int64_t id, std::vector<Entry<T>>& heap) {
  std::pop_heap(heap.begin(), heap.end(), Before{});
  std::swap(*z, heap.back().logit);
  heap.back().id = id;
  std::push_heap(heap.begin(), heap.end(), Before{});
}

// Whether any of a block is above the bound: what equals it has a higher id. A NaN is not.
template <int W, class T>
TK_INLINE bool any_above(const T* z, T bound) {
  Vec<T, W> largest = load<W>(z);
  for (int64_t i = W; i < kBlock; i += W) largest = vmax(load<W>(z + i), largest);
  return fold_max<W>(vmax(largest, broadcast<W>(bound))) > bound;
}

template <int W, class T>
TK_INLINE void exchange_row(T* z, const Tile<T>& tile, std::vector<Entry<T>>& heap, int64_t k) {
  int64_t i = 0;
  for (; i < tile.columns && int64_t(heap.size()) < k; ++i) {
    heap.push_back({z[i], tile.first_id + i});
    std::push_heap(heap.begin(), heap.end(), Before{});
    z[i] = -std::numeric_limits<T>::infinity();
  }
  while (i < tile.columns) {
    const int64_t end = std::min(i + kBlock, tile.columns);
    if (end - i == kBlock && !any_above<W>(z + i, heap.front().logit)) {
      i = end;
      continue;
    }
    for (; i < end; ++i)
      if (z[i] > heap.front().logit) swap_in(z + i, tile.first_id + i, heap);
  }
}

// The selection is a heap until the last tile, which leaves it in order.
template <class T>
void exchange(const Tile<T>& tile, const Selection<T>& into, bool is_last) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(tile.columns, 1));
  parallel_for(tile.rows, grain, [&](int64_t begin, int64_t end) {
    dispatch([&](auto width) TK_INLINE_LAMBDA {
      constexpr int W = width() * sizeof(float) / sizeof(T);
      std::vector<Entry<T>> heap;
      heap.reserve(into.k);
      for (int64_t r = begin; r < end; ++r) {
        T* logits = into.logits + r * into.k;
        int64_t* ids = into.ids + r * into.k;
        heap.clear();
        for (int64_t j = 0; j < std::min(into.k, tile.seen); ++j) heap.push_back({logits[j], ids[j]});
        exchange_row<W>(tile.z + r * tile.stride, tile, heap, into.k);
        if (is_last) std::sort_heap(heap.begin(), heap.end(), Before{});
        for (size_t j = 0; j < heap.size(); ++j) logits[j] = heap[j].logit, ids[j] = heap[j].id;
      }
    });
  });
}

void bound_exchange(uintptr_t z, int dtype, int64_t stride, int64_t rows, int64_t columns, int64_t first,
                    int64_t shard_first, uintptr_t logits, uintptr_t ids, int64_t k, bool is_last) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    exchange(Tile<T>{as<T>(z), stride, rows, columns, first, shard_first + first},
             Selection<T>{as<T>(logits), as<int64_t>(ids), k}, is_last);
  });
}

}  // namespace
}  // namespace tk::topk

void bind_topk(pybind11::module_& m) {
  m.def("topk_exchange", &tk::topk::bound_exchange, pybind11::call_guard<pybind11::gil_scoped_release>());
}
