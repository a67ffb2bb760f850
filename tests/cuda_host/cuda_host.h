// What a test may set about the host execution of kernels.
#pragma once

namespace cuda_host {

enum class Order { forward, backward, random };

// The order in which a block's threads take their turns.
void set_order(Order order, unsigned seed);

}  // namespace cuda_host
