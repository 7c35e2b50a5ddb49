// Element types, their conversions to and from float, and packs of 16 bytes.
#pragma once

#include <cstring>

#include "device.cuh"

namespace teamlora {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// `value` as T holds it, where the op's definition rounds.
template <typename T>
__device__ float rounded(float value) {
    return to_float(from_float<T>(value));
}

// 16 bytes of elements, as one memory transaction moves them.
template <typename T>
struct alignas(16) Pack {
    static constexpr int kWidth = 16 / sizeof(T);
    T values[kWidth];
};

// A pack of memory that no kernel writes while this one runs. `source` is 16-byte aligned.
template <typename T>
__device__ Pack<T> load_constant(const T* source) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(source));
    Pack<T> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
}

template <typename T>
__device__ Pack<T> load_pack(const T* source) {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    Pack<T> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
}

template <typename T>
__device__ void store_pack(T* target, const Pack<T>& pack) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(pack));
    *reinterpret_cast<uint4*>(target) = raw;
}

// The same to global memory, as one transaction: the compiler takes a plain assignment apart into four.
template <typename T>
__device__ void store_global(T* target, const Pack<T>& pack) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(pack));
    __stwb(reinterpret_cast<uint4*>(target), raw);
}

// The first `count` elements from `source`, which need not be aligned; zeros after them.
template <typename T>
__device__ Pack<T> load_elements(const T* source, int count) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::kWidth; ++j) pack.values[j] = j < count ? source[j] : from_float<T>(0.0F);
    return pack;
}

}  // namespace teamlora
