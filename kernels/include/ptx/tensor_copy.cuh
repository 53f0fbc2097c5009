// Copies of boxes of a matrix from global to shared memory by TMA (cp.async.bulk.tensor). One thread issues what many would
// have fetched, without an address or a bound: a tensor map has them, which the driver makes of a matrix
// (cuTensorMapEncodeTiled; src/device/tensor_map.rs) and a kernel takes as a parameter:
//
//     __global__ void kernel(const __grid_constant__ TensorMap x, ...) {
//         if (threadIdx.x == 0) {
//             mbarrier_arrive_expect(&full, box_bytes);
//             tensor_copy(shared, x, column, row, &full);
//         }
//
// sm_90 and later; on others a kernel that comes to one traps.
//
// The rows of a box lie one after the other, and what is outside the matrix is zero. Where the map says so, 16-byte pieces of rows
// of 32, 64 or 128 bytes are swizzled as wgmma wants its B (wgmma.cuh): by bits of the address in shared memory, so that `shared`
// is in memory which dynamic_shared has aligned to 8 such rows.
#pragma once

#include "../platform.cuh"
#include "memory.cuh"

/// A matrix in global memory, and a box of it; what the words are is the driver's affair.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

/// Begins to copy the box from `column` and `row` on to `shared`, aligned to 128 bytes; all bytes of a box, those outside the
/// matrix too, count towards the phase of `barrier`. Until that is over, hands off: and what other threads have done there
/// before is ordered by a barrier. `map` is a parameter of the kernel.
__device__ __forceinline__ void tensor_copy(void* shared, const TensorMap& map, unsigned column, unsigned row,
                                            uint64_t* barrier EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared_address(shared)),
                 "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
#else
    __trap();
#endif
#else
    ::host::tensor_copy(shared, &map, column, row, barrier, at);
#endif
}
