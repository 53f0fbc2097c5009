// The stem: a dense 3x3 convolution of stride 2 on RGB, in all three directions, on the plain f32 units.
//
// x [images, height, width, 3], y and g [images, out_height, out_width, channels], weight [channels, 3, 3, 3] and dx like x are of
// type T, f32, f16 or bf16; everything else is f32 but for `bytes`, 8-bit RGB of x's shape. Channels are a multiple of 8, at
// most 64; arrays are aligned to 16 bytes. With oh, ow an output pixel, x being zero outside the image:
//
//   y[n, oh, ow, o]          = sum over kh, kw, i of x[n, 2 oh + kh - pad_top, 2 ow + kw - pad_left, i] weight[o, kh, kw, i]
//   dy                       = a g + b y + c, owed [3, channels] = a, b, c
//   dweight[o, kh, kw, i]   += sum over n, oh, ow of dy[n, oh, ow, o] x[n, 2 oh + kh - pad_top, 2 ow + kw - pad_left, i]
//   dx[n, ih, iw, i]         = skip + sum over o and the kh, kw that reach ih, iw of dy[n, oh, ow, o] weight[o, kh, kw, i]
//
// x may be given as bytes: each becomes table[channel][value] ([3, 256]) rounded to T, what the kernels of input.cu make of it.
// What a block computes for is a tile of `columns` x 4 `bands` output pixels of one image; a block walks the tiles blockIdx.x,
// blockIdx.x + gridDim.x, ..., so that there are few partial sums. Everything is added in a fixed order. A block has 256 threads.
//
// stem_fprop: stores y; with `moments` also takes the moments of what it stores (include/batch_norm.cuh; the pixels of each run
//   lie behind them), with `folded` stores act(y + bias) + skip. Grid at most 512. Least bytes: those of x (or bytes), y,
//   weight and skip; 54 operations for each element of y. Dynamic shared memory: 4 * 27 * channels, then the input rows, at
//   least 8192.
// stem_wgrad: Grid at most 256. Least bytes: those of x, g, y, dweight twice and the partial sums; 54 operations for each
//   element of y. Dynamic shared memory: 4 * 4 * bands * columns * channels, at least 8192, then the input rows.
// stem_dgrad: Grid ceil(images * height * width / 256). Least bytes: those of g, y, dx, skip and weight; 54 operations for
//   each element of y. Only gradients of images need it, so it is plain: a thread gathers for a pixel.

#include "include/activation.cuh"
#include "include/batch_norm.cuh"
#include "include/last_block.cuh"
#include "include/predecessors.cuh"
#include "include/ptx.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256, colors = 3, side = 3, row_taps = side * colors, taps = side * row_taps;
/// Output rows of a thread of fprop, and of a band of a tile.
constexpr unsigned band_rows = 4;
constexpr unsigned max_channels = 64;

struct StemShape {
    unsigned images, height, width, out_height, out_width, channels, pad_top, pad_left;
    /// Of a tile: output columns, and bands of output rows.
    unsigned columns, bands;
    /// Tiles of an image.
    unsigned tiles_across, tiles_down;

    __device__ __forceinline__ unsigned tiles() const { return images * tiles_down * tiles_across; }
    /// Input rows of a tile.
    __device__ __forceinline__ unsigned rows() const { return 2 * band_rows * bands + 1; }
    /// Elements from one of them to the next in shared memory: what a tile needs, begun at a multiple of eight.
    __device__ __forceinline__ unsigned pitch() const { return ((2 * columns + 1) * colors + 14) / 8 * 8; }
};

/// Where x comes from.
template <class T> struct StemInput {
    const T* elements;
    /// If not null, instead of the elements.
    const unsigned char* bytes;
    const float* table;
};

/// A tile's place.
struct Tile {
    unsigned image, first_row, first_column;

    __device__ __forceinline__ Tile(const StemShape& s, unsigned tile) {
        const unsigned line = tile / s.tiles_across;
        image = line / s.tiles_down;
        first_column = (tile - line * s.tiles_across) * s.columns;
        first_row = (line - image * s.tiles_down) * (band_rows * s.bands);
    }
    __device__ __forceinline__ unsigned pixels(const StemShape& s) const {
        return min(band_rows * s.bands, s.out_height - first_row) * min(s.columns, s.out_width - first_column);
    }
};

/// The input rows under a tile in shared memory. Rows keep their position modulo eight elements, so that global memory is read
/// 16 bytes at a time whatever the width, which is no multiple of anything.
template <class T> struct InputRows {
    T* rows;
    unsigned pitch;
    /// The first element of the tile's first row in x, which may lie outside of the image; elements from row to row.
    int begin, line;

    __device__ __forceinline__ InputRows(T* shared, const StemShape& s, const Tile& tile)
        : rows(shared), pitch(s.pitch()), line(int(s.width * colors)) {
        const int top = 2 * int(tile.first_row) - int(s.pad_top), left = 2 * int(tile.first_column) - int(s.pad_left);
        begin = (int(tile.image * s.height) + top) * line + left * int(colors);
    }

    /// The first wanted element of a row.
    __device__ __forceinline__ const T* row(unsigned index) const {
        return rows + index * pitch + ((begin + int(index) * line) & 7);
    }

    /// Fills them; zeros outside of the image.
    __device__ __forceinline__ void fill(const StemInput<T>& x, const float* table, const StemShape& s, const Tile& tile) {
        const int top = 2 * int(tile.first_row) - int(s.pad_top), left = 2 * int(tile.first_column) - int(s.pad_left);
        const int elements = int(s.images * s.height) * line;
        const unsigned chunks = pitch / 8, count = s.rows() * chunks;
        for (unsigned item = threadIdx.x; item < count; item += threads) {
            const unsigned index = item / chunks, chunk = item - index * chunks;
            const int row = top + int(index), from = begin + int(index) * line;
            const int first = (from & ~7) + int(chunk * 8);
            float v[8] = {};
            if (row >= 0 && row < int(s.height)) {
                const int low = from - left * int(colors), high = low + line;
                const bool whole = first >= 0 && first + 8 <= elements;
                if (x.bytes == nullptr) {
                    if (whole) {
                        load8(x.elements + first, v);
                    } else {
#pragma unroll
                        for (int j = 0; j < 8; ++j)
                            if (first + j >= 0 && first + j < elements) v[j] = to_float(x.elements[first + j]);
                    }
                } else {
                    uint2 bits = make_uint2(0, 0);
                    if (whole) {
                        bits = *reinterpret_cast<const uint2*>(x.bytes + first);
                    } else {
#pragma unroll
                        for (int j = 0; j < 8; ++j)
                            if (first + j >= 0 && first + j < elements)
                                (j < 4 ? bits.x : bits.y) |= unsigned(x.bytes[first + j]) << (8 * (j % 4));
                    }
                    unsigned color = unsigned(first + 24) % colors;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        v[j] = table[color * 256 + ((j < 4 ? bits.x : bits.y) >> (8 * (j % 4)) & 0xffu)];
                        color = color == colors - 1 ? 0 : color + 1;
                    }
                }
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (first + j < low || first + j >= high) v[j] = 0.0f;
            }
            store8(rows + index * pitch + chunk * 8, v);
        }
    }
};

/// The table in shared memory, if x is given as bytes.
template <class T> __device__ __forceinline__ void fill_table(const StemInput<T>& x, float (&table)[colors * 256]) {
    if (x.bytes == nullptr) return;
    for (unsigned i = threadIdx.x; i < colors * 256; i += threads) table[i] = x.table[i];
}

/// The weights in shared memory, [27, channels].
template <class T>
__device__ __forceinline__ void fill_weights(const T* weight, float* shared, unsigned channels) {
    for (unsigned i = threadIdx.x; i < taps * channels; i += threads) {
        const unsigned tap = i / channels, channel = i - tap * channels;
        shared[i] = to_float(weight[channel * taps + tap]);
    }
}

/// What becomes of an output. Flags: bit 0 moments, bit 1 folded, bit 2 SiLU.
template <class T> struct StemOutput {
    const float* bias;
    const T* skip;
    unsigned flags;

    __device__ __forceinline__ bool moments() const { return flags & 1; }
    __device__ __forceinline__ bool folded() const { return flags & 2; }

    __device__ __forceinline__ void finish(float (&v)[8], unsigned channel, unsigned index) const {
        if (!folded()) return;
        float b[8], s[8] = {};
        load8<Cache::read_only>(bias + channel, b);
        if (skip != nullptr) load8(skip + index, s);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            v[j] += b[j];
            if (flags & 4) v[j] = silu(v[j]);
            v[j] += s[j];
        }
    }
};

template <class T>
__device__ __forceinline__ void fprop(const StemInput<T>& x, const T* weight, T* y, const StemOutput<T>& output,
                                      float* partial, unsigned* counter, const NormFinish& finish,
                                      const StemShape& s) {
    __shared__ float table[colors * 256];
    __align__(16) __shared__ float pivots[max_channels];
    float* const weights = dynamic_shared<float>();
    T* const shared_rows = dynamic_shared<T>(taps * s.channels * 4);
    fill_table(x, table);
    fill_weights(weight, weights, s.channels);
    const unsigned groups = s.channels / 8, slot = threadIdx.x / groups, channel = threadIdx.x % groups * 8;
    const unsigned band = slot / s.columns, column = slot - band * s.columns;
    float pixels = 0.0f;
    ShiftedSums sums[8];
    for (unsigned index = blockIdx.x; index < s.tiles(); index += gridDim.x) {
        const Tile tile(s, index);
        InputRows<T> rows(shared_rows, s, tile);
        __syncthreads();
        rows.fill(x, table, s, tile);
        __syncthreads();
        float sum[band_rows][8] = {};
        if (band < s.bands) {
#pragma unroll
            for (unsigned kh = 0; kh < side; ++kh) {
                const T* from[band_rows];
#pragma unroll
                for (unsigned r = 0; r < band_rows; ++r)
                    from[r] = rows.row(2 * (band_rows * band + r) + kh) + column * (2 * colors);
#pragma unroll
                for (unsigned k = 0; k < row_taps; ++k) {
                    float w[8];
                    load8(weights + (kh * row_taps + k) * s.channels + channel, w);
#pragma unroll
                    for (unsigned r = 0; r < band_rows; ++r) {
                        const float value = to_float(from[r][k]);
#pragma unroll
                        for (unsigned j = 0; j < 8; ++j) sum[r][j] += value * w[j];
                    }
                }
            }
        }
        if (output.moments() && index == blockIdx.x) {
            // The block's first pixel: near all others as far as digits go.
            if (slot == 0) {
#pragma unroll
                for (unsigned j = 0; j < 8; ++j) pivots[channel + j] = to_float(from_float<T>(sum[0][j]));
            }
            __syncthreads();
        }
        pixels += float(tile.pixels(s));
        if (band >= s.bands || tile.first_column + column >= s.out_width) continue;
        float pivot[8] = {};
        if (output.moments()) load8(pivots + channel, pivot);
        const unsigned row = tile.first_row + band_rows * band;
        unsigned at = ((tile.image * s.out_height + row) * s.out_width + tile.first_column + column) * s.channels + channel;
#pragma unroll
        for (unsigned r = 0; r < band_rows; ++r) {
            if (row + r >= s.out_height) break;
            output.finish(sum[r], channel, at);
            store8(y + at, sum[r]);
            at += s.out_width * s.channels;
            if (!output.moments()) continue;
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) sums[j].add(to_float(from_float<T>(sum[r][j])), pivot[j]);
        }
    }
    if (!output.moments()) return;

    // The threads of each channel, one after another.
    float* const collected = dynamic_shared<float>(taps * s.channels * 4);
    const unsigned slots = threads / groups;
    float total[2] = {};
#pragma unroll
    for (unsigned k = 0; k < 2; ++k) {
        __syncthreads();
        if (slot < slots) {
            float values[8];
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) values[j] = k == 0 ? sums[j].sum : sums[j].squares;
            store8(collected + slot * s.channels + channel, values);
        }
        __syncthreads();
        if (threadIdx.x < s.channels)
#pragma unroll 4
            for (unsigned i = 0; i < slots; ++i) total[k] += collected[i * s.channels + threadIdx.x];
    }
    if (threadIdx.x < s.channels) {
        const ShiftedSums all{total[0], total[1]};
        partial[blockIdx.x * 2 * s.channels + threadIdx.x] = all.mean(pivots[threadIdx.x], pixels);
        partial[(blockIdx.x * 2 + 1) * s.channels + threadIdx.x] = all.deviations(pixels);
    }
    const float* const counts = partial + 2 * gridDim.x * s.channels;
    if (threadIdx.x == 0) partial[2 * gridDim.x * s.channels + blockIdx.x] = pixels;
    if (!is_last_block(counter, gridDim.x)) return;
    finish_moments<threads>(partial, gridDim.x, s.channels, 0, s.channels, finish,
                            s.images * s.out_height * s.out_width,
                            [=](unsigned run) { return unsigned(__ldcg(counts + run)); });
}

/// dy of eight channels at once; owed is [3, channels].
template <class T>
__device__ __forceinline__ void load_gradient(const T* g, const T* y, unsigned at, const float* owed, unsigned channels,
                                              unsigned channel, float (&dy)[8]) {
    float v[8], a[8], b[8], c[8];
    load8(g + at, dy);
    load8(y + at, v);
    load8(owed + channel, a);
    load8(owed + channels + channel, b);
    load8(owed + 2 * channels + channel, c);
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) dy[j] = a[j] * dy[j] + b[j] * v[j] + c[j];
}

/// A thread has one kernel row of eight output channels, 72 weights, for every so manieth pixel of a tile.
template <class T>
__device__ __forceinline__ void wgrad(const StemInput<T>& x, const T* g, const T* y, const float* owed, float* dweight,
                                      float* partial, unsigned* counter, unsigned rows_at, const StemShape& s) {
    __shared__ float table[colors * 256];
    __align__(16) __shared__ float coefficients[3 * max_channels];
    float* const gradient = dynamic_shared<float>();
    T* const shared_rows = dynamic_shared<T>(rows_at);
    fill_table(x, table);
    for (unsigned i = threadIdx.x; i < 3 * s.channels; i += threads) coefficients[i] = owed[i];
    const unsigned groups = s.channels / 8, places = side * groups, lanes = threads / places;
    const unsigned lane = threadIdx.x / places, place = threadIdx.x - lane * places;
    const unsigned kh = place / groups, channel = (place - kh * groups) * 8;
    const unsigned pixels = band_rows * s.bands * s.columns;
    float sum[row_taps][8] = {};
    for (unsigned index = blockIdx.x; index < s.tiles(); index += gridDim.x) {
        const Tile tile(s, index);
        InputRows<T> rows(shared_rows, s, tile);
        __syncthreads();
        rows.fill(x, table, s, tile);
        for (unsigned item = threadIdx.x; item < pixels * groups; item += threads) {
            const unsigned pixel = item / groups, first = (item - pixel * groups) * 8;
            const unsigned line = pixel / s.columns;
            const unsigned row = tile.first_row + line, column = tile.first_column + pixel - line * s.columns;
            float dy[8] = {};
            if (row < s.out_height && column < s.out_width)
                load_gradient(g, y, ((tile.image * s.out_height + row) * s.out_width + column) * s.channels + first,
                              coefficients, s.channels, first, dy);
            store8(gradient + pixel * s.channels + first, dy);
        }
        __syncthreads();
        unsigned line = 0, column = lane;
        for (unsigned pixel = lane; pixel < pixels && lane < lanes; pixel += lanes, column += lanes) {
            while (column >= s.columns) column -= s.columns, ++line;
            const T* from = rows.row(2 * line + kh) + column * (2 * colors);
            float dy[8];
            load8(gradient + pixel * s.channels + channel, dy);
#pragma unroll
            for (unsigned k = 0; k < row_taps; ++k) {
                const float value = to_float(from[k]);
#pragma unroll
                for (unsigned j = 0; j < 8; ++j) sum[k][j] += value * dy[j];
            }
        }
    }

    // The lanes of each weight one after another, then the blocks.
    const unsigned count = taps * s.channels;
#pragma unroll
    for (unsigned k = 0; k < row_taps; ++k) {
        __syncthreads();
        if (lane < lanes) store8(gradient + threadIdx.x * 8, sum[k]);
        __syncthreads();
        if (threadIdx.x < places * 8) {
            float total = 0.0f;
#pragma unroll 4
            for (unsigned i = 0; i < lanes; ++i) total += gradient[i * places * 8 + threadIdx.x];
            const unsigned row = threadIdx.x / s.channels, o = threadIdx.x - row * s.channels;
            partial[blockIdx.x * count + o * taps + row * row_taps + k] = total;
        }
    }
    if (!is_last_block(counter, gridDim.x)) return;
    for (unsigned i = threadIdx.x; i < count; i += threads) {
        float total = 0.0f;
#pragma unroll 8
        for (unsigned run = 0; run < gridDim.x; ++run) total += __ldcg(partial + run * count + i);
        dweight[i] += total;
    }
}

template <class T>
__device__ __forceinline__ void dgrad(const T* g, const T* y, const float* owed, const T* weight, const T* skip, T* dx,
                                      const StemShape& s) {
    __align__(16) __shared__ float weights[taps * max_channels];
    fill_weights(weight, weights, s.channels);
    __syncthreads();
    const unsigned pixel = blockIdx.x * threads + threadIdx.x;
    if (pixel >= s.images * s.height * s.width) return;
    const unsigned line = pixel / s.width, column = pixel - line * s.width, image = line / s.height;
    const unsigned below = line - image * s.height + s.pad_top, right = column + s.pad_left;
    float sum[colors] = {};
    // The kernel's rows and columns that reach a pixel are even or odd with it.
    for (unsigned kh = below % 2; kh < side && kh <= below; kh += 2) {
        const unsigned row = (below - kh) / 2;
        if (row >= s.out_height) continue;
        for (unsigned kw = right % 2; kw < side && kw <= right; kw += 2) {
            const unsigned out = (right - kw) / 2;
            if (out >= s.out_width) continue;
            const unsigned at = ((image * s.out_height + row) * s.out_width + out) * s.channels;
            for (unsigned channel = 0; channel < s.channels; channel += 8) {
                float dy[8];
                load_gradient(g, y, at + channel, owed, s.channels, channel, dy);
#pragma unroll
                for (unsigned i = 0; i < colors; ++i) {
                    float w[8];
                    load8(weights + ((kh * side + kw) * colors + i) * s.channels + channel, w);
#pragma unroll
                    for (unsigned j = 0; j < 8; ++j) sum[i] += dy[j] * w[j];
                }
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < colors; ++i) {
        const float extra = skip == nullptr ? 0.0f : to_float(skip[pixel * colors + i]);
        dx[pixel * colors + i] = from_float<T>(sum[i] + extra);
    }
}

} // namespace

#define EFFNETV2_STEM(suffix, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(threads) stem_fprop_##suffix(                               \
        const T* x, const unsigned char* bytes, const float* table, const T* weight, T* y, const float* bias, \
        const T* skip, float* partial, unsigned* counter, NormFinish finish, unsigned flags, StemShape shape) { \
        after_predecessors();                                                                                   \
        fprop({x, bytes, table}, weight, y, {bias, skip, flags}, partial, counter, finish, shape);           \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) stem_wgrad_##suffix(                               \
        const T* x, const unsigned char* bytes, const float* table, const T* g, const T* y, const float* owed, \
        float* dweight, float* partial, unsigned* counter, unsigned rows_at, StemShape shape) {              \
        after_predecessors();                                                                                \
        wgrad({x, bytes, table}, g, y, owed, dweight, partial, counter, rows_at, shape);                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads, 2) stem_dgrad_##suffix(                               \
        const T* g, const T* y, const float* owed, const T* weight, const T* skip, T* dx, StemShape shape) { \
        after_predecessors();                                                                                \
        dgrad(g, y, owed, weight, skip, dx, shape);                                                          \
    }                                                                                                        \
    EFFNETV2_KERNEL(stem_fprop_##suffix)                                                                     \
    EFFNETV2_KERNEL(stem_wgrad_##suffix)                                                                     \
    EFFNETV2_KERNEL(stem_dgrad_##suffix)

EFFNETV2_STEM(f32, float)
EFFNETV2_STEM(f16, f16)
EFFNETV2_STEM(bf16, bf16)
