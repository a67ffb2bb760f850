// Numbers as the launchers pass them (trajkern/_native/_args.py).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "../common/choice.h"
#include "../common/dtype.h"
#include "../common/kernels.h"

namespace tk {

template <size_t N>
using Pointers = std::array<uintptr_t, N>;  // 0: absent

using Where = std::array<uintptr_t, 3>;  // Launch, in the order of its members

inline Launch launch_of(const Where& x) { return {as<double>(x[0]), int64_t(x[1]), as<void>(x[2])}; }

using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace tk
