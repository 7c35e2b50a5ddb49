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
