// Many tokens (prefill): both products on tensor cores for half and bfloat16.
//
// `many_down` makes parts of z. `many_route` adds them up, rounds, routes and writes v, what the second product
// multiplies: v[token, (e, j)] = w_e u_j, rounded to T. `many_up` multiplies by `up` and adds `base` in its epilogue.
#pragma once

#include "columns.cuh"
#include "parts.cuh"
#include "plan.h"
#include "routing.cuh"
#include "rows.cuh"
#include "tile.cuh"

namespace teamlora {

// Blocks that fit beside each other: 512 threads of 128 registers each. Products of floats keep more in registers.
template <typename T, int kThreads>
inline constexpr int kBlocks = sizeof(T) == 2 ? 512 / kThreads : 1;

// Copies rows of kStageWidth elements from global to shared memory without waiting. Elements from `limit` on, and rows
// for which `row_of` is negative, become zeros. `aligned`: packs begin on 16 bytes, and none reaches over `limit`
// (a copy of a part would become a branch for each length).
template <typename T, int kRows, int kStageWidth, int kStride, int kThreads, typename RowOf>
__device__ void copy_rows(T* target, const T* source, int64_t source_stride, int first, int limit, bool aligned,
                          const RowOf& row_of) {
    constexpr int kWidth = Pack<T>::kWidth, kPacks = kStageWidth / kWidth;
#pragma unroll
    for (int n = 0; n < (kRows * kPacks + kThreads - 1) / kThreads; ++n) {
        const int i = threadIdx.x + n * kThreads, row = i / kPacks, column = i % kPacks * kWidth;
        if (kRows * kPacks % kThreads != 0 && row >= kRows) break;
        const int64_t from = row_of(row);
        const int available = from < 0 ? 0 : limit - (first + column);
        T* to = target + row * kStride + column;
        const T* where = available > 0 ? source + from * source_stride + first + column : source;
        if (aligned) {
            __pipeline_memcpy_async(to, where, 16, available > 0 ? 0 : 16);
        } else {
            store_pack(to, load_elements(where, available));
        }
    }
}

// The pipeline of both products: `fetch(step)` starts the copies of a step into stage `step % kStages`.
template <int kStages, typename Fetch>
__device__ void start_stages(int steps, const Fetch& fetch) {
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
        if (step < steps) fetch(step);
        __pipeline_commit();
    }
}

// Calls `use(step)` for each step, while the stages of the next ones are filled. Ends with a barrier.
template <int kStages, typename Fetch, typename Use>
__device__ void run_stages(int steps, const Fetch& fetch, const Use& use) {
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        // All have this step's stage, and all are done with the one that is fetched next.
        __syncthreads();
        if (step + kStages - 1 < steps) fetch(step + kStages - 1);
        __pipeline_commit();
        use(step);
    }
    __syncthreads();
}

struct ManyDownArguments {
    const void* x;
    const void* down;
    float* parts;  // of z, [splits, tokens, row_stride]
    int tokens, in, rows, row_stride, split_width;
    bool aligned;
};

static_assert(kTile == 16, "the plan counts columns of z in sixteens");

template <typename T, int kColumnTiles>
struct ManyDown {
    static constexpr int kTokenTiles = kManyTokens / kTile, kTokens = kManyTokens, kColumns = kTile * kColumnTiles;
    // Warps along the inner dimension, and how many depths of a stage each of them takes: of wide stages fewer, so that
    // there are more of them.
    static constexpr int kDepthWarps = 2, kDepths = kColumnTiles > 3 ? 1 : 2;
    static constexpr int kThreads = 32 * kTokenTiles * kDepthWarps;
    static constexpr int kStageWidth = kDepthWarps * kDepths * Tile<T>::kDepth;
    // 16 bytes more than the data, so that rows start in different banks.
    static constexpr int kStride = kStageWidth + Pack<T>::kWidth;
    static constexpr int kStageElements = (kTokens + kColumns) * kStride;
    static constexpr int kStages =
        kSharedLimit / (kStageElements * sizeof(T)) > 4 ? 4 : kSharedLimit / (kStageElements * sizeof(T));
    static_assert(kStages >= 2, "a stage is too large");
    static constexpr int kZStride = kColumns + 4;
    static constexpr size_t kZBytes = sizeof(float) * kTokens * kZStride;
    static constexpr size_t kStagesBytes = sizeof(T) * kStages * kStageElements;
    static constexpr size_t kSharedBytes = kStagesBytes > kZBytes ? kStagesBytes : kZBytes;
    static_assert(kSharedBytes <= kSharedLimit, "z is too large");
};

// Grid: tiles of tokens, tiles of rows of `down` (the columns of z, whatever their sibling), splits of `in`.
template <typename T, int kColumnTiles, typename... Rows>
__global__ void __launch_bounds__(ManyDown<T, kColumnTiles>::kThreads, kBlocks<T, ManyDown<T, kColumnTiles>::kThreads>)
    many_down(ManyDownArguments arguments, Rows... batch) {
    using Shape = ManyDown<T, kColumnTiles>;
    using Product = Tile<T>;
    TEAMLORA_DYNAMIC_SHARED(shared);
    let_next_kernel_begin();
    T* stages = reinterpret_cast<T*>(shared);
    const auto own =
        range_of(static_cast<int64_t>(blockIdx.x) * Shape::kTokens, arguments.tokens, Shape::kTokens, batch...);
    const int64_t token0 = own.first;
    const T* down = static_cast<const T*>(arguments.down);
    if constexpr (kHasSlots<Rows...>) {
        if (own.slot < 0) return;
        down = weights_of(down, own.slot, static_cast<int64_t>(arguments.rows) * arguments.in);
    }
    const int column0 = blockIdx.y * Shape::kColumns, columns = arguments.rows - column0;
    const int begin = blockIdx.z * arguments.split_width;
    const int end = min(begin + arguments.split_width, arguments.in);

    const auto token_of = [&](int row) { return token0 + row < own.end ? token0 + row : int64_t{-1}; };
    const auto row_of = [&](int column) { return column < columns ? int64_t{column0} + column : int64_t{-1}; };
    const auto fetch = [&](int step) {
        T* stage = stages + step % Shape::kStages * Shape::kStageElements;
        const int first = begin + step * Shape::kStageWidth;
        copy_rows<T, Shape::kTokens, Shape::kStageWidth, Shape::kStride, Shape::kThreads>(
            stage, static_cast<const T*>(arguments.x), arguments.in, first, end, arguments.aligned, token_of);
        copy_rows<T, Shape::kColumns, Shape::kStageWidth, Shape::kStride, Shape::kThreads>(
            stage + Shape::kTokens * Shape::kStride, down, arguments.in, first, end, arguments.aligned, row_of);
    };

    const int warp = threadIdx.x / 32, token_tile = warp % Shape::kTokenTiles, depth_warp = warp / Shape::kTokenTiles;
    typename Product::Accumulator sums[kColumnTiles];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) Product::clear(sums[n]);
    const int steps = (end - begin + Shape::kStageWidth - 1) / Shape::kStageWidth;
    start_stages<Shape::kStages>(steps, fetch);
    run_stages<Shape::kStages>(steps, fetch, [&](int step) {
        const T* left = stages + step % Shape::kStages * Shape::kStageElements;
        const T* right = left + Shape::kTokens * Shape::kStride;
#pragma unroll
        for (int u = 0; u < Shape::kDepths; ++u) {
            const int depth = (depth_warp * Shape::kDepths + u) * Product::kDepth;
            const auto x = Product::load_left(left + token_tile * kTile * Shape::kStride + depth, Shape::kStride);
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n) {
                Product::template multiply<Order::kColumnMajor>(sums[n], x, right + n * kTile * Shape::kStride + depth,
                                                                Shape::kStride);
            }
        }
    });

    // The two warps of a tile add their sums up in shared memory.
    float* z = shared;
    float* own_z = z + token_tile * kTile * Shape::kZStride;
    if (depth_warp == 1) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) Product::store(own_z + n * kTile, sums[n], Shape::kZStride);
    }
    __syncthreads();
    if (depth_warp == 0) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
            Product::add(sums[n], own_z + n * kTile, Shape::kZStride);
            Product::store(own_z + n * kTile, sums[n], Shape::kZStride);
        }
    }
    __syncthreads();
    // Four sums at a time. Those of rows past the last, which are padding, are zeros.
    float* parts = arguments.parts + (int64_t{blockIdx.z} * arguments.tokens + token0) * arguments.row_stride + column0;
    for (int i = threadIdx.x; i < Shape::kTokens * Shape::kColumns / 4; i += Shape::kThreads) {
        const int token = i / (Shape::kColumns / 4), column = i % (Shape::kColumns / 4) * 4;
        if (token0 + token >= own.end) break;
        if (column0 + column >= arguments.row_stride) continue;
        const uint4 four = *reinterpret_cast<const uint4*>(z + token * Shape::kZStride + column);
        __stcg(reinterpret_cast<uint4*>(parts + static_cast<int64_t>(token) * arguments.row_stride + column), four);
    }
}

struct ManyRouteArguments {
    Parts parts;
    const float* mix;
    void* values;  // v, T [tokens, siblings, value_stride]
    int num_experts, down_rank, own_tokens;
    Divisor expert_rank, sibling_rows, value_stride;
    bool shared_down;
};

inline constexpr int kRouteThreads = 128;

// Grid: groups of `own_tokens` tokens, siblings. Given fewer registers, the compiler waits for each part in turn.
template <typename T, typename... Rows>
__global__ void __launch_bounds__(kRouteThreads, 8) many_route(ManyRouteArguments arguments, Rows... batch) {
    TEAMLORA_DYNAMIC_SHARED(shared);
    let_next_kernel_begin();
    const int k = arguments.num_experts, a = arguments.down_rank, c = arguments.expert_rank.value, up_rank = k * c;
    const int sibling = blockIdx.y, sibling_rows = a + k, own_tokens = arguments.own_tokens;
    const auto own = range_of(static_cast<int>(blockIdx.x * own_tokens), arguments.parts.tokens, own_tokens, batch...);
    const int token0 = own.first, stride = arguments.value_stride.value;
    const float* global_mix = arguments.mix + sibling * k * k;
    if constexpr (kHasSlots<Rows...>) {
        if (own.slot < 0) return wait_for_kernel_before();
        global_mix = weights_of(global_mix, own.slot, static_cast<int64_t>(gridDim.y) * k * k);
    }
    float* z = shared;                               // [own_tokens, a + k]
    float* weights = z + own_tokens * sibling_rows;  // [own_tokens, k]
    float* mix = weights + own_tokens * k;           // [k, k]
    copy_interaction(mix, global_mix, k);
    const auto token_of = [&](int t) { return min(token0 + t, own.end - 1); };
    const PartsOfBlock parts(arguments.parts, token_of, sibling * sibling_rows, arguments.sibling_rows);

    wait_for_kernel_before();
    parts.template add_up<T>(z, own_tokens);
    wait_for_copies<0>();
    __syncthreads();
    route<kHasSlots<Rows...>>(z + a, sibling_rows, own_tokens, k, mix, weights);

    T* values = static_cast<T*>(arguments.values);
    for (int i = threadIdx.x; i < own_tokens * stride; i += kRouteThreads) {
        const int token = arguments.value_stride.quotient(i), row = i - token * stride;
        const int expert = min(arguments.expert_rank.quotient(row), k - 1);
        if (token0 + token >= own.end) break;
        const int source = arguments.shared_down ? row - expert * c : row;
        // v is padded to whole packs, which the second product reads.
        const float value = row < up_rank ? z[token * sibling_rows + source] * weights[token * k + expert] : 0.0F;
        values[(static_cast<int64_t>(token0 + token) * gridDim.y + sibling) * stride + row] = from_float<T>(value);
    }
}

struct ManyUpArguments {
    const void* base;
    const void* up;
    void* y;
    const void* values;
    int tokens, up_rank, value_stride, out;
    Columns columns;
};

template <typename T>
struct ManyUp {
    static constexpr int kTokens = kManyTokens, kColumns = kManyColumns, kThreads = 256;
    static constexpr int kDepth = 2 * Tile<T>::kDepth;
    static constexpr int kValueStride = kDepth + Pack<T>::kWidth, kUpStride = kColumns + Pack<T>::kWidth;
    static constexpr int kStageElements = kTokens * kValueStride + kDepth * kUpStride;
    static constexpr int kStages = 3;
    static constexpr int kResultStride = kColumns + 4;
    static constexpr size_t kStagesBytes = sizeof(T) * kStages * kStageElements;
    static constexpr size_t kResultBytes = sizeof(float) * kTokens * kResultStride;
    static constexpr size_t kSharedBytes = kStagesBytes > kResultBytes ? kStagesBytes : kResultBytes;
    static_assert(kSharedBytes <= kSharedLimit, "the stages are too large");
};

// Grid: tiles of tokens, tiles of columns. kAligned: `base`, `up` and `y` are read and written in whole packs, which
// no sibling's end cuts.
template <typename T, bool kAligned, typename... Rows>
__global__ void __launch_bounds__(ManyUp<T>::kThreads, kBlocks<T, ManyUp<T>::kThreads>)
    many_up(ManyUpArguments arguments, Rows... batch) {
    using Shape = ManyUp<T>;
    using Product = Tile<T>;
    constexpr int kWidth = Pack<T>::kWidth, kColumnTiles = 4;
    constexpr int kPacksAcross = Shape::kColumns / kWidth, kRowStep = Shape::kThreads / kPacksAcross;
    constexpr int kOwn = Shape::kTokens / kRowStep;
    TEAMLORA_DYNAMIC_SHARED(shared);
    T* stages = reinterpret_cast<T*>(shared);
    const ColumnTile tile = arguments.columns.tile(blockIdx.y, Shape::kColumns);
    const auto block =
        range_of(static_cast<int64_t>(blockIdx.x) * Shape::kTokens, arguments.tokens, Shape::kTokens, batch...);
    const int64_t token0 = block.first, out = arguments.out;
    const T* up = static_cast<const T*>(arguments.up);
    if constexpr (kHasSlots<Rows...>) {
        if (block.slot < 0) {
            wait_for_kernel_before();
            const int rows = static_cast<int>(min(block.end - token0, int64_t{Shape::kTokens}));
            const int width = min(tile.width, Shape::kColumns);
            for (int i = threadIdx.x; i < rows * width; i += Shape::kThreads) {
                const int64_t at = (token0 + i / width) * out + tile.first + i % width;
                write_without_adapter(static_cast<const T*>(arguments.base), static_cast<T*>(arguments.y), at,
                                      block.slot);
            }
            return;
        }
        up = weights_of(up, block.slot, arguments.up_rank * out);
    }

    const int64_t token_stride = static_cast<int64_t>(arguments.columns.num_siblings) * arguments.value_stride;
    const T* sibling_values = static_cast<const T*>(arguments.values) + tile.sibling * arguments.value_stride;
    const auto token_of = [&](int row) { return token0 + row < block.end ? token0 + row : int64_t{-1}; };
    const auto stage_of = [&](int step) { return stages + step % Shape::kStages * Shape::kStageElements; };
    const auto fetch_values = [&](int step) {
        copy_rows<T, Shape::kTokens, Shape::kDepth, Shape::kValueStride, Shape::kThreads>(
            stage_of(step), sibling_values, token_stride, step * Shape::kDepth, arguments.value_stride, true, token_of);
    };
    const auto fetch_weights = [&](int step) {
        const int depth0 = step * Shape::kDepth, up_rank = arguments.up_rank;
        const auto row_of = [&](int row) { return depth0 + row < up_rank ? depth0 + row : int64_t{-1}; };
        copy_rows<T, Shape::kDepth, Shape::kColumns, Shape::kUpStride, Shape::kThreads>(
            stage_of(step) + Shape::kTokens * Shape::kValueStride, up, out, tile.first, tile.first + tile.width,
            kAligned, row_of);
    };
    const auto fetch = [&](int step) {
        fetch_values(step);
        fetch_weights(step);
    };
    // What does not wait for v is under way while the kernels before still run. The first group of copies holds the
    // weights of all stages that are filled ahead.
    const int steps = (arguments.up_rank + Shape::kDepth - 1) / Shape::kDepth;
#pragma unroll
    for (int step = 0; step < Shape::kStages - 1; ++step) {
        if (step < steps) fetch_weights(step);
    }

    // A thread's own packs of base and y lie below each other. `base` is under way while the product is made: raw
    // words, which nothing touches before the epilogue.
    const int own_column = threadIdx.x % kPacksAcross * kWidth, own_row = threadIdx.x / kPacksAcross;
    const int own_width = tile.width - own_column;
    const int own_rows =
        own_width > 0 ? static_cast<int>(min(block.end - token0, int64_t{Shape::kTokens})) - own_row : 0;
    const int64_t own = (token0 + own_row) * out + tile.first + own_column;
    const T* own_base = static_cast<const T*>(arguments.base) + own;
    uint4 base[kAligned ? kOwn : 1];
    if constexpr (kAligned) {
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
            base[n] = n * kRowStep < own_rows ? load_raw(own_base + n * kRowStep * out) : uint4{};
        }
    }
    wait_for_kernel_before();
    start_stages<Shape::kStages>(steps, fetch_values);

    const int warp = threadIdx.x / 32, token_tile = warp % 4, column_half = warp / 4;
    typename Product::Accumulator sums[kColumnTiles];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) Product::clear(sums[n]);
    run_stages<Shape::kStages>(steps, fetch, [&](int step) {
        const T* values = stages + step % Shape::kStages * Shape::kStageElements;
        const T* weights = values + Shape::kTokens * Shape::kValueStride;
#pragma unroll 1  // saves registers
        for (int depth = 0; depth < Shape::kDepth; depth += Product::kDepth) {
            const T* left = values + token_tile * kTile * Shape::kValueStride + depth;
            const auto v = Product::load_left(left, Shape::kValueStride);
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n) {
                const T* right = weights + depth * Shape::kUpStride + (column_half * kColumnTiles + n) * kTile;
                Product::template multiply<Order::kRowMajor>(sums[n], v, right, Shape::kUpStride);
            }
        }
    });

    float* result = shared;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
        float* target = result + token_tile * kTile * Shape::kResultStride + (column_half * kColumnTiles + n) * kTile;
        Product::store(target, sums[n], Shape::kResultStride);
    }
    __syncthreads();
    T* own_y = static_cast<T*>(arguments.y) + own;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
        if (n * kRowStep >= own_rows) break;
        const float* delta = result + (own_row + n * kRowStep) * Shape::kResultStride + own_column;
        const int64_t at = n * kRowStep * out;
        if constexpr (kAligned) {
            hold(base[n]);
            store_raw(own_y + at, add_to_pack<T>(base[n], delta));
        } else {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                if (j < own_width) own_y[at + j] = from_float<T>(to_float(own_base[at + j]) + delta[j]);
            }
        }
    }
}

}  // namespace teamlora
