// The router: softmax, interaction, normalisation, in float32, for the tokens of one block.
#pragma once

#include "device.cuh"

namespace teamlora {

// A bit for each expert that takes part: those of whose row of `mix` [k, k] something is not zero. The others are
// padding of an adapter in a slot that is larger. Called by whole warps.
__device__ inline unsigned experts_of(const float* mix, int k) {
    const int expert = static_cast<int>(threadIdx.x) % 32;
    bool takes_part = false;
    for (int to = 0; expert < k && to < k; ++to) takes_part |= mix[expert * k + to] != 0.0F;
    return __ballot_sync(0xffffffffU, takes_part);
}

// Starts to copy a sibling's interaction [k, k] into shared memory, as a group of copies of its own.
__device__ inline void copy_interaction(float* mix, const float* source, int k) {
#pragma unroll 1
    for (int i = threadIdx.x; i < k * k; i += static_cast<int>(blockDim.x)) {
        __pipeline_memcpy_async(mix + i, source + i, sizeof(float));
    }
    __pipeline_commit();
}

// w = normalise(exp(logits - max) mix). Softmax's own denominator cancels in the normalisation. kPadded: experts that
// take no part count as nothing, whatever their logits, and where none does all weights are zero.
//
// Called by all threads of a block, after a barrier. `logits` [tokens, k] in shared memory, `stride` floats from token
// to token, is overwritten; `weights` [tokens, k] is dense, in shared memory; `mix` [k, k] is in either memory. Ends
// with a barrier.
template <bool kPadded>
__device__ inline void route(float* logits, int stride, int tokens, int k, const float* mix, float* weights) {
    const int thread = threadIdx.x, threads = blockDim.x;
    const unsigned experts = kPadded ? experts_of(mix, k) : 0xffffffffU;
    const auto takes_part = [&](int expert) { return !kPadded || (experts >> expert & 1U) != 0; };
    for (int token = thread; token < tokens; token += threads) {
        float* row = logits + token * stride;
        const int first = kPadded ? max(__ffs(static_cast<int>(experts)) - 1, 0) : 0;
        float largest = row[first];
        for (int expert = 1; expert < k; ++expert) {
            if (takes_part(expert)) largest = fmaxf(largest, row[expert]);
        }
        for (int expert = 0; expert < k; ++expert) {
            row[expert] = takes_part(expert) ? expf(row[expert] - largest) : 0.0F;
        }
    }
    __syncthreads();
    for (int i = thread; i < tokens * k; i += threads) {
        const int token = i / k, expert = i % k;
        const float* row = logits + token * stride;
        float sum = 0.0F;
        for (int from = 0; from < k; ++from) sum += row[from] * mix[from * k + expert];
        weights[i] = sum;
    }
    __syncthreads();
    for (int token = thread; token < tokens; token += threads) {
        float* row = weights + token * k;
        float sum = 0.0F;
        for (int expert = 0; expert < k; ++expert) sum += row[expert];
        const float inverse = kPadded && experts == 0 ? 0.0F : 1.0F / sum;
        for (int expert = 0; expert < k; ++expert) row[expert] *= inverse;
    }
    __syncthreads();
}

}  // namespace teamlora
