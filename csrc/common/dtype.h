// Element types as the launchers number them (trajkern/_native/_args.py), and pointers as they pass them.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

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

// What is squared may be this large, as trajkern/_checks.py's largest_value has it: no sum of squares of differences
// overflows, nor a difference in T.
template <class T>
constexpr T kLargest = T(8.507059173023462e37);  // 2^126
template <>
inline constexpr double kLargest<double> = 3.1217485503159922e144;  // 2^480

// f of a value of the element type.
template <class F>
auto with_dtype(int dtype, F&& f) {
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
  throw std::invalid_argument("dtype must be one of the four, got number " + std::to_string(dtype));
}

// f of a value of the type: float32 or float64.
template <class F>
auto with_float(int dtype, F&& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::float16:
    case DType::bfloat16:
      break;
  }
  throw std::invalid_argument("dtype must be float32 or float64, got number " + std::to_string(dtype));
}

// A pointer as Python passes it; 0 is null.
template <class T>
T* as(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

}  // namespace tk
