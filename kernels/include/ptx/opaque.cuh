// What the compiler may not move.
#pragma once

#include "../platform.cuh"

/// x, of which the compiler knows nothing, at this place: what is computed of it is computed here, and not before a loop
/// around it, to be kept in registers all the while.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
    return x;
}
