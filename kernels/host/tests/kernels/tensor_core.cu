// One warp, one instruction: matrices in and out as plain arrays.

#include "../../../include/ptx.cuh"
#include "../../../include/types.cuh"

namespace {

/// a [16][16] row-major, b [8][16] (column after column), c and d [16][8].
template <class T> __device__ void multiply(const T* a, const T* b, const float* c, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](const T* at) { return *reinterpret_cast<const uint32_t*>(at); };
    const uint32_t a_fragment[4] = {pair(a + 16 * g + 2 * t), pair(a + 16 * (g + 8) + 2 * t),
                                    pair(a + 16 * g + 2 * t + 8), pair(a + 16 * (g + 8) + 2 * t + 8)};
    const uint32_t b_fragment[2] = {pair(b + 16 * g + 2 * t), pair(b + 16 * g + 2 * t + 8)};
    float fragment[4];
    for (int i = 0; i < 4; ++i) fragment[i] = c[8 * (g + 8 * (i / 2)) + 2 * t + i % 2];
    mma_m16n8k16<T>(fragment, a_fragment, b_fragment, fragment);
    for (int i = 0; i < 4; ++i) d[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = fragment[i];
}

/// in: 256 16-bit elements, as four 8x8 matrices. out [count][32] registers.
template <int count, bool transposed> __device__ void load(const uint16_t* in, uint32_t* out) {
    uint16_t* tile = dynamic_shared<uint16_t>();
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] = in[i];
    __syncwarp();
    uint32_t fragment[count];
    const uint16_t* row = tile + 8 * (threadIdx.x % (8 * count));
    if constexpr (transposed)
        ldmatrix_trans<count>(fragment, row);
    else
        ldmatrix<count>(fragment, row);
    for (int i = 0; i < count; ++i) out[32 * i + threadIdx.x] = fragment[i];
}

/// in [4][32] registers, out: the 256 elements that stmatrix makes of them.
template <bool transposed> __device__ void store(const uint32_t* in, uint16_t* out) {
    uint16_t* tile = dynamic_shared<uint16_t>();
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) fragment[i] = in[32 * i + threadIdx.x];
    if constexpr (transposed)
        stmatrix_trans<4>(tile + 8 * threadIdx.x, fragment);
    else
        stmatrix<4>(tile + 8 * threadIdx.x, fragment);
    __syncwarp();
    for (int i = threadIdx.x; i < 256; i += 32) out[i] = tile[i];
}

} // namespace

extern "C" __global__ void mma_bf16(const bf16* a, const bf16* b, const float* c, float* d) {
    multiply(a, b, c, d);
}
extern "C" __global__ void mma_f16(const f16* a, const f16* b, const float* c, float* d) {
    multiply(a, b, c, d);
}

/// a [16][8] row-major, b [8][8] (column after column), c and d [16][8].
extern "C" __global__ void mma_tf32(const float* a, const float* b, const float* c, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint32_t a_fragment[4] = {to_tf32(a[8 * g + t]), to_tf32(a[8 * (g + 8) + t]),
                                    to_tf32(a[8 * g + t + 4]), to_tf32(a[8 * (g + 8) + t + 4])};
    const uint32_t b_fragment[2] = {to_tf32(b[8 * g + t]), to_tf32(b[8 * g + t + 4])};
    float in[4], out[4];
    for (int i = 0; i < 4; ++i) in[i] = c[8 * (g + 8 * (i / 2)) + 2 * t + i % 2];
    mma_m16n8k8_tf32(out, a_fragment, b_fragment, in);
    for (int i = 0; i < 4; ++i) d[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = out[i];
}

extern "C" __global__ void ldmatrix_x1(const uint16_t* in, uint32_t* out) { load<1, false>(in, out); }
extern "C" __global__ void ldmatrix_x2(const uint16_t* in, uint32_t* out) { load<2, false>(in, out); }
extern "C" __global__ void ldmatrix_x4(const uint16_t* in, uint32_t* out) { load<4, false>(in, out); }
extern "C" __global__ void ldmatrix_trans_x1(const uint16_t* in, uint32_t* out) { load<1, true>(in, out); }
extern "C" __global__ void ldmatrix_trans_x2(const uint16_t* in, uint32_t* out) { load<2, true>(in, out); }
extern "C" __global__ void ldmatrix_trans_x4(const uint16_t* in, uint32_t* out) { load<4, true>(in, out); }
extern "C" __global__ void stmatrix_x4(const uint32_t* in, uint16_t* out) { store<false>(in, out); }
extern "C" __global__ void stmatrix_trans_x4(const uint32_t* in, uint16_t* out) { store<true>(in, out); }

/// Copies of 4, 8 and 16 bytes, of which the first `source_bytes` (at most each size) come from `in`. out
/// [28] bytes.
extern "C" __global__ void copy_async(const unsigned char* in, unsigned char* out, int source_bytes) {
    unsigned char* buffer = dynamic_shared<unsigned char>();
    if (threadIdx.x == 0) {
        cp_async<16>(buffer, in, min(source_bytes, 16));
        cp_async_commit_group();
        cp_async<8>(buffer + 16, in + 16, min(source_bytes, 8));
        cp_async_commit_group();
        cp_async<4>(buffer + 24, in + 24, min(source_bytes, 4));
        cp_async_commit_group();
        cp_async_wait_group<2>();
        for (int i = 0; i < 16; ++i) out[i] = buffer[i];
        cp_async_wait_group<1>();
        for (int i = 16; i < 24; ++i) out[i] = buffer[i];
        cp_async_wait_all();
        for (int i = 24; i < 28; ++i) out[i] = buffer[i];
    }
}

/// Approximate functions of in[thread]; out [6][threads].
extern "C" __global__ void approximate(const float* in, float* out) {
    const float x = in[threadIdx.x];
    const int n = blockDim.x;
    out[threadIdx.x] = ex2_approx(x);
    out[n + threadIdx.x] = lg2_approx(x);
    out[2 * n + threadIdx.x] = tanh_approx(x);
    out[3 * n + threadIdx.x] = rcp_approx(x);
    out[4 * n + threadIdx.x] = rsqrt_approx(x);
    out[5 * n + threadIdx.x] = __expf(x);
}

/// Eight elements per thread through load8 and store8 of the type; out may be of another.
extern "C" __global__ void convert_f32_bf16(const float* in, bf16* out) {
    float x[8];
    load8<Cache::read_only>(in + 8 * threadIdx.x, x);
    store8<Cache::streaming>(out + 8 * threadIdx.x, x);
}

extern "C" __global__ void convert_f16_f32(const f16* in, float* out) {
    float x[8];
    load8(in + 8 * threadIdx.x, x);
    store8(out + 8 * threadIdx.x, x);
}

EFFNETV2_KERNEL(mma_bf16)
EFFNETV2_KERNEL(mma_f16)
EFFNETV2_KERNEL(mma_tf32)
EFFNETV2_KERNEL(ldmatrix_x1)
EFFNETV2_KERNEL(ldmatrix_x2)
EFFNETV2_KERNEL(ldmatrix_x4)
EFFNETV2_KERNEL(ldmatrix_trans_x1)
EFFNETV2_KERNEL(ldmatrix_trans_x2)
EFFNETV2_KERNEL(ldmatrix_trans_x4)
EFFNETV2_KERNEL(stmatrix_x4)
EFFNETV2_KERNEL(stmatrix_trans_x4)
EFFNETV2_KERNEL(copy_async)
EFFNETV2_KERNEL(approximate)
EFFNETV2_KERNEL(convert_f32_bf16)
EFFNETV2_KERNEL(convert_f16_f32)
