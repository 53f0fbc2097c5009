// Products of one or two warpgroups: matrices in and out as plain arrays, B laid out by the PTX manual's words, element
// by element.

#include "../../../include/ptx.cuh"
#include "../../../include/types.cuh"

namespace {

/// Byte `offset` of a matrix whose rows of S bytes are swizzled: bits 4.. are exchanged by bits 7...
template <unsigned S> __device__ unsigned swizzled(unsigned offset) {
    return offset ^ (offset >> 7 & (S / 16 - 1)) << 4;
}

/// d = c + a b: a [threads / 2][k], b [n][k], c and d [threads / 2][n], k a multiple of 64. A group is two steps
/// of k, and one may be under way while the next is issued.
template <class T, unsigned n, bool b_rows, unsigned S>
__device__ void product(const T* a, const T* b, const float* c, float* d, unsigned k) {
    constexpr unsigned across = S / 2;
    auto* tile = dynamic_shared<unsigned char, 1024>();
    for (unsigned i = threadIdx.x; i < n * k; i += blockDim.x) {
        const unsigned column = i / k, step = i % k;
        // Panels of S bytes: of k, all columns of each one below the other; of columns, all k.
        const unsigned offset = b_rows ? column / across * k * S + step * S + column % across * 2
                                       : step / across * n * S + column * S + step % across * 2;
        *reinterpret_cast<T*>(tile + swizzled<S>(offset)) = b[i];
    }
    fence_proxy_async_shared();
    __syncthreads();
    const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = threadIdx.x / 32 * 16;
    float acc[n / 8][4];
    for (unsigned j = 0; j < n / 8; ++j)
        for (unsigned i = 0; i < 4; ++i) acc[j][i] = c[(first + g + i / 2 * 8) * n + 8 * j + 2 * t + i % 2];
    wgmma_fence();
    for (unsigned step = 0; step < k; step += 16) {
        uint32_t rows[4];
        for (unsigned i = 0; i < 4; ++i)
            rows[i] = *reinterpret_cast<const uint32_t*>(a + (first + g + i % 2 * 8) * k + step + i / 2 * 8 + 2 * t);
        const unsigned offset = b_rows ? step * S : step / across * n * S + step % across * 2;
        wgmma_fence();
        wgmma_m64k16<T, n, b_rows>(acc, rows, wgmma_descriptor<S>(tile + offset, b_rows ? k * S : 0, 8 * S));
        if (step % 32 == 16) wgmma_commit_group();
        if (step % 64 == 48) wgmma_wait_group<1>();
    }
    wgmma_wait_group<0>();
    wgmma_settle(acc);
    for (unsigned j = 0; j < n / 8; ++j)
        for (unsigned i = 0; i < 4; ++i) d[(first + g + i / 2 * 8) * n + 8 * j + 2 * t + i % 2] = acc[j][i];
}

/// The kinds of B that exist for n.
template <class T, unsigned n>
__device__ void each_layout(const T* a, const T* b, const float* c, float* d, unsigned k, int b_rows,
                            unsigned swizzle) {
    if (!b_rows && swizzle == 32) product<T, n, false, 32>(a, b, c, d, k);
    if (!b_rows && swizzle == 64) product<T, n, false, 64>(a, b, c, d, k);
    if (!b_rows && swizzle == 128) product<T, n, false, 128>(a, b, c, d, k);
    if (b_rows && swizzle == 32) product<T, n, true, 32>(a, b, c, d, k);
    if constexpr (n % 32 == 0)
        if (b_rows && swizzle == 64) product<T, n, true, 64>(a, b, c, d, k);
    if constexpr (n % 64 == 0)
        if (b_rows && swizzle == 128) product<T, n, true, 128>(a, b, c, d, k);
}

template <class T>
__device__ void each_n(const T* a, const T* b, const float* c, float* d, unsigned n, unsigned k, int b_rows,
                       unsigned swizzle) {
    if (n == 16) each_layout<T, 16>(a, b, c, d, k, b_rows, swizzle);
    if (n == 32) each_layout<T, 32>(a, b, c, d, k, b_rows, swizzle);
    if (n == 48) each_layout<T, 48>(a, b, c, d, k, b_rows, swizzle);
    if (n == 64) each_layout<T, 64>(a, b, c, d, k, b_rows, swizzle);
    if (n == 96) each_layout<T, 96>(a, b, c, d, k, b_rows, swizzle);
    if (n == 128) each_layout<T, 128>(a, b, c, d, k, b_rows, swizzle);
}

} // namespace

extern "C" __global__ void wgmma_f16(const f16* a, const f16* b, const float* c, float* d, unsigned n, unsigned k,
                                     int b_rows, unsigned swizzle) {
    each_n(a, b, c, d, n, k, b_rows, swizzle);
}
extern "C" __global__ void wgmma_bf16(const bf16* a, const bf16* b, const float* c, float* d, unsigned n, unsigned k,
                                      int b_rows, unsigned swizzle) {
    each_n(a, b, c, d, n, k, b_rows, swizzle);
}

EFFNETV2_KERNEL(wgmma_f16)
EFFNETV2_KERNEL(wgmma_bf16)
