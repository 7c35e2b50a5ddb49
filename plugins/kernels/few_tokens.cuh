// Few tokens (decode): bound by reading `down` and `up` once, so no tensor cores, and enough blocks to fill the chip.
//
// `few_down` sums slices of z = x downT in float32; `few_up` adds the slices and rounds z, routes, and makes y.
#pragma once

#include "columns.cuh"
#include "parts.cuh"
#include "plan.h"
#include "routing.cuh"
#include "rows.cuh"

namespace teamlora {

// Threads that lie side by side on a row of `up`; the rest of the block takes other rows.
inline constexpr int kUpRowGroups = kUpThreads / kUpLanes;
static_assert(kUpLanes == 8, "sums are exchanged over 8 and 16 lanes");
template <int kTokens>
inline constexpr int kUpAhead = up_rows_ahead(kTokens);

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

// Blocks that fit beside each other. Sums of one token or of eight, as there are tokens of an adapter, are two loops.
template <int kTokens, bool kAligned, typename... Rows>
inline constexpr int kDownBlocks = kAligned && !(kHasSlots<Rows...> && kTokens > 1) ? 4 : 3;

// Grid: groups of kDownRows rows, slices of `in`, tiles of tokens. Each thread holds a pack of every row of its group
// before it uses the first, so that the loads are in flight together.
template <typename T, int kTokens, int kDownRows, bool kAligned, typename... Rows>
__global__ void __launch_bounds__(kDownThreads, kDownBlocks<kTokens, kAligned, Rows...>)
    few_down(FewDownArguments arguments, Rows... batch) {
    constexpr int kWidth = Pack<T>::kWidth, kSums = kDownRows * kTokens;
    static_assert(kSums <= 32, "a block may have one warp, which adds them up");
    TEAMLORA_DYNAMIC_SHARED(sums);  // [warps, kSums]
    let_next_kernel_begin();
    const int in = arguments.in, threads = static_cast<int>(blockDim.x);
    const int row0 = blockIdx.x * kDownRows;
    const auto own = tokens_of<kTokens>(arguments.tokens, blockIdx.z, batch...);
    const T* down = static_cast<const T*>(arguments.down);
    if constexpr (kHasSlots<Rows...>) {
        if (own.count == 0 || own.slot < 0) return;
        down = weights_of(down, own.slot, static_cast<int64_t>(arguments.rows) * in);
    }
    const int begin = blockIdx.y * arguments.slice_width;
    const int end = min(begin + arguments.slice_width, in);

    // Rows and tokens past the last read the last one again; their results are dropped.
    const T* rows[kDownRows];
    const T* tokens[kTokens];
#pragma unroll
    for (int r = 0; r < kDownRows; ++r) {
        rows[r] = down + static_cast<int64_t>(min(row0 + r, arguments.rows - 1)) * in;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        tokens[t] = static_cast<const T*>(arguments.x) + static_cast<int64_t>(own.clamped(t)) * in;
    }

    float z[kDownRows][kTokens] = {};
    const auto add_products = [&](auto own_tokens) {
        for (int i = begin + threadIdx.x * kWidth; i < end; i += threads * kWidth) {
            Pack<T> weights[kDownRows];
#pragma unroll
            for (int r = 0; r < kDownRows; ++r) {
                weights[r] = kAligned ? load_constant(rows[r] + i) : load_elements(rows[r] + i, end - i);
            }
#pragma unroll
            for (int t = 0; t < decltype(own_tokens)::value; ++t) {
                const Pack<T> x = kAligned ? load_constant(tokens[t] + i) : load_elements(tokens[t] + i, end - i);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const float value = to_float(x.values[j]);
#pragma unroll
                    for (int r = 0; r < kDownRows; ++r) z[r][t] += value * to_float(weights[r].values[j]);
                }
            }
        }
    };
    if constexpr (kHasSlots<Rows...> && kTokens > 1) {
        // A batch of many adapters: without the products of seven tokens that there are not.
        if (own.count == 1) {
            add_products(std::integral_constant<int, 1>{});
        } else {
            add_products(std::integral_constant<int, kTokens>{});
        }
    } else {
        add_products(std::integral_constant<int, kTokens>{});
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
    const int t = threadIdx.x / kDownRows, row = row0 + threadIdx.x % kDownRows;
    if (threadIdx.x < kSums && own.has(t) && row < arguments.rows) {
        float sum = 0.0F;
        for (int w = 0; w < threads / 32; ++w) sum += sums[w * kSums + threadIdx.x];
        const int64_t at = static_cast<int64_t>(blockIdx.y) * arguments.tokens + own.place(t);
        arguments.partials[at * arguments.rows + row] = sum;
    }
}

struct FewUpArguments {
    const void* base;
    const float* mix;
    const void* up;
    void* y;
    const float* partials;
    int tokens, num_experts, down_rank, slices, rows, out;
    Divisor expert_rank, sibling_rows;
    bool shared_down;
    Columns columns;
};

// Grid: tiles of columns (never across siblings), tiles of tokens. kAligned: `base`, `up` and `y` are packs, which no
// sibling's end cuts.
template <typename T, int kTokens, bool kAligned, typename... Rows>
__global__ void __launch_bounds__(kUpThreads, 2) few_up(FewUpArguments arguments, Rows... batch) {
    constexpr int kWidth = Pack<T>::kWidth, kColumns = kUpLanes * kWidth, kWarps = kUpThreads / 32;
    constexpr int kOwn = (kTokens * kColumns + kUpThreads - 1) / kUpThreads, kAhead = kUpAhead<kTokens>;
    static_assert(kTokens <= kUpRowGroups, "a thread copies one pack of base");
    TEAMLORA_DYNAMIC_SHARED(shared);
    const int k = arguments.num_experts, a = arguments.down_rank, c = arguments.expert_rank.value;
    const int up_rank = k * c, sibling_rows = a + k, thread = threadIdx.x;
    const int room = room_of<kTokens>(batch...);
    auto* up_places = reinterpret_cast<uint4*>(shared);                    // [kAhead, threads]
    T* base_tile = reinterpret_cast<T*>(up_places + kAhead * kUpThreads);  // [tokens, columns]
    float* z = reinterpret_cast<float*>(base_tile + room * kColumns);      // [tokens, a + k]
    float* weights = z + room * sibling_rows;                              // [tokens, k]
    float* sums = weights + room * k;                                      // [warps, tokens, columns]
    float* mix = sums + kWarps * room * kColumns;                          // [k, k]
    const ColumnTile tile = arguments.columns.tile(blockIdx.x, kColumns);
    const auto own = tokens_of<kTokens>(arguments.tokens, blockIdx.y, batch...);
    const int64_t out = arguments.out;
    const int own_tokens = own.size();
    const T* weights_up = static_cast<const T*>(arguments.up);
    const float* global_mix = arguments.mix;
    if constexpr (kHasSlots<Rows...>) {
        if (own.count == 0 || own.slot < 0) {
            wait_for_kernel_before();
            for (int i = thread; i < own.count * kColumns; i += kUpThreads) {
                if (i % kColumns >= tile.width) continue;
                write_without_adapter(static_cast<const T*>(arguments.base), static_cast<T*>(arguments.y),
                                      own.place(i / kColumns) * out + tile.first + i % kColumns, own.slot);
            }
            return;
        }
        weights_up = weights_of(weights_up, own.slot, up_rank * out);
        global_mix = weights_of(global_mix, own.slot, static_cast<int64_t>(arguments.columns.num_siblings) * k * k);
    }

    // What does not wait for z is under way first, while few_down still runs: the interaction, rows of `up` for each
    // thread, and `base`. They are copied past the registers: a wait for one register is often one for all loads ahead
    // of it, and would be one for `up` before the router.
    copy_interaction(mix, global_mix + tile.sibling * k * k, k);
    const int lane_column = thread % kUpLanes * kWidth, row0 = thread / kUpLanes;
    const int available = tile.width - lane_column;
    // Columns past the end read the tile's first, and what comes of them is dropped.
    const T* up = weights_up + tile.first + (available > 0 ? lane_column : 0);
    const auto load_row_of_up = [&](int first) {
        const int row = first + row0;
        return load_elements(up + row * out, row < up_rank ? available : 0);
    };
    // Copies rows of `up`, `first` rows from the thread's first, into its own places; none past the last.
    const auto copy_rows_of_up = [&](int first) {
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
            const int row = first + row0 + n * kUpRowGroups;
            uint4* place = up_places + n * kUpThreads + thread;
            if (row < up_rank) __pipeline_memcpy_async(place, up + row * out, sizeof(uint4));
        }
    };
    const T* own_base = static_cast<const T*>(arguments.base) + tile.first;
    // Where packs are not aligned they come through registers: these rows of `up`, and the elements of `base`.
    std::conditional_t<kAligned, uint4, Pack<T>> next[kAhead];
    T base[kOwn];
    if constexpr (kAligned) {
        copy_rows_of_up(0);
        const int t = thread / kUpLanes;
        if (t < kTokens && own.has(t) && available > 0) {
            const T* source = own_base + own.place(t) * out + lane_column;
            __pipeline_memcpy_async(base_tile + t * kColumns + lane_column, source, sizeof(uint4));
        }
    } else {
#pragma unroll
        for (int n = 0; n < kAhead; ++n) next[n] = load_row_of_up(n * kUpRowGroups);
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
            const int i = thread + n * kUpThreads, column = i % kColumns, t = i / kColumns;
            const bool inside = i < kTokens * kColumns && column < tile.width && own.has(t);
            base[n] = inside ? own_base[own.place(t) * out + column] : from_float<T>(0.0F);
        }
    }
    __pipeline_commit();
    const auto token_of = [&](int t) { return own.nearest(t); };
    const PartsOfBlock parts({arguments.partials, arguments.slices, arguments.tokens, arguments.rows}, token_of,
                             tile.sibling * sibling_rows, arguments.sibling_rows);

    wait_for_kernel_before();
    parts.template add_up<T>(z, own_tokens);
    wait_for_copies<1>();  // the interaction
    __syncthreads();
    route<kHasSlots<Rows...>>(z + a, sibling_rows, own_tokens, k, mix, weights);

    float delta[kTokens][kWidth] = {};
#pragma unroll 1
    for (int first = 0; first < up_rank; first += kAhead * kUpRowGroups) {
        if constexpr (kAligned) {
            wait_for_copies<0>();
#pragma unroll
            for (int n = 0; n < kAhead; ++n) next[n] = up_places[n * kUpThreads + thread];
            copy_rows_of_up(first + kAhead * kUpRowGroups);
            __pipeline_commit();
        }
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
            const int row = first + row0 + n * kUpRowGroups;
            if (row >= up_rank) break;
            const Pack<T> weight = unpack<T>(next[n]);
            if constexpr (!kAligned) next[n] = load_row_of_up(first + (kAhead + n) * kUpRowGroups);
            const int expert = arguments.expert_rank.quotient(row),
                      source = arguments.shared_down ? row - expert * c : row;
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (kHasSlots<Rows...> && t >= own_tokens) break;
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
        if (kHasSlots<Rows...> && t >= own_tokens) break;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            float sum = delta[t][j];
            sum += __shfl_xor_sync(0xffffffffU, sum, 8);
            sum += __shfl_xor_sync(0xffffffffU, sum, 16);
            if (lane < kUpLanes) sums[(warp * room + t) * kColumns + lane_column + j] = sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
        const int i = thread + n * kUpThreads, column = i % kColumns, t = i / kColumns;
        if (i < kTokens * kColumns && column < tile.width && own.has(t)) {
            float sum = to_float(kAligned ? base_tile[i] : base[n]);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += sums[w * room * kColumns + i];
            static_cast<T*>(arguments.y)[own.place(t) * out + tile.first + column] = from_float<T>(sum);
        }
    }
}

}  // namespace teamlora
