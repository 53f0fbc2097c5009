// Tensor-core products of a warpgroup (Hopper's wgmma): four consecutive warps, the first a multiple of four, multiply
// together, A from their registers and B from shared memory, while they go on. The instruction exists on sm_90a alone;
// elsewhere a kernel that comes to it traps.
//
//     ldmatrix<4>(a, ...);
//     wgmma_fence();                                // behind the last other access to acc and a
//     wgmma_m64k16<bf16, 64, false>(acc, a, wgmma_descriptor<128>(b, 0, 1024));
//     wgmma_commit_group();
//     wgmma_wait_group<0>();                        // until then hands off acc, a, and the B in shared memory
//     wgmma_settle(acc);
//
// wgmma reads shared memory past what orders other accesses: a thread that has written some of B, be it by cp.async,
// says fence_proxy_async_shared() after it (after the wait for the copy) and before the barrier that makes it known.
//
// B in shared memory. Columns of B are n, its rows are k; elements are of 16 bits. Memory is rows of S = 32, 64 or 128
// bytes, whose 16-byte pieces are swizzled: piece c of the row at byte offset o lies in the place c ^ (o / 128 % (S / 16)),
// offsets counted from a multiple of 8 S; for row r of S = 128, 64 and 32 that is c ^ r % 8, c ^ r / 2 % 4 and
// c ^ r / 4 % 2. Eight rows are an atom, and atoms lie at multiples of 8 S.
//   b_rows = false ("K-major"): a row of memory is S / 2 consecutive k of one column of B; columns 8 i .. 8 i + 7 are one
//     atom, and `stride_bytes` after it the next eight columns begin. A step of 16 k is 32 bytes of each row: the
//     descriptor of those from k on points at k's place in the first row, unswizzled: base + 2 k bytes. leading_bytes: 0.
//   b_rows = true ("MN-major"): a row of memory is S / 2 consecutive columns of one k; k 0 .. 7 are one atom, and
//     `stride_bytes` after it follows the atom of k 8 .. 15. The next S / 2 columns begin `leading_bytes` after the first
//     ones. n is a multiple of S / 2. The descriptor points at an atom.
#pragma once

#include <type_traits>

#include "../platform.cuh"
#include "../types.cuh"
#include "memory.cuh"

/// Whether this is compiled for a device that has it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_wgmma = true;
#else
constexpr bool has_wgmma = false;
#endif

/// Where B lies in shared memory, as above. `shared` is in memory that dynamic_shared has aligned to 8 * swizzle_bytes.
template <unsigned swizzle_bytes>
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, unsigned leading_bytes,
                                                     unsigned stride_bytes EFFNETV2_AT_PARAMETER) {
    static_assert(swizzle_bytes == 32 || swizzle_bytes == 64 || swizzle_bytes == 128, "32, 64 or 128 bytes");
    constexpr uint64_t mode = swizzle_bytes == 128 ? 1 : swizzle_bytes == 64 ? 2 : 3;
#ifdef __CUDACC__
    const uint32_t address = shared_address(shared);
#else
    const uint32_t address = ::host::wgmma_address(shared, 8 * swizzle_bytes, at);
#endif
    // All three without their last four bits, in 14 bits each.
    return (address & 0x3ffffu) >> 4 | uint64_t(leading_bytes >> 4 & 0x3fffu) << 16 |
           uint64_t(stride_bytes >> 4 & 0x3fffu) << 32 | mode << 62;
}

/// Before the first wgmma, and between other accesses to its registers and it: all threads of a warp.
__device__ __forceinline__ void wgmma_fence(EFFNETV2_AT_SOLE_PARAMETER) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif defined(__CUDACC__)
    __trap();
#else
    ::host::wgmma_fence(at);
#endif
}

/// Closes the group of products issued since the last call: all threads of a warp.
__device__ __forceinline__ void wgmma_commit_group(EFFNETV2_AT_SOLE_PARAMETER) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif defined(__CUDACC__)
    __trap();
#else
    ::host::wgmma_commit(at);
#endif
}

/// Waits until at most the `pending` newest groups are still under way: all threads of a warp.
template <unsigned pending> __device__ __forceinline__ void wgmma_wait_group(EFFNETV2_AT_SOLE_PARAMETER) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#elif defined(__CUDACC__)
    __trap();
#else
    ::host::wgmma_wait(pending, at);
#endif
}

/// After wgmma_wait_group, for the compiler: what is computed of these accumulators is computed behind this place.
template <unsigned count> __device__ __forceinline__ void wgmma_settle(float (&acc)[count][4]) {
#ifdef __CUDACC__
#pragma unroll
    for (unsigned i = 0; i < count; ++i)
        asm volatile("" : "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])::"memory");
#else
    static_cast<void>(acc);
#endif
}

/// Lets wgmma and TMA see what this thread has written to shared memory, as soon as a barrier has ordered the two.
__device__ __forceinline__ void fence_proxy_async_shared() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    __trap();
#endif
#else
    ::host::fence_proxy_async();
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Names of the accumulators' registers, and the registers.
#define EFFNETV2_WGMMA_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define EFFNETV2_WGMMA_R16 EFFNETV2_WGMMA_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define EFFNETV2_WGMMA_R24 EFFNETV2_WGMMA_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define EFFNETV2_WGMMA_R32 EFFNETV2_WGMMA_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define EFFNETV2_WGMMA_R40 EFFNETV2_WGMMA_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define EFFNETV2_WGMMA_R48 EFFNETV2_WGMMA_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define EFFNETV2_WGMMA_R56 EFFNETV2_WGMMA_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define EFFNETV2_WGMMA_R64 EFFNETV2_WGMMA_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define EFFNETV2_WGMMA_F4(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define EFFNETV2_WGMMA_F8(j) EFFNETV2_WGMMA_F4(j), EFFNETV2_WGMMA_F4(j + 1)
#define EFFNETV2_WGMMA_F16(j) EFFNETV2_WGMMA_F8(j), EFFNETV2_WGMMA_F8(j + 2)
#define EFFNETV2_WGMMA_F32(j) EFFNETV2_WGMMA_F16(j), EFFNETV2_WGMMA_F16(j + 4)

// The operands behind the accumulators are A's four registers, B's descriptor and its major; acc is always added to.
#define EFFNETV2_WGMMA_TYPED(shape, type, names, a0, a1, a2, a3, b0, b1, ...)                                       \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, {%" #a0 ", %" #a1       \
                 ", %" #a2 ", %" #a3 "}, %" #b0 ", 1, 1, 1, %" #b1 ";"                                              \
                 : __VA_ARGS__                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(b_rows)                                  \
                 : "memory")
#define EFFNETV2_WGMMA(columns, ...)                                                                                \
    if constexpr (n == columns && is_bf16) EFFNETV2_WGMMA_TYPED("m64n" #columns "k16", "bf16", __VA_ARGS__);        \
    if constexpr (n == columns && !is_bf16) EFFNETV2_WGMMA_TYPED("m64n" #columns "k16", "f16", __VA_ARGS__)
#endif

/// acc += A B by a warpgroup, A 64 x 16 and B 16 x n of T = f16 or bf16, n 16, 32, 48, 64, 96 or 128. Each warp gives 16
/// rows of A as mma_m16n8k16 takes them and gets the same rows: acc[j] is what that has for columns 8 j .. 8 j + 7. Issued
/// by all 128 threads together with one descriptor `b`; done when a wgmma_wait_group says so.
template <class T, unsigned n, bool b_rows>
__device__ __forceinline__ void wgmma_m64k16(float (&acc)[n / 8][4], const uint32_t (&a)[4],
                                             uint64_t b EFFNETV2_AT_PARAMETER) {
    constexpr bool is_bf16 = std::is_same_v<T, bf16>;
    static_assert(is_bf16 || std::is_same_v<T, f16>, "f16 or bf16");
    static_assert(n == 16 || n == 32 || n == 48 || n == 64 || n == 96 || n == 128, "columns there is code for");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    EFFNETV2_WGMMA(16, EFFNETV2_WGMMA_R8, 8, 9, 10, 11, 12, 13, EFFNETV2_WGMMA_F8(0));
    EFFNETV2_WGMMA(32, EFFNETV2_WGMMA_R16, 16, 17, 18, 19, 20, 21, EFFNETV2_WGMMA_F16(0));
    EFFNETV2_WGMMA(48, EFFNETV2_WGMMA_R24, 24, 25, 26, 27, 28, 29, EFFNETV2_WGMMA_F16(0), EFFNETV2_WGMMA_F8(4));
    EFFNETV2_WGMMA(64, EFFNETV2_WGMMA_R32, 32, 33, 34, 35, 36, 37, EFFNETV2_WGMMA_F32(0));
    EFFNETV2_WGMMA(96, EFFNETV2_WGMMA_R48, 48, 49, 50, 51, 52, 53, EFFNETV2_WGMMA_F32(0), EFFNETV2_WGMMA_F16(8));
    EFFNETV2_WGMMA(128, EFFNETV2_WGMMA_R64, 64, 65, 66, 67, 68, 69, EFFNETV2_WGMMA_F32(0), EFFNETV2_WGMMA_F32(8));
#elif defined(__CUDACC__)
    __trap();
#else
    ::host::wgmma(is_bf16 ? ::host::wgmma_m64k16_bf16 : ::host::wgmma_m64k16_f16, acc[0], n, a, b, b_rows, at);
#endif
}
