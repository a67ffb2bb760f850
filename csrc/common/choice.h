// Enumerations as Python passes them: by place.
#pragma once
#include <stdexcept>
#include <string>

namespace tk {

// The member at this place, of members(E) that count from 0; `name` is what the error calls it. Nothing else gets past
// it, so a switch over all members, which the build checks, may end in __builtin_unreachable().
template <class E>
E choice(const char* name, int place) {
  if (place >= 0 && place < members(E{})) return static_cast<E>(place);
  throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(members(E{})) + "), got " +
                              std::to_string(place));
}

}  // namespace tk
