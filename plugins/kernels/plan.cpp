#include "plan.h"

#include <algorithm>

namespace teamlora {
namespace {

constexpr int32_t kSplitStep = 64;
// A row is short that has no more than this part of what few tokens are.
constexpr int32_t kShortRow = 4;
constexpr size_t kAlignment = 256;
// Of `in` and of tokens: counting on from the last by steps of blocks stays within 32 bits.
constexpr int64_t kMostSize = int64_t{1} << 30;
// A grid's second and third dimension.
constexpr int64_t kMostBlocks = 65535;
// Tokens of short rows, each of which may need a block.
constexpr int64_t kMostShortRows = kMostBlocks / kGroupedTokens * kGroupedTokens;

size_t few_up_shared_bytes(const MixedExpertShape& shape, int32_t token_tile) noexcept {
    const size_t columns = static_cast<size_t>(kUpLanes) * pack_width(shape.dtype), warps = kUpThreads / 32;
    // Of several adapters, a kernel for 8 tokens takes fewer of them too.
    const int32_t ahead = up_rows_ahead(shape.slots > 0 && token_tile > 1 ? 8 : token_tile);
    const size_t packs = static_cast<size_t>(ahead) * kUpThreads + token_tile * kUpLanes;
    const size_t values = static_cast<size_t>(shape.sibling_rows()) + shape.num_experts + warps * columns;
    const size_t mix = static_cast<size_t>(shape.num_experts) * shape.num_experts;
    return 16 * packs + (token_tile * values + mix) * sizeof(float);
}

size_t route_shared_bytes(const MixedExpertShape& shape, int32_t tokens) noexcept {
    const size_t values = static_cast<size_t>(shape.sibling_rows()) + shape.num_experts;
    const size_t mix = static_cast<size_t>(shape.num_experts) * shape.num_experts;
    return (tokens * values + mix) * sizeof(float);
}

int32_t multiprocessors(const Tuning& tuning) noexcept {
    return std::clamp(tuning.multiprocessors, 1, kMostMultiprocessors);
}

int32_t most_splits(const MixedExpertShape& shape, const Tuning& tuning) noexcept {
    return ceil_div(shape.in, std::max(tuning.split_width, kSplitStep));
}

int32_t most_column_tiles(const Tuning& tuning) noexcept { return std::max(tuning.column_tiles, 3); }

int32_t blocks_each(const Tuning& tuning) noexcept { return std::max(tuning.blocks_each, 1); }

// v, T [tokens, siblings, value_stride]
size_t values_bytes(const MixedExpertShape& shape) noexcept {
    const int32_t stride = round_up(shape.up_rank(), pack_width(shape.dtype));
    return static_cast<size_t>(shape.tokens) * shape.num_siblings * stride * element_size(shape.dtype);
}

// Of many tokens' first kernel. Of several adapters there are fewer widths, so that the library stays small.
bool has_tiles(const MixedExpertShape& shape, int32_t column_tiles) noexcept {
    return shape.slots == 0 || column_tiles == 3 || column_tiles == 9;
}

// Blocks that some tokens of several adapters may need: the more adapters, the more of them have a tile in part.
int32_t most_groups(const MixedExpertShape& shape, int32_t token_tile) noexcept {
    const auto tokens = static_cast<int32_t>(std::min<int64_t>(shape.tokens, kGroupedTokens));
    int64_t rows = shape.batch();
    if (shape.tokens > kGroupedTokens) rows = std::min(rows, (kGroupedTokens - 2) / shape.row_tokens + 2);
    // Rows without an adapter, and with a wrong index, are groups too.
    const int64_t adapters = std::min<int64_t>({rows, int64_t{shape.slots} + 2, tokens});
    return static_cast<int32_t>((tokens + (token_tile - 1) * adapters) / token_tile);
}

}  // namespace

const char* unsupported(const MixedExpertShape& shape) noexcept {
    if (shape.num_siblings < 1 || shape.num_siblings > kMaxSiblings) return "out_splits must name 1 to 4 siblings";
    if (shape.num_experts < 1 || shape.num_experts > kMaxExperts) return "num_experts must be 1 to 32";
    if (shape.in < 1 || shape.expert_rank < 1 || shape.tokens < 0) return "a size is not positive";
    if (shape.expert_rank > kMaxRank / shape.num_experts) return "the rank is beyond 4096";
    if (shape.in > kMostSize || shape.tokens > kMostSize) return "more than 2^30 inputs or tokens";
    int64_t column_blocks = 0;
    for (int32_t g = 0; g < shape.num_siblings; ++g) {
        if (shape.out_splits[g] < 1) return "an out_split is not positive";
        column_blocks += ceil_div<int64_t>(shape.out_splits[g], kManyColumns);
    }
    if (column_blocks > kMostBlocks) return "more than 8.3 million outputs";
    if (shape.slots < 0 || shape.row_tokens < 0) return "a size is not positive";
    if (shape.slots > 0 && shape.tokens > 0 && (shape.row_tokens == 0 || shape.tokens % shape.row_tokens != 0)) {
        return "the tokens are no whole number of rows";
    }
    return nullptr;
}

bool takes_few(const MixedExpertShape& shape, const Tuning& tuning) noexcept {
    if (shape.tokens <= tuning.few_tokens) return true;
    // Rows so short that each would leave a tile of many tokens mostly empty.
    return shape.slots > 0 && shape.row_tokens <= tuning.few_tokens / kShortRow && shape.tokens <= kMostShortRows;
}

FewTokensPlan plan_few_tokens(const MixedExpertShape& shape, const Tuning& tuning) noexcept {
    FewTokensPlan plan{};
    for (const int32_t tile : {8, 4, 1}) {
        plan.token_tile = tile;
        // Of several adapters, a kernel sees when it runs how many tokens of a tile there are.
        const bool wasteful = tile > 1 && shape.tokens <= (shape.slots > 0 ? 1 : tile / 2);
        if (!wasteful && few_up_shared_bytes(shape, tile) <= kSharedLimit) break;
    }
    plan.shared_bytes = few_up_shared_bytes(shape, plan.token_tile);
    plan.token_blocks = static_cast<int32_t>(ceil_div<int64_t>(shape.tokens, plan.token_tile));
    if (shape.slots > 0) {
        plan.group_blocks = most_groups(shape, plan.token_tile);
        plan.token_blocks = static_cast<int32_t>(ceil_div<int64_t>(shape.tokens, kGroupedTokens)) * plan.group_blocks;
    }
    const int32_t width = pack_width(shape.dtype), step = kDownThreads * width;
    const int32_t most_slices = std::clamp(tuning.few_slices, 1, kMostSlices);
    plan.slice_width = round_up(ceil_div(shape.in, std::min(most_slices, ceil_div(shape.in, step))), step);
    plan.slices = ceil_div(shape.in, plan.slice_width);
    plan.down_threads = std::min(kDownThreads, round_up(ceil_div(shape.in, width), 32));
    const bool fills = int64_t{ceil_div(shape.rows(), 4)} * plan.slices >= multiprocessors(tuning);
    plan.down_rows = plan.token_tile > 1 || fills ? 4 : 1;
    plan.workspace_bytes = sizeof(float) * plan.slices * shape.tokens * shape.rows();
    return plan;
}

ManyTokensPlan plan_many_tokens(const MixedExpertShape& shape, const Tuning& tuning) noexcept {
    ManyTokensPlan plan{};
    const int64_t row_tokens = shape.slots > 0 ? shape.row_tokens : shape.tokens;
    const auto blocks_of = [&](int32_t tile) { return static_cast<int32_t>(ceil_div<int64_t>(row_tokens, tile)); };
    const auto batch = static_cast<int32_t>(shape.slots > 0 ? shape.batch() : 1);
    plan.row_blocks = blocks_of(kManyTokens);
    plan.token_blocks = batch * plan.row_blocks;
    const int32_t splits_of_in = most_splits(shape, tuning);
    // The widest tiles whose splits give each multiprocessor a block: x is read once for each tile.
    for (const int32_t tiles : {9, 7, 5, 3}) {
        if (tiles > most_column_tiles(tuning) || !has_tiles(shape, tiles)) continue;
        plan.column_tiles = tiles;
        plan.column_blocks = ceil_div(shape.rows(), 16 * tiles);
        if (int64_t{plan.token_blocks} * plan.column_blocks * splits_of_in >= multiprocessors(tuning)) break;
    }
    // As many of them with the least padding.
    for (const int32_t tiles : {7, 5, 3, 1}) {
        if (has_tiles(shape, tiles) && ceil_div(shape.rows(), 16 * tiles) == plan.column_blocks) {
            plan.column_tiles = std::min(plan.column_tiles, tiles);
        }
    }
    const int64_t blocks = std::max<int64_t>(int64_t{plan.token_blocks} * plan.column_blocks, 1);
    const int64_t wanted = int64_t{multiprocessors(tuning)} * blocks_each(tuning) / blocks;
    const auto splits = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, splits_of_in));
    plan.split_width = round_up(ceil_div(shape.in, splits), kSplitStep);
    plan.splits = ceil_div(shape.in, plan.split_width);
    plan.row_stride = round_up(shape.rows(), 4);
    plan.value_stride = round_up(shape.up_rank(), pack_width(shape.dtype));
    plan.route_tokens = 8;
    while (plan.route_tokens > 1 && route_shared_bytes(shape, plan.route_tokens) > kSharedLimit) plan.route_tokens /= 2;
    plan.route_shared_bytes = route_shared_bytes(shape, plan.route_tokens);
    plan.route_row_blocks = blocks_of(plan.route_tokens);
    plan.route_blocks = batch * plan.route_row_blocks;
    const size_t parts = sizeof(float) * plan.splits * shape.tokens * plan.row_stride;
    plan.values_offset = round_up(parts, kAlignment);
    plan.workspace_bytes = plan.values_offset + values_bytes(shape);
    return plan;
}

size_t workspace_bytes(const MixedExpertShape& shape, const Tuning& tuning) noexcept {
    if (shape.tokens == 0) return 0;
    return takes_few(shape, tuning) ? plan_few_tokens(shape, tuning).workspace_bytes
                                    : plan_many_tokens(shape, tuning).workspace_bytes;
}

size_t workspace_bound(const MixedExpertShape& shape, const Tuning& tuning) noexcept {
    if (shape.tokens == 0) return 0;
    // Of decode: its slices depend on `in` alone.
    MixedExpertShape few = shape;
    few.tokens = std::min<int64_t>(shape.tokens, tuning.few_tokens);
    if (shape.slots > 0) {
        const int64_t short_rows = std::min<int64_t>(shape.batch() * (tuning.few_tokens / kShortRow), kMostShortRows);
        few.tokens = std::min(shape.tokens, std::max<int64_t>(few.tokens, short_rows));
        few.row_tokens = few.tokens;
    }
    const size_t decode = plan_few_tokens(few, tuning).workspace_bytes;
    // Of prefill: where `in` is split, all blocks together are no more than the largest GPU has room for.
    const int64_t splits = most_splits(shape, tuning);
    const int64_t column_blocks = ceil_div(shape.rows(), 16 * most_column_tiles(tuning));
    const int64_t split_tokens = int64_t{kMostMultiprocessors} * blocks_each(tuning) * kManyTokens / column_blocks;
    const int64_t rows = std::max(shape.tokens, std::min(shape.tokens * splits, split_tokens));
    const size_t parts = sizeof(float) * rows * round_up(shape.rows(), 4);
    return std::max(decode, round_up(parts, kAlignment) + values_bytes(shape));
}

}  // namespace teamlora
