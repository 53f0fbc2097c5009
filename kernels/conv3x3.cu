// Dense 3x3 convolution of stride 1 or 2, in all three directions.
//
// x [images, height, width, inputs], y and g [images, out_height, out_width, outputs], weight [outputs, 3, 3, inputs] and dx
// like x are of type T, f32, f16 or bf16; everything else, dweight too, is f32, and so are all sums, in a fixed order.
// Channels are multiples of 8, arrays aligned to 16 bytes. With s the stride, x being zero outside the image:
//
//   y[n, oh, ow, o]         = sum over kh, kw, i of x[n, s oh + kh - pad_top, s ow + kw - pad_left, i] weight[o, kh, kw, i]
//   dy                      = a g + b y + c, owed [3, outputs] = a, b, c; f16 and bf16 round it before they multiply
//   dweight[o, kh, kw, i]  += sum over n, oh, ow of dy[n, oh, ow, o] x[n, s oh + kh - pad_top, s ow + kw - pad_left, i]
//   dx[n, ih, iw, i]        = skip + sum over o and the kh, kw that reach ih, iw of dy[n, oh, ow, o] weight[o, kh, kw, i]
//
// f16, bf16 and tf32 (f32 as tensor cores multiply it) run on tensor cores, f32 in plain arithmetic. Each direction is 18 *
// outputs * inputs operations for each pixel of y. There are three mainloops, and nothing is lowered in memory by any:
//
// - In f16 and bf16 fprop of stride 1 and dgrad work on spatial tiles (conv_halo.cuh): 256 pixels of an image by 64, 48
//   (dgrad) or 32 columns, or with stride 2 128 cells of four pixels by 32 columns or 64 by 48. A tile's halo is fetched, and
//   what it owes paid, once for all nine taps. The exception are images so small that they would leave more than half of
//   their tiles dead.
// - For f16 and bf16, dweight is summed down strips of images (conv_strips.cuh), all nine taps of a tile at once.
// - All else is an implicit product (gemm.cuh): 128 x 128 (wide), 128 x 64 (narrow) or, for dweight, 64 x 128 tiles. The
//   loaders below gather what lies under the kernel, 16 bytes of a pixel's channels at a time, so each value is fetched, and
//   paid for, once for each tap that it lies under.
//
// Blocks have 256 threads, those of spatial tiles 128, and some of strips 384.
//
// conv3x3_fprop: rows are pixels of y, k is (kh, kw, i), as it lies in the weights. Stores y as ForwardOutput says: with the
//   moments of batch norm, or folded for inference. Grid runs * groups as in GemmGrid, groups of `bn` outputs. Least bytes: x,
//   weight and y once, skip if any; partial moments.
// conv3x3_dgrad: rows are pixels of x, k is (tap, o). With stride 2 the pixels of x are four classes, by whether row and column
//   are odd, that are reached by 1, 2, 2 and 4 taps: four products in one launch, no tap of which is a zero. Grid the sum
//   over classes of runs * groups, groups of `bn` inputs. Least bytes: g, y, weight and dx once, skip if any.
// conv3x3_fprop_tiles, conv3x3_dgrad_tiles, conv3x3_dgrad_cells: the same results, rows being pixels of spatial tiles or cells,
//   k (32 channels, tap, channel). Grid runs * groups as in GemmGrid, runs of tiles. A block fetches for each tile its halo,
//   1.3 times its pixels, and the weights of its columns.
// conv3x3_fprop_wgmma, conv3x3_dgrad_wgmma: as _tiles, with the same bytes, by Products::of_warpgroup. On sm_90a; elsewhere a
//   trap.
// conv3x3_wgrad_f32: rows are outputs, columns (kh, kw, i), k are pixels of y. Grid splits * tiles as in WeightGrid. Least
//   bytes: g, y, x and twice dweight; with splits their partial tiles.
// conv3x3_wgrad_24, _32, _40 (inputs of a warp) _s1, _s2 (the stride), f16 and bf16: grid splits * tiles as in
//   StripShape, blocks of 384, 256 and 256 threads. Least bytes: g, y, x, and the partial tiles of all splits.
// conv3x3_wgrad_sum: adds those to dweight. Grid: fragments of 16 outputs x 8 inputs of all tiles and taps, blocks of 256
//   threads. Least bytes: the partial tiles and twice dweight.

#include "include/conv_halo.cuh"
#include "include/conv_strips.cuh"
#include "include/gemm_epilogue.cuh"
#include "include/gemm_operands.cuh"
#include "include/gemm_weight.cuh"
#include "include/predecessors.cuh"

namespace {

constexpr unsigned side = 3, taps = side * side;

template <class T> using Wide = GemmTile<T, 128, 128, 2, 4, 3>;
template <class T> using Narrow = GemmTile<T, 128, 64, 4, 2, 3>;
template <class T> using Weights = GemmTile<T, 64, 128, 2, 4, 3>;
template <class T> using NarrowTf32 = GemmTile<T, 128, 64, 4, 2, 3, true>;
template <class T> using WeightsTf32 = GemmTile<T, 64, 128, 2, 4, 3, true>;

/// Where pixels of y lie in x.
struct ConvShape {
    /// Of y.
    unsigned pixels;
    /// Of x.
    unsigned height, width;
    unsigned stride, pad_top, pad_left;
    FastDivisor out_width, out_height, inputs;
};

/// The pixel of x under the first tap of a pixel of y. It may lie outside, even before the beginning; so may its offset.
struct Corner {
    int row, column;
    unsigned offset;

    Corner() = default;
    __device__ __forceinline__ Corner(const ConvShape& s, unsigned pixel) {
        const unsigned line = s.out_width.quotient(pixel), image = s.out_height.quotient(line);
        row = int((line - image * s.out_height.divisor) * s.stride) - int(s.pad_top);
        column = int((pixel - line * s.out_width.divisor) * s.stride) - int(s.pad_left);
        offset = ((image * s.height + unsigned(row)) * s.width + unsigned(column)) * s.inputs.divisor;
    }
};

/// The operand of fprop [pixels of y, (tap, input)]: x under the kernel.
template <class T> struct ConvInput {
    static constexpr unsigned sources = 1;
    static constexpr bool may_transform = false;
    const T* x;
    ConvShape shape;

    struct Row {
        /// Of the corner; bit t: tap t is within the image.
        unsigned offset, reached;
    };

    __device__ __forceinline__ Row row(unsigned pixel) const {
        if (pixel >= shape.pixels) return {0, 0};
        const Corner corner(shape, pixel);
        unsigned columns = 0, reached = 0;
#pragma unroll
        for (unsigned k = 0; k < side; ++k)
            if (unsigned(corner.column + int(k)) < shape.width) columns |= 1u << k;
#pragma unroll
        for (unsigned k = 0; k < side; ++k)
            if (unsigned(corner.row + int(k)) < shape.height) reached |= columns << (side * k);
        return {corner.offset, reached};
    }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned k) const {
        // Of k beyond the last tap the bit is 0.
        const unsigned tap = shape.inputs.quotient(k), kh = tap / side, kw = tap - kh * side;
        const unsigned step = (kh * shape.width + kw - tap) * shape.inputs.divisor + k;
        return {row.offset + step, (row.reached >> tap & 1) != 0};
    }
    __device__ __forceinline__ const T* base(unsigned) const { return x; }
};

/// The same as memory rows of wgrad, pixel by pixel, where a thread always has the same columns, that is, one tap.
template <class T> struct ConvPixels {
    static constexpr unsigned sources = 1;
    static constexpr bool may_transform = false;
    const T* x;
    ConvShape shape;
    /// Where the split ends.
    unsigned end;

    using Row = Corner;

    __device__ __forceinline__ Row row(unsigned pixel) const {
        Corner corner(shape, pixel);
        if (pixel >= end) corner.row = int(shape.height);
        return corner;
    }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned column) const {
        const unsigned tap = shape.inputs.quotient(column), kh = tap / side, kw = tap - kh * side;
        const unsigned step = (kh * shape.width + kw - tap) * shape.inputs.divisor + column;
        const bool inside = unsigned(row.row + int(kh)) < shape.height && unsigned(row.column + int(kw)) < shape.width;
        return {row.offset + step, inside && tap < taps};
    }
    __device__ __forceinline__ const T* base(unsigned) const { return x; }
};

/// Pixels of x that the same taps reach: all of them, or with stride 2 every other row and column from the first ones on.
/// Tap (i, j) of the class is tap (first_kernel_row + stride i, first_kernel_column + stride j), and takes pixel (r, c) of
/// the class to pixel (out_row + r - i, out_column + c - j) of y.
struct GradientClass {
    FastDivisor columns, rows, taps_across;
    unsigned taps_down, first_row, first_column, first_kernel_row, first_kernel_column, out_row, out_column;
    /// Of the class; row tiles of a run; the class's first block.
    unsigned pixels, tiles, first_block;
};

struct GradientShape {
    unsigned height, width, out_height, out_width, stride, inputs;
    FastDivisor outputs;
    /// Column groups of a class.
    unsigned groups;
    /// With stride 1 the first alone. Those that are not there begin at the end of the grid.
    GradientClass classes[4];
};

/// The operand of dgrad [pixels of the class, (tap, output)]: dy where the taps take them.
template <class T> struct ConvGradient {
    static constexpr unsigned sources = 2;
    static constexpr bool may_transform = true, keeps_rows = true;
    const T *g, *y;
    const float* owed;
    unsigned out_height, out_width;
    FastDivisor outputs;
    const GradientClass& own;

    struct Row {
        unsigned offset, reached;
    };
    using Columns = OwedColumns;

    __device__ __forceinline__ Row row(unsigned pixel) const {
        if (pixel >= own.pixels) return {0, 0};
        const unsigned line = own.columns.quotient(pixel), image = own.rows.quotient(line);
        const unsigned row = own.out_row + line - image * own.rows.divisor;
        const unsigned column = own.out_column + pixel - line * own.columns.divisor;
        unsigned columns = 0, reached = 0;
#pragma unroll
        for (unsigned k = 0; k < side; ++k)
            if (k < own.taps_across.divisor && column - k < out_width) columns |= 1u << k;
#pragma unroll
        for (unsigned k = 0; k < side; ++k)
            if (k < own.taps_down && row - k < out_height) reached |= columns << (own.taps_across.divisor * k);
        return {((image * out_height + row) * out_width + column) * outputs.divisor, reached};
    }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned k) const {
        const unsigned tap = outputs.quotient(k), down = own.taps_across.quotient(tap);
        const unsigned across = tap - down * own.taps_across.divisor;
        const unsigned back = (down * out_width + across + tap) * outputs.divisor;
        return {row.offset + k - back, (row.reached >> tap & 1) != 0};
    }
    __device__ __forceinline__ const T* base(unsigned source) const { return source == 0 ? g : y; }
    __device__ __forceinline__ bool transforms() const { return true; }

    __device__ __forceinline__ Columns columns(unsigned k) const {
        const unsigned channel = k - outputs.quotient(k) * outputs.divisor;
        Columns v;
        load_vector(owed + channel, v.a);
        load_vector(owed + outputs.divisor + channel, v.b);
        load_vector(owed + 2 * outputs.divisor + channel, v.c);
        return v;
    }
    __device__ __forceinline__ void transform(float (&x)[4], const float (&second)[4], const Row&,
                                              const Columns& v) const {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) x[j] = v.a[j] * x[j] + (v.b[j] * second[j] + v.c[j]);
    }
};

/// The weights as dgrad's memory rows (tap, output) [inputs].
template <class T> struct ConvTaps {
    static constexpr unsigned sources = 1;
    static constexpr bool may_transform = false;
    const T* weight;
    unsigned inputs, stride;
    FastDivisor outputs;
    const GradientClass& own;

    struct Row {
        unsigned offset;
        bool inside;
    };

    __device__ __forceinline__ Row row(unsigned k) const {
        const unsigned tap = outputs.quotient(k), down = own.taps_across.quotient(tap);
        const unsigned across = tap - down * own.taps_across.divisor, output = k - tap * outputs.divisor;
        const unsigned kh = own.first_kernel_row + stride * down, kw = own.first_kernel_column + stride * across;
        return {((output * side + kh) * side + kw) * inputs, down < own.taps_down};
    }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned column) const {
        return {row.offset + column, row.inside && column < inputs};
    }
    __device__ __forceinline__ const T* base(unsigned) const { return weight; }
};

/// Stores dx, plus skip, for the pixels of a class.
template <class T> struct ConvGradientEpilogue {
    struct Extra {
        Pack8<T> skip;
        unsigned offset;
        bool inside;
    };
    T* dx;
    const T* skip;
    unsigned height, width, stride, inputs;
    const GradientClass& own;

    __device__ __forceinline__ Extra prefetch(unsigned pixel, unsigned column) const {
        const unsigned line = own.columns.quotient(pixel), image = own.rows.quotient(line);
        const unsigned row = own.first_row + stride * (line - image * own.rows.divisor);
        const unsigned at = own.first_column + stride * (pixel - line * own.columns.divisor);
        Extra extra{};
        extra.offset = ((image * height + row) * width + at) * inputs + column;
        extra.inside = pixel < own.pixels && column < inputs;
        if (skip && extra.inside) extra.skip = load_pack8(skip + extra.offset);
        return extra;
    }
    __device__ __forceinline__ void store(unsigned, unsigned, float (&x)[8], const Extra& extra) {
        if (!extra.inside) return;
        float other[8];
        unpack8(extra.skip, other);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) x[j] += other[j];
        store8(dx + extra.offset, x);
    }
};

template <class Tile, class T>
__device__ __forceinline__ void fprop(const T* x, const T* weight, const ForwardOutput<T>& to, const ConvShape& shape,
                                      unsigned outputs, const GemmGrid& grid, const NormFinish& norm, float* partial,
                                      unsigned* counters) {
    using Memory = GemmMemory<Tile, ConvInput<T>, GemmMatrix<T>>;
    const unsigned k = taps * shape.inputs.divisor;
    const ConvInput<T> rows{x, shape};
    const GemmMatrix<T> columns{weight, outputs, k};
    const GemmWalk walk = grid.walk<Tile>(shape.pixels, k);
    if (!to.moments) {
        FoldedEpilogue<Tile> epilogue{to, shape.pixels, outputs};
        return gemm<Tile, Major::k, Major::k>(rows, columns, walk, epilogue);
    }
    MomentsEpilogue<Tile> epilogue(to.y, shape.pixels, outputs, dynamic_shared<float>(Memory::bytes));
    gemm<Tile, Major::k, Major::k>(rows, columns, walk, epilogue);
    epilogue.finish(grid, partial, counters, norm);
}

template <class Tile, class T>
__device__ __forceinline__ void dgrad(const T* g, const T* y, const float* owed, const T* weight, const T* skip, T* dx,
                                      const GradientShape& s) {
    unsigned of = 0;
#pragma unroll
    for (unsigned k = 1; k < 4; ++k)
        if (blockIdx.x >= s.classes[k].first_block) of = k;
    const GradientClass& own = s.classes[of];
    const unsigned block = blockIdx.x - own.first_block, run = block / s.groups, group = block - run * s.groups;
    const unsigned first = run * own.tiles * Tile::bm, k = own.taps_down * own.taps_across.divisor * s.outputs.divisor;
    const GemmWalk walk{first, min(own.tiles, (own.pixels - first + Tile::bm - 1) / Tile::bm), group * Tile::bn, 0,
                        (k + Tile::bk - 1) / Tile::bk};
    const ConvGradient<T> rows{g, y, owed, s.out_height, s.out_width, s.outputs, own};
    const ConvTaps<T> columns{weight, s.inputs, s.stride, s.outputs, own};
    ConvGradientEpilogue<T> epilogue{dx, skip, s.height, s.width, s.stride, s.inputs, own};
    gemm<Tile, Major::k, Major::rows>(rows, columns, walk, epilogue);
}

constexpr Products products_of_tiles = Products::of_warps, products_of_wgmma = Products::of_warpgroup;

/// A block's spatial tiles.
__device__ __forceinline__ ConvWalk tile_walk(const ConvTiles& tiles, const GemmGrid& grid, unsigned bn) {
    const unsigned first = grid.run() * grid.tiles;
    return {first, min(grid.tiles, tiles.count() - first), grid.group() * bn};
}

template <class Tile, class T>
__device__ __forceinline__ void fprop_tiles(const T* x, const T* weight, const ForwardOutput<T>& to,
                                            const ConvTiles& tiles, unsigned inputs, unsigned outputs,
                                            const GemmGrid& grid, const NormFinish& norm, float* partial,
                                            unsigned* counters) {
    using Memory = ConvMemory<Tile, Direction::forward, UnitStride::most_halo>;
    const ConvWalk walk = tile_walk(tiles, grid, Tile::bn);
    const unsigned pixels = tiles.images * tiles.height * tiles.width;
    const PlainHalo<T> halo{x, inputs};
    if (!to.moments) {
        FoldedEpilogue<Tile> epilogue{to, pixels, outputs};
        return convolve<Tile, Direction::forward>(halo, weight, outputs, UnitStride{tiles}, walk, epilogue);
    }
    MomentsEpilogue<Tile> epilogue(to.y, pixels, outputs, dynamic_shared<float>(Memory::pivots));
    convolve<Tile, Direction::forward>(halo, weight, outputs, UnitStride{tiles}, walk, epilogue);
    // A warp counts its own rows; the table is not needed any more, after the barriers of the last steps.
    static_assert(Tile::wm == 64 && Tile::warps_n == 1, "two rows for a lane");
    unsigned alive = 0;
    for (unsigned t = walk.first; t < walk.first + walk.count; ++t) {
        const ConvTile tile = tiles.tile(t);
#pragma unroll
        for (unsigned r = 0; r < 2; ++r) alive += tiles.row_pixel(tile, 2 * threadIdx.x + r) != no_pixel ? 1 : 0;
    }
#pragma unroll
    for (unsigned offset = 16; offset != 0; offset /= 2) alive += __shfl_xor_sync(0xffffffffu, alive, int(offset));
    unsigned* const counts = dynamic_shared<unsigned>(Memory::table);
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = alive;
    epilogue.finish(grid, partial, counters, norm, [&](unsigned w) { return counts[w]; },
                    [&](unsigned r) {
                        const unsigned first = r * grid.tiles, end = min(first + grid.tiles, tiles.count());
                        return tiles.pixels_before(end) - tiles.pixels_before(first);
                    });
}

template <class Tile, class T>
__device__ __forceinline__ void dgrad_tiles(const T* g, const T* y, const float* owed, const T* weight, const T* skip,
                                            T* dx, const ConvTiles& tiles, unsigned inputs, unsigned outputs,
                                            const GemmGrid& grid) {
    const unsigned pixels = tiles.images * tiles.height * tiles.width;
    GradientEpilogue<Tile, 2> epilogue(GradientTarget<T>{dx, skip, nullptr, nullptr}, pixels, inputs);
    convolve<Tile, Direction::backward>(OwingHalo<T>{g, y, owed, outputs}, weight, inputs, UnitStride{tiles},
                                        tile_walk(tiles, grid, Tile::bn), epilogue);
}

template <class Tile, class T>
__device__ __forceinline__ void dgrad_cells(const T* g, const T* y, const float* owed, const T* weight, const T* skip,
                                            T* dx, const CellStride& cells, unsigned inputs, unsigned outputs,
                                            const GemmGrid& grid) {
    const unsigned pixels = cells.tiles.images * cells.height * cells.width;
    GradientEpilogue<Tile, 2> epilogue(GradientTarget<T>{dx, skip, nullptr, nullptr}, pixels, inputs);
    convolve<Tile, Direction::backward>(OwingHalo<T>{g, y, owed, outputs}, weight, inputs, cells,
                                        tile_walk(cells.tiles, grid, Tile::bn), epilogue);
}

template <class Tile, class T>
__device__ __forceinline__ void wgrad(const T* g, const T* y, const float* owed, const T* x, float* dweight,
                                      const ConvShape& shape, unsigned outputs, const WeightGrid& grid, float* partial,
                                      unsigned* counters) {
    const unsigned tiles = grid.row_tiles * grid.column_tiles, width = taps * shape.inputs.divisor;
    const unsigned tile = blockIdx.x % tiles, first = blockIdx.x / tiles * grid.steps * Tile::bk;
    const unsigned end = min(shape.pixels, first + grid.steps * Tile::bk);
    const GemmGradient<T> rows{g, y, owed, nullptr, end, outputs, outputs, {}};
    const ConvPixels<T> columns{x, shape, end};
    const GemmWalk walk{tile / grid.column_tiles * Tile::bm, 1, tile % grid.column_tiles * Tile::bn, first,
                        (end - first + Tile::bk - 1) / Tile::bk};
    WeightEpilogue<Tile> epilogue{dweight, partial, outputs, width, blockIdx.x, grid.splits == 1};
    gemm<Tile, Major::rows, Major::rows>(rows, columns, walk, epilogue);
    if (grid.splits > 1) add_partial<Tile>(dweight, outputs, width, grid, blockIdx.x, partial, counters);
}

} // namespace

#define EFFNETV2_CONV3X3_FPROP(suffix, T, Tile)                                                              \
    extern "C" __global__ void __launch_bounds__(Tile<T>::threads, 2) conv3x3_fprop_##suffix(                \
        const T* x, const T* weight, T* y, const float* bias, const T* skip, float* partial,                 \
        unsigned* counters, const NormFinish norm, const ConvShape shape, unsigned outputs, unsigned silu,   \
        unsigned moments, const GemmGrid grid) {                                                             \
        after_predecessors();                                                                                \
        fprop<Tile<T>>(x, weight, ForwardOutput<T>{y, bias, skip, silu, moments}, shape, outputs, grid,      \
                       norm, partial, counters);                                                             \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_fprop_##suffix)

#define EFFNETV2_CONV3X3_DGRAD(suffix, T, Tile)                                                              \
    extern "C" __global__ void __launch_bounds__(Tile<T>::threads, 2)                                        \
        conv3x3_dgrad_##suffix(const T* g, const T* y, const float* owed, const T* weight, const T* skip,    \
                               T* dx, const GradientShape shape) {                                           \
        after_predecessors();                                                                                \
        dgrad<Tile<T>>(g, y, owed, weight, skip, dx, shape);                                                 \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_dgrad_##suffix)

/// By the inputs of a warp and the stride.
#define EFFNETV2_CONV3X3_STRIPS(inputs, stride, threads, suffix, T)                                          \
    extern "C" __global__ void __launch_bounds__(threads, 1) conv3x3_wgrad_##inputs##_s##stride##_##suffix(  \
        const T* g, const T* y, const float* owed, const T* x, float* partial, const StripShape shape) {     \
        after_predecessors();                                                                                \
        strip_wgrad<T, stride, inputs / 8>(g, y, owed, x, partial, shape);                                   \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_wgrad_##inputs##_s##stride##_##suffix)

#define EFFNETV2_CONV3X3_WGRAD(suffix, T, Weights)                                                           \
    extern "C" __global__ void __launch_bounds__(Weights<T>::threads, 2)                                     \
        conv3x3_wgrad_##suffix(const T* g, const T* y, const float* owed, const T* x, float* dweight,        \
                               float* partial, unsigned* counters, const ConvShape shape, unsigned outputs,  \
                               const WeightGrid grid) {                                                      \
        after_predecessors();                                                                                \
        wgrad<Weights<T>>(g, y, owed, x, dweight, shape, outputs, grid, partial, counters);                  \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_wgrad_##suffix)

/// `name` says by which products, and whoever launches them on a device without such finds a trap.
#define EFFNETV2_CONV3X3_FPROP_TILES(suffix, T, name, columns, blocks)                                       \
    extern "C" __global__ void __launch_bounds__(128, blocks) conv3x3_fprop_##name##columns##_##suffix(      \
        const T* x, const T* weight, T* y, const float* bias, const T* skip, float* partial,                 \
        unsigned* counters, const NormFinish norm, const ConvTiles tiles, unsigned inputs, unsigned outputs, \
        unsigned silu, unsigned moments, const GemmGrid grid) {                                              \
        after_predecessors();                                                                                \
        if constexpr (exist<products_of_##name>)                                                             \
            fprop_tiles<ConvTileOf<T, 256, columns, products_of_##name>>(                                    \
                x, weight, ForwardOutput<T>{y, bias, skip, silu, moments}, tiles, inputs, outputs, grid,     \
                norm, partial, counters);                                                                    \
        else                                                                                                 \
            __trap();                                                                                        \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_fprop_##name##columns##_##suffix)

#define EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, name, columns, blocks)                                       \
    extern "C" __global__ void __launch_bounds__(128, blocks) conv3x3_dgrad_##name##columns##_##suffix(      \
        const T* g, const T* y, const float* owed, const T* weight, const T* skip, T* dx,                    \
        const ConvTiles tiles, unsigned inputs, unsigned outputs, const GemmGrid grid) {                     \
        after_predecessors();                                                                                \
        if constexpr (exist<products_of_##name>)                                                             \
            dgrad_tiles<ConvTileOf<T, 256, columns, products_of_##name>>(g, y, owed, weight, skip, dx,       \
                                                                         tiles, inputs, outputs, grid);      \
        else                                                                                                 \
            __trap();                                                                                        \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_dgrad_##name##columns##_##suffix)

#define EFFNETV2_CONV3X3_DGRAD_CELLS(suffix, T, columns, rows, blocks)                                       \
    extern "C" __global__ void __launch_bounds__(128, blocks) conv3x3_dgrad_cells##columns##_##suffix(       \
        const T* g, const T* y, const float* owed, const T* weight, const T* skip, T* dx,                    \
        const CellStride cells, unsigned inputs, unsigned outputs, const GemmGrid grid) {                    \
        after_predecessors();                                                                                \
        dgrad_cells<ConvTileOf<T, rows, columns>>(g, y, owed, weight, skip, dx, cells, inputs,               \
                                                  outputs, grid);                                            \
    }                                                                                                        \
    EFFNETV2_KERNEL(conv3x3_dgrad_cells##columns##_##suffix)

#define EFFNETV2_CONV3X3_TILES(suffix, T)                 \
    EFFNETV2_CONV3X3_DGRAD_CELLS(suffix, T, 32, 128, 2)   \
    EFFNETV2_CONV3X3_DGRAD_CELLS(suffix, T, 48, 64, 3)    \
    EFFNETV2_CONV3X3_FPROP_TILES(suffix, T, tiles, 32, 4) \
    EFFNETV2_CONV3X3_FPROP_TILES(suffix, T, tiles, 64, 2) \
    EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, tiles, 32, 4) \
    EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, tiles, 48, 3) \
    EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, tiles, 64, 2) \
    EFFNETV2_CONV3X3_FPROP_TILES(suffix, T, wgmma, 32, 3) \
    EFFNETV2_CONV3X3_FPROP_TILES(suffix, T, wgmma, 64, 2) \
    EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, wgmma, 32, 3) \
    EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, wgmma, 48, 3) \
    EFFNETV2_CONV3X3_DGRAD_TILES(suffix, T, wgmma, 64, 2)

EFFNETV2_CONV3X3_TILES(f16, f16)
EFFNETV2_CONV3X3_TILES(bf16, bf16)
EFFNETV2_CONV3X3_FPROP(narrow_f32, float, Narrow)
EFFNETV2_CONV3X3_FPROP(narrow_tf32, float, NarrowTf32)
EFFNETV2_CONV3X3_FPROP(narrow_f16, f16, Narrow)
EFFNETV2_CONV3X3_FPROP(narrow_bf16, bf16, Narrow)
EFFNETV2_CONV3X3_FPROP(wide_f16, f16, Wide)
EFFNETV2_CONV3X3_FPROP(wide_bf16, bf16, Wide)
EFFNETV2_CONV3X3_DGRAD(narrow_f32, float, Narrow)
EFFNETV2_CONV3X3_DGRAD(narrow_tf32, float, NarrowTf32)
EFFNETV2_CONV3X3_DGRAD(narrow_f16, f16, Narrow)
EFFNETV2_CONV3X3_DGRAD(narrow_bf16, bf16, Narrow)
EFFNETV2_CONV3X3_WGRAD(f32, float, Weights)
EFFNETV2_CONV3X3_WGRAD(tf32, float, WeightsTf32)
EFFNETV2_CONV3X3_STRIPS(24, 1, 384, f16, f16)
EFFNETV2_CONV3X3_STRIPS(24, 2, 384, f16, f16)
EFFNETV2_CONV3X3_STRIPS(32, 1, 256, f16, f16)
EFFNETV2_CONV3X3_STRIPS(32, 2, 256, f16, f16)
EFFNETV2_CONV3X3_STRIPS(40, 1, 256, f16, f16)
EFFNETV2_CONV3X3_STRIPS(40, 2, 256, f16, f16)
EFFNETV2_CONV3X3_STRIPS(24, 1, 384, bf16, bf16)
EFFNETV2_CONV3X3_STRIPS(24, 2, 384, bf16, bf16)
EFFNETV2_CONV3X3_STRIPS(32, 1, 256, bf16, bf16)
EFFNETV2_CONV3X3_STRIPS(32, 2, 256, bf16, bf16)
EFFNETV2_CONV3X3_STRIPS(40, 1, 256, bf16, bf16)
EFFNETV2_CONV3X3_STRIPS(40, 2, 256, bf16, bf16)

extern "C" __global__ void __launch_bounds__(256) conv3x3_wgrad_sum(const float* partial, float* dweight,
                                                                    const StripShape shape, unsigned fragments) {
    after_predecessors();
    sum_strips(partial, dweight, shape, fragments);
}
EFFNETV2_KERNEL(conv3x3_wgrad_sum)
