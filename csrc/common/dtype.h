// Element types as the launchers number them (trajkern/_native/_args.py), and pointers as they pass them.
#pragma once
#include <cstdint>

namespace tk {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// 16-bit floats are storage only: distinct types, so that a conversion is never a silent integer one.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What sums over elements of type T accumulate in, and what its statistics are returned in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls f with a value of the element type.
template <class F>
void with_dtype(int dtype, F&& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::float16:
      return f(Half{});
    case DType::bfloat16:
      return f(BFloat16{});
  }
}

// Calls f with a value of the type: float32 or float64.
template <class F>
void with_float(int dtype, F&& f) {
  if (static_cast<DType>(dtype) == DType::float64) return f(double{});
  f(float{});
}

// A pointer as Python passes it; 0 is null.
template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

}  // namespace tk
