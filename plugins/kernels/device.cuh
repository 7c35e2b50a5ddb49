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

// A border for the compiler: what makes `value` stays before it, what is made of it behind it. Right after a load, the
// load cannot sink below a later wait; before a use, the halves of a loaded word are not taken apart, and waited for,
// where the load is. It is no instruction.
__device__ inline void hold(float& value) { asm volatile("" : "+f"(value)); }
__device__ inline void hold(uint4& raw) { asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w)); }

// In the first of two kernels: the second may begin, as far as its `wait_for_first_kernel`.
__device__ inline void let_second_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In the second: what the first has written is there from here on. Until then it may not be read, and never by the
// read-only path, which takes memory for constant from the kernel's start.
__device__ inline void wait_for_first_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#else
    asm volatile("" ::: "memory");
#endif
}

// Whether the current device runs code of `kernel` that has these two instructions, and its driver captures such
// launches in graphs. Code for sm_80 that an sm_90 compiles from PTX has not: the PTX's version counts, not the device.
template <typename... Parameters>
bool may_overlap(void (*kernel)(Parameters...)) noexcept {
#if CUDART_VERSION >= 12030
    int driver = 0;
    cudaFuncAttributes attributes{};
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
           cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
#else
    static_cast<void>(kernel);
    return false;
#endif
}

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

// The first of two kernels, which calls `let_second_kernel_begin`.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_first(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) noexcept {
    return launch_kernel(kernel, grid, block, shared_bytes, stream, arguments...);
}

// The second, of which every thread calls `wait_for_first_kernel`. Where it may not overlap, it begins after the first.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_second(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) noexcept {
    if (!may_overlap(kernel)) return launch_kernel(kernel, grid, block, shared_bytes, stream, arguments...);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace teamlora
#endif
