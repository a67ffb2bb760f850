// The shared prefixes of a packed batch as a tree whose edges are stretches of tokens (a radix tree), built by
// inserting one trajectory after the other. A child is found by a hash of its first token: many cost no more than few.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace tk {

struct PrefixBatch {
  const int64_t* tokens;
  const bool* mask;
  const int64_t *cu_seqlens, *group;
  int64_t count, groups;
  double tolerance;
  std::vector<const double*> logprobs;  // read where the mask is true
};

class PrefixTree {
 public:
  // Tokens `here` and `there` of the batch agree, and everything before them, but not this field's log-probs.
  struct Mismatch {
    int64_t field = -1, here = 0, there = 0;
  };

  // Inner nodes first, then one leaf a trajectory; a root's parent is -1.
  struct Numbered {
    std::vector<int64_t> parent, lengths, source, root_groups;
  };

  PrefixTree(const PrefixBatch& in, bool split) : in_(in), split_(split), end_(in.count), table_(1024, -1) {
    nodes_.resize(in.groups);  // node g stands above group g's roots
  }

  // False at a mismatch that is not to be split.
  bool build() {
    for (int64_t n = 0; n < in_.count; ++n)
      if (!insert(n)) return false;
    return true;
  }

  const Mismatch& mismatch() const { return mismatch_; }

  Numbered numbered() const {
    std::vector<int64_t> number(nodes_.size(), -1), ends(nodes_.size()), path;
    std::vector<bool> inner(nodes_.size());
    for (const int64_t node : end_) ++ends[node];
    for (size_t x = in_.groups; x < nodes_.size(); ++x)
      if (nodes_[x].parent >= in_.groups) inner[nodes_[x].parent] = true;
    for (size_t x = in_.groups; x < nodes_.size(); ++x) inner[x] = inner[x] || ends[x] > 1;
    Numbered out;
    const auto add = [&](int64_t parent, int64_t source, int64_t length, int64_t group) {
      out.parent.push_back(parent < in_.groups ? -1 : number[parent]);
      out.lengths.push_back(length);
      for (int64_t k = 0; k < length; ++k) out.source.push_back(source + k);
      if (parent < in_.groups) out.root_groups.push_back(group);
    };
    for (int64_t n = 0; n < in_.count; ++n) {  // top down along each trajectory
      for (int64_t x = end_[n]; x >= in_.groups && number[x] < 0; x = nodes_[x].parent)
        if (inner[x]) path.push_back(x);
      for (; !path.empty(); path.pop_back()) {
        number[path.back()] = int64_t(out.parent.size());
        add(nodes_[path.back()].parent, nodes_[path.back()].begin, nodes_[path.back()].length, in_.group[n]);
      }
    }
    for (int64_t n = 0; n < in_.count; ++n) {
      const int64_t x = end_[n];
      if (x < in_.groups || inner[x])
        add(x, 0, 0, in_.group[n]);
      else
        add(nodes_[x].parent, nodes_[x].begin, nodes_[x].length, in_.group[n]);
    }
    return out;
  }

 private:
  // Its tokens are begin:begin+length of the batch; `twin` is the next child of its parent with the same first token.
  struct Node {
    int64_t parent = -1, begin = 0, length = 0, twin = -1;
  };

  static uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
    return x ^ (x >> 33);
  }

  bool same_token(int64_t a, int64_t b) const { return in_.tokens[a] == in_.tokens[b] && in_.mask[a] == in_.mask[b]; }

  // Field whose log-probs differ, or -1.
  int64_t differing(int64_t a, int64_t b) const {
    if (!in_.mask[a]) return -1;
    for (size_t f = 0; f < in_.logprobs.size(); ++f)
      if (!(std::fabs(in_.logprobs[f][a] - in_.logprobs[f][b]) <= in_.tolerance)) return int64_t(f);
    return -1;
  }

  // The place in the table of the child of `parent` that begins like token t, or of the empty entry for it.
  size_t find(int64_t parent, int64_t t) const {
    const size_t wrap = table_.size() - 1;
    size_t at = mixed(mixed(uint64_t(parent)) + 2 * uint64_t(in_.tokens[t]) + in_.mask[t]) & wrap;
    while (table_[at] >= 0 && !(nodes_[table_[at]].parent == parent && same_token(nodes_[table_[at]].begin, t)))
      at = (at + 1) & wrap;
    return at;
  }

  void place(int64_t x) {
    const size_t at = find(nodes_[x].parent, nodes_[x].begin);
    nodes_[x].twin = table_[at];
    table_[at] = x;
  }

  int64_t create(int64_t parent, int64_t begin, int64_t length) {
    if (2 * (nodes_.size() + 1) > table_.size()) grow();
    nodes_.push_back({parent, begin, length, -1});
    place(int64_t(nodes_.size()) - 1);
    return int64_t(nodes_.size()) - 1;
  }

  void grow() {
    const std::vector<int64_t> old = std::move(table_);
    table_.assign(2 * old.size(), -1);
    for (const int64_t x : old)
      if (x >= 0) table_[find(nodes_[x].parent, nodes_[x].begin)] = x;  // its twins hang on it
  }

  // Cuts x after `length` tokens; the new upper part takes x's place, and x, the lower one, keeps its children.
  int64_t cut(int64_t x, int64_t length) {
    if (2 * (nodes_.size() + 1) > table_.size()) grow();
    const int64_t upper = int64_t(nodes_.size());
    nodes_.push_back({nodes_[x].parent, nodes_[x].begin, length, nodes_[x].twin});
    const size_t at = find(nodes_[x].parent, nodes_[x].begin);
    if (table_[at] == x) {
      table_[at] = upper;
    } else {
      int64_t before = table_[at];
      while (nodes_[before].twin != x) before = nodes_[before].twin;
      nodes_[before].twin = upper;
    }
    nodes_[x].parent = upper, nodes_[x].begin += length, nodes_[x].length -= length;
    place(x);
    return upper;
  }

  // Tokens that x shares with the batch's from t on; false where they part by a log-prob that is not to be split.
  bool shared(int64_t x, int64_t t, int64_t end, int64_t* length) {
    const int64_t begin = nodes_[x].begin, most = std::min(nodes_[x].length, end - t);
    int64_t k = 0;
    for (; k < most && same_token(begin + k, t + k); ++k) {
      const int64_t field = differing(begin + k, t + k);
      if (field < 0) continue;
      if (split_) break;
      mismatch_ = {field, begin + k, t + k};
      return false;
    }
    *length = k;
    return true;
  }

  bool insert(int64_t n) {
    int64_t node = in_.group[n], t = in_.cu_seqlens[n];
    const int64_t end = in_.cu_seqlens[n + 1];
    while (t < end) {
      int64_t child = table_[find(node, t)], length = 0;
      for (; child >= 0; child = nodes_[child].twin) {
        if (!shared(child, t, end, &length)) return false;
        if (length > 0) break;
      }
      if (child < 0) child = create(node, t, length = end - t);
      if (length < nodes_[child].length) child = cut(child, length);
      node = child, t += length;
    }
    end_[n] = node;
    return true;
  }

  const PrefixBatch& in_;
  const bool split_;
  Mismatch mismatch_;
  std::vector<Node> nodes_;
  std::vector<int64_t> end_;    // the node at which a trajectory ends
  std::vector<int64_t> table_;  // open addressing; -1: empty
};

}  // namespace tk
