// Runs the CUDA kernels on the CPU: what device.cuh includes in place of CUDA's device headers.
//
// One fiber for each thread of a block, switched at barriers and warp operations; blocks run one after another, but
// stop where they wait for the kernel before. CUDA's own headers give half and bfloat16 on the host. What a GPU leaves
// open is decided by the schedule's seed, the worst way where one can tell: the order of blocks, warps and lanes,
// whether an asynchronous copy happens at once or when it is waited for, and whether a kernel has run when the one
// behind it begins. Shared memory starts as NaN. Fragments of tensor-core tiles are spread over the lanes, as on a GPU.
//
// Caught here: a missing or divergent barrier (a thread runs ahead and reads NaN or old values; a block that cannot go
// on is an error), reads and writes past an array (under AddressSanitizer) or unaligned ones, a copy or a kernel ahead
// that a thread does not wait for, kernels launched in the wrong place of a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

// CUDA's headers give the host compiler empty or foreign definitions of these.
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define TEAMLORA_DYNAMIC_SHARED(name) float* name = emulation::dynamic_shared()

using std::max;
using std::min;

namespace emulation {

// Decides what a GPU leaves open. Seed 0 is in order, 1 in reverse order, others are shuffled.
void set_schedule(uint64_t seed);

struct Thread {
    dim3 index;
    int lane;
};

const Thread& current();
dim3 current_block();
extern dim3 current_grid, current_block_size;

float* dynamic_shared();
void block_barrier();
void warp_barrier();
// A thread waits for what other blocks do: others run before the rest of its own block does.
void let_other_blocks_run();

// A place of this warp's where lane `lane` can leave `size` bytes for the others.
void* lane_slot(int lane);
inline constexpr size_t kSlotBytes = 64;

void copy_async(void* target, const void* source, size_t size, size_t zeros);
void commit_copies();
void wait_copies(int still_open);

// Dimensions, and what each thread runs; whether the kernel ahead may not have ended, so that each thread has to wait.
struct Grid {
    dim3 size, block_size;
    size_t shared_bytes;
    std::function<void()> kernel;
    bool waits = false;
};

// Of a kernel among those of its call.
enum class Place { kFirst, kNext, kLast };

// Kernels of one call, of which the next may begin before the one ahead has ended, where they overlap: a grid runs at
// once, or when one behind it waits, or, where none does, after the last.
void run_grid(Grid grid, Place place, bool overlaps);
void wait_for_grids_before();
void require_that_has_waited();

// Forgets what was launched; `why` is what cudaGetErrorString says from now on.
void give_up(const char* why);

// The grids that `launch` asks for, of which none is run.
std::vector<Grid> record(const std::function<void()>& launch);

}  // namespace emulation

#define threadIdx (emulation::current().index)
#define blockIdx (emulation::current_block())
#define gridDim (emulation::current_grid)
#define blockDim (emulation::current_block_size)

inline void __syncthreads() { emulation::block_barrier(); }

namespace emulation {

// What a GPU reads or writes at once lies at a multiple of its size.
template <typename T>
T* aligned(T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) throw std::logic_error("an unaligned access");
    return address;
}

}  // namespace emulation

template <typename T>
T __ldg(const T* address) {
    return *emulation::aligned(address);
}
template <typename T>
T __ldcg(const T* address) {
    return *emulation::aligned(address);
}
template <typename T>
void __stcg(T* address, T value) {
    *emulation::aligned(address) = value;
}
inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
    if (mask != 0xffffffffU) throw std::logic_error("a shuffle among some lanes only");
    const int lane = emulation::current().lane;
    std::memcpy(emulation::lane_slot(lane), &value, sizeof(value));
    emulation::warp_barrier();
    float other;
    std::memcpy(&other, emulation::lane_slot(lane ^ distance), sizeof(other));
    emulation::warp_barrier();
    return other;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    if (mask != 0xffffffffU) throw std::logic_error("a shuffle among some lanes only");
    std::memcpy(emulation::lane_slot(emulation::current().lane), &value, sizeof(value));
    emulation::warp_barrier();
    T other;
    std::memcpy(&other, emulation::lane_slot(source % 32), sizeof(other));
    emulation::warp_barrier();
    return other;
}

namespace emulation {

// A bit for each lane whose `value` is as `wanted` says.
template <typename Wanted>
unsigned lanes_where(unsigned mask, int value, const Wanted& wanted) {
    if (mask != 0xffffffffU) throw std::logic_error("a vote of some lanes only");
    std::memcpy(lane_slot(current().lane), &value, sizeof(value));
    warp_barrier();
    unsigned found = 0;
    for (int lane = 0; lane < 32; ++lane) {
        int other;
        std::memcpy(&other, lane_slot(lane), sizeof(other));
        if (wanted(other)) found |= 1U << lane;
    }
    warp_barrier();
    return found;
}

}  // namespace emulation

inline unsigned __ballot_sync(unsigned mask, int value) {
    return emulation::lanes_where(mask, value, [](int other) { return other != 0; });
}
inline unsigned __match_any_sync(unsigned mask, int value) {
    return emulation::lanes_where(mask, value, [&](int other) { return other == value; });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __pipeline_memcpy_async(void* target, const void* source, size_t size, size_t zeros = 0) {
    emulation::copy_async(target, source, size, zeros);
}
inline void __pipeline_commit() { emulation::commit_copies(); }

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

// A 16x16 tile: lane l holds its elements 8 l to 8 l + 7, in row-major order.
template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "only 16x16x16 is emulated");
    static constexpr int num_elements = 8;
    T x[num_elements];
};

template <typename Fragment, typename T>
void fill_fragment(Fragment& tile, T value) {
    std::fill_n(tile.x, tile.num_elements, value);
}

inline void require_alignment(const void* address, int stride, size_t element) {
    if (reinterpret_cast<uintptr_t>(address) % 32 != 0) throw std::logic_error("a tile is not 32-byte aligned");
    if (stride * element % 16 != 0) throw std::logic_error("a tile's rows are not 16-byte aligned");
}

template <typename Use, int M, int N, int K, typename T, typename Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& tile, const T* source, int stride) {
    require_alignment(source, stride, sizeof(T));
    emulation::warp_barrier();
    for (int i = 0; i < tile.num_elements; ++i) {
        const int at = emulation::current().lane * 8 + i, row = at / 16, column = at % 16;
        const bool by_rows = std::is_same_v<Layout, row_major>;
        tile.x[i] = source[by_rows ? row * stride + column : column * stride + row];
    }
    emulation::warp_barrier();
}

template <int M, int N, int K>
void load_matrix_sync(fragment<accumulator, M, N, K, float>& tile, const float* source, int stride, layout_t layout) {
    require_alignment(source, stride, sizeof(float));
    if (layout != mem_row_major) throw std::logic_error("only row-major accumulators are emulated");
    emulation::warp_barrier();
    for (int i = 0; i < tile.num_elements; ++i) {
        const int at = emulation::current().lane * 8 + i;
        tile.x[i] = source[at / 16 * stride + at % 16];
    }
    emulation::warp_barrier();
}

template <int M, int N, int K>
void store_matrix_sync(float* target, const fragment<accumulator, M, N, K, float>& tile, int stride, layout_t layout) {
    require_alignment(target, stride, sizeof(float));
    if (layout != mem_row_major) throw std::logic_error("only row-major accumulators are emulated");
    emulation::warp_barrier();
    for (int i = 0; i < tile.num_elements; ++i) {
        const int at = emulation::current().lane * 8 + i;
        target[at / 16 * stride + at % 16] = tile.x[i];
    }
    emulation::warp_barrier();
}

template <typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& result, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& sum) {
    struct Deposit {
        T a[8], b[8];
    };
    static_assert(sizeof(Deposit) <= emulation::kSlotBytes);
    const int lane = emulation::current().lane;
    Deposit mine;
    std::copy_n(a.x, 8, mine.a);
    std::copy_n(b.x, 8, mine.b);
    std::memcpy(emulation::lane_slot(lane), &mine, sizeof(mine));
    emulation::warp_barrier();
    const int row = lane / 2, column0 = lane % 2 * 8;
    float sums[8];
    std::copy_n(sum.x, 8, sums);
    for (int depth = 0; depth < 16; ++depth) {
        const auto* left = static_cast<const Deposit*>(emulation::lane_slot(row * 2 + depth / 8));
        const auto* right = static_cast<const Deposit*>(emulation::lane_slot(depth * 2 + column0 / 8));
        const float value = static_cast<float>(left->a[depth % 8]);
        for (int j = 0; j < 8; ++j) sums[j] += value * static_cast<float>(right->b[j]);
    }
    std::copy_n(sums, 8, result.x);
    emulation::warp_barrier();
}

}  // namespace nvcuda::wmma

namespace teamlora {

inline void hold(float&) {}
inline void hold(int64_t&) {}
inline void hold(const float*&) {}
inline void hold(uint4&) {}
template <int kStillOpen>
void wait_for_copies() {
    emulation::wait_copies(kStillOpen);
}
inline void let_next_kernel_begin() {}
inline void wait_for_kernel_before() { emulation::wait_for_grids_before(); }
inline float load_written_before(const float* source) {
    emulation::require_that_has_waited();
    return *emulation::aligned(source);
}

using emulation::Place;

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                          Place place, bool overlaps, const Arguments&... arguments) {
    const bool fits = shared_bytes <= 48 * 1024 && block.x <= 1024 && grid.y <= 65535 && grid.z <= 65535;
    if (!fits) return cudaErrorInvalidValue;
    try {
        emulation::run_grid({grid, block, shared_bytes, [=] { kernel(arguments...); }}, place, overlaps);
    } catch (const std::exception& error) {
        // Whoever launches throws nothing.
        emulation::give_up(error.what());
        return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

struct Device {
    int multiprocessors;
    bool overlaps;
};

// Few multiprocessors, so that small shapes are cut as large ones are on a GPU.
template <typename... Parameters>
cudaError_t ask_device(int, void (*)(Parameters...), Device& answer) {
    answer = {16, true};
    return cudaSuccess;
}

}  // namespace teamlora
