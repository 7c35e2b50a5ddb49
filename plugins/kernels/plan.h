// How one call is cut into blocks, and how its workspace is laid out: pure functions of the sizes, host only.
#pragma once

#include "mixed_expert.h"

namespace teamlora {

// Up to this many tokens a call is bound by reading weights, and tensor cores would idle. An estimate: it has not yet
// been tuned on a GPU.
inline constexpr int64_t kFewTokens = 32;

template <typename Int>
constexpr Int ceil_div(Int value, Int divisor) noexcept {
    return (value + divisor - 1) / divisor;
}
template <typename Int>
constexpr Int round_up(Int value, Int multiple) noexcept {
    return ceil_div(value, multiple) * multiple;
}

constexpr int32_t element_size(DataType dtype) noexcept { return dtype == DataType::kFloat32 ? 4 : 2; }
// Elements in 16 bytes.
constexpr int32_t pack_width(DataType dtype) noexcept { return 16 / element_size(dtype); }

// Few tokens: z is summed in `slices` parts of `in`, each by blocks of its own; the second kernel adds them up.
struct FewTokensPlan {
    int32_t token_tile;  // tokens a block works on at a time: 1, 4 or 8
    int32_t slices;
    int32_t slice_width;
    size_t shared_bytes;     // of the second kernel
    size_t workspace_bytes;  // partial z, float [slices, tokens, rows]
};

// Many tokens: a block makes z for `token_tile` tokens and a chunk of one sibling's columns (with the router's), so it
// can route by itself. Where that gives too few blocks, `splits` blocks share `in`, and the last to finish adds up.
struct ManyTokensPlan {
    int32_t token_tile;     // 16 or 64
    int32_t column_tiles;   // z columns of a block, in sixteens: 1, 3 or 6
    int32_t chunks;         // blocks along a sibling's columns
    int32_t chunk_columns;  // columns of A in each
    int32_t splits;
    int32_t split_width;
    int64_t token_blocks;
    int32_t value_stride;  // elements of one token's v of one sibling, padded to 16 bytes
    size_t counters_offset, partials_offset, values_offset, workspace_bytes;
};

FewTokensPlan plan_few_tokens(const MixedExpertShape& shape) noexcept;
ManyTokensPlan plan_many_tokens(const MixedExpertShape& shape) noexcept;

}  // namespace teamlora
