// Named barriers: 16 per block (0 is that of __syncthreads), each for a number of whole warps.
#pragma once

#include "../platform.cuh"

/// Waits at barrier `id` until `threads` threads have synced or arrived.
__device__ __forceinline__ void barrier_sync(unsigned id, unsigned threads EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    ::host::this_thread().block.sync_some(id, threads, true, at);
#endif
}

/// Counts towards barrier `id` without waiting.
__device__ __forceinline__ void barrier_arrive(unsigned id, unsigned threads EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    ::host::this_thread().block.sync_some(id, threads, false, at);
#endif
}
