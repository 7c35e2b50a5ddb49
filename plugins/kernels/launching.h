// How kernels are launched, and what is asked of a device: the calls to CUDA's runtime. Host only, without a GPU
// compiler; the emulation has its own.
#pragma once

#include <atomic>

#include <cuda_runtime_api.h>

namespace teamlora {

// Of a call's kernels: the first waits for all that the stream did before; others may begin early where `overlaps`.
// Never the first: what others load before they wait is complete because it is.
enum class Place { kFirst, kNext, kLast };

// In per cent, what kernels of a call want of a multiprocessor's memory as shared memory, and not as L1 cache, which
// they hardly use. All of them the same: it changes only while the multiprocessor is idle, so that a kernel with a wish
// of its own could not begin early there. A hint, which drivers before CUDA 12.8 may not know; one that refuses it is
// not asked again.
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

// What drivers have said to the wish so far.
enum class Answer { kUnknown, kTaken, kRefused };
inline std::atomic<Answer> answer_to_share{Answer::kUnknown};

// Also where it cannot be told. No error of CUDA's is left for whoever asks next for one.
inline bool may_be_capturing(cudaStream_t stream) noexcept {
    cudaStreamCaptureStatus status{};
    if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
    cudaGetLastError();
    return true;
}

// A refusal may end a capture: there the wish is made only where a launch before has been granted it.
inline bool asks_for_share(cudaStream_t stream) noexcept {
    const Answer answer = answer_to_share.load(std::memory_order_relaxed);
    return answer == Answer::kTaken || (answer == Answer::kUnknown && !may_be_capturing(stream));
}

// The last attribute is the wish for shared memory: without it, where it is refused.
inline cudaError_t launch_with_share(cudaLaunchConfig_t& config, const void* kernel, void** arguments) noexcept {
    cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
    if (error == cudaSuccess) {
        answer_to_share.store(Answer::kTaken, std::memory_order_relaxed);
        return error;
    }
    cudaGetLastError();
    --config.numAttrs;
    error = cudaLaunchKernelExC(&config, kernel, arguments);
    if (error == cudaSuccess) answer_to_share.store(Answer::kRefused, std::memory_order_relaxed);
    return error;
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
    if (overlaps && place != Place::kFirst) {
        cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
#if CUDART_VERSION >= 12080
    if (overlaps && driver_version() >= kKnowsShare && asks_for_share(stream)) {
        cudaLaunchAttribute& share = attributes[config.numAttrs++];
        share.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
        share.val.sharedMemCarveout = kSharedMemoryShare;
        return launch_with_share(config, reinterpret_cast<const void*>(kernel), addresses);
    }
#endif
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
