// A vector of floats of the instruction set that the including file is compiled for, and T's way in and out of it.
//
// Everything is in a namespace of the instruction set's own, and nothing of the standard library is called: one
// function that the linker shares between two instruction sets would crash on a processor that has only one of them.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace teamlora::cpu::TEAMLORA_CODE {

// Registers hold a tile's sums, one row of a panel, and one element of x.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16, kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#elif defined(__ARM_NEON)
inline constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 4;
#else
inline constexpr int kLanes = 4, kTileRows = 5, kTileVectors = 2;
#endif

using Vector = float __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using HalfBits = uint16_t __attribute__((vector_size(2 * kLanes)));

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class To, class From>
inline To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class To>
inline To read(const void* from) {
    To to;
    __builtin_memcpy(&to, from, sizeof(to));
    return to;
}

inline Bits choose(Bits condition, Bits yes, Bits no) { return (condition & yes) | (~condition & no); }

inline Vector load(const float* from) { return read<Vector>(from); }
inline void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof(value)); }

inline Vector load(const BFloat16* from) {
    return same_bits<Vector>(__builtin_convertvector(read<HalfBits>(from), Bits) << 16);
}
inline void store(BFloat16* to, Vector value) {
    const Bits bits = same_bits<Bits>(value);
    const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Bits not_a_number = same_bits<Bits>((bits & 0x7FFFFFFF) > 0x7F800000);
    const HalfBits narrow = __builtin_convertvector(choose(not_a_number, (bits >> 16) | 0x40, rounded), HalfBits);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}

#if defined(__AVX512F__)
// With a mask of all lanes: the forms without one make GCC 12 warn about its own header (its bug 105593, mended in 13).
inline Vector load(const Float16* from) { return Vector(_mm512_maskz_cvtph_ps(0xFFFF, read<__m256i>(from))); }
inline void store(Float16* to, Vector value) {
    const __m256i narrow = _mm512_maskz_cvtps_ph(0xFFFF, __m512(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}
#elif defined(__AVX2__)
inline Vector load(const Float16* from) { return Vector(_mm256_cvtph_ps(read<__m128i>(from))); }
inline void store(Float16* to, Vector value) {
    const __m128i narrow = _mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}
#elif defined(__ARM_NEON)
inline Vector load(const Float16* from) { return Vector(vcvt_f32_f16(read<float16x4_t>(from))); }
inline void store(Float16* to, Vector value) {
    const float16x4_t narrow = vcvt_f16_f32(float32x4_t(value));
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}
#else
inline Vector load(const Float16* from) {
    const Bits half = __builtin_convertvector(read<HalfBits>(from), Bits);
    const Bits magnitude = half & 0x7FFF;
    // The exponent moves from a bias of 15 to one of 127 by a product, which is right for subnormal numbers too.
    const Bits scaled = same_bits<Bits>(same_bits<Vector>(magnitude << 13) * 0x1p112F);
    const Bits special = same_bits<Bits>(magnitude >= 0x7C00);
    return same_bits<Vector>(choose(special, (magnitude << 13) | 0x7F800000, scaled) | ((half & 0x8000) << 16));
}
inline void store(Float16* to, Vector value) {
    const Bits bits = same_bits<Bits>(value), magnitude = bits & 0x7FFFFFFF;
    const Bits normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13;
    // Adding a half leaves the number of units of the least subnormal number in the last bits, rounded.
    const Bits subnormal = same_bits<Bits>(same_bits<Vector>(magnitude) + 0.5F) - 0x3F000000;
    const Bits not_a_number = same_bits<Bits>(magnitude > 0x7F800000);
    const Bits special = choose(not_a_number, Bits{} + 0x7E00, Bits{} + 0x7C00);
    Bits result = choose(same_bits<Bits>(magnitude < 0x38800000), subnormal, normal);
    result = choose(same_bits<Bits>(magnitude >= 0x47800000), special, result) | ((bits >> 16) & 0x8000);
    const HalfBits narrow = __builtin_convertvector(result, HalfBits);
    __builtin_memcpy(to, &narrow, sizeof(narrow));
}
#endif

// Some of a vector: the first `count` floats.
template <class T>
inline Vector load_part(const T* from, int64_t count) {
    T part[kLanes] = {};
    __builtin_memcpy(part, from, static_cast<size_t>(count) * sizeof(T));
    return load(part);
}
template <class T>
inline void store_part(T* to, Vector value, int64_t count) {
    T part[kLanes];
    store(part, value);
    __builtin_memcpy(to, part, static_cast<size_t>(count) * sizeof(T));
}

// Rounded to T.
template <class T>
inline Vector rounded(Vector value) {
    T narrow[kLanes];
    store(narrow, value);
    return load(narrow);
}
template <>
inline Vector rounded<float>(Vector value) {
    return value;
}

// exp(x) for x <= 0, within 1.5 units of the last place; NaN stays NaN, and what would be subnormal becomes 1.2e-38.
inline Vector exp_of_negative(Vector x) {
    const Bits low = same_bits<Bits>(x < -87.0F);
    x = same_bits<Vector>(choose(low, same_bits<Bits>(Vector{} - 87.0F), same_bits<Bits>(x)));
    // Adding 1.5 x 2^23 rounds to a whole number, which is then in the last bits.
    const Vector shifted = x * 1.44269504F + 12582912.0F;
    const Vector whole = shifted - 12582912.0F;
    const Vector rest = (x - whole * 0.693359375F) + whole * 2.12194440e-4F;
    Vector power = Vector{} + 1.9875691500e-4F;
    power = power * rest + 1.3981999507e-3F;
    power = power * rest + 8.3334519073e-3F;
    power = power * rest + 4.1665795894e-2F;
    power = power * rest + 1.6666665459e-1F;
    power = power * rest + 5.0000001201e-1F;
    power = power * rest * rest + rest + 1.0F;
    const Bits scale = (same_bits<Bits>(shifted) + 127) << 23;
    return power * same_bits<Vector>(scale);
}

}  // namespace teamlora::cpu::TEAMLORA_CODE
