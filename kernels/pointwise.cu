// Pointwise (1x1) convolution and the classifier: y [pixels, outputs] = x [pixels, inputs] W^T, W [outputs, inputs].
//
// x, W, y and gradients of x and y are of type T, f32, f16 or bf16; everything else, dW too, is f32, and so are all sums,
// in a fixed order; kernels in tf32 are those of f32 with their products on tensor cores. Channels are multiples of 8,
// arrays aligned to 16 bytes. x owes what GemmInput says (SiLU of a normalisation, a gate), the gradient of y what
// GemmGradient says (batch norm's backward, stochastic depth); both are paid on load. The mainloop is gemm.cuh: tiles
// of 128 x 128 (wide), 128 x 64 (narrow), 64 x 128 (low) and 64 x 256 (broad), f16 and bf16 on tensor cores, f32 in plain
// arithmetic or in tf32. What rows owe is paid for each tile, so the fewer rows and the more columns, the less. Each is
// 2 * pixels * inputs * outputs operations. In kernels of wgmma128 and wgmma64 warpgroups multiply, in the tiles of
// wide and narrow, but for dW; they run on sm_90a alone. The gradient of x has no wide ones: with 128 columns its epilogue
// finds too few registers, since wgmma's accumulators lie side by side. In those of tma128 and tma64 TMA brings what warpgroups
// multiply, x as it lies: of the launch's maps the boxes are bm and bn rows of 64 bytes.
//
// pointwise_fprop: y, as ForwardOutput says: with the moments of batch norm, or folded for inference. Grid runs * groups as
//   in GemmGrid, groups of `bn` outputs. Least bytes: x, W and y once, skip if any; partial moments 8 * runs * outputs
//   twice.
// pointwise_dgrad: dx = dy W, as GradientTarget says: plus skip, or times SiLU' with the two sums of batch norm's backward.
//   Grid likewise, groups of inputs. Least bytes: g, its y, W, dx and skip or the input's y once; partial sums as above.
// pointwise_dgrad_gated: dx and squeeze-excitation's five sums [5, images, inputs] of it (squeeze_excite.cu), of dx before
//   it is rounded. Grid images * groups: a block has all pixels of its image.
// pointwise_wgrad: dW += dy^T x. Grid splits * tiles as in WeightGrid: pixels are cut into `splits`, a block has one of them
//   and one tile of dW. Least bytes: g, its y, x and twice dW; with splits their partial tiles, written and read.
// pointwise_backward: both gradients in one launch, so that they fill the GPU together and a layer's backward costs one
//   launch. Its blocks are those of pointwise_wgrad and pointwise_dgrad, in the order that BackwardWindows says: of one
//   window of the pixels after the other, so that the second reading finds in the second level what the first has brought.
//   pointwise_backward_gated: with pointwise_dgrad_gated, `grid.runs` being the images. Least bytes: those of both; what the
//   second level gives is not counted. Where channels are few, pointwise_one_pass.cu reads what they have in common once.
// pointwise_classifier_bias: dbias [classes] += the sums of dlogits [images, classes] over images, and, where rows of
//   dlogits are not aligned, a copy of it with rows of `pitch` elements, 0 from `classes` on. Grid ceil(pitch / 32), block
//   256. The classifier is otherwise pointwise_fprop with a bias, _dgrad and _wgrad.

#include "include/gemm_epilogue.cuh"
#include "include/gemm_operands.cuh"
#include "include/gemm_weight.cuh"
#include "include/predecessors.cuh"

namespace {

constexpr unsigned threads = 256;

template <class T> using Wide = GemmTile<T, 128, 128, 2, 4, 3>;
template <class T> using Narrow = GemmTile<T, 128, 64, 4, 2, 3>;
template <class T> using Low = GemmTile<T, 64, 128, 2, 4, 3>;
template <class T> using Broad = GemmTile<T, 64, 256, 1, 8, 3>;
template <class T> using Wgmma128 = WarpgroupTile<T, 128, 128, 8, 3>;
template <class T> using Wgmma64 = WarpgroupTile<T, 128, 64, 8, 3>;
template <class T> using NarrowTf32 = GemmTile<T, 128, 64, 4, 2, 3, true>;
template <class T> using LowTf32 = GemmTile<T, 64, 128, 2, 4, 3, true>;

/// `x` [pixels, inputs] and `weight` [outputs, inputs] as their loaders have them.
template <class Tile, class X, class Weight, class T>
__device__ __forceinline__ void fprop(const X& x, const Weight& weight, unsigned pixels, unsigned inputs,
                                      unsigned outputs, const ForwardOutput<T>& to, const GemmGrid& grid,
                                      const NormFinish& norm, float* partial, unsigned* counters) {
    if constexpr (!exist<Tile::products>) return __trap();
    const GemmWalk walk = grid.walk<Tile>(pixels, inputs);
    if (!to.moments) {
        FoldedEpilogue<Tile> epilogue{to, pixels, outputs};
        return gemm<Tile, Major::k, Major::k>(x, weight, walk, epilogue);
    }
    MomentsEpilogue<Tile> epilogue(to.y, pixels, outputs, dynamic_shared<float>(GemmMemory<Tile, X, Weight>::bytes));
    gemm<Tile, Major::k, Major::k>(x, weight, walk, epilogue);
    epilogue.finish(grid, partial, counters, norm);
}

template <class Tile, class T>
__device__ __forceinline__ void dgrad(const GemmGradient<T>& dy, const T* weight, const GradientTarget<T>& to,
                                      unsigned inputs, const GemmGrid& grid, unsigned block,
                                      const OwedFinish& owed, float* partial, unsigned* counters) {
    if constexpr (!exist<Tile::products>) return __trap();
    const GemmMatrix<T> columns{weight, dy.width, inputs};
    GradientEpilogue<Tile, 2> epilogue(to, dy.height, inputs);
    gemm<Tile, Major::k, Major::rows>(dy, columns, grid.walk<Tile>(dy.height, dy.width, block), epilogue);
    epilogue.finish(grid, block, partial, counters, owed);
}

template <class Tile, class T>
__device__ __forceinline__ void dgrad_gated(GemmGradient<T> dy, const T* weight, const GradientTarget<T>& to,
                                            unsigned inputs, const GemmGrid& grid, unsigned block, float* sums) {
    const unsigned image = grid.run(block), images = grid.runs, pixels = dy.pixels.divisor;
    const unsigned first = grid.group(block) * Tile::bn;
    dy.height = (image + 1) * pixels;
    const GemmMatrix<T> columns{weight, dy.width, inputs};
    const GemmWalk walk{image * pixels, (pixels + Tile::bm - 1) / Tile::bm, first, 0,
                        (dy.width + Tile::bk - 1) / Tile::bk};
    GradientEpilogue<Tile, 5> epilogue(to, dy.height, inputs);
    gemm<Tile, Major::k, Major::rows>(dy, columns, walk, epilogue);
    epilogue.each_sum(first, [&](unsigned k, unsigned column, float sum) {
        sums[(k * images + image) * inputs + column] = sum;
    });
}

/// Of `together` splits, each takes one step in turn. Splits that are left without pixels have one step of zeros.
template <class Tile, class T>
__device__ __forceinline__ void wgrad(const GemmGradient<T>& dy, const GemmInput<T>& x, float* dweight,
                                      const WeightGrid& grid, unsigned together, unsigned block, float* partial,
                                      unsigned* counters) {
    const unsigned tiles = grid.row_tiles * grid.column_tiles, outputs = dy.width, inputs = x.width;
    const unsigned tile = block % tiles, split = block / tiles;
    const unsigned first = (split / together * together * grid.steps + split % together) * Tile::bk;
    const unsigned apart = together * Tile::bk, left = dy.height > first ? (dy.height - first + apart - 1) / apart : 1;
    const GemmWalk walk{tile / grid.column_tiles * Tile::bm, 1, tile % grid.column_tiles * Tile::bn, first,
                        min(grid.steps, left), together};
    WeightEpilogue<Tile> epilogue{dweight, partial, outputs, inputs, block, grid.splits == 1};
    gemm<Tile, Major::rows, Major::rows>(dy, x, walk, epilogue);
    if (grid.splits > 1) add_partial<Tile>(dweight, outputs, inputs, grid, block, partial, counters);
}

/// The order of both gradients' blocks: window after window of the pixels, and of each the `splits` of the weights' gradient,
/// whose blocks take longer, before the `runs` of the input's. The last window has what runs are left. In a window
/// `together` splits go through its pixels side by side, so that they are all where the runs are; 1: each has pixels of
/// its own.
struct BackwardWindows {
    unsigned runs, splits, together;
};

/// Behind the partial sums and counters of the input's gradient lie those of the weights'.
template <class Tile, class WeightTile, bool gated, class T>
__device__ __forceinline__ void backward(const GemmGradient<T>& dy, const T* weight, const GradientTarget<T>& to,
                                         const GemmInput<T>& x, float* dweight, const GemmGrid& grid,
                                         const WeightGrid& weights, const BackwardWindows& windows,
                                         const OwedFinish& owed, float* sums, float* partial, unsigned* counters) {
    if constexpr (!exist<Tile::products>) return __trap();
    const unsigned of_weights = windows.splits * weights.row_tiles * weights.column_tiles;
    const unsigned of_input = windows.runs * grid.groups;
    const unsigned window = blockIdx.x / (of_weights + of_input), place = blockIdx.x % (of_weights + of_input);
    if (place < of_weights) {
        partial += gated ? 0 : 2 * grid.runs * x.width;
        return wgrad<WeightTile>(dy, x, dweight, weights, windows.together, window * of_weights + place, partial,
                                 counters + grid.groups);
    }
    const unsigned block = window * of_input + (place - of_weights);
    if constexpr (gated)
        dgrad_gated<Tile>(dy, weight, to, x.width, grid, block, sums);
    else
        dgrad<Tile>(dy, weight, to, x.width, grid, block, owed, partial, counters);
}

/// A column for each of 32 threads, its rows over 8.
template <class T>
__device__ __forceinline__ void classifier_bias(const T* dlogits, T* padded, float* dbias, unsigned images,
                                                unsigned classes, unsigned pitch) {
    constexpr unsigned slices = threads / 32;
    __shared__ float partial[slices][32];
    const unsigned lane = threadIdx.x % 32, slice = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (c < pitch)
#pragma unroll 4
        for (unsigned n = slice; n < images; n += slices) {
            const T value = c < classes ? dlogits[n * classes + c] : from_float<T>(0.0f);
            if (padded) padded[n * pitch + c] = value;
            sum += to_float(value);
        }
    partial[slice][lane] = sum;
    __syncthreads();
    if (slice != 0 || c >= classes) return;
    float total = partial[0][lane];
#pragma unroll
    for (unsigned s = 1; s < slices; ++s) total += partial[s][lane];
    dbias[c] += total;
}

} // namespace

#define EFFNETV2_POINTWISE_FPROP(suffix, T, Tile, blocks)                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        pointwise_fprop_##suffix(const GemmInput<T> x, const T* weight, const ForwardOutput<T> y,            \
                                 unsigned outputs, const GemmGrid grid, const NormFinish norm,               \
                                 float* partial, unsigned* counters) {                                       \
        after_predecessors();                                                                                \
        const GemmMatrix<T> columns{weight, outputs, x.width};                                               \
        fprop<Tile<T>>(x, columns, x.height, x.width, outputs, y, grid, norm, partial, counters);            \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_fprop_##suffix)

#define EFFNETV2_POINTWISE_TMA(suffix, T, Tile)                                                              \
    extern "C" __global__ void __launch_bounds__(threads, 2)                                                 \
        pointwise_fprop_##suffix(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, \
                                 const ForwardOutput<T> y, unsigned pixels, unsigned inputs, unsigned outputs, \
                                 const GemmGrid grid, const NormFinish norm, float* partial,                 \
                                 unsigned* counters) {                                                       \
        after_predecessors();                                                                                \
        fprop<Tile<T>>(GemmTensor{x}, GemmTensor{weight}, pixels, inputs, outputs, y, grid, norm, partial,   \
                       counters);                                                                            \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_fprop_##suffix)

#define EFFNETV2_POINTWISE_DGRAD(suffix, T, Tile, blocks)                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        pointwise_dgrad_##suffix(const GemmGradient<T> dy, const T* weight, const GradientTarget<T> dx,      \
                                 unsigned inputs, const GemmGrid grid, const OwedFinish owed,                \
                                 float* partial, unsigned* counters) {                                       \
        after_predecessors();                                                                                \
        dgrad<Tile<T>>(dy, weight, dx, inputs, grid, blockIdx.x, owed, partial, counters);                   \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_dgrad_##suffix)

#define EFFNETV2_POINTWISE_GATED(suffix, T, Tile, blocks)                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks) pointwise_dgrad_gated_##suffix(            \
        const GemmGradient<T> dy, const T* weight, const GradientTarget<T> dx, unsigned inputs,              \
        const GemmGrid grid, float* sums) {                                                                  \
        after_predecessors();                                                                                \
        dgrad_gated<Tile<T>>(dy, weight, dx, inputs, grid, blockIdx.x, sums);                                \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_dgrad_gated_##suffix)

#define EFFNETV2_POINTWISE_WGRAD(suffix, T, Tile, blocks)                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        pointwise_wgrad_##suffix(const GemmGradient<T> dy, const GemmInput<T> x, float* dweight,             \
                                 const WeightGrid grid, float* partial, unsigned* counters) {                \
        after_predecessors();                                                                                \
        wgrad<Tile<T>>(dy, x, dweight, grid, 1, blockIdx.x, partial, counters);                              \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_wgrad_##suffix)

#define EFFNETV2_POINTWISE_BACKWARD(suffix, T, Tile, WeightTile, gated)                                      \
    extern "C" __global__ void __launch_bounds__(threads, 2) pointwise_backward_##suffix(                    \
        const GemmGradient<T> dy, const T* weight, const GradientTarget<T> dx, const GemmInput<T> x,         \
        float* dweight, const GemmGrid grid, const WeightGrid weights, const BackwardWindows windows,        \
        const OwedFinish owed, float* sums, float* partial, unsigned* counters) {                            \
        after_predecessors();                                                                                \
        backward<Tile<T>, WeightTile<T>, gated>(dy, weight, dx, x, dweight, grid, weights, windows, owed,    \
                                                sums, partial, counters);                                    \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_backward_##suffix)

#define EFFNETV2_POINTWISE_BIAS(suffix, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        pointwise_classifier_bias_##suffix(const T* dlogits, T* padded, float* dbias, unsigned images,       \
                                           unsigned classes, unsigned pitch) {                               \
        after_predecessors();                                                                                \
        classifier_bias(dlogits, padded, dbias, images, classes, pitch);                                     \
    }                                                                                                        \
    EFFNETV2_KERNEL(pointwise_classifier_bias_##suffix)

#define EFFNETV2_POINTWISE(suffix, T, Narrow, Gated, Low)                                                    \
    EFFNETV2_POINTWISE_FPROP(narrow_##suffix, T, Narrow, 2)                                                  \
    EFFNETV2_POINTWISE_DGRAD(narrow_##suffix, T, Narrow, 2)                                                  \
    EFFNETV2_POINTWISE_GATED(suffix, T, Gated, 2)                                                            \
    EFFNETV2_POINTWISE_WGRAD(low_##suffix, T, Low, 2)                                                        \
    EFFNETV2_POINTWISE_BACKWARD(narrow_##suffix, T, Narrow, Low, false)                                      \
    EFFNETV2_POINTWISE_BACKWARD(gated_##suffix, T, Gated, Low, true)

#define EFFNETV2_POINTWISE_WIDE(suffix, T)                                                                   \
    EFFNETV2_POINTWISE_FPROP(wide_##suffix, T, Wide, 2)                                                      \
    EFFNETV2_POINTWISE_DGRAD(wide_##suffix, T, Wide, 2)                                                      \
    EFFNETV2_POINTWISE_BACKWARD(wide_##suffix, T, Wide, Low, false)                                          \
    EFFNETV2_POINTWISE_FPROP(broad_##suffix, T, Broad, 2)                                                    \
    EFFNETV2_POINTWISE_DGRAD(broad_##suffix, T, Broad, 2)                                                    \
    EFFNETV2_POINTWISE_WGRAD(broad_##suffix, T, Broad, 2)                                                    \
    EFFNETV2_POINTWISE_BACKWARD(broad_##suffix, T, Broad, Broad, false)                                      \
    EFFNETV2_POINTWISE_BACKWARD(gated_broad_##suffix, T, Low, Broad, true)

#define EFFNETV2_POINTWISE_WGMMA(suffix, T)                                                                  \
    EFFNETV2_POINTWISE_FPROP(wgmma64_##suffix, T, Wgmma64, 2)                                                \
    EFFNETV2_POINTWISE_DGRAD(wgmma64_##suffix, T, Wgmma64, 2)                                                \
    EFFNETV2_POINTWISE_BACKWARD(wgmma64_##suffix, T, Wgmma64, Low, false)                                \
    EFFNETV2_POINTWISE_FPROP(wgmma128_##suffix, T, Wgmma128, 2)                                              \
    EFFNETV2_POINTWISE_TMA(tma64_##suffix, T, Wgmma64)                                                       \
    EFFNETV2_POINTWISE_TMA(tma128_##suffix, T, Wgmma128)

EFFNETV2_POINTWISE(f32, float, Narrow, Narrow, Low)
EFFNETV2_POINTWISE(tf32, float, NarrowTf32, NarrowTf32, LowTf32)
EFFNETV2_POINTWISE(f16, f16, Narrow, Low, Low)
EFFNETV2_POINTWISE(bf16, bf16, Narrow, Low, Low)
EFFNETV2_POINTWISE_WIDE(f16, f16)
EFFNETV2_POINTWISE_WIDE(bf16, bf16)
EFFNETV2_POINTWISE_WGMMA(f16, f16)
EFFNETV2_POINTWISE_WGMMA(bf16, bf16)
EFFNETV2_POINTWISE_BIAS(f32, float)
EFFNETV2_POINTWISE_BIAS(f16, f16)
EFFNETV2_POINTWISE_BIAS(bf16, bf16)
