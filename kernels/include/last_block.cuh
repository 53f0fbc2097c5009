// Work for the last block of a grid: what the partial results of all blocks add up to, without a launch of its own.
#pragma once

#include "platform.cuh"

/// Whether this block is the last of `blocks` that come here with the same counter. Asked once, by all threads of a block,
/// after they have stored what the last block shall read; the last block reads it with `__ldcg`. The counter is zero
/// before the kernel and after it.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == blocks - 1;
    __syncthreads();
    __threadfence();
    return last;
}
