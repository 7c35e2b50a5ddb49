// z of a block's tokens and of one sibling, from the parts of its sums that blocks of the kernel before have left.
#pragma once

#include "divisor.cuh"
#include "elements.cuh"

namespace teamlora {

// Parts that a thread asks for at a time.
inline constexpr int kPartsAhead = 8;

struct Parts {
    const float* sums;  // [count, tokens, row_stride]
    int count, tokens, row_stride;
};

// Made before the kernel waits for the one ahead: where a thread's first number has its parts is known by then.
// `TokenOf` gives the place of the block's n-th token, of one that may be read where it has none.
template <typename TokenOf>
class PartsOfBlock {
public:
    // Of the block's tokens, and `rows` rows from `first_row` on.
    __device__ PartsOfBlock(const Parts& parts, const TokenOf& token_of, int first_row, const Divisor& rows)
        : parts_(parts),
          rows_(rows),
          token_of_(token_of),
          first_row_(first_row),
          stride_(static_cast<int64_t>(parts.tokens) * parts.row_stride),
          first_(begin_of(threadIdx.x)) {
        hold(stride_);
        hold(first_);
    }

    // z [own_tokens, rows] in shared memory, added up in the order of the parts and rounded to T. Called by all
    // threads; a barrier is the caller's.
    template <typename T>
    __device__ void add_up(float* z, int own_tokens) const {
        const float* begin = first_;
        for (int i = threadIdx.x; i < own_tokens * rows_.value;) {
            float sum = 0.0F;
#pragma unroll 1
            for (int first = 0; first < parts_.count; first += kPartsAhead) {
                float own[kPartsAhead];
#pragma unroll
                for (int n = 0; n < kPartsAhead; ++n) {
                    own[n] = first + n < parts_.count ? load_written_before(begin) : 0.0F;
                    begin += stride_;
                    hold(begin);  // or eight addresses would be made before the first is asked for
                }
#pragma unroll
                for (int n = 0; n < kPartsAhead; ++n) hold(own[n]);
#pragma unroll
                for (int n = 0; n < kPartsAhead; ++n) sum += own[n];
            }
            z[i] = rounded<T>(sum);
            i += static_cast<int>(blockDim.x);
            begin = begin_of(i);
        }
    }

private:
    // The first part of number `i` of z.
    __device__ const float* begin_of(int i) const {
        const int token_of_block = rows_.quotient(i), row = first_row_ + i - token_of_block * rows_.value;
        const int token = token_of_(token_of_block);
        return parts_.sums + static_cast<int64_t>(token) * parts_.row_stride + row;
    }

    Parts parts_;
    Divisor rows_;
    TokenOf token_of_;
    int first_row_;
    int64_t stride_;  // from part to part
    const float* first_;
};

}  // namespace teamlora
