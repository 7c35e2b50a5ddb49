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

#include "launching.h"

// Dynamic shared memory of a block, as floats.
#define TEAMLORA_DYNAMIC_SHARED(name) extern __shared__ __align__(128) float name[]

namespace teamlora {

// A border for the compiler: what makes `value` stays before it, what is made of it behind it. Right after a load, the
// load cannot sink below a later wait; before a use, the halves of a loaded word are not taken apart, and waited for,
// where the load is. It is no instruction.
__device__ inline void hold(float& value) { asm volatile("" : "+f"(value)); }
__device__ inline void hold(int64_t& value) { asm volatile("" : "+l"(value)); }
__device__ inline void hold(const float*& address) { asm volatile("" : "+l"(address)); }
__device__ inline void hold(uint4& raw) { asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w)); }

// This thread's asynchronous copies are there from here on, but for those of the last `kStillOpen` groups. CUDA's own
// __pipeline_wait_prior is no border for the compiler, which may read what is copied before it.
template <int kStillOpen>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(kStillOpen) : "memory");
}

// The kernel behind this one may begin, as far as its `wait_for_kernel_before`.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What the kernel before has written is there from here on, and what those before it have. Until then it may not be
// read, and never by the read-only path, which takes memory for constant from the kernel's start. Every thread of a
// kernel that may begin early calls it: so a kernel has ended when the one behind it has.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#else
    asm volatile("" ::: "memory");
#endif
}

// A number that a kernel before has written, from the L2 cache: no read-only path, and no earlier than the wait, for
// the compiler either.
__device__ inline float load_written_before(const float* source) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(source) : "memory");
    return value;
}

}  // namespace teamlora
#endif
