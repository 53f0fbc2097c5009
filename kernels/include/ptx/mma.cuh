// Tensor-core products of one warp: D = A B + C with f32 accumulators. All 32 lanes take part. D may be C.
//
// With g = lane / 4 and t = lane % 4, a lane's registers hold
//   C, D   c[0], c[1] = (row g, columns 2t, 2t+1)    c[2], c[3] = (row g+8, columns 2t, 2t+1)
#pragma once

#include <type_traits>

#include "../platform.cuh"
#include "../types.cuh"

/// A 16x16 times B 16x8 of T = f16 or bf16, two to a register, the lower index in the low half:
///   A   a[0] = (g, 2t..)   a[1] = (g+8, 2t..)   a[2] = (g, 2t+8..)   a[3] = (g+8, 2t+8..)
///   B   b[0] = (2t.., g)   b[1] = (2t+8.., g)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             const float (&c)[4] EFFNETV2_AT_PARAMETER) {
    constexpr bool is_bf16 = std::is_same_v<T, bf16>;
    static_assert(is_bf16 || std::is_same_v<T, f16>, "f16 or bf16");
#ifdef __CUDACC__
    if constexpr (is_bf16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
                       "f"(c[2]), "f"(c[3]));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
                       "f"(c[2]), "f"(c[3]));
#else
    ::host::mma(is_bf16 ? ::host::mma_m16n8k16_bf16 : ::host::mma_m16n8k16_f16, d, a, b, c, at);
#endif
}

/// A 16x8 times B 8x8 of tf32, one to a register (to_tf32):
///   A   a[0] = (g, t)   a[1] = (g+8, t)   a[2] = (g, t+4)   a[3] = (g+8, t+4)
///   B   b[0] = (t, g)   b[1] = (t+4, g)
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2],
                                                 const float (&c)[4] EFFNETV2_AT_PARAMETER) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
                   "f"(c[2]), "f"(c[3]));
#else
    ::host::mma(::host::mma_m16n8k8_tf32, d, a, b, c, at);
#endif
}

/// x rounded to the 10 fraction bits of tf32, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef __CUDACC__
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#else
    const uint32_t bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
#endif
}
