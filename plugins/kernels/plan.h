// How one call is cut into blocks, and how its workspace is laid out: pure functions, host only.
#pragma once

#include "mixed_expert.h"

namespace teamlora {

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

// What a block may have without asking the driver for more.
inline constexpr size_t kSharedLimit = 48 * 1024;

// Threads of the kernels for few tokens: of the first at most, and of the second, in which `kUpLanes` lie side by side
// on a row of `up`, a pack each.
inline constexpr int32_t kDownThreads = 128, kUpThreads = 256, kUpLanes = 8;

// Rows of `up` that each thread of the second asks for ahead of their use: a rank of 128 is all under way while the
// first still runs, or half of it where many tokens fill shared memory.
constexpr int32_t up_rows_ahead(int32_t token_tile) noexcept { return token_tile > 4 ? 2 : 4; }

// Few tokens: z is summed in `slices` parts of `in`, each by blocks of its own; the second kernel adds them up.
struct FewTokensPlan {
    int32_t token_tile;  // tokens a block works on at a time: 1, 4 or 8; of one adapter at most, where there are slots
    int32_t token_blocks;  // blocks along the tokens
    int32_t group_blocks;  // where there are slots: of 32 tokens, as many as they may need
    int32_t down_rows;     // of a block of the first kernel: 4, or 1 for one token where that gives too few blocks
    int32_t down_threads;  // of such a block: no more warps than a slice has packs for
    int32_t slices;
    int32_t slice_width;
    size_t shared_bytes;     // of the second kernel
    size_t workspace_bytes;  // parts of z, float [slices, tokens, rows]
};

// Many tokens: a block makes z for 64 tokens and some of its columns, whatever their sibling. Where that gives too few
// blocks, `splits` of them share `in`. The second kernel adds the parts up, routes, and writes v.
struct ManyTokensPlan {
    int32_t column_tiles;   // z columns of a block, in sixteens: 1, 3, 5, 7 or 9
    int32_t column_blocks;  // blocks along the columns of z, each of which reads x
    int32_t splits;
    int32_t split_width;
    int32_t token_blocks;
    int32_t row_blocks;    // where there are slots: of each row
    int32_t row_stride;    // floats of one token's z, padded to 16 bytes
    int32_t value_stride;  // elements of one token's v of one sibling, padded to 16 bytes
    int32_t route_tokens;  // of a block of the second kernel
    int32_t route_blocks;  // along the tokens
    int32_t route_row_blocks;
    size_t route_shared_bytes;
    size_t values_offset;  // v is behind the parts of z, float [splits, tokens, row_stride]
    size_t workspace_bytes;
};

// A block's tokens, and its columns of y.
inline constexpr int32_t kManyTokens = 64, kManyColumns = 128;
// A kernel for few tokens of several adapters looks at so many together, to find those of one.
inline constexpr int32_t kGroupedTokens = 32;

bool takes_few(const MixedExpertShape& shape, const Tuning& tuning) noexcept;
FewTokensPlan plan_few_tokens(const MixedExpertShape& shape, const Tuning& tuning) noexcept;
ManyTokensPlan plan_many_tokens(const MixedExpertShape& shape, const Tuning& tuning) noexcept;

}  // namespace teamlora
