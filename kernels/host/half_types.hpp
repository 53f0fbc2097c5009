// `__half` and `__nv_bfloat16` on the CPU: storage, and conversions that round as the device does.
//
// Both conversions from float round to nearest, ties to even; overflow becomes infinity, subnormals are kept,
// and every NaN becomes the one canonical NaN 0x7fff that `cvt.rn.f16.f32` and `cvt.rn.bf16.f32` produce.
#pragma once

#include <cstdint>

#include "bits.hpp"
#include "vector_types.hpp"

struct __half {
    uint16_t bits;
};

struct __nv_bfloat16 {
    uint16_t bits;
};

struct alignas(4) __half2 {
    __half x, y;
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

namespace host {

inline constexpr uint16_t canonical_nan = 0x7fff;

inline uint16_t bfloat16_bits(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return canonical_nan;
    const uint32_t ties_to_even = 0x7fffu + (bits >> 16 & 1u);
    return uint16_t((bits + ties_to_even) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t half_bits(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return canonical_nan;
    // 65520 is halfway between the largest half and the next power of two; the tie goes to the even one.
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Below 2^-14 a half counts in units of 2^-24; adding 0.5 leaves exactly those units in the fraction.
        const float shifted = bit_cast<float>(magnitude) + 0.5f;
        return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    const uint32_t ties_to_even = 0xfffu + (magnitude >> 13 & 1u);
    return uint16_t(sign | ((magnitude - 0x38000000u + ties_to_even) >> 13));
}

inline float half_value(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t exponent = bits >> 10 & 0x1fu;
    const uint32_t fraction = bits & 0x3ffu;
    if (exponent == 0) {
        const float magnitude = float(fraction) * 0x1p-24f;
        return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
    }
    const uint32_t wide = exponent == 31 ? 0xffu : exponent + 112u;
    return bit_cast<float>(sign | wide << 23 | fraction << 13);
}

} // namespace host

inline __half __float2half_rn(float value) { return {host::half_bits(value)}; }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline float __half2float(__half value) { return host::half_value(value.bits); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {host::bfloat16_bits(value)}; }
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return host::bfloat16_value(value.bits); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
