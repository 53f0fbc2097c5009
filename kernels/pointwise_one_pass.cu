// Both gradients of a pointwise convolution in one pass over its tensors: dx = dy W and dW += dy^T x, for f16 and bf16.
//
// pointwise.cu's backward reads g, y and the input once for dx and once more for dW. Here a block brings a tile of 32 to 128
// pixels to shared memory once, pays there and in registers what the tensors owe, and takes both products from it, dW
// staying in registers over all its tiles. So all outputs have to fit a block, 64 or 128 of them (n64, n128), while the
// inputs may be cut into column groups, each of which reads g and y again.
//
// T is f16 or bf16; sums and dW are f32, in a fixed order. y, W and gradients are those of pointwise.cu: x
// [pixels, inputs] is what GemmInput says, the gradient of y [pixels, outputs] what GemmGradient says, dx what
// GradientTarget says, where `to.y` is x's own y and `to.norm` its normalisation, if they are given. 4 * pixels * inputs *
// outputs operations on tensor cores. Least bytes: g and y once for each column group, x and dx once, skip if any, W and
// twice dW; and partial results, written and read: 8 * runs * outputs * inputs of dW, 16 * runs * inputs of sums.
//
// pointwise_one_pass: grid runs * groups as in OnePassGrid, groups fastest. With `to.y` the two sums of batch norm's
//   backward.
// pointwise_one_pass_gated: the same for a gated input, with squeeze-excitation's five sums [5, images, inputs] instead; a
//   run is a number of images.
//
// The eight warps of a block are cut along 32 inputs and, where fewer than eight are needed for them, along 16 pixels of the
// tile. A warp multiplies transposed, dx^T = W^T dy^T, since then the accumulators of 8 inputs x 8 pixels lie in the
// registers just as ldmatrix brings the same piece of x for the other product: SiLU and its derivative come of one sigmoid,
// nothing else is exchanged, and dx takes the place of x in shared memory, from where it is stored in rows of 16 bytes.

#include "include/activation.cuh"
#include "include/batch_norm.cuh"
#include "include/gemm_epilogue.cuh"
#include "include/gemm_operands.cuh"
#include "include/gemm_weight.cuh"
#include "include/predecessors.cuh"

namespace {

constexpr unsigned threads = 256, warps = threads / 32;
/// Inputs of a warp, and pixels that it has at a time.
constexpr unsigned warp_columns = 32, warp_rows = 16;

/// How pixels and inputs are cut: units of `rows` rows (an image where each has sums of its own, else a run), `units` of them
/// to a run, tiles of `tile` rows (a multiple of 16); groups of `columns` inputs, a multiple of 16 and 256 at most.
struct OnePassGrid {
    unsigned rows, units, runs, groups, columns, tile;
};

__device__ __forceinline__ unsigned round_up(unsigned x, unsigned to) { return (x + to - 1) / to * to; }

/// Of a warp's lane in ldmatrix: the matrices lie 0 2 / 1 3, as the rows go down, or 0 1 / 2 3.
struct MatrixLane {
    unsigned down, across;
    __device__ __forceinline__ static MatrixLane first_down() {
        return {threadIdx.x / 8 % 2 * 8 + threadIdx.x % 8, threadIdx.x / 16 % 2 * 8};
    }
    __device__ __forceinline__ static MatrixLane first_across() {
        return {threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8, threadIdx.x / 8 % 2 * 8};
    }
};

/// Dynamic shared memory: two stages of g, which becomes dy, y, x and, if there is one, skip; W; the normalisation
/// [3, columns]; and each warp's sums. Rows are 16 bytes apart from a multiple of 32, so that ldmatrix finds its eight rows
/// in different banks. At the end dW lies where stages and W were: it is no larger.
struct OnePassMemory {
    /// Elements of a row, rows of W and columns of the tiles rounded up to whole fragments.
    unsigned depth, dy_pitch, x_pitch, stage, weights, norm, sums;

    template <class T>
    __device__ __forceinline__ OnePassMemory(const OnePassGrid& grid, unsigned outputs, bool skip, T)
        : depth(round_up(outputs, 16)), dy_pitch(depth + 8), x_pitch(grid.columns + 8),
          stage(grid.tile * (2 * dy_pitch + (skip ? 2 : 1) * x_pitch)), weights(2 * stage),
          norm((weights + depth * x_pitch) * sizeof(T)), sums(norm + 3 * grid.columns * sizeof(float)) {}
};

template <class T, unsigned fragments, bool gated>
__device__ __forceinline__ void one_pass(const GemmGradient<T>& dy, const T* weight, const GradientTarget<T>& to,
                                         const GemmInput<T>& x, float* dweight, const OnePassGrid& grid,
                                         const OwedFinish& owed, float* five_sums, float* partial,
                                         unsigned* counters) {
    constexpr unsigned count = gated ? 5 : 2;
    const unsigned run = blockIdx.x / grid.groups, group = blockIdx.x % grid.groups;
    const unsigned outputs = dy.width, inputs = x.width, height = dy.height;
    const unsigned first_column = group * grid.columns, columns = min(grid.columns, inputs - first_column);
    const unsigned width = round_up(columns, 16);
    const OnePassMemory memory(grid, outputs, to.skip != nullptr, T());
    T* const stages = dynamic_shared<T>();
    T* const weights = stages + memory.weights;
    float* const norm = dynamic_shared<float>(memory.norm);
    float* const sums_of_warps = dynamic_shared<float>(memory.sums);

    // The units of this run, of which only the last one of all may be short, and then it is the only one of its run.
    const unsigned first_unit = gated ? run * grid.units : run;
    const unsigned units = gated ? min(grid.units, (height + grid.rows - 1) / grid.rows - first_unit) : 1;
    const unsigned unit_rows = min(grid.rows, height - first_unit * grid.rows);
    const unsigned tiles = (unit_rows + grid.tile - 1) / grid.tile;
    const auto row_of = [&](unsigned unit, unsigned tile) { return (first_unit + unit) * grid.rows + tile * grid.tile; };
    const auto rows_of = [&](unsigned tile) { return min(grid.tile, unit_rows - tile * grid.tile); };

    // A thread fetches and pays pieces of one row, `own`, from `piece` on.
    const unsigned across = threads / grid.tile, own = threadIdx.x / across, piece = threadIdx.x % across * 8;
    const auto fetch = [&](T* stage, unsigned first_row, unsigned rows) {
        const bool inside = own < rows;
        const unsigned row = inside ? first_row + own : 0;
        T* to_dy = stage + own * memory.dy_pitch;
#pragma unroll 1
        for (unsigned c = piece; c < memory.depth; c += across * 8) {
            const bool there = inside && c < outputs;
            const unsigned offset = there ? row * outputs + c : 0, bytes = there ? 16 : 0;
            cp_async<16>(to_dy + c, dy.g + offset, bytes);
            cp_async<16>(to_dy + grid.tile * memory.dy_pitch + c, dy.y + offset, bytes);
        }
        T* to_x = stage + 2 * grid.tile * memory.dy_pitch + own * memory.x_pitch;
#pragma unroll 1
        for (unsigned c = piece; c < width; c += across * 8) {
            const bool there = inside && c < columns;
            const unsigned offset = there ? row * inputs + first_column + c : 0, bytes = there ? 16 : 0;
            cp_async<16>(to_x + c, x.data + offset, bytes);
            if (to.skip) cp_async<16>(to_x + grid.tile * memory.x_pitch + c, to.skip + offset, bytes);
        }
    };
    const auto pay = [&](T* stage, unsigned first_row, unsigned rows) {
        if (own >= rows) return;
        const auto row = dy.row(first_row + own);
#pragma unroll 1
        for (unsigned c = piece; c < outputs; c += across * 8) {
            T* g = stage + own * memory.dy_pitch + c;
            const Pack8<T> second = load_pack8(g + grid.tile * memory.dy_pitch);
            float value[8], y[8];
            load8(g, value);
            unpack8(second, y);
#pragma unroll
            for (unsigned four = 0; four < 8; four += 4)
                dy.transform(reinterpret_cast<float(&)[4]>(value[four]), reinterpret_cast<float(&)[4]>(y[four]), row,
                             dy.columns(c + four));
            store8(g, value);
        }
    };

    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // Warps along the inputs, a power of two, and along the pixels.
    const unsigned along = grid.columns > 128 ? 8 : grid.columns > 64 ? 4 : grid.columns > 32 ? 2 : 1;
    const unsigned part = warp / along, parts = warps / along, warp_column = warp % along * warp_columns;
    const MatrixLane down = MatrixLane::first_down(), right = MatrixLane::first_across();
    float dw[fragments][4][4] = {};
    float sums[count][4] = {};
    float gate[4] = {};

    const auto multiply = [&](T* stage, unsigned first_row, unsigned rows, bool whole) {
        const T* dy_tile = stage;
        T* x_tile = stage + 2 * grid.tile * memory.dy_pitch + warp_column;
#pragma unroll 1
        for (unsigned half = part * warp_rows; half < rows; half += parts * warp_rows) {
            const T* pixels = dy_tile + half * memory.dy_pitch;
            T* const place = x_tile + (half + down.down) * memory.x_pitch + down.across;
            // x of 8 inputs and 16 pixels each.
            uint32_t values[4][2];
#pragma unroll
            for (unsigned j = 0; j < 2; ++j) {
                uint32_t four[4] = {};
                if (whole || j == 0) ldmatrix_trans<4>(four, place + 16 * j);
                values[2 * j][0] = four[0], values[2 * j][1] = four[1];
                values[2 * j + 1][0] = four[2], values[2 * j + 1][1] = four[3];
            }
            // dx^T: 16 inputs and 8 pixels each.
            float dx[2][2][4] = {};
#pragma unroll 1
            for (unsigned n = 0; n < memory.depth; n += 16) {
                uint32_t of_pixels[4];
                ldmatrix<4>(of_pixels, pixels + right.down * memory.dy_pitch + n + right.across);
                const uint32_t low[2] = {of_pixels[0], of_pixels[1]}, high[2] = {of_pixels[2], of_pixels[3]};
#pragma unroll
                for (unsigned j = 0; j < 2; ++j) {
                    if (!whole && j == 1) continue;
                    uint32_t of_inputs[4];
                    ldmatrix_trans<4>(of_inputs, weights + (n + right.down) * memory.x_pitch + warp_column + 16 * j +
                                                     right.across);
                    mma_m16n8k16<T>(dx[j][0], of_inputs, low, dx[j][0]);
                    mma_m16n8k16<T>(dx[j][1], of_inputs, high, dx[j][1]);
                }
            }
            if (to.y) {
#pragma unroll
                for (unsigned j = 0; j < 4; ++j) {
                    if (!whole && j >= 2) continue;
                    const float* of_channel = norm + warp_column + 8 * j + g;
                    const float scale = of_channel[0], shift = of_channel[grid.columns];
                    const float mean = of_channel[2 * grid.columns];
#pragma unroll
                    for (unsigned p = 0; p < 2; ++p) {
                        const float2 both = unpack2<T>(values[j][p]);
                        const float raw[2] = {both.x, both.y};
                        float input[2];
#pragma unroll
                        for (unsigned e = 0; e < 2; ++e) {
                            const float z = scale * raw[e] + shift, s = sigmoid(z);
                            const float centred = raw[e] - mean;
                            float slope = silu_grad(z, s);
                            float& d = dx[j / 2][p][j % 2 * 2 + e];
                            input[e] = z * s;
                            const float dz = d * slope;
                            sums[0][j] += dz;
                            if constexpr (gated) {
                                if (half + 8 * p + 2 * t + e >= rows) slope = 0.0f;
                                sums[1][j] += slope;
                                sums[2][j] += dz * centred;
                                sums[3][j] += slope * centred;
                                sums[4][j] += d * input[e];
                                input[e] *= gate[j];
                            } else {
                                sums[1][j] += dz * centred;
                                d = dz;
                            }
                        }
                        values[j][p] = pack2<T>(input[0], input[1]);
                    }
                }
            } else if (to.skip) {
#pragma unroll
                for (unsigned j = 0; j < 2; ++j) {
                    if (!whole && j == 1) continue;
                    uint32_t four[4];
                    ldmatrix_trans<4>(four, place + grid.tile * memory.x_pitch + 16 * j);
#pragma unroll
                    for (unsigned i = 0; i < 4; ++i) {
                        const float2 both = unpack2<T>(four[i]);
                        dx[j][i % 2][i / 2 * 2] += both.x;
                        dx[j][i % 2][i / 2 * 2 + 1] += both.y;
                    }
                }
            }
            // All lanes have their x.
            __syncwarp();
#pragma unroll
            for (unsigned j = 0; j < 2; ++j) {
                if (!whole && j == 1) continue;
                uint32_t four[4];
#pragma unroll
                for (unsigned i = 0; i < 4; ++i)
                    four[i] = pack2<T>(dx[j][i % 2][i / 2 * 2], dx[j][i % 2][i / 2 * 2 + 1]);
                stmatrix_trans<4>(place + 16 * j, four);
            }
#pragma unroll
            for (unsigned m = 0; m < fragments; ++m) {
                if (16 * m >= memory.depth) continue;
                uint32_t of_outputs[4];
                ldmatrix_trans<4>(of_outputs, pixels + right.down * memory.dy_pitch + 16 * m + right.across);
#pragma unroll
                for (unsigned j = 0; j < 4; ++j)
                    if (whole || j < 2) mma_m16n8k16<T>(dw[m][j], of_outputs, values[j], dw[m][j]);
            }
            __syncwarp();
#pragma unroll
            for (unsigned i = 0; i < 2; ++i) {
                const unsigned row = half + 8 * i + lane / 4, column = warp_column + lane % 4 * 8;
                if (row < rows && column < columns)
                    store16(to.dx + (first_row + row) * inputs + first_column + column,
                            load16<uint4>(stage + 2 * grid.tile * memory.dy_pitch + row * memory.x_pitch + column));
            }
        }
    };
    // Hands the sum k of a column to `use(k, column, sum)`, by one thread for each, and begins anew.
    const auto each_sum = [&](auto use) {
#pragma unroll
        for (unsigned k = 0; k < count; ++k)
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                float& sum = sums[k][j];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (t == 0) sums_of_warps[(warp * count + k) * warp_columns + 8 * j + g] = sum;
                sum = 0.0f;
            }
        __syncthreads();
        const unsigned c = threadIdx.x, column = first_column + c;
        if (c >= columns) return;
        const float rstd = to.norm[3 * inputs + column];
#pragma unroll
        for (unsigned k = 0; k < count; ++k) {
            const float* of_warps = sums_of_warps + (c / warp_columns * count + k) * warp_columns + c % warp_columns;
            float sum = of_warps[0];
#pragma unroll 1
            for (unsigned p = 1; p < parts; ++p) sum += of_warps[p * along * count * warp_columns];
            const bool of_xhat = gated ? k == 2 || k == 3 : k == 1;
            use(k, column, of_xhat ? sum * rstd : sum);
        }
    };

    for (unsigned c = threadIdx.x % 32 * 8; c < width; c += 256)
        for (unsigned n = warp; n < memory.depth; n += warps) {
            const bool there = n < outputs && c < columns;
            cp_async<16>(weights + n * memory.x_pitch + c, weight + (there ? n * inputs + first_column + c : 0),
                         there ? 16u : 0u);
        }
    if (to.y)
        for (unsigned c = threadIdx.x; c < width; c += threads)
#pragma unroll
            for (unsigned k = 0; k < 3; ++k)
                norm[k * grid.columns + c] = c < columns ? to.norm[k * inputs + first_column + c] : 0.0f;
    fetch(stages, row_of(0, 0), rows_of(0));
    cp_async_commit_group();
    unsigned slot = 0;
    for (unsigned unit = 0; unit < units; ++unit) {
        if constexpr (gated)
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                const unsigned c = warp_column + 8 * j + g;
                gate[j] = c < columns ? __ldg(x.gate + (first_unit + unit) * inputs + first_column + c) : 0.0f;
            }
        for (unsigned tile = 0; tile < tiles; ++tile) {
            T* const stage = stages + slot * memory.stage;
            slot ^= 1;
            cp_async_wait_group<0>();
            pay(stage, row_of(unit, tile), rows_of(tile));
            // All threads have brought this tile, and are through with the one before, whose memory is fetched into next.
            __syncthreads();
            const bool turns = tile + 1 == tiles;
            const unsigned next_unit = unit + turns, next_tile = turns ? 0 : tile + 1;
            if (next_unit < units)
                fetch(stages + slot * memory.stage, row_of(next_unit, next_tile), rows_of(next_tile));
            cp_async_commit_group();
            // The columns of the last warps may be few, or none.
            if (warp_column < width)
                multiply(stage, row_of(unit, tile), rows_of(tile), warp_column + 16 < width);
        }
        if constexpr (gated)
            each_sum([&](unsigned k, unsigned column, float sum) {
                const unsigned images = height / grid.rows;
                five_sums[(k * images + first_unit + unit) * inputs + column] = sum;
            });
    }

    // dW of the block in shared memory, the warps along the pixels one after the other, and from there to its place.
    float* const together = dynamic_shared<float>();
    for (unsigned p = 0; p < parts; ++p) {
        __syncthreads();
        if (part != p || warp_column >= width) continue;
#pragma unroll
        for (unsigned m = 0; m < fragments; ++m)
#pragma unroll
            for (unsigned j = 0; j < 4; ++j)
#pragma unroll
                for (unsigned h = 0; h < 2; ++h) {
                    const unsigned n = 16 * m + 8 * h + g, c = warp_column + 8 * j + 2 * t;
                    if (n >= outputs || c >= columns) continue;
                    float2& sum = *reinterpret_cast<float2*>(together + n * grid.columns + c);
                    const float2 before = p == 0 ? make_float2(0.0f, 0.0f) : sum;
                    sum = make_float2(before.x + dw[m][j][2 * h], before.y + dw[m][j][2 * h + 1]);
                }
    }
    __syncthreads();
    float* const of_weights = partial + (gated ? 0 : 2 * grid.runs * inputs);
    const unsigned quads = columns / 4, all = outputs * quads, elements = outputs * inputs;
    const auto each = [&](auto use) {
        for (unsigned i = threadIdx.x; i < all; i += threads) {
            const unsigned offset = i / quads * inputs + first_column + i % quads * 4;
            use(offset, dweight + offset);
        }
    };
    each([&](unsigned offset, float*) {
        const float* from = together + offset / inputs * grid.columns + offset % inputs - first_column;
        store16(of_weights + run * elements + offset, load16<float4>(from));
    });
    const unsigned radices = (grid.runs + radix - 1) / radix;
    unsigned* const of_group = counters + grid.groups + group * radices;
    add_splits(each, of_weights, elements, grid.runs, run, of_group, counters + (1 + radices) * grid.groups + group);
    if constexpr (!gated) {
        if (!to.y) return;
        each_sum([&](unsigned k, unsigned column, float sum) { partial[(run * 2 + k) * inputs + column] = sum; });
        if (!is_last_block(counters + group, grid.runs)) return;
        finish_owed<threads>(partial, grid.runs, inputs, first_column, grid.columns, owed);
    }
}

} // namespace

#define EFFNETV2_ONE_PASS(name, T, fragments, gated, blocks)                                                 \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        name(const GemmGradient<T> dy, const T* weight, const GradientTarget<T> dx, const GemmInput<T> x,    \
             float* dweight, const OnePassGrid grid, const OwedFinish owed, float* sums, float* partial,     \
             unsigned* counters) {                                                                           \
        after_predecessors();                                                                                \
        one_pass<T, fragments, gated>(dy, weight, dx, x, dweight, grid, owed, sums, partial, counters);      \
    }                                                                                                        \
    EFFNETV2_KERNEL(name)

#define EFFNETV2_ONE_PASS_OF(suffix, T)                                                                      \
    EFFNETV2_ONE_PASS(pointwise_one_pass_n64_##suffix, T, 4, false, 2)                                       \
    EFFNETV2_ONE_PASS(pointwise_one_pass_n128_##suffix, T, 8, false, 1)                                      \
    EFFNETV2_ONE_PASS(pointwise_one_pass_gated_n64_##suffix, T, 4, true, 1)                                  \
    EFFNETV2_ONE_PASS(pointwise_one_pass_gated_n128_##suffix, T, 8, true, 1)

EFFNETV2_ONE_PASS_OF(f16, f16)
EFFNETV2_ONE_PASS_OF(bf16, bf16)
