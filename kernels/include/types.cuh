// Element types of tensors, and eight elements at a time as floats: one 16-byte access for f16 and bf16, two
// for f32.
//
// Everything is stored rounded to nearest, ties to even, on the GPU and on the host device alike.
#pragma once

#include "platform.cuh"
#include "ptx/memory.cuh"

using f16 = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

/// Two elements in 32 bits, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack2(float low, float high);

template <> __device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

template <> __device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

template <class T> __device__ __forceinline__ float2 unpack2(uint32_t bits);

template <> __device__ __forceinline__ float2 unpack2<f16>(uint32_t bits) {
    return __half22float2(reinterpret_cast<const __half2&>(bits));
}

template <> __device__ __forceinline__ float2 unpack2<bf16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

/// Eight elements as they lie in memory: 16 bytes, which is also their alignment; 32 bytes for float.
template <class T> struct Pack8 {
    uint4 bits;
};

template <> struct Pack8<float> {
    float4 low, high;
};

template <class T> __device__ __forceinline__ Pack8<T> pack8(const float (&x)[8]) {
    return {
        make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]))};
}

template <> __device__ __forceinline__ Pack8<float> pack8<float>(const float (&x)[8]) {
    return {make_float4(x[0], x[1], x[2], x[3]), make_float4(x[4], x[5], x[6], x[7])};
}

template <class T> __device__ __forceinline__ void unpack8(const Pack8<T>& pack, float (&x)[8]) {
    const uint32_t words[4] = {pack.bits.x, pack.bits.y, pack.bits.z, pack.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void unpack8(const Pack8<float>& pack, float (&x)[8]) {
    x[0] = pack.low.x, x[1] = pack.low.y, x[2] = pack.low.z, x[3] = pack.low.w;
    x[4] = pack.high.x, x[5] = pack.high.y, x[6] = pack.high.z, x[7] = pack.high.w;
}

/// Loads eight elements from global or shared memory, aligned to 16 bytes, and leaves them as they are: half the registers
/// of `load8` for f16 and bf16.
template <class T, Cache cache = Cache::normal>
__device__ __forceinline__ Pack8<T> load_pack8(const T* from EFFNETV2_AT_PARAMETER) {
    Pack8<T> pack;
    if constexpr (sizeof(T) == 4) {
        pack.low = load16<float4, cache>(from EFFNETV2_AT_ARGUMENT);
        pack.high = load16<float4, cache>(from + 4 EFFNETV2_AT_ARGUMENT);
    } else {
        pack.bits = load16<uint4, cache>(from EFFNETV2_AT_ARGUMENT);
    }
    return pack;
}

/// Loads eight elements from global or shared memory, aligned to 16 bytes.
template <Cache cache = Cache::normal, class T>
__device__ __forceinline__ void load8(const T* from, float (&x)[8] EFFNETV2_AT_PARAMETER) {
    unpack8(load_pack8<T, cache>(from EFFNETV2_AT_ARGUMENT), x);
}

/// Stores eight elements as they are to global or shared memory, aligned to 16 bytes.
template <Cache cache = Cache::normal, class T>
__device__ __forceinline__ void store_pack8(T* to, const Pack8<T>& pack EFFNETV2_AT_PARAMETER) {
    if constexpr (sizeof(T) == 4) {
        store16<cache>(to, pack.low EFFNETV2_AT_ARGUMENT);
        store16<cache>(to + 4, pack.high EFFNETV2_AT_ARGUMENT);
    } else {
        store16<cache>(to, pack.bits EFFNETV2_AT_ARGUMENT);
    }
}

/// Stores eight elements to global or shared memory, aligned to 16 bytes, each rounded to T.
template <Cache cache = Cache::normal, class T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8] EFFNETV2_AT_PARAMETER) {
    store_pack8<cache>(to, pack8<T>(x) EFFNETV2_AT_ARGUMENT);
}
