// Grids that begin while the grid before them still ends (programmatic dependent launch, sm_90 and later).
//
// Both do nothing in a grid that was launched without the attribute, and before sm_90, where there is none.
#pragma once

#include "../platform.cuh"

/// Waits until the grids that this one depends on have completed, and all that they wrote can be seen. It is the
/// calling thread that waits: each that reads or writes what they may use calls it.
__device__ __forceinline__ void grid_dependency_wait() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
    ::host::this_thread().awaits_predecessors = false;
#endif
}

/// Lets the grids that depend on this one begin as soon as every block has come here or has ended. Once for a block;
/// more often changes nothing.
__device__ __forceinline__ void grid_dependency_launch() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
