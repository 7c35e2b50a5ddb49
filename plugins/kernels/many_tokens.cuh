// Many tokens (prefill): both products on tensor cores for half and bfloat16.
//
// `many_down` makes z for a tile of tokens, routes in its epilogue and writes v, what the second product multiplies:
// v[token, (e, j)] = w_e u_j, rounded to T. `many_up` multiplies by `up` and adds `base` in its epilogue.
#pragma once

#include "columns.cuh"
#include "routing.cuh"
#include "tile.cuh"

namespace teamlora {

// 48 KB of shared memory are a block's without asking the driver.
inline constexpr int kSharedLimit = 48 * 1024;

// Blocks that fit beside each other: 512 threads of 128 registers each. Products of floats keep more in registers.
template <typename T, int kThreads>
inline constexpr int kBlocks = sizeof(T) == 2 ? 512 / kThreads : 1;

struct ManyDownArguments {
    const void* x;
    const void* down;
    const float* mix;
    void* values;        // v, T [tokens, siblings, value_stride]
    float* partials;     // [blocks of the grid's x and y, splits, token tile, columns]
    uint32_t* counters;  // [blocks of the grid's x and y], zero at the start
    int tokens, in, num_experts, expert_rank, down_rank;
    bool shared_down, aligned;
    int chunks, chunk_columns, split_width, value_stride;
};

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
        __pipeline_wait_prior(kStages - 2);
        // All have this step's stage, and all are done with the one that is fetched next.
        __syncthreads();
        if (step + kStages - 1 < steps) fetch(step + kStages - 1);
        __pipeline_commit();
        use(step);
    }
    __syncthreads();
}

template <typename T, int kTokenTiles, int kColumnTiles>
struct ManyDown {
    static constexpr int kTokens = kTile * kTokenTiles, kColumns = kTile * kColumnTiles;
    // Warps along the inner dimension, and how many depths of a stage each of them takes.
    static constexpr int kDepthWarps = kTokenTiles == 1 ? 4 : 2, kDepths = 4 / kDepthWarps;
    static constexpr int kWarps = kTokenTiles * kDepthWarps, kThreads = 32 * kWarps;
    static constexpr int kStageWidth = 4 * Tile<T>::kDepth;
    // 16 bytes more than the data, so that rows start in different banks.
    static constexpr int kStride = kStageWidth + Pack<T>::kWidth;
    static constexpr int kStageElements = (kTokens + kColumns) * kStride;
    static constexpr int kStages =
        kSharedLimit / (kStageElements * int(sizeof(T))) > 4 ? 4 : kSharedLimit / (kStageElements * int(sizeof(T)));
    static_assert(kStages >= 2, "a stage is too large");
    // z of a block, and after it the router's weights.
    static constexpr int kZStride = kColumns + 4;
    static constexpr int kZElements = kTokens * kZStride;
    static constexpr size_t kEpilogueBytes = sizeof(float) * (kZElements * (kDepthWarps / 2) + kTokens * kMaxExperts);
    static constexpr size_t kSharedBytes =
        kStages * kStageElements * sizeof(T) > kEpilogueBytes ? kStages * kStageElements * sizeof(T) : kEpilogueBytes;
    static_assert(kSharedBytes <= kSharedLimit, "the epilogue is too large");
};

// Whether this block is the last of its `splits`; if so, z becomes the sum over them, in the order of the splits.
template <typename Shape>
__device__ bool add_up_splits(float* z, float* partials, uint32_t* counter, int split, int splits) {
    // Behind z, where the router's weights will be.
    auto* finished_before = reinterpret_cast<uint32_t*>(z + Shape::kZElements);
    for (int i = threadIdx.x; i < Shape::kTokens * Shape::kColumns; i += Shape::kThreads) {
        const int token = i / Shape::kColumns, column = i % Shape::kColumns;
        partials[split * Shape::kTokens * Shape::kColumns + i] = z[token * Shape::kZStride + column];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *finished_before = atomicAdd(counter, 1U);
    __syncthreads();
    if (*finished_before + 1 != static_cast<uint32_t>(splits)) return false;
    __threadfence();
    for (int i = threadIdx.x; i < Shape::kTokens * Shape::kColumns; i += Shape::kThreads) {
        const int token = i / Shape::kColumns, column = i % Shape::kColumns;
        float sum = 0.0F;
        for (int s = 0; s < splits; ++s) sum += __ldcg(partials + s * Shape::kTokens * Shape::kColumns + i);
        z[token * Shape::kZStride + column] = sum;
    }
    __syncthreads();
    return true;
}

// Grid: tiles of tokens, siblings times chunks, splits of `in`.
template <typename T, int kTokenTiles, int kColumnTiles>
__global__ void __launch_bounds__(ManyDown<T, kTokenTiles, kColumnTiles>::kThreads,
                                  kBlocks<T, ManyDown<T, kTokenTiles, kColumnTiles>::kThreads>)
    many_down(ManyDownArguments arguments) {
    using Shape = ManyDown<T, kTokenTiles, kColumnTiles>;
    using Product = Tile<T>;
    TEAMLORA_DYNAMIC_SHARED(shared);
    T* stages = reinterpret_cast<T*>(shared);
    const int k = arguments.num_experts, a = arguments.down_rank, c = arguments.expert_rank;
    const int sibling = blockIdx.y / arguments.chunks,
              column0 = blockIdx.y % arguments.chunks * arguments.chunk_columns;
    const int columns = min(arguments.chunk_columns, a - column0);
    const int64_t token0 = static_cast<int64_t>(blockIdx.x) * Shape::kTokens;
    const int begin = blockIdx.z * arguments.split_width;
    const int end = min(begin + arguments.split_width, arguments.in);

    const auto token_of = [&](int row) { return token0 + row < arguments.tokens ? token0 + row : int64_t{-1}; };
    // Columns of z: this chunk of A, then the router.
    const auto row_of = [&](int column) -> int64_t {
        if (column >= columns + k) return -1;
        return sibling * (a + k) + (column < columns ? column0 + column : a + column - columns);
    };
    const auto fetch = [&](int step) {
        T* stage = stages + step % Shape::kStages * Shape::kStageElements;
        const int first = begin + step * Shape::kStageWidth;
        copy_rows<T, Shape::kTokens, Shape::kStageWidth, Shape::kStride, Shape::kThreads>(
            stage, static_cast<const T*>(arguments.x), arguments.in, first, end, arguments.aligned, token_of);
        copy_rows<T, Shape::kColumns, Shape::kStageWidth, Shape::kStride, Shape::kThreads>(
            stage + Shape::kTokens * Shape::kStride, static_cast<const T*>(arguments.down), arguments.in, first, end,
            arguments.aligned, row_of);
    };

    const int warp = threadIdx.x / 32, token_tile = warp % kTokenTiles, depth_warp = warp / kTokenTiles;
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

    // Warps along the inner dimension add their sums up, half of them at a time; z ends up in the first slot.
    float* z = shared;
    const int slot_offset = token_tile * kTile * Shape::kZStride;
#pragma unroll
    for (int half = Shape::kDepthWarps / 2; half > 0; half /= 2) {
        if (depth_warp >= half && depth_warp < 2 * half) {
            float* slot = z + (depth_warp - half) * Shape::kZElements + slot_offset;
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n) Product::store(slot + n * kTile, sums[n], Shape::kZStride);
        }
        __syncthreads();
        if (depth_warp < half) {
            const float* slot = z + depth_warp * Shape::kZElements + slot_offset;
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n) Product::add(sums[n], slot + n * kTile, Shape::kZStride);
        }
        __syncthreads();
    }
    if (depth_warp == 0) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) Product::store(z + slot_offset + n * kTile, sums[n], Shape::kZStride);
    }
    __syncthreads();

    if (gridDim.z > 1) {
        const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
        float* partials = arguments.partials + block * gridDim.z * Shape::kTokens * Shape::kColumns;
        if (!add_up_splits<Shape>(z, partials, arguments.counters + block, blockIdx.z, gridDim.z)) return;
    }
    if constexpr (sizeof(T) == 2) {
        for (int i = threadIdx.x; i < Shape::kTokens * Shape::kColumns; i += Shape::kThreads) {
            float& value = z[i / Shape::kColumns * Shape::kZStride + i % Shape::kColumns];
            value = rounded<T>(value);
        }
        __syncthreads();
    }
    float* weights = z + Shape::kZElements;
    route(z + columns, Shape::kZStride, Shape::kTokens, k, arguments.mix + sibling * k * k, weights);

    T* values = static_cast<T*>(arguments.values);
    const int64_t token_stride = static_cast<int64_t>(gridDim.y / arguments.chunks) * arguments.value_stride;
    for (int i = threadIdx.x; i < Shape::kTokens * columns; i += Shape::kThreads) {
        const int row = i / columns, column = i % columns;
        if (token0 + row >= arguments.tokens) break;
        const float u = z[row * Shape::kZStride + column];
        const int64_t at = (token0 + row) * token_stride + sibling * arguments.value_stride + column0 + column;
        if (arguments.shared_down) {
            for (int expert = 0; expert < k; ++expert) {
                values[at + expert * c] = from_float<T>(u * weights[row * k + expert]);
            }
        } else {
            values[at] = from_float<T>(u * weights[row * k + (column0 + column) / c]);
        }
    }
    // v is padded to whole packs, which the second product reads.
    const int up_rank = k * c, padding = arguments.value_stride - up_rank;
    if (column0 > 0 || padding == 0) return;
    for (int i = threadIdx.x; i < Shape::kTokens * padding; i += Shape::kThreads) {
        const int row = i / padding;
        if (token0 + row >= arguments.tokens) break;
        values[(token0 + row) * token_stride + sibling * arguments.value_stride + up_rank + i % padding] =
            from_float<T>(0.0F);
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
    static constexpr int kTokens = 64, kColumns = 128, kThreads = 256;
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
template <typename T, bool kAligned>
__global__ void __launch_bounds__(ManyUp<T>::kThreads, kBlocks<T, ManyUp<T>::kThreads>)
    many_up(ManyUpArguments arguments) {
    using Shape = ManyUp<T>;
    using Product = Tile<T>;
    constexpr int kWidth = Pack<T>::kWidth, kColumnTiles = 4;
    constexpr int kPacksAcross = Shape::kColumns / kWidth, kRowStep = Shape::kThreads / kPacksAcross;
    constexpr int kOwn = Shape::kTokens / kRowStep;
    TEAMLORA_DYNAMIC_SHARED(shared);
    T* stages = reinterpret_cast<T*>(shared);
    const ColumnTile tile = arguments.columns.tile(blockIdx.y, Shape::kColumns);
    const int64_t token0 = static_cast<int64_t>(blockIdx.x) * Shape::kTokens, out = arguments.out;

    const int64_t token_stride = static_cast<int64_t>(arguments.columns.num_siblings) * arguments.value_stride;
    const T* sibling_values = static_cast<const T*>(arguments.values) + tile.sibling * arguments.value_stride;
    const auto token_of = [&](int row) { return token0 + row < arguments.tokens ? token0 + row : int64_t{-1}; };
    const auto fetch = [&](int step) {
        T* stage = stages + step % Shape::kStages * Shape::kStageElements;
        const int depth0 = step * Shape::kDepth, up_rank = arguments.up_rank;
        const auto row_of = [&](int row) { return depth0 + row < up_rank ? depth0 + row : int64_t{-1}; };
        copy_rows<T, Shape::kTokens, Shape::kDepth, Shape::kValueStride, Shape::kThreads>(
            stage, sibling_values, token_stride, depth0, arguments.value_stride, true, token_of);
        copy_rows<T, Shape::kDepth, Shape::kColumns, Shape::kUpStride, Shape::kThreads>(
            stage + Shape::kTokens * Shape::kValueStride, static_cast<const T*>(arguments.up), out, tile.first,
            tile.first + tile.width, kAligned, row_of);
    };
    const int steps = (arguments.up_rank + Shape::kDepth - 1) / Shape::kDepth;
    start_stages<Shape::kStages>(steps, fetch);

    // A thread's own packs of base and y lie below each other. `base` is under way while the product is made: raw
    // words, which nothing touches before the epilogue.
    const int own_column = threadIdx.x % kPacksAcross * kWidth, own_row = threadIdx.x / kPacksAcross;
    const int own_width = tile.width - own_column;
    const int own_rows =
        own_width > 0 ? static_cast<int>(min(arguments.tokens - token0, int64_t{Shape::kTokens})) - own_row : 0;
    const int64_t own = (token0 + own_row) * out + tile.first + own_column;
    const T* own_base = static_cast<const T*>(arguments.base) + own;
    uint4 base[kAligned ? kOwn : 1];
    if constexpr (kAligned) {
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
            base[n] = n * kRowStep < own_rows ? load_raw(own_base + n * kRowStep * out) : uint4{};
        }
    }

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
