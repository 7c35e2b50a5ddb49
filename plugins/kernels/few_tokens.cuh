// Few tokens (decode): bound by reading `down` and `up` once, so no tensor cores, and enough blocks to fill the chip.
//
// `few_down` sums slices of z = x downT in float32; `few_up` adds the slices and rounds z, routes, and makes y.
#pragma once

#include "columns.cuh"
#include "parts.cuh"
#include "routing.cuh"

namespace teamlora {

// At most; fewer where a slice of `in` has no more packs.
inline constexpr int kDownThreads = 128;
inline constexpr int kUpThreads = 256;
// Threads that lie side by side on a row of `up`; the rest of the block takes other rows.
inline constexpr int kUpLanes = 8;
inline constexpr int kUpRowGroups = kUpThreads / kUpLanes;
// Rows of `up` that a thread holds ahead of their use: a rank of 128 is all in flight while few_down still runs.
template <int kTokens>
inline constexpr int kUpAhead = kTokens == 1   ? 4
                                : kTokens == 4 ? 2
                                               : 1;

struct FewDownArguments {
    const void* x;
    const void* down;
    float* partials;  // [slices, tokens, rows]
    int tokens, in, rows, slice_width;
};

__device__ inline float sum_of_warp(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffU, value, distance);
    return value;
}

// Grid: groups of kDownRows rows, slices of `in`, tiles of tokens. Each thread holds a pack of every row of its group
// before it uses the first, so that the loads are in flight together.
template <typename T, int kTokens, int kDownRows, bool kAligned>
__global__ void __launch_bounds__(kDownThreads, kAligned ? 4 : 3) few_down(FewDownArguments arguments) {
    constexpr int kWidth = Pack<T>::kWidth, kSums = kDownRows * kTokens;
    TEAMLORA_DYNAMIC_SHARED(sums);  // [warps, kSums]
    let_next_kernel_begin();
    const int in = arguments.in, threads = static_cast<int>(blockDim.x);
    const int row0 = blockIdx.x * kDownRows, token0 = blockIdx.z * kTokens;
    const int begin = blockIdx.y * arguments.slice_width;
    const int end = min(begin + arguments.slice_width, in);

    // Rows and tokens past the last read the last one again; their results are dropped.
    const T* rows[kDownRows];
    const T* tokens[kTokens];
#pragma unroll
    for (int r = 0; r < kDownRows; ++r) {
        rows[r] = static_cast<const T*>(arguments.down) + static_cast<int64_t>(min(row0 + r, arguments.rows - 1)) * in;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        tokens[t] =
            static_cast<const T*>(arguments.x) + static_cast<int64_t>(min(token0 + t, arguments.tokens - 1)) * in;
    }

    float z[kDownRows][kTokens] = {};
    for (int i = begin + threadIdx.x * kWidth; i < end; i += threads * kWidth) {
        Pack<T> weights[kDownRows];
#pragma unroll
        for (int r = 0; r < kDownRows; ++r) {
            weights[r] = kAligned ? load_constant(rows[r] + i) : load_elements(rows[r] + i, end - i);
        }
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const Pack<T> x = kAligned ? load_constant(tokens[t] + i) : load_elements(tokens[t] + i, end - i);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const float value = to_float(x.values[j]);
#pragma unroll
                for (int r = 0; r < kDownRows; ++r) z[r][t] += value * to_float(weights[r].values[j]);
            }
        }
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kDownRows; ++r) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const float sum = sum_of_warp(z[r][t]);
            if (lane == 0) sums[warp * kSums + t * kDownRows + r] = sum;
        }
    }
    __syncthreads();
    const int token = token0 + threadIdx.x / kDownRows, row = row0 + threadIdx.x % kDownRows;
    if (threadIdx.x < kSums && token < arguments.tokens && row < arguments.rows) {
        float sum = 0.0F;
        for (int w = 0; w < threads / 32; ++w) sum += sums[w * kSums + threadIdx.x];
        const int64_t at = static_cast<int64_t>(blockIdx.y) * arguments.tokens + token;
        arguments.partials[at * arguments.rows + row] = sum;
    }
}

struct FewUpArguments {
    const void* base;
    const float* mix;
    const void* up;
    void* y;
    const float* partials;
    int tokens, num_experts, expert_rank, down_rank, slices, rows, out;
    bool shared_down;
    Columns columns;
};

// Grid: tiles of columns (never across siblings), tiles of tokens.
template <typename T, int kTokens, bool kAligned>
__global__ void __launch_bounds__(kUpThreads, 2) few_up(FewUpArguments arguments) {
    constexpr int kWidth = Pack<T>::kWidth, kColumns = kUpLanes * kWidth, kWarps = kUpThreads / 32;
    constexpr int kOwn = (kTokens * kColumns + kUpThreads - 1) / kUpThreads, kAhead = kUpAhead<kTokens>;
    TEAMLORA_DYNAMIC_SHARED(shared);
    const int k = arguments.num_experts, a = arguments.down_rank, c = arguments.expert_rank;
    const int up_rank = k * c, sibling_rows = a + k, thread = threadIdx.x;
    float* z = shared;                                         // [tokens, a + k]
    float* weights = z + kTokens * sibling_rows;               // [tokens, k]
    float* sums = weights + kTokens * k;                       // [warps, tokens, columns]
    float* mix = sums + kUpThreads / 32 * kTokens * kColumns;  // [k, k]
    const ColumnTile tile = arguments.columns.tile(blockIdx.x, kColumns);
    const int token0 = blockIdx.y * kTokens;
    const int64_t out = arguments.out;

    // What does not wait for z is loaded first, while few_down still runs: rows of `up` for each thread, the
    // interaction, and `base`. Nothing touches them before they are needed.
    const int lane_column = thread % kUpLanes * kWidth, row0 = thread / kUpLanes;
    const int available = tile.width - lane_column;
    const T* up = static_cast<const T*>(arguments.up) + tile.first + lane_column;
    // Not by the read-only path, whose loads may sink below the wait. Rows and columns past the end read the first row
    // of `up`; what comes of them is dropped.
    const auto load_up = [&](int row) {
        const int elements = row < up_rank ? available : 0;
        const T* source = elements > 0 ? up + row * out : static_cast<const T*>(arguments.up);
        if constexpr (kAligned) {
            return load_raw(source);
        } else {
            return load_elements(source, elements);
        }
    };
    decltype(load_up(0)) next[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) next[n] = load_up(row0 + n * kUpRowGroups);
    if constexpr (kAligned) {
#pragma unroll
        for (int n = 0; n < kAhead; ++n) hold(next[n]);
    }
    const float* global_mix = arguments.mix + tile.sibling * k * k;
    float own_mix = global_mix[min(thread, k * k - 1)];
    hold(own_mix);
    T base[kOwn];
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
        const int i = thread + n * kUpThreads, column = i % kColumns, token = token0 + i / kColumns;
        const bool inside = i < kTokens * kColumns && column < tile.width && token < arguments.tokens;
        base[n] =
            inside ? static_cast<const T*>(arguments.base)[token * out + tile.first + column] : from_float<T>(0.0F);
    }

    wait_for_kernel_before();
    const Parts parts{arguments.partials, arguments.slices, arguments.tokens, arguments.rows};
    add_up_parts<T>(z, parts, token0, kTokens, tile.sibling * sibling_rows, sibling_rows);
    if (thread < k * k) mix[thread] = own_mix;
#pragma unroll 1  // more than 16 experts
    for (int i = thread + kUpThreads; i < k * k; i += kUpThreads) mix[i] = __ldg(global_mix + i);
    __syncthreads();
    route(z + a, sibling_rows, kTokens, k, mix, weights);

    float delta[kTokens][kWidth] = {};
#pragma unroll 1
    for (int first = row0; first < up_rank; first += kAhead * kUpRowGroups) {
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
            const int row = first + n * kUpRowGroups;
            if (row >= up_rank) break;
            const Pack<T> weight = unpack<T>(next[n]);
            next[n] = load_up(row + kAhead * kUpRowGroups);
            const int expert = row / c, source = arguments.shared_down ? row - expert * c : row;
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const float value = rounded<T>(z[t * sibling_rows + source] * weights[t * k + expert]);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) delta[t][j] += value * to_float(weight.values[j]);
            }
        }
    }

    // A warp holds four row groups of the same columns.
    const int warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            float sum = delta[t][j];
            sum += __shfl_xor_sync(0xffffffffU, sum, 8);
            sum += __shfl_xor_sync(0xffffffffU, sum, 16);
            if (lane < kUpLanes) sums[(warp * kTokens + t) * kColumns + lane_column + j] = sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
        const int i = thread + n * kUpThreads, column = i % kColumns, token = token0 + i / kColumns;
        if (i < kTokens * kColumns && column < tile.width && token < arguments.tokens) {
            float sum = to_float(base[n]);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += sums[w * kTokens * kColumns + i];
            static_cast<T*>(arguments.y)[token * out + tile.first + column] = from_float<T>(sum);
        }
    }
}

}  // namespace teamlora
