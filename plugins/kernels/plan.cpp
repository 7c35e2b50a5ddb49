#include "plan.h"

#include <algorithm>

namespace teamlora {
namespace {

constexpr int32_t kFewThreads = 128;
constexpr int32_t kMostSlices = 8;
// What a block may have without asking the driver for more, which would be host work at launch.
constexpr size_t kSharedBytes = 48 * 1024;
// Blocks that keep the largest chips busy.
constexpr int64_t kWantedBlocks = 128;
constexpr int32_t kSplitStep = 256;
constexpr size_t kAlignment = 256;

size_t few_up_shared_bytes(const MixedExpertShape& shape, int32_t token_tile) noexcept {
    const size_t columns = 8 * static_cast<size_t>(pack_width(shape.dtype));
    const size_t values = static_cast<size_t>(shape.sibling_rows()) + shape.num_experts + 8 * columns;
    const size_t mix = static_cast<size_t>(shape.num_experts) * shape.num_experts;
    return (token_tile * values + mix) * sizeof(float);
}

}  // namespace

const char* unsupported(const MixedExpertShape& shape) noexcept {
    if (shape.num_siblings < 1 || shape.num_siblings > kMaxSiblings) return "out_splits must name 1 to 4 siblings";
    if (shape.num_experts < 1 || shape.num_experts > kMaxExperts) return "num_experts must be 1 to 32";
    if (shape.in < 1 || shape.expert_rank < 1 || shape.tokens < 0) return "a size is not positive";
    if (shape.expert_rank > kMaxRank / shape.num_experts) return "the rank is beyond 4096";
    int64_t out = 0;
    for (int32_t g = 0; g < shape.num_siblings; ++g) {
        if (shape.out_splits[g] < 1) return "an out_split is not positive";
        out += shape.out_splits[g];
    }
    if (out > INT32_MAX || shape.tokens > INT32_MAX) return "a size is beyond 2^31";
    return nullptr;
}

FewTokensPlan plan_few_tokens(const MixedExpertShape& shape) noexcept {
    FewTokensPlan plan{};
    for (const int32_t tile : {8, 4, 1}) {
        plan.token_tile = tile;
        const bool wasteful = tile > 1 && shape.tokens <= tile / 2;
        if (!wasteful && few_up_shared_bytes(shape, tile) <= kSharedBytes) break;
    }
    plan.shared_bytes = few_up_shared_bytes(shape, plan.token_tile);
    const int32_t step = kFewThreads * pack_width(shape.dtype);
    plan.slice_width = round_up(ceil_div(shape.in, std::min(kMostSlices, ceil_div(shape.in, step))), step);
    plan.slices = ceil_div(shape.in, plan.slice_width);
    plan.workspace_bytes = sizeof(float) * plan.slices * shape.tokens * shape.rows();
    return plan;
}

ManyTokensPlan plan_many_tokens(const MixedExpertShape& shape) noexcept {
    ManyTokensPlan plan{};
    const int32_t k = shape.num_experts, a = shape.down_rank();
    plan.column_tiles = a + k <= 16 ? 1 : a + k <= 48 ? 3 : 6;
    plan.chunks = ceil_div(a, 16 * plan.column_tiles - k);
    plan.chunk_columns = ceil_div(a, plan.chunks);
    const int64_t column_blocks = static_cast<int64_t>(shape.num_siblings) * plan.chunks;
    plan.token_tile = ceil_div<int64_t>(shape.tokens, 64) * column_blocks >= kWantedBlocks ? 64 : 16;
    plan.token_blocks = ceil_div<int64_t>(shape.tokens, plan.token_tile);
    const int64_t blocks = std::max<int64_t>(plan.token_blocks * column_blocks, 1);
    const int64_t wanted = std::min<int64_t>(ceil_div(kWantedBlocks, blocks), ceil_div(shape.in, kSplitStep));
    plan.split_width = round_up(ceil_div(shape.in, static_cast<int32_t>(wanted)), kSplitStep);
    plan.splits = ceil_div(shape.in, plan.split_width);
    plan.value_stride = round_up(shape.up_rank(), pack_width(shape.dtype));

    const bool split = plan.splits > 1;
    const size_t counters = split ? blocks * sizeof(uint32_t) : 0;
    const size_t partials = split ? sizeof(float) * plan.splits * blocks * plan.token_tile * 16 * plan.column_tiles : 0;
    const size_t values =
        static_cast<size_t>(shape.tokens) * shape.num_siblings * plan.value_stride * element_size(shape.dtype);
    plan.counters_offset = 0;
    plan.partials_offset = round_up(counters, kAlignment);
    plan.values_offset = plan.partials_offset + round_up(partials, kAlignment);
    plan.workspace_bytes = plan.values_offset + values;
    return plan;
}

size_t workspace_bytes(const MixedExpertShape& shape) noexcept {
    if (shape.tokens == 0) return 0;
    return shape.tokens <= kFewTokens ? plan_few_tokens(shape).workspace_bytes
                                      : plan_many_tokens(shape).workspace_bytes;
}

size_t workspace_bound(const MixedExpertShape& shape) noexcept {
    // Beyond this many tokens nothing is split, and what is needed grows with them.
    const int64_t unsplit = 64 * kWantedBlocks;
    MixedExpertShape smaller = shape;
    size_t most = workspace_bytes(shape);
    for (smaller.tokens = std::min(shape.tokens, unsplit); smaller.tokens > 0; --smaller.tokens) {
        most = std::max(most, workspace_bytes(smaller));
    }
    return most;
}

}  // namespace teamlora
