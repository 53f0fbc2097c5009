// An example of a kernel family, for the tests of the host device: C = A B, rounded to T, with the column
// sums of C.
//
//   a [m][k], b [k][n], c [m][n], all row-major; k and n are multiples of 8, m is any number
//   sums [grid.y][n]: row r holds the column sums, taken before rounding, of the rows of C in row tile r
//   grid (ceil(n / 64), ceil(m / 64)), block 128, dynamic shared memory sizeof(GemmTiles)
//
// Moves at least (m k + k n + m n) sizeof(T) bytes and does m n k multiply-adds.

#include "../../../include/ptx.cuh"
#include "../../../include/types.cuh"

namespace {

constexpr int tile_m = 64, tile_n = 64, tile_k = 32, threads = 128, stages = 2;
/// Eight elements of padding move each row by four banks: the eight rows that ldmatrix reads then do not
/// collide.
constexpr int padding = 8;

template <class T> struct GemmTiles {
    T a[stages][tile_m][tile_k + padding];
    T b[stages][tile_k][tile_n + padding];
    float sums[2][tile_n];
};

template <class T> struct GemmOperands {
    const T* a;
    const T* b;
    int m, n, k;
};

/// Fetches rows [row0, row0 + rows) and columns [column0, column0 + columns) of a row-major matrix; zero
/// outside.
template <int rows, int columns, class T>
__device__ void fetch_tile(T (*tile)[columns + padding], const T* matrix, int row0, int column0, int height,
                           int width) {
    constexpr int packs = columns / 8;
    for (int i = threadIdx.x; i < rows * packs; i += threads) {
        const int row = i / packs, column = i % packs * 8;
        const bool inside = row0 + row < height && column0 + column < width;
        const T* source = matrix + size_t(row0 + row) * width + column0 + column;
        cp_async<16>(&tile[row][column], inside ? source : matrix, inside ? 16 : 0);
    }
}

template <class T> __device__ void fetch(GemmTiles<T>& tiles, const GemmOperands<T>& operands, int step) {
    const int stage = step % stages, k0 = step * tile_k;
    fetch_tile<tile_m, tile_k>(tiles.a[stage], operands.a, blockIdx.y * tile_m, k0, operands.m, operands.k);
    fetch_tile<tile_k, tile_n>(tiles.b[stage], operands.b, k0, blockIdx.x * tile_n, operands.k, operands.n);
}

/// Each of the 2 x 2 warps computes 32 x 32 of the tile: 2 x 4 fragments.
template <class T>
__device__ void multiply_stage(float (&c)[2][4][4], GemmTiles<T>& tiles, int stage, int warp, int lane) {
    const int row0 = warp / 2 * 32, column0 = warp % 2 * 32;
    for (int k = 0; k < tile_k; k += 16) {
        uint32_t a[2][4], b[4][2];
        for (int i = 0; i < 2; ++i)
            ldmatrix<4>(a[i], &tiles.a[stage][row0 + 16 * i + lane % 16][k + lane / 16 * 8]);
        for (int j = 0; j < 4; ++j) ldmatrix_trans<2>(b[j], &tiles.b[stage][k + lane % 16][column0 + 8 * j]);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(c[i][j], a[i], b[j], c[i][j]);
    }
}

/// Column sums of the warp's 32 rows, over the eight lanes that hold the same columns; rows outside are zero.
__device__ void sum_columns(float (&c)[2][4][4], float (*sums)[tile_n], int warp, int lane) {
    for (int j = 0; j < 4; ++j)
        for (int half = 0; half < 2; ++half) {
            float sum = c[0][j][half] + c[0][j][half + 2] + c[1][j][half] + c[1][j][half + 2];
            for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (lane < 4) sums[warp / 2][warp % 2 * 32 + 8 * j + 2 * lane + half] = sum;
        }
}

template <class T>
__device__ void store_tile(T* c, const float (&fragments)[2][4][4], int m, int n, int warp, int lane) {
    const int row0 = blockIdx.y * tile_m + warp / 2 * 32 + lane / 4;
    const int column0 = blockIdx.x * tile_n + warp % 2 * 32 + lane % 4 * 2;
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
            for (int half = 0; half < 2; ++half) {
                const int row = row0 + 16 * i + 8 * half, column = column0 + 8 * j;
                const uint32_t pair = pack2<T>(fragments[i][j][2 * half], fragments[i][j][2 * half + 1]);
                if (row < m && column < n)
                    reinterpret_cast<uint32_t*>(c)[(size_t(row) * n + column) / 2] = pair;
            }
}

template <class T> __device__ void gemm(const GemmOperands<T>& operands, T* c, float* sums) {
    GemmTiles<T>& tiles = *dynamic_shared<GemmTiles<T>>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int steps = (operands.k + tile_k - 1) / tile_k;
    float fragments[2][4][4] = {};

    fetch(tiles, operands, 0);
    cp_async_commit_group();
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) fetch(tiles, operands, step + 1);
        cp_async_commit_group();
        cp_async_wait_group<1>();
        __syncthreads();
        multiply_stage(fragments, tiles, step % stages, warp, lane);
        __syncthreads();
    }

    store_tile(c, fragments, operands.m, operands.n, warp, lane);
    sum_columns(fragments, tiles.sums, warp, lane);
    __syncthreads();
    const int column = blockIdx.x * tile_n + threadIdx.x;
    if (threadIdx.x < tile_n && column < operands.n)
        sums[size_t(blockIdx.y) * operands.n + column] =
            tiles.sums[0][threadIdx.x] + tiles.sums[1][threadIdx.x];
}

} // namespace

extern "C" __global__ void __launch_bounds__(threads)
    example_gemm_bf16(const bf16* a, const bf16* b, bf16* c, float* sums, int m, int n, int k) {
    gemm<bf16>({a, b, m, n, k}, c, sums);
}

extern "C" __global__ void __launch_bounds__(threads)
    example_gemm_f16(const f16* a, const f16* b, f16* c, float* sums, int m, int n, int k) {
    gemm<f16>({a, b, m, n, k}, c, sums);
}

EFFNETV2_KERNEL(example_gemm_bf16)
EFFNETV2_KERNEL(example_gemm_f16)
