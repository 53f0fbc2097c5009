// SiLU and its derivative. Absolute errors: the sigmoid 2^-21, times |x| for SiLU.
#pragma once

#include "ptx/math.cuh"

/// 1 / (1 + e^-x).
__device__ __forceinline__ float sigmoid(float x) {
    return rcp_approx(1.0f + ex2_approx(-1.442695041f * x));
}

/// x sigmoid(x).
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

/// The derivative of SiLU where s = sigmoid(x): s (1 + x (1 - s)).
__device__ __forceinline__ float silu_grad(float x, float s) { return s * (1.0f + x * (1.0f - s)); }
