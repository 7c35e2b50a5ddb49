// The router: softmax, interaction, normalisation, in float32, for the tokens of one block.
#pragma once

#include "device.cuh"

namespace teamlora {

// Starts to copy a sibling's interaction [k, k] into shared memory, as a group of copies of its own.
__device__ inline void copy_interaction(float* mix, const float* source, int k) {
#pragma unroll 1
    for (int i = threadIdx.x; i < k * k; i += static_cast<int>(blockDim.x)) {
        __pipeline_memcpy_async(mix + i, source + i, sizeof(float));
    }
    __pipeline_commit();
}

// w = normalise(exp(logits - max) mix). Softmax's own denominator cancels in the normalisation.
//
// Called by all threads of a block, after a barrier. `logits` [tokens, k] in shared memory, `stride` floats from token
// to token, is overwritten; `weights` [tokens, k] is dense, in shared memory; `mix` [k, k] is in either memory. Ends
// with a barrier.
__device__ inline void route(float* logits, int stride, int tokens, int k, const float* mix, float* weights) {
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int token = thread; token < tokens; token += threads) {
        float* row = logits + token * stride;
        float largest = row[0];
        for (int expert = 1; expert < k; ++expert) largest = fmaxf(largest, row[expert]);
        for (int expert = 0; expert < k; ++expert) row[expert] = expf(row[expert] - largest);
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
        const float inverse = 1.0F / sum;
        for (int expert = 0; expert < k; ++expert) row[expert] *= inverse;
    }
    __syncthreads();
}

}  // namespace teamlora
