// The router-mixed expert projection on a GPU: shapes, workspace, launch. Plain C++; see README.md for the design.
//
//     z = x downT                              [tokens, G (a + k)], summed in float32, rounded to T
//     w = softmax(logits) mix, normalised      [tokens, G, k], in float32
//     v = w_e u_e                              [tokens, G, k c], rounded to T
//     y = base + v up                          [tokens, O], summed in float32, rounded to T
//
// The op's definition, with what it rounds, is teamlora_export/graph/op.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace teamlora {

enum class DataType : int32_t { kFloat32, kFloat16, kBFloat16 };

inline constexpr int32_t kMaxSiblings = 4;
inline constexpr int32_t kMaxExperts = 32;
// Rows of one sibling's `down` (a + k) and of `up` (k c): what a block of the few-tokens path keeps of one token.
inline constexpr int32_t kMaxRank = 4096;
// What a workspace is laid out for: a GPU with more of them is used as if it had these.
inline constexpr int32_t kMostMultiprocessors = 192, kMostSlices = 16;

// Sizes of one call. `down_rank` is a, `expert_rank` is c: a = k c, or a = c where every expert reads all of u.
struct MixedExpertShape {
    DataType dtype = DataType::kFloat16;
    int64_t tokens = 0;
    int32_t in = 0;
    int32_t num_experts = 0;
    int32_t expert_rank = 0;
    bool shared_down = false;
    int32_t num_siblings = 0;
    int32_t out_splits[kMaxSiblings] = {};
    // Version 2 of the op: adapters that `down`, `mix` and `up` have, and tokens of each row, which has an index of its
    // own; all tokens where one index is for all. 0 slots: version 1.
    int32_t slots = 0;
    int64_t row_tokens = 0;

    // Rows of the batch that an index is given for.
    int64_t batch() const noexcept { return row_tokens > 0 ? tokens / row_tokens : 0; }
    int32_t up_rank() const noexcept { return num_experts * expert_rank; }
    int32_t down_rank() const noexcept { return shared_down ? expert_rank : up_rank(); }
    int32_t sibling_rows() const noexcept { return down_rank() + num_experts; }
    int32_t rows() const noexcept { return num_siblings * sibling_rows(); }
    int32_t out() const noexcept {
        int32_t sum = 0;
        for (int32_t g = 0; g < num_siblings; ++g) sum += out_splits[g];
        return sum;
    }
};

// What decides beside the sizes how a call is cut into blocks: the GPU, and constants, each of which is an estimate
// until `scripts/check_gpu` has tried others on it.
struct Tuning {
    int32_t multiprocessors = kMostMultiprocessors;
    bool overlaps = false;  // whether a kernel may begin before the one ahead of it has ended
    // Up to this many tokens a call is bound by reading weights, and tensor cores would idle.
    int32_t few_tokens = 32;
    int32_t few_slices = kMostSlices;  // of `in`, at most
    // Blocks of the first product of many tokens that a multiprocessor gets at most, where `in` is split for them.
    int32_t blocks_each = 2;
    int32_t split_width = 256;  // elements of `in`, at least
    int32_t column_tiles = 9;   // of 16 columns of z in a block, at most
};

// Device pointers, dense and row-major. `y` may be `base` itself; nothing else may overlap.
struct MixedExpertTensors {
    const void* x;     // T [tokens, in]
    const void* base;  // T [tokens, O]
    const void* down;  // T [G (a + k), in]
    const float* mix;  // [G, k, k]
    const void* up;    // T [k c, O]
    void* y;           // T [tokens, O]
    // Version 2, where the three weights have a leading dimension of slots: int32 [tokens / row_tokens], the slot of
    // each row; below 0: y is base. A row whose index is that of no slot becomes NaN: no host has seen it.
    const int32_t* adapter = nullptr;
};

// Why the kernels cannot take `shape`, or nullptr where they can. Any number of tokens is taken, none too.
const char* unsupported(const MixedExpertShape& shape) noexcept;

// Bytes of workspace that `launch` needs for exactly these sizes: a pure function of its arguments.
size_t workspace_bytes(const MixedExpertShape& shape, const Tuning& tuning) noexcept;

// No less than any number of tokens from 0 to `shape.tokens`, in as many rows or fewer, needs on any GPU, with the
// constants of `tuning`.
size_t workspace_bound(const MixedExpertShape& shape, const Tuning& tuning = {}) noexcept;

// That of the current device, which is asked once.
cudaError_t tuning_of_device(Tuning& tuning) noexcept;

// Enqueues the projection. No allocation, no synchronisation, no host read: CUDA graphs capture it, and take what the
// tensors hold, indices and slots too, when they run.
// `workspace` is 256-byte aligned and has `workspace_bytes(shape, tuning)` bytes; its content does not matter.
cudaError_t launch(const MixedExpertShape& shape, const Tuning& tuning, const MixedExpertTensors& tensors,
                   void* workspace, cudaStream_t stream) noexcept;

}  // namespace teamlora
