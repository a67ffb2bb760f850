// What a tree's parents imply, its flat form, and the tree of a packed batch's shared prefixes: all linear.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "../common/dtype.h"
#include "tree_prefix.h"

namespace tk {
namespace {

// Written by derive(), one entry a node but for child_begin's [M+1], child's [M - roots] and tree_begin's [L].
struct Derived {
  int32_t *parent, *child_begin, *child, *leaf_begin, *leaf_end, *tree_begin, *root, *depth;
  int64_t *position, *previous;
};

struct Counts {
  int64_t bad = -1, leaves = 0, roots = 0, levels = 0;
};

// The children of every node, ascending, by counting.
void list_children(int64_t m, const Derived& out) {
  std::fill_n(out.child_begin, m + 1, 0);
  for (int64_t n = 0; n < m; ++n)
    if (out.parent[n] >= 0) ++out.child_begin[out.parent[n] + 1];
  for (int64_t n = 0; n < m; ++n) out.child_begin[n + 1] += out.child_begin[n];
  const std::unique_ptr<int32_t[]> next(new int32_t[m]);
  std::copy_n(out.child_begin, m, next.get());
  for (int64_t n = 0; n < m; ++n)
    if (out.parent[n] >= 0) out.child[next[out.parent[n]]++] = int32_t(n);
}

// `bad`: the first node whose parent is no earlier node; nothing else is written then.
Counts derive(const int64_t* parent, const int64_t* lengths, int64_t m, const Derived& out) {
  Counts found;
  for (int64_t n = 0; n < m; ++n) {
    if (parent[n] < -1 || parent[n] >= n) return {n, 0, 0, 0};
    out.parent[n] = int32_t(parent[n]);
  }
  list_children(m, out);
  std::fill_n(out.leaf_end, m, 0);  // counts first
  for (int64_t n = m; n-- > 0;) {
    if (out.child_begin[n] == out.child_begin[n + 1]) out.leaf_end[n] = 1;
    if (out.parent[n] >= 0) out.leaf_end[out.parent[n]] += out.leaf_end[n];
  }
  const std::unique_ptr<int32_t[]> next(new int32_t[m]);  // where the next child's leaves begin
  const std::unique_ptr<int64_t[]> last(new int64_t[m]);  // a node's last token, or the one before it
  int64_t tokens = 0;
  for (int64_t n = 0; n < m; ++n) {
    const int64_t p = out.parent[n];  // the one that was checked: another thread may write into `parent`
    const int32_t below = out.leaf_end[n];
    if (p < 0) {
      out.leaf_begin[n] = int32_t(found.leaves);
      std::fill_n(out.tree_begin + found.leaves, below, int32_t(found.leaves));
      out.root[n] = int32_t(found.roots++), out.depth[n] = 0;
      out.position[n] = 0, out.previous[n] = -1;
      found.leaves += below;
    } else {
      out.leaf_begin[n] = next[p];
      out.root[n] = out.root[p], out.depth[n] = out.depth[p] + 1;
      out.position[n] = out.position[p] + lengths[p], out.previous[n] = last[p];
      next[p] += below;
    }
    next[n] = out.leaf_begin[n], out.leaf_end[n] = out.leaf_begin[n] + below;
    tokens += lengths[n];
    last[n] = lengths[n] > 0 ? tokens - 1 : out.previous[n];
    found.levels = std::max<int64_t>(found.levels, out.depth[n] + 1);
  }
  return found;
}

std::array<int64_t, 4> bound_derive(uintptr_t parent, uintptr_t lengths, int64_t m,
                                    const std::array<uintptr_t, 10>& derived) {
  using I = int32_t;
  const auto& x = derived;  // in the order of Derived's members
  const Derived out{as<I>(x[0]), as<I>(x[1]), as<I>(x[2]), as<I>(x[3]),       as<I>(x[4]),
                    as<I>(x[5]), as<I>(x[6]), as<I>(x[7]), as<int64_t>(x[8]), as<int64_t>(x[9])};
  const Counts found = derive(as<const int64_t>(parent), as<const int64_t>(lengths), m, out);
  return {found.bad, found.leaves, found.roots, found.levels};
}

// Packed token of every flat one. Each leaf's row is filled from its end, node by node up to the root.
void bound_flat(uintptr_t parent_, uintptr_t offsets_, uintptr_t leaves_, int64_t count, uintptr_t flat_offsets_,
                uintptr_t index_) {
  const auto* parent = as<const int64_t>(parent_);
  const auto* offsets = as<const int64_t>(offsets_);
  for (int64_t l = 0; l < count; ++l) {
    int64_t* end = as<int64_t>(index_) + as<const int64_t>(flat_offsets_)[l + 1];
    for (int64_t n = as<const int64_t>(leaves_)[l]; n >= 0; n = parent[n])
      for (int64_t t = offsets[n + 1]; t-- > offsets[n];) *--end = t;
  }
}

// (mismatch or None, parent, lengths, source of each node's tokens, group of each root), as bytes of int64.
pybind11::tuple bound_prefixes(uintptr_t tokens, uintptr_t mask, uintptr_t cu_seqlens, uintptr_t group, int64_t count,
                               int64_t groups, const std::vector<uintptr_t>& logprobs, double tolerance, bool split) {
  PrefixBatch in{as<const int64_t>(tokens),
                 as<const bool>(mask),
                 as<const int64_t>(cu_seqlens),
                 as<const int64_t>(group),
                 count,
                 groups,
                 tolerance,
                 {}};
  for (const uintptr_t x : logprobs) in.logprobs.push_back(as<const double>(x));
  PrefixTree::Mismatch at;
  PrefixTree::Numbered out;
  bool done;
  {
    const pybind11::gil_scoped_release unlocked;
    PrefixTree tree(in, split);
    done = tree.build();
    at = tree.mismatch();
    if (done) out = tree.numbered();
  }
  const auto bytes = [](const std::vector<int64_t>& x) {
    return pybind11::bytearray(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(int64_t));
  };
  if (!done) return pybind11::make_tuple(pybind11::make_tuple(at.field, at.here, at.there));
  return pybind11::make_tuple(pybind11::none(), bytes(out.parent), bytes(out.lengths), bytes(out.source),
                              bytes(out.root_groups));
}

}  // namespace
}  // namespace tk

void bind_tree_layout(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("tree_derive", &tk::bound_derive, unlocked());
  m.def("tree_flat", &tk::bound_flat, unlocked());
  m.def("tree_prefixes", &tk::bound_prefixes);
}
