// The arithmetic that CUDA offers beyond <math.h>: intrinsics, bit counting, type punning, min and max.
//
// Approximate intrinsics (`__expf`, `__fdividef`, ...) are computed accurately here: a test's tolerance must
// already allow for the device's few units in the last place.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "bits.hpp"

// The C library reserves these names for itself, so they are macros rather than functions.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fdividef(float x, float y) { return x / y; }
inline float fdividef(float x, float y) { return x / y; }

// Named roundings. The empty assembly keeps the compiler from contracting a product and a sum into an fma.
inline float __fmul_rn(float x, float y) {
    float product = x * y;
    asm("" : "+m"(product));
    return product;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }

inline int __float_as_int(float x) { return host::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return host::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return host::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return host::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return host::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return host::bit_cast<double>(x); }

namespace host {

/// Float to integer as the device converts: rounded already, saturating, NaN to zero.
template <class Integer> inline Integer saturating(float rounded) {
    if (rounded != rounded) return 0;
    if (rounded <= float(std::numeric_limits<Integer>::min())) return std::numeric_limits<Integer>::min();
    if (rounded >= float(std::numeric_limits<Integer>::max())) return std::numeric_limits<Integer>::max();
    return Integer(rounded);
}

} // namespace host

inline int __float2int_rn(float x) { return host::saturating<int>(rintf(x)); }
inline int __float2int_rz(float x) { return host::saturating<int>(truncf(x)); }
inline int __float2int_rd(float x) { return host::saturating<int>(floorf(x)); }
inline int __float2int_ru(float x) { return host::saturating<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return host::saturating<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return host::saturating<unsigned>(truncf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
    return reversed;
}

/// Four bytes picked out of the eight of `y:x` by the nibbles of `selector`; a nibble's top bit copies signs.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 0xfu;
        unsigned byte = unsigned(bytes >> (8 * (nibble & 7u))) & 0xffu;
        if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        result |= byte << (8 * i);
    }
    return result;
}

inline int __mulhi(int x, int y) { return int(int64_t(x) * y >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31u));
}

#define HOST_MIN_MAX(Type)                                                                                   \
    inline Type min(Type a, Type b) { return b < a ? b : a; }                                                \
    inline Type max(Type a, Type b) { return a < b ? b : a; }

HOST_MIN_MAX(int)
HOST_MIN_MAX(unsigned)
HOST_MIN_MAX(long)
HOST_MIN_MAX(unsigned long)
HOST_MIN_MAX(long long)
HOST_MIN_MAX(unsigned long long)

#undef HOST_MIN_MAX

// CUDA compares mixed signedness as unsigned, and floats as fminf and fmaxf do: a NaN loses.
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
