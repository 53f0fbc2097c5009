// Barriers in shared memory that count arrivals and bytes (mbarrier), as copies by TMA need them. sm_90 and later; on others
// a kernel that comes to one traps.
//
//     if (threadIdx.x == 0) { mbarrier_init(&full, 1); fence_proxy_async_shared(); }
//     __syncthreads();
//     if (threadIdx.x == 0) { mbarrier_arrive_expect(&full, bytes); tensor_copy(..., &full); }
//     mbarrier_wait(&full, parity);          // whoever reads what has come
//
// A barrier goes through phases, from 0 on. A phase ends when as many threads have arrived as mbarrier_init said, and as many
// bytes have come as they expect; the next begins by itself. `parity` is that of the phase to wait for, phase % 2: the wait
// ends when this phase, or any later one that is odd or even like it, is over, so no thread may be two phases behind.
#pragma once

#include "../platform.cuh"
#include "memory.cuh"

/// Makes a barrier for so many arrivals in each phase of 8 bytes of shared memory, aligned to 8. fence_proxy_async_shared()
/// after it shows it to TMA, a barrier to the other threads.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
    ::host::mbarrier_init(barrier, arrivals, at);
#endif
}

/// Arrives, and lets the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
#else
    ::host::mbarrier_arrive_expect(barrier, bytes, at);
#endif
}

/// Waits for the end of the phase of this parity. What its copies have brought is visible to the thread then.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    // try_wait itself waits for a while.
    unsigned is_over;
    do {
        asm volatile("{\n\t"
                     ".reg .pred over;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, over;\n\t"
                     "}"
                     : "=r"(is_over)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (is_over == 0);
#else
    __trap();
#endif
#else
    ::host::mbarrier_wait(barrier, parity, at);
#endif
}
