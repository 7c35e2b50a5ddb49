// Whose weights a block takes: those of the call's one adapter, or of the adapter of its tokens' row.
//
// The indices are read on the device, and a slot's weights are at a fixed distance from the first's. So a captured
// graph takes what adapters and slots hold when it runs, and no grid depends on them: a block finds its own tokens
// and their slot, or leaves.
#pragma once

#include "divisor.cuh"
#include "elements.cuh"

namespace teamlora {

// In place of a slot: a row without an adapter, and one whose index is that of no slot, which is an error.
inline constexpr int kNoAdapter = -1, kWrongAdapter = -2;

// Version 2: rows of `row_tokens` tokens. A kernel for few tokens looks at 32 of them together, of which there are
// `tiles`; a block takes at most `tile` of one adapter, a power of two. A row of one for many tokens is shared out
// among `tiles` blocks.
struct AdapterOfRow {
    const int32_t* adapter;  // [tokens / row_tokens]
    int slots, tile;
    Divisor row_tokens, tiles;

    __device__ int slot_of(int row) const {
        // Not by the read-only path: a kernel may begin before the copy of an index has been seen by it.
        const int slot = __ldcg(adapter + row);
        return slot < 0 ? kNoAdapter : slot < slots ? slot : kWrongAdapter;
    }
};

// A kernel of version 2 has an `AdapterOfRow` behind its arguments, one of version 1 nothing.
template <typename... Rows>
inline constexpr bool kHasSlots = sizeof...(Rows) > 0;

// T [slots, ..], from a slot's first element on.
template <typename T>
__device__ const T* weights_of(const T* weights, int slot, int64_t elements) {
    return weights + slot * elements;
}

// The tokens of a block for few: consecutive ones.
template <int kTokens>
struct Consecutive {
    int first, tokens;

    // The place in the call of the block's `t`-th token; where it has none, of one that may be read.
    __device__ int clamped(int t) const { return min(first + t, tokens - 1); }
    __device__ int nearest(int t) const { return clamped(t); }
    __device__ int place(int t) const { return first + t; }
    __device__ bool has(int t) const { return first + t < tokens; }
    // Those past the last are computed too.
    __device__ int size() const { return kTokens; }
};

// Some of 32 tokens, of one adapter: those of `first` on for which a bit is set, `count` of them.
struct Group {
    int slot, first, count;
    unsigned bits;

    __device__ int place(int t) const {
        unsigned rest = bits;
        for (int n = 0; n < t; ++n) rest &= rest - 1;
        return first + __ffs(static_cast<int>(rest)) - 1;
    }
    __device__ int clamped(int t) const {
        unsigned rest = bits;
        // Of places that the compiler knows, each is one step from the one before.
#pragma unroll
        for (int n = 0; n < t; ++n) rest = n + 1 < count ? rest & (rest - 1) : rest;
        return first + __ffs(static_cast<int>(rest)) - 1;
    }
    __device__ int nearest(int t) const { return place(min(t, count - 1)); }
    __device__ bool has(int t) const { return t < count; }
    __device__ int size() const { return count; }
};

// Tokens that a block has room for.
template <int kTokens>
__device__ constexpr int room_of() {
    return kTokens;
}
template <int kTokens>
__device__ int room_of(const AdapterOfRow& rows) {
    return rows.tile;
}

template <int kTokens>
__device__ Consecutive<kTokens> tokens_of(int tokens, unsigned index) {
    return {static_cast<int>(index * kTokens), tokens};
}

// The tokens of block `index` along the tiles of tokens, none where there are fewer groups than blocks. Called by
// whole warps, each of which finds the same.
//
// A lane looks at a token each. The first of an adapter, and each behind it that `tile` others of the same lie
// between, lead a group; groups are numbered by their leaders' places. The first groups of all 32s come first, so that
// blocks without one, which there are where rows share an adapter, are the last.
template <int kTokens>
__device__ Group tokens_of(int tokens, unsigned index, const AdapterOfRow& rows) {
    constexpr unsigned kAll = 0xffffffffU;
    const int group = rows.tiles.quotient(static_cast<int>(index));
    const int first = (static_cast<int>(index) - group * rows.tiles.value) * 32;
    const int lane = static_cast<int>(threadIdx.x) % 32, token = first + lane;
    const bool inside = token < tokens;
    const int slot = inside ? rows.slot_of(rows.row_tokens.quotient(token)) : kWrongAdapter - 1;
    const unsigned peers = __match_any_sync(kAll, slot), before = (1U << lane) - 1;
    unsigned leaders = __ballot_sync(kAll, inside && (__popc(peers & before) & (rows.tile - 1)) == 0);
    for (int n = group; n > 0; --n) leaders &= leaders - 1;
    const int leader = leaders == 0 ? 0 : __ffs(static_cast<int>(leaders)) - 1;
    const unsigned bits = __shfl_sync(kAll, peers, leader) & ~((1U << leader) - 1);
    const int count = leaders == 0 ? 0 : min(rows.tile, __popc(bits));
    return {__shfl_sync(kAll, slot, leader), first, count, bits};
}

// Consecutive tokens [first, end) of the call, of one adapter.
template <typename Int>
struct Range {
    Int first;
    int end, slot;
};

// The tokens of a block along the tiles of tokens, `width` of which it takes: those past the end are another's.
// `first`: where they begin if rows do not matter.
template <typename Int>
__device__ Range<Int> range_of(Int first, int tokens, int) {
    return {first, tokens, 0};
}
template <typename Int>
__device__ Range<Int> range_of(Int, int, int width, const AdapterOfRow& rows) {
    // Of too many blocks for `Divisor`.
    const int block = static_cast<int>(blockIdx.x), row = block / rows.tiles.value, tile = block % rows.tiles.value;
    const Int begin = static_cast<Int>(row) * rows.row_tokens.value;
    return {begin + static_cast<Int>(tile) * width, static_cast<int>(begin) + rows.row_tokens.value, rows.slot_of(row)};
}

// An element of y in a row without an adapter: `base` as it is, which may be y itself, and NaN for an index that is
// none, since the host never sees it.
template <typename T>
__device__ void write_without_adapter(const T* base, T* y, int64_t at, int slot) {
    if (slot == kNoAdapter && base == y) return;
    y[at] = slot == kNoAdapter ? base[at] : from_float<T>(NAN);
}

}  // namespace teamlora
