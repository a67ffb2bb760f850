// Ratcliff and Obershelp's likeness of strings, block for block what difflib.SequenceMatcher finds, without the
// interpreter's lock: the longest common block, the one that begins first among equals, then the same left and right.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"

namespace tk::srl {

// A Python string's code points; its owner keeps it alive.
struct Text {
  const void* data;
  int64_t length;
  int kind;  // bytes a code point: 1, 2 or 4

  explicit Text(PyObject* text) {
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(text) != 0) throw pybind11::error_already_set();
#endif
    data = PyUnicode_DATA(text), length = PyUnicode_GET_LENGTH(text), kind = PyUnicode_KIND(text);
  }
  uint32_t operator[](int64_t i) const {
    if (kind == 1) return static_cast<const uint8_t*>(data)[i];
    if (kind == 2) return static_cast<const uint16_t*>(data)[i];
    return static_cast<const uint32_t*>(data)[i];
  }
};

constexpr int kNone = -1;

// Two texts as letters: the distinct characters of b are numbered, a's others are kNone. Reused from pair to pair.
class Letters {
 public:
  std::vector<int> a, b;                // the letter at each place
  std::vector<int64_t> places, bounds;  // of the letter c in b, ascending: places[bounds[c]] to places[bounds[c + 1]]
  std::vector<char> seeds;              // may the letter begin a block?

  void read(const Text& text_a, const Text& text_b, bool autojunk) {
    const int64_t n = text_b.length;
    b.resize(n), counts_.clear();
    for (int64_t j = 0; j < n; ++j) ++counts_[b[j] = number(text_b[j])];
    a.resize(text_a.length);
    for (int64_t i = 0; i < text_a.length; ++i) a[i] = text_a[i] < letter_.size() ? letter_[text_a[i]] : kNone;
    for (int64_t j = 0; j < n; ++j) letter_[text_b[j]] = kNone;

    const auto letters = int64_t(counts_.size());
    bounds.assign(letters + 1, 0), seeds.resize(letters), places.resize(n);
    for (int64_t c = 0; c < letters; ++c) {
      bounds[c + 1] = bounds[c] + counts_[c];
      seeds[c] = !(autojunk && n >= 200 && counts_[c] > n / 100 + 1);
      counts_[c] = bounds[c];
    }
    for (int64_t j = 0; j < n; ++j) places[counts_[b[j]]++] = j;
  }

 private:
  std::vector<int> letter_;      // of each code point; kNone between two pairs
  std::vector<int64_t> counts_;  // of each letter in b

  int number(uint32_t character) {
    if (character >= letter_.size()) letter_.resize(character + 1, kNone);
    int& letter = letter_[character];
    if (letter == kNone) {
      letter = int(counts_.size());
      counts_.push_back(0);
    }
    return letter;
  }
};

struct Block {
  int64_t a, b, size;  // a[a : a + size] == b[b : b + size]
};

class Matcher {
 public:
  // NaN where it takes more steps: characters of a, and places in b of the same one, each as often as it is looked at.
  double ratio(const Text& a, const Text& b, bool autojunk, int64_t max_steps) {
    letters_.read(a, b, autojunk);
    runs_.assign(b.length + 1, Run{0, 0}), row_ = 0, steps_left_ = max_steps;
    const int64_t both = a.length + b.length, alike = matched();
    if (steps_left_ < 0) return std::numeric_limits<double>::quiet_NaN();
    return both == 0 ? 1 : 2.0 * double(alike) / double(both);
  }

 private:
  struct Run {
    int64_t row, length;  // of a block that ends in that row (a find's place in a)
  };
  Letters letters_;
  std::vector<Run> runs_;  // [j + 1] is of b's place j
  int64_t row_, steps_left_;
  std::vector<std::array<int64_t, 4>> ranges_;

  int64_t matched() {
    int64_t total = 0;
    ranges_.assign(1, {0, int64_t(letters_.a.size()), 0, int64_t(letters_.b.size())});
    while (!ranges_.empty() && steps_left_ >= 0) {
      const auto [a, a_end, b, b_end] = ranges_.back();
      ranges_.pop_back();
      const Block block = grown(longest(a, a_end, b, b_end), a, a_end, b, b_end);
      if (block.size == 0) continue;
      total += block.size;
      if (a < block.a && b < block.b) ranges_.push_back({a, block.a, b, block.b});
      const int64_t a_rest = block.a + block.size, b_rest = block.b + block.size;
      if (a_rest < a_end && b_rest < b_end) ranges_.push_back({a_rest, a_end, b_rest, b_end});
    }
    return total;
  }

  // The longest block of seeds. A row needs its predecessor's run at the place before, which it may have overwritten.
  Block longest(int64_t a_begin, int64_t a_end, int64_t b_begin, int64_t b_end) {
    Block best{a_begin, b_begin, 0};
    ++row_;  // no run of another find is of the row before the first
    steps_left_ -= a_end - a_begin;
    for (int64_t i = a_begin; i < a_end && steps_left_ >= 0; ++i) {
      ++row_;
      const int c = letters_.a[i];
      if (c == kNone || !letters_.seeds[c]) continue;
      const int64_t* places = letters_.places.data();
      const int64_t *first = places + letters_.bounds[c], *end = places + letters_.bounds[c + 1];
      int64_t last = -1;
      Run overwritten{0, 0};
      for (auto at = std::lower_bound(first, end, b_begin); at < end && *at < b_end; ++at) {
        const int64_t j = *at;
        --steps_left_;
        const Run before = j - 1 == last ? overwritten : runs_[j];
        const int64_t length = before.row == row_ - 1 ? before.length + 1 : 1;
        overwritten = runs_[j + 1], last = j;
        runs_[j + 1] = {row_, length};
        if (length > best.size) best = {i - length + 1, j - length + 1, length};
      }
    }
    return best;
  }

  // By what is alike at its ends, seeds or not.
  Block grown(Block block, int64_t a_begin, int64_t a_end, int64_t b_begin, int64_t b_end) const {
    const std::vector<int>&a = letters_.a, &b = letters_.b;
    while (block.a > a_begin && block.b > b_begin && a[block.a - 1] == b[block.b - 1])
      --block.a, --block.b, ++block.size;
    while (block.a + block.size < a_end && block.b + block.size < b_end &&
           a[block.a + block.size] == b[block.b + block.size])
      ++block.size;
    return block;
  }
};

void bound_similarity(const pybind11::tuple& a, const pybind11::tuple& b, bool autojunk, int64_t max_steps,
                      uintptr_t out) {
  std::vector<Text> texts_a, texts_b;
  for (const auto text : a) texts_a.emplace_back(text.ptr());
  for (const auto text : b) texts_b.emplace_back(text.ptr());
  const auto count = int64_t(texts_a.size());
  std::atomic<int64_t> next{0};
  const pybind11::gil_scoped_release unlocked;
  parallel_for(count, 1, [&](int64_t, int64_t) {  // each thread takes the next pair: some take much longer than others
    Matcher matcher;
    for (int64_t i = next++; i < count; i = next++)
      as<double>(out)[i] = matcher.ratio(texts_a[i], texts_b[i], autojunk, max_steps);
  });
}

}  // namespace tk::srl

void bind_srl(pybind11::module_& m) { m.def("similarity", &tk::srl::bound_similarity); }
