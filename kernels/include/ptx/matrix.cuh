// 8x8 matrices of 16-bit elements between shared memory and the registers of a warp. All 32 lanes take part.
//
// Lane 8 i + r gives the address of row r of matrix i: 16 bytes of shared memory, aligned to 16. Register i
// of lane l is row l / 4 of matrix i, columns 2 (l % 4) and the next; with _trans the matrix is transposed on
// its way.
#pragma once

#include "../platform.cuh"
#include "memory.cuh"

#ifdef __CUDACC__

template <int count, bool transposed>
__device__ __forceinline__ void ldmatrix_any(uint32_t (&r)[count], const void* row) {
    static_assert(count == 1 || count == 2 || count == 4, "x1, x2 or x4");
    const uint32_t address = shared_address(row);
    if constexpr (count == 1 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(address)
                     : "memory");
    if constexpr (count == 1 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(address)
                     : "memory");
    if constexpr (count == 2 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    if constexpr (count == 2 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    if constexpr (count == 4 && !transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    if constexpr (count == 4 && transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}

/// stmatrix came with sm_90. Before it every lane asks for the row addresses that its elements need.
template <int count, bool transposed>
__device__ __forceinline__ void stmatrix_any(void* row, const uint32_t (&r)[count]) {
    static_assert(count == 1 || count == 2 || count == 4, "x1, x2 or x4");
    const uint32_t address = shared_address(row);
#if __CUDA_ARCH__ >= 900
    if constexpr (count == 1 && !transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0])
                     : "memory");
    if constexpr (count == 1 && transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0])
                     : "memory");
    if constexpr (count == 2 && !transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]),
                     "r"(r[1])
                     : "memory");
    if constexpr (count == 2 && transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
                     "r"(r[0]), "r"(r[1])
                     : "memory");
    if constexpr (count == 4 && !transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
    if constexpr (count == 4 && transposed)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
#else
    uint32_t lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    const uint32_t major = lane / 4, minor = lane % 4;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        if constexpr (transposed) {
            const uint32_t low_row = __shfl_sync(0xffffffffu, address, 8 * i + 2 * minor);
            const uint32_t high_row = __shfl_sync(0xffffffffu, address, 8 * i + 2 * minor + 1);
            const uint16_t low = static_cast<uint16_t>(r[i]), high = static_cast<uint16_t>(r[i] >> 16);
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(low_row + 2 * major), "h"(low) : "memory");
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(high_row + 2 * major), "h"(high) : "memory");
        } else {
            const uint32_t target = __shfl_sync(0xffffffffu, address, 8 * i + major) + 4 * minor;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(r[i]) : "memory");
        }
    }
#endif
}

#endif

template <int count>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[count], const void* row EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    ldmatrix_any<count, false>(r, row);
#else
    ::host::load_matrices(r, count, false, row, at);
#endif
}

template <int count>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[count], const void* row EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    ldmatrix_any<count, true>(r, row);
#else
    ::host::load_matrices(r, count, true, row, at);
#endif
}

template <int count>
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&r)[count] EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    stmatrix_any<count, false>(row, r);
#else
    ::host::store_matrices(row, r, count, false, at);
#endif
}

template <int count>
__device__ __forceinline__ void stmatrix_trans(void* row, const uint32_t (&r)[count] EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    stmatrix_any<count, true>(row, r);
#else
    ::host::store_matrices(row, r, count, true, at);
#endif
}
