// Value checks that would cost several torch calls each. A result of -1 is fine; else the first offending index.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>

namespace py = pybind11;

namespace {

// cu_seqlens must start at 0, never decrease and end at length.
int64_t first_bad_offset(uintptr_t address, int64_t count, int64_t length) {
  const int64_t* cu_seqlens = reinterpret_cast<const int64_t*>(address);
  if (count == 0 || cu_seqlens[0] != 0) return 0;
  for (int64_t i = 1; i < count; ++i) {
    if (cu_seqlens[i] < cu_seqlens[i - 1]) return i;
  }
  return cu_seqlens[count - 1] == length ? -1 : count - 1;
}

template <class T>
int64_t first_outside_of(const T* x, int64_t count, T low) {
  constexpr int64_t kBlock = 1024;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = start + kBlock < count ? start + kBlock : count;
    int bad = 0;  // no early exit inside a block, so that it vectorises
    for (int64_t i = start; i < end; ++i) bad |= !(x[i] - x[i] == 0) | !(x[i] >= low);
    for (int64_t i = start; bad && i < end; ++i) {
      if (!std::isfinite(x[i]) || !(x[i] >= low)) return i;
    }
  }
  return -1;
}

// Every value must be finite and at least low.
int64_t first_outside(uintptr_t address, bool is_double, int64_t count, double low) {
  if (is_double) return first_outside_of(reinterpret_cast<const double*>(address), count, low);
  return first_outside_of(reinterpret_cast<const float*>(address), count, static_cast<float>(low));
}

}  // namespace

void bind_checks(py::module_& m) {
  m.def("first_bad_offset", &first_bad_offset);
  m.def("first_outside", &first_outside);
}
