// The only place that knows whether a GPU compiler or the CPU emulation of plugins/tests reads the kernels.
#pragma once

#ifdef TEAMLORA_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>

// Dynamic shared memory of a block, as floats.
#define TEAMLORA_DYNAMIC_SHARED(name) extern __shared__ __align__(128) float name[]

namespace teamlora {

// Nothing that is made of `raw` may move to before this place. Without it the compiler takes the halves of a loaded
// word apart where the load is, and waits for it there.
__device__ inline void hold(uint4& raw) { asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w)); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) noexcept {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace teamlora
#endif
