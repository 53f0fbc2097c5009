// Asynchronous copies from global to shared memory (cp.async), in groups that complete in order.
//
// A thread waits for its own groups only; a barrier then makes the data visible to the block.
#pragma once

#include "../platform.cuh"
#include "memory.cuh"

/// Copies the first `source_bytes` of `bytes` (4, 8 or 16) and fills the rest with zeros; with 0 nothing is
/// read and `global` may be anything. Both addresses are aligned to `bytes`. 16-byte copies go past L1.
template <int bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         unsigned source_bytes = bytes EFFNETV2_AT_PARAMETER) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "4, 8 or 16 bytes");
#ifdef __CUDACC__
    const uint32_t destination = shared_address(shared);
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global),
                     "r"(source_bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(global),
                     "n"(bytes), "r"(source_bytes)
                     : "memory");
#else
    ::host::async_copy(shared, global, bytes, source_bytes, at);
#endif
}

/// Closes the group of copies issued since the last call.
__device__ __forceinline__ void cp_async_commit_group() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    ::host::async_commit();
#endif
}

/// Waits until at most the `pending` newest groups are still under way.
template <int pending> __device__ __forceinline__ void cp_async_wait_group() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
    ::host::async_wait(pending);
#endif
}

/// Closes the open group and waits for everything.
__device__ __forceinline__ void cp_async_wait_all() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    ::host::async_commit();
    ::host::async_wait(0);
#endif
}
