// Approximate functions: one instruction of the special-function unit each, errors by the PTX manual. The
// host device computes them accurately. The .ftz forms take and give subnormals as zero, there too.
#pragma once

#include "../platform.cuh"

#ifndef __CUDACC__
/// Zero of the same sign for a subnormal.
__device__ __forceinline__ float flush_subnormal(float x) {
    return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}
#endif

/// 2^x, relative error at most 2^-22.
__device__ __forceinline__ float ex2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return flush_subnormal(exp2f(flush_subnormal(x)));
#endif
}

/// log2(x), absolute error at most 2^-22 for x in [0.5, 2], relative error elsewhere.
__device__ __forceinline__ float lg2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return flush_subnormal(log2f(flush_subnormal(x)));
#endif
}

/// tanh(x), relative error at most 2^-11.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return tanhf(x);
#endif
}

/// 1 / x, at most one unit in the last place off.
__device__ __forceinline__ float rcp_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return flush_subnormal(1.0f / flush_subnormal(x));
#endif
}

/// 1 / sqrt(x), relative error at most 2^-22.9.
__device__ __forceinline__ float rsqrt_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return flush_subnormal(1.0f / sqrtf(flush_subnormal(x)));
#endif
}
