// Division by a number that a whole call shares: a multiplication and a shift for the reciprocal and a dozen more.
#pragma once

#include "device.cuh"

namespace teamlora {

// n / divisor is n factor / 2^31, rounded down. What factor = 2^31 / divisor + 1 is too large by adds less than
// 1 / divisor, so no whole, as long as n divisor < 2^31.
struct Divisor {
    int value;
    unsigned factor;

    static Divisor of(int divisor) noexcept { return {divisor, (1U << 31) / static_cast<unsigned>(divisor) + 1}; }

    __device__ int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<unsigned>(n)) * factor >> 31);
    }
};

}  // namespace teamlora
