// Memory that the kernels see: a GPU's, or, where they are emulated, the host's own.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#ifdef TEAMLORA_EMULATION
#include "emulation.h"
#else
#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>
#endif

namespace device_memory {

#ifdef TEAMLORA_EMULATION

// The host's memory `host` itself.
inline void* allocate(void* host, size_t) { return host; }
inline void release(void*) {}
inline void upload(void*, const void*, size_t) {}
inline void download(void*, const void*, size_t) {}
inline void finish() {}
inline void set_schedule(uint64_t seed) { emulation::set_schedule(seed); }

#else

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void* allocate(void*, size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void upload(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copying to the GPU");
}
inline void download(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copying from the GPU");
}
// Raises what went wrong in a kernel.
inline void finish() { check(cudaDeviceSynchronize(), "running"); }
// A GPU has its own.
inline void set_schedule(uint64_t) {}

#endif

}  // namespace device_memory
