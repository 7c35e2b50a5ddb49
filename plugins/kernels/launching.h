// How kernels are launched, and what is asked of a device: the calls to CUDA's runtime. Host only, without a GPU
// compiler; the emulation has its own.
#pragma once

#include <cuda_runtime_api.h>

namespace teamlora {

// Of a call's kernels: the first waits for all that the stream did before; others may begin early where `overlaps`.
// Never the first: what others load before they wait is complete because it is.
enum class Place { kFirst, kNext, kLast };

// In per cent, what kernels of a call want of a multiprocessor's memory as shared memory, and not as L1 cache, which
// they hardly use. All of them the same: it changes only while the multiprocessor is idle, so that a kernel with a wish
// of its own could not begin early there. A hint, which drivers before CUDA 12.8 may not know.
inline constexpr unsigned kSharedMemoryShare = 100;
inline constexpr int kKnowsShare = 12080;

// That of the driver, the same for all devices, or 0.
inline int driver_version() noexcept {
    static const int version = [] {
        int found = 0;
        return cudaDriverGetVersion(&found) == cudaSuccess ? found : 0;
    }();
    return version;
}

template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Place place, bool overlaps, const Parameters&... arguments) noexcept {
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
#if CUDART_VERSION >= 12080
    if (overlaps && driver_version() >= kKnowsShare) {
        cudaLaunchAttribute& share = attributes[config.numAttrs++];
        share.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
        share.val.sharedMemCarveout = kSharedMemoryShare;
    }
#endif
    if (overlaps && place != Place::kFirst) {
        cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}

// What is asked of the current device, once for each.
struct Device {
    int multiprocessors;
    // Whether it runs code of `kernel` that lets others begin early and waits for them (device.cuh), and its driver
    // captures such launches in graphs. Code for sm_80 that an sm_90 compiles from PTX does not: the PTX's version
    // counts, not the device.
    bool overlaps;
};

template <typename... Parameters>
cudaError_t ask_device(int device, void (*kernel)(Parameters...), Device& answer) noexcept {
    cudaError_t error = cudaDeviceGetAttribute(&answer.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    answer.overlaps = false;
#if CUDART_VERSION >= 12030
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    answer.overlaps = error == cudaSuccess && driver_version() >= 12030 && attributes.ptxVersion >= 90;
#else
    static_cast<void>(kernel);
#endif
    return error;
}

}  // namespace teamlora
