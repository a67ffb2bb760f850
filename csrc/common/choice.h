// Enumerations as Python passes them: by place.
#pragma once
#include <stdexcept>
#include <string>

namespace tk {

// How many members an enumeration has; they count from 0.
template <class E>
constexpr int kMembers = 0;

// The member at this place; `name` is what the error calls it.
template <class E>
E choice(const char* name, int place) {
  if (place >= 0 && place < kMembers<E>) return static_cast<E>(place);
  throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(kMembers<E>) + "), got " +
                              std::to_string(place));
}

}  // namespace tk
