// The network's input: 8-bit RGB images, resized; and what they become as normalised elements, flipped and mixed on the way.
//
// input_<type>:
// x [n, side, side, 3] u8 and y of the same shape, T being f32, f16 or bf16; both aligned to 16 bytes. `table`
// [3, 256] f32 holds what each value of each channel becomes, (value / 255 - mean) / deviation, so that the
// result does not depend on how a device rounds. `mix` [n] says for each image what becomes of it.
//
//   v(i, row, column, c) = table[c][x[i, row, flipped ? side - 1 - column : column, c]],  flipped being i's
//   y[n, row, column, c] = v(partner, ...) inside the box, else own v(n, ...) + other v(partner, ...)
//
// in f32, both products rounded before the sum, then rounded to T. Where `other` is 0 the partner is not read.
// Grid ceil(elements / 8192), block 256. Least bytes for each element: 1, 1 more where the partner is read, and
// the size of T; at most 2 multiplications and an addition.
//
// input_resize: images of any size, in `pixels` [height, width, 3] u8 each, to out [n, side, side, 3] u8. `sources` [n] says
// where each lies and what is read of it; `taps`, for its rows and its columns, which pixels make each of the output and with
// what weights, integers with `shift` binary places:
//
//   r(b) = clip(sum over the taps k of output row o of weight_k pixel(start_o + k, b)), for each byte b of the columns read
//   out[i, o, x, c] = clip(sum over the taps k of output column x of weight_k r(3 (start_x + k) + c))
//   clip(v) = v rounded half up at `shift`, within 0 .. 255
//
// All sums are of 32-bit integers, and exact. Grid n * side, block 256, dynamic shared memory for a row of the widest
// source. Least bytes: those of the sources that are read and of out; 2 operations for each tap and byte.

#include "include/predecessors.cuh"
#include "include/ptx.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256, width = 8, rounds = 4, channels = 3;
/// Elements of a block: in each round thread t has elements 8 t .. 8 t + 7.
constexpr unsigned round_tile = threads * width, tile = round_tile * rounds;

/// What becomes of one image, 32 bytes.
struct Mix {
    float own, other;
    unsigned partner;
    /// Bit 0: the image is flipped; bit 1: the partner is.
    unsigned flips;
    unsigned left, top, right, bottom;

    __device__ __forceinline__ bool contains(unsigned column, unsigned row) const {
        return left <= column && column < right && top <= row && row < bottom;
    }
    /// Whether elements keep their place and there is no box.
    __device__ __forceinline__ bool in_place() const {
        return flips == 0 && (left >= right || top >= bottom);
    }
};

/// An element's place in its image.
struct Place {
    unsigned row, column, channel;

    __device__ __forceinline__ Place(unsigned inside, unsigned side) {
        const unsigned pixel = inside / channels;
        channel = inside - pixel * channels;
        row = pixel / side;
        column = pixel - row * side;
    }
    __device__ __forceinline__ void advance(unsigned side) {
        if (++channel < channels) return;
        channel = 0;
        if (++column < side) return;
        column = 0;
        ++row;
    }
    /// Where it comes from.
    __device__ __forceinline__ unsigned source(unsigned side, bool flipped) const {
        return (row * side + (flipped ? side - 1 - column : column)) * channels + channel;
    }
};

__device__ __forceinline__ Mix load_mix(const Mix* from) {
    const uint4 low = load16<uint4, Cache::read_only>(from);
    const uint4 high = load16<uint4, Cache::read_only>(reinterpret_cast<const uint4*>(from) + 1);
    return {__uint_as_float(low.x), __uint_as_float(low.y), low.z, low.w, high.x, high.y, high.z, high.w};
}

__device__ __forceinline__ float mixed(const Mix& m, float own, float other) {
    return __fadd_rn(__fmul_rn(m.own, own), __fmul_rn(m.other, other));
}

__device__ __forceinline__ float element(const unsigned char* own, const unsigned char* other, const Mix& m,
                                         const Place& at, unsigned side, const float* values) {
    const float* row = values + at.channel * 256;
    const bool inside = m.contains(at.column, at.row);
    float partner = 0.0f;
    if (inside || m.other != 0.0f) partner = row[other[at.source(side, m.flips >> 1 & 1)]];
    if (inside) return partner;
    return mixed(m, row[own[at.source(side, m.flips & 1)]], partner);
}

/// Eight bytes in a row, at any address.
__device__ __forceinline__ uint2 load_bytes(const unsigned char* from) {
    if (reinterpret_cast<uintptr_t>(from) % 8 == 0) return *reinterpret_cast<const uint2*>(from);
    uint2 bytes = make_uint2(0, 0);
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
        bytes.x |= unsigned(from[j]) << (8 * j);
        bytes.y |= unsigned(from[j + 4]) << (8 * j);
    }
    return bytes;
}

__device__ __forceinline__ void look_up(uint2 bytes, unsigned channel, const float* values,
                                        float (&x)[width]) {
#pragma unroll
    for (unsigned j = 0; j < width; ++j) {
        const unsigned value = (j < 4 ? bytes.x : bytes.y) >> (8 * (j % 4)) & 0xffu;
        x[j] = values[channel * 256 + value];
        channel = channel == channels - 1 ? 0 : channel + 1;
    }
}

template <class T>
__device__ __forceinline__ void forward(const unsigned char* images, const float* table, const Mix* mix, T* y,
                                        unsigned elements, unsigned side) {
    __shared__ float values[channels * 256];
    for (unsigned i = threadIdx.x; i < channels * 256; i += threads) values[i] = table[i];
    __syncthreads();
    const unsigned image = side * side * channels;
    for (unsigned round = 0; round < rounds; ++round) {
        const unsigned first = blockIdx.x * tile + round * round_tile + threadIdx.x * width;
        if (first >= elements) return;
        unsigned n = first / image, inside = first - n * image;
        Mix m = load_mix(mix + n);
        const unsigned char* own = images + n * image;
        const unsigned char* other = images + m.partner * image;
        if (inside + width <= image) {
            float x[width];
            if (m.in_place()) {
                const unsigned channel = inside % channels;
                look_up(load_bytes(own + inside), channel, values, x);
                float partner[width] = {};
                if (m.other != 0.0f) look_up(load_bytes(other + inside), channel, values, partner);
#pragma unroll
                for (unsigned j = 0; j < width; ++j) x[j] = mixed(m, x[j], partner[j]);
            } else {
                Place at(inside, side);
#pragma unroll
                for (unsigned j = 0; j < width; ++j) {
                    x[j] = element(own, other, m, at, side, values);
                    at.advance(side);
                }
            }
            store8<Cache::streaming>(y + first, x);
        } else {
            // Across the border of two images (or several, if they are small), or at the end.
            for (unsigned i = first; i < min(first + width, elements); ++i) {
                y[i] = from_float<T>(element(own, other, m, Place(inside, side), side, values));
                if (++inside < image || i + 1 == elements) continue;
                inside = 0;
                m = load_mix(mix + ++n);
                own = images + n * image;
                other = images + m.partner * image;
            }
        }
    }
}

/// One image, 32 bytes.
struct Source {
    /// Where it begins, in bytes, and how long a row is.
    unsigned offset, stride;
    /// Where the taps of its rows and of its columns begin.
    unsigned rows, columns;
    /// The columns that are read: bytes before them in a row, and bytes of them.
    unsigned first, bytes;
    unsigned row_shift, column_shift;
};

/// The taps of one output row or column: the first pixel, and the weights of it and those behind it.
struct Taps {
    const int* weights;
    unsigned start, count;

    /// `table` holds for each row or column, and one past the last, its start and where in `all` its weights begin.
    __device__ __forceinline__ Taps(const unsigned* all, const unsigned* table, unsigned which) {
        const unsigned begin = table[2 * which + 1];
        weights = reinterpret_cast<const int*>(all) + begin;
        start = table[2 * which];
        count = table[2 * which + 3] - begin;
    }
};

__device__ __forceinline__ unsigned char clip(int sum, unsigned shift) {
    return static_cast<unsigned char>(min(max(sum >> shift, 0), 255));
}

__device__ __forceinline__ void resize(const unsigned char* pixels, const Source* sources, const unsigned* all,
                                       unsigned char* out, unsigned side) {
    unsigned char* row = dynamic_shared<unsigned char>();
    const unsigned image = blockIdx.x / side, o = blockIdx.x - image * side;
    const Source source = sources[image];
    const Taps rows(all, all + source.rows, o);
    const unsigned char* from = pixels + source.offset + rows.start * source.stride + source.first;
    for (unsigned b = threadIdx.x; b < source.bytes; b += threads) {
        int sum = 1 << (source.row_shift - 1);
#pragma unroll 4
        for (unsigned k = 0; k < rows.count; ++k) sum += rows.weights[k] * from[k * source.stride + b];
        row[b] = clip(sum, source.row_shift);
    }
    __syncthreads();
    for (unsigned x = threadIdx.x; x < side; x += threads) {
        const Taps columns(all, all + source.columns, x);
        const unsigned char* pixel = row + columns.start * channels - source.first;
        int sum[channels];
#pragma unroll
        for (unsigned c = 0; c < channels; ++c) sum[c] = 1 << (source.column_shift - 1);
#pragma unroll 2
        for (unsigned k = 0; k < columns.count; ++k) {
            const int weight = columns.weights[k];
#pragma unroll
            for (unsigned c = 0; c < channels; ++c) sum[c] += weight * pixel[k * channels + c];
        }
#pragma unroll
        for (unsigned c = 0; c < channels; ++c)
            out[(blockIdx.x * side + x) * channels + c] = clip(sum[c], source.column_shift);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(threads)
    input_resize(const unsigned char* pixels, const Source* sources, const unsigned* taps, unsigned char* out,
                 unsigned side) {
    after_predecessors();
    resize(pixels, sources, taps, out, side);
}

EFFNETV2_KERNEL(input_resize)

#define EFFNETV2_INPUT(suffix, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        input_##suffix(const unsigned char* images, const float* table, const Mix* mix, T* y,                \
                       unsigned elements, unsigned side) {                                                   \
        after_predecessors();                                                                                \
        forward(images, table, mix, y, elements, side);                                                      \
    }                                                                                                        \
    EFFNETV2_KERNEL(input_##suffix)

EFFNETV2_INPUT(f32, float)
EFFNETV2_INPUT(f16, f16)
EFFNETV2_INPUT(bf16, bf16)
