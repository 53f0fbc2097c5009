// What every kernel begins with, so that it may be launched while the one before it still runs.
//
// A kernel that is launched as a programmatic dependent (src/device/launch.rs) may have its blocks set up in the
// places that the last blocks of its predecessor leave free. Nothing says then that the predecessor is done but the
// wait: before it a block may neither read nor write what any other kernel uses, and after it the order is that of
// the stream.
//
// Every block of every kernel waits, also one that has nothing to do. A wait is for the kernel before alone; that all
// the earlier ones are done follows because that one could not end without having waited in its turn. A block that
// left early would break the chain for all that come later, and so would break events and copies behind it.
//
// Dependents are let in at the beginning, right behind the wait.
//   - They come only when every block of this grid has begun or is done. Then no block of this grid is in want of a
//     place, so what those that wait hold of registers and shared memory is taken from nobody. With several waves
//     this is when the last one has begun, by itself; a later call would only leave places empty.
//   - Behind the wait and not before it: when the last block of this grid has come through the wait, the kernel
//     before is over. So there are never more than two kernels at a time, one that computes and one that waits.
//     Before it, a row of small kernels could all be resident and wait for the first, for nothing: each computes only
//     after the one before.
//   - What it may cost: the places that are free first are not spread evenly, so that a grid of less than a wave may
//     find itself on fewer multiprocessors than it would after a clean end.
//
// A copy or a fill between two kernels waits for the first to end and holds the second back until it is done itself,
// and an event is reached when the kernel before it has ended: only from kernel to kernel may one begin early. So it
// is in a graph, which a capture gives such edges where the launches had the attribute.
#pragma once

#include "ptx/grid_dependency.cuh"

/// The first statement of every kernel: waits for those before it, then lets the next one's blocks be set up.
__device__ __forceinline__ void after_predecessors() {
    grid_dependency_wait();
    grid_dependency_launch();
}
