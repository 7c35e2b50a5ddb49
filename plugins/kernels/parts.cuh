// z of a block's tokens and of one sibling, from the parts of its sums that blocks of the kernel before have left.
#pragma once

#include "elements.cuh"

namespace teamlora {

// Parts that a thread asks for at a time.
inline constexpr int kPartsAhead = 8;

struct Parts {
    const float* sums;  // [count, tokens, row_stride]
    int count, tokens, row_stride;
};

// z [own_tokens, rows] in shared memory: rows `first_row` on of the tokens `token0` on, added up in the order of the
// parts and rounded to T. Tokens past the last are the last again. Called by all threads; a barrier is the caller's.
template <typename T>
__device__ void add_up_parts(float* z, const Parts& parts, int token0, int own_tokens, int first_row, int rows) {
    const int64_t part_stride = static_cast<int64_t>(parts.tokens) * parts.row_stride;
    for (int i = threadIdx.x; i < own_tokens * rows; i += static_cast<int>(blockDim.x)) {
        const int token = min(token0 + i / rows, parts.tokens - 1), row = first_row + i % rows;
        const float* source = parts.sums + static_cast<int64_t>(token) * parts.row_stride + row;
        float sum = 0.0F;
#pragma unroll 1
        for (int first = 0; first < parts.count; first += kPartsAhead) {
            float own[kPartsAhead];
#pragma unroll
            for (int n = 0; n < kPartsAhead; ++n) {
                own[n] = first + n < parts.count ? load_written_before(source + (first + n) * part_stride) : 0.0F;
            }
#pragma unroll
            for (int n = 0; n < kPartsAhead; ++n) hold(own[n]);
#pragma unroll
            for (int n = 0; n < kPartsAhead; ++n) sum += own[n];
        }
        z[i] = rounded<T>(sum);
    }
}

}  // namespace teamlora
