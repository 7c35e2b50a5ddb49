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
__device__ void store_pack(T* target, const Pack<T>& pack) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(pack));
    *reinterpret_cast<uint4*>(target) = raw;
}

// A pack as the raw word that a load brings, from the L2 cache. Kept like that until its use (see `hold`), it stays in
// the registers of its load, and nothing waits for it before: the elements of a `Pack` are taken apart at once.
template <typename T>
__device__ uint4 load_raw(const T* source) {
    return __ldcg(reinterpret_cast<const uint4*>(source));
}

// The elements of a raw word, from here on.
template <typename T>
__device__ Pack<T> unpack(uint4 raw) {
    hold(raw);
    Pack<T> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
}
template <typename T>
__device__ Pack<T> unpack(const Pack<T>& pack) {
    return pack;
}

// One transaction to global memory: the compiler takes a plain assignment of a `Pack` apart into four.
template <typename T>
__device__ void store_raw(T* target, uint4 raw) {
    __stcg(reinterpret_cast<uint4*>(target), raw);
}

// The elements of `raw` plus those of `delta`, summed in float32. `delta` is in shared memory, 16-byte aligned.
template <typename T>
__device__ uint4 add_to_pack(uint4 raw, const float* delta) {
    Pack<T> pack;
    memcpy(&pack, &raw, sizeof(pack));
#pragma unroll
    for (int j = 0; j < Pack<T>::kWidth; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(delta + j);
        pack.values[j] = from_float<T>(to_float(pack.values[j]) + four.x);
        pack.values[j + 1] = from_float<T>(to_float(pack.values[j + 1]) + four.y);
        pack.values[j + 2] = from_float<T>(to_float(pack.values[j + 2]) + four.z);
        pack.values[j + 3] = from_float<T>(to_float(pack.values[j + 3]) + four.w);
    }
    memcpy(&raw, &pack, sizeof(raw));
    return raw;
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
