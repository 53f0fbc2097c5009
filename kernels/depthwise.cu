// Depthwise convolution, one k x k filter a channel, k = 3 or 5, stride s = 1 or 2: forward, and the gradients of input
// and weights in one pass.
//
//   y[n, oh, ow, c] = sum over kh, kw of w[kh, kw, c] x[n, s oh + kh - top, s ow + kw - left, c]
//
// Shapes: input [n, h, w, c], output and its gradient [n, oh, ow, c], weights [k, k, c], all of the element type; their
// gradient [k, k, c] f32, added to. Channels are a multiple of 8; every array is aligned to 16 bytes. Sums are in f32.
//
//   fprop     x = input, or SiLU(scale input + shift) with `norm` [4, c]; zero beyond the border. What is stored is y; and
//             its moments become a normalisation (NormFinish); or act(y + bias[c]) + skip [n, oh, ow, c] is stored instead.
//   backward  dy = a dz + b raw + c with `owed` [3, c]; dz = g, or (gate[n, c] g + dpool[n, c]) SiLU'(scale raw + shift)
//             with the `raw_norm` of that output. dx is stored: plus skip [n, h, w, c], or, where x = SiLU(z), as
//             dz = dx SiLU'(z), whose sums and those of dz xhat become OwedFinish.
//
// A thread has a few channels of a strip: some columns, and rows one after the other. Of its sums over rows it keeps what
// rows share: the outputs that the rows so far have begun (fprop), or the last rows of dy (backward, which needs each
// element of the input only once), so every row is read and transformed once a strip. Strips overlap by k - 1 columns
// (stride 1); a transform is dearer than its load, and wide strips keep their number down.
//
// Rows are counted in steps: step o is output row o and the input rows s o - top ... s o - top + s - 1, in the coordinates
// u = row + top the rows s o ... s o + s - 1. Columns likewise. So tap t of input row u = s o + r meets output row o - age
// where t = s age + r.
//
// A block has 64 channels, `lanes` threads side by side, and `slots` strips at a time. The grid is runs * ceil(c / 64)
// blocks, channel tiles fastest; run i has the strips i * per_slot * slots and following, per_slot for each slot. The
// partial sums of all runs are added up by the last block of a channel tile.
//
// Least bytes: each tensor once: input, y and skip; input twice as read and written, g and raw. Operations: 2 k k for each
// element of y forward, 4 k k backward, and an exponential and a reciprocal for each SiLU.

#include "include/activation.cuh"
#include "include/batch_norm.cuh"
#include "include/last_block.cuh"
#include "include/types.cuh"

/// The sides of both tensors, and how they are cut. Steps are output rows forward; backward they begin at top / stride.
struct DepthwiseGeometry {
    unsigned images, height, width, out_height, out_width, channels, top, left;
    /// Strips of an image side by side, and one below the other with `steps` steps each.
    unsigned strips, cuts, steps;
    /// Of a run and slot; runs.
    unsigned per_slot, runs;
};

namespace {

constexpr unsigned threads = 128, tile = 64;

/// `count` elements as they lie in memory.
template <class T, unsigned count> struct Packed {
    static constexpr unsigned size = count * sizeof(T) / 4;
    uint32_t words[size];
};

/// Loads what `inside` says is there, else zeros.
template <unsigned count, class T> __device__ __forceinline__ Packed<T, count> load_packed(const T* from, bool inside) {
    Packed<T, count> pack = {};
    constexpr unsigned size = Packed<T, count>::size;
    if (!inside) return pack;
    if constexpr (size >= 4) {
#pragma unroll
        for (unsigned i = 0; i < size; i += 4) {
            const uint4 four = load16<uint4>(reinterpret_cast<const uint32_t*>(from) + i);
            pack.words[i] = four.x, pack.words[i + 1] = four.y, pack.words[i + 2] = four.z, pack.words[i + 3] = four.w;
        }
    } else if constexpr (size == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        pack.words[0] = two.x, pack.words[1] = two.y;
    } else {
        pack.words[0] = *reinterpret_cast<const uint32_t*>(from);
    }
    return pack;
}

template <class T, unsigned count> __device__ __forceinline__ void store_packed(T* to, const Packed<T, count>& pack) {
    constexpr unsigned size = Packed<T, count>::size;
    if constexpr (size >= 4) {
#pragma unroll
        for (unsigned i = 0; i < size; i += 4)
            store16(reinterpret_cast<uint32_t*>(to) + i,
                    make_uint4(pack.words[i], pack.words[i + 1], pack.words[i + 2], pack.words[i + 3]));
    } else if constexpr (size == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack.words[0], pack.words[1]);
    } else {
        *reinterpret_cast<uint32_t*>(to) = pack.words[0];
    }
}

/// x <- the elements from number first on.
template <class T, unsigned count, unsigned size>
__device__ __forceinline__ void unpack(const Packed<T, count>& pack, float (&x)[size], unsigned first = 0) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (unsigned i = 0; i < size; ++i) x[i] = __uint_as_float(pack.words[first + i]);
    } else {
#pragma unroll
        for (unsigned i = 0; i < size / 2; ++i) {
            const float2 pair = unpack2<T>(pack.words[first / 2 + i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
}

template <class T, unsigned count> __device__ __forceinline__ Packed<T, count> pack(const float (&x)[count]) {
    Packed<T, count> to;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (unsigned i = 0; i < count; ++i) to.words[i] = __float_as_uint(x[i]);
    } else {
#pragma unroll
        for (unsigned i = 0; i < count / 2; ++i) to.words[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    }
    return to;
}

/// The elements from number first on <- x.
template <class T, unsigned count, unsigned size>
__device__ __forceinline__ void replace(Packed<T, count>& to, const float (&x)[size], unsigned first) {
    const Packed<T, size> part = pack<T>(x);
#pragma unroll
    for (unsigned i = 0; i < part.size; ++i) to.words[first * sizeof(T) / 4 + i] = part.words[i];
}

/// The sigmoid, or 1 for all finite z: with that SiLU is the identity and its derivative 1, at no cost.
struct Gate {
    float exponent, weight;

    __device__ __forceinline__ explicit Gate(bool sigmoid)
        : exponent(sigmoid ? -1.442695041f : 0.0f), weight(sigmoid ? 1.0f : 0.0f) {}
    __device__ __forceinline__ float operator()(float z) const {
        return rcp_approx(weight * ex2_approx(exponent * z) + 1.0f);
    }
};

/// One float for each channel of a tile, in shared memory, such that the lanes of a warp read theirs without conflicts.
/// A lane's come in pieces.
template <unsigned count, unsigned piece> struct Row {
    static constexpr unsigned lanes = tile / count;
    float values[tile];

    __device__ __forceinline__ float& at(unsigned channel) {
        const unsigned lane = channel / count, within = channel % count;
        return values[(within / piece * lanes + lane) * piece + within % piece];
    }
    /// Piece `part` of one lane's.
    __device__ __forceinline__ void get(unsigned lane, unsigned part, float (&x)[piece]) const {
        reload_shared(values + (part * lanes + lane) * piece, x);
    }
};

/// rows[i] <- the tile's part of vector i of `from` [rows, channels], zeros beyond the channels.
template <unsigned rows, unsigned count, unsigned piece, class T>
__device__ __forceinline__ void fill(Row<count, piece>* to, const T* from, unsigned first, unsigned channels) {
    for (unsigned i = threadIdx.x; i < rows * tile; i += threads) {
        const unsigned row = i / tile, channel = i % tile;
        to[row].at(channel) = first + channel < channels ? to_float(from[row * channels + first + channel]) : 0.0f;
    }
}

/// The same for a vector that may be absent.
template <unsigned count, unsigned piece>
__device__ __forceinline__ void fill(Row<count, piece>& to, const float* from, unsigned first, unsigned channels, float absent) {
    for (unsigned channel = threadIdx.x; channel < tile; channel += threads)
        to.at(channel) = from != nullptr && first + channel < channels ? from[first + channel] : absent;
}

/// A thread's place in the grid.
template <unsigned count> struct Place {
    static constexpr unsigned lanes = tile / count, slots = threads / lanes;
    /// The block's run and first channel, the thread's lane, slot and first channel.
    unsigned run, first, lane, slot, channel;
    bool inside;

    __device__ __forceinline__ explicit Place(unsigned channels) {
        const unsigned tiles = (channels + tile - 1) / tile;
        run = blockIdx.x / tiles;
        first = (blockIdx.x - run * tiles) * tile;
        lane = threadIdx.x % lanes;
        slot = threadIdx.x / lanes;
        channel = first + lane * count;
        inside = channel < channels;
    }
};

/// A strip: its image, first column (in steps) and range of steps.
struct Strip {
    unsigned image, column, step, end;

    __device__ __forceinline__ Strip(const DepthwiseGeometry& shape, unsigned index, unsigned columns, unsigned total) {
        const unsigned above = index / shape.strips;
        column = (index - above * shape.strips) * columns;
        image = above / shape.cuts;
        step = (above - image * shape.cuts) * shape.steps;
        end = min(step + shape.steps, total);
    }
};

/// The pixels of the output in the first `strips` strips, of `columns` columns each.
__device__ __forceinline__ unsigned pixels_before(const DepthwiseGeometry& shape, unsigned strips, unsigned columns) {
    const unsigned above = strips / shape.strips, image = above / shape.cuts;
    const unsigned row = min((above - image * shape.cuts) * shape.steps, shape.out_height);
    const unsigned rows = min(shape.steps, shape.out_height - row);
    return (image * shape.out_height + row) * shape.out_width +
           rows * min((strips - above * shape.strips) * columns, shape.out_width);
}

/// What becomes of the output.
struct Storing {
    const float* bias;
    const void* skip;
    unsigned moments, silu;
};

template <class T, unsigned count, unsigned kernel, unsigned stride, unsigned columns>
__device__ __forceinline__ void fprop(const T* x, const float* norm, const T* weight, T* y, const float* bias,
                                      unsigned silu_after, const T* skip, const NormFinish& finish, float* partial,
                                      unsigned* counters, const DepthwiseGeometry& shape) {
    // A row of the input takes part in `ages` rows of the output.
    constexpr unsigned ages = (kernel - 1) / stride + 1, wide = (columns - 1) * stride + kernel;
    constexpr unsigned piece = count < 4 ? count : 4;
    using At = Place<count>;
    __shared__ Row<count, piece> filter[kernel * kernel], scales, shifts, biases;
    __shared__ float means[At::slots][tile], deviations[At::slots][tile];
    __shared__ unsigned pixels[At::slots];
    const At at(shape.channels);
    const unsigned channels = shape.channels, row_size = shape.width * channels, out_row_size = shape.out_width * channels;
    fill<kernel * kernel>(filter, weight, at.first, channels);
    fill(scales, norm, at.first, channels, 1.0f);
    fill(shifts, norm == nullptr ? nullptr : norm + channels, at.first, channels, 0.0f);
    fill(biases, bias, at.first, channels, 0.0f);
    __syncthreads();
    const Gate before(norm != nullptr), after(silu_after != 0);
    const bool moments = finish.norm != nullptr;
    ShiftedSums sums[count];
    float pivot[count] = {};
    unsigned stored = 0;
    const unsigned items = shape.images * shape.cuts * shape.strips;
    for (unsigned k = 0; k < shape.per_slot; ++k) {
        const unsigned index = (at.run * shape.per_slot + k) * At::slots + at.slot;
        if (index >= items || !at.inside) break;
        const Strip strip(shape, index, columns, shape.out_height);
        const int left = int(strip.column * stride) - int(shape.left);
        // Elements are fewer than 2^31: 32 bits name them, and wrap around where nothing is read.
        const unsigned from = (strip.image * shape.height * shape.width + unsigned(left)) * channels + at.channel;
        const unsigned to = (strip.image * shape.out_height * shape.out_width + strip.column) * channels + at.channel;
        float sum[ages][columns][count] = {};
        for (unsigned group = strip.step; group < strip.end + ages - 1; group += ages) {
#pragma unroll
            for (unsigned phase = 0; phase < ages; ++phase) {
                const unsigned step = group + phase;
                if (step >= strip.end + ages - 1) break;
#pragma unroll
                for (unsigned r = 0; r < stride; ++r) {
                    const int row = int(step * stride + r) - int(shape.top);
                    if (row < 0 || row >= int(shape.height)) continue;
                    const unsigned line = from + unsigned(row) * row_size;
                    Packed<T, count> raw[wide];
#pragma unroll
                    for (unsigned v = 0; v < wide; ++v)
                        raw[v] = load_packed<count>(x + (line + v * channels), unsigned(left + int(v)) < shape.width);
                    // A few channels at a time: fewer registers.
#pragma unroll
                    for (unsigned part = 0; part < count / piece; ++part) {
                        float active[wide][piece], scale[piece], shift[piece];
                        scales.get(at.lane, part, scale);
                        shifts.get(at.lane, part, shift);
#pragma unroll
                        for (unsigned v = 0; v < wide; ++v) {
                            unpack(raw[v], active[v], part * piece);
                            const bool inside = unsigned(left + int(v)) < shape.width;
#pragma unroll
                            for (unsigned j = 0; j < piece; ++j) {
                                const float z = scale[j] * active[v][j] + shift[j];
                                active[v][j] = inside ? z * before(z) : 0.0f;
                            }
                        }
#pragma unroll
                        for (unsigned age = 0; age < ages; ++age) {
                            const unsigned tap = stride * age + r;
                            if (tap >= kernel) continue;
                            float (&line_of)[columns][count] = sum[(phase + ages - age) % ages];
#pragma unroll
                            for (unsigned t = 0; t < kernel; ++t) {
                                float w[piece];
                                filter[tap * kernel + t].get(at.lane, part, w);
#pragma unroll
                                for (unsigned q = 0; q < columns; ++q)
#pragma unroll
                                    for (unsigned j = 0; j < piece; ++j)
                                        line_of[q][part * piece + j] += w[j] * active[q * stride + t][j];
                            }
                        }
                    }
                }
                // The oldest row has met all its taps.
                float (&done)[columns][count] = sum[(phase + 1) % ages];
                const unsigned row = step - (ages - 1);
                if (step >= strip.step + ages - 1) {
                    const unsigned line = to + row * out_row_size;
#pragma unroll
                    for (unsigned q = 0; q < columns; ++q) {
                        if (strip.column + q >= shape.out_width) break;
                        if (bias != nullptr) {
#pragma unroll
                            for (unsigned part = 0; part < count / piece; ++part) {
                                float offset[piece];
                                biases.get(at.lane, part, offset);
#pragma unroll
                                for (unsigned j = 0; j < piece; ++j) {
                                    const float z = done[q][part * piece + j] + offset[j];
                                    done[q][part * piece + j] = z * after(z);
                                }
                            }
                            if (skip != nullptr) {
                                float other[count];
                                unpack(load_packed<count>(skip + (line + q * channels), true), other);
#pragma unroll
                                for (unsigned j = 0; j < count; ++j) done[q][j] += other[j];
                            }
                        }
                        const Packed<T, count> rounded = pack<T>(done[q]);
                        store_packed(y + (line + q * channels), rounded);
                        if (moments) {
                            float value[count];
                            unpack(rounded, value);
                            if (stored == 0)
#pragma unroll
                                for (unsigned j = 0; j < count; ++j) pivot[j] = value[j];
                            ++stored;
#pragma unroll
                            for (unsigned j = 0; j < count; ++j) sums[j].add(value[j], pivot[j]);
                        }
                    }
                }
#pragma unroll
                for (unsigned q = 0; q < columns; ++q)
#pragma unroll
                    for (unsigned j = 0; j < count; ++j) done[q][j] = 0.0f;
            }
        }
    }
    if (!moments) return;
    const float weight_of = float(max(stored, 1u));
#pragma unroll
    for (unsigned j = 0; j < count; ++j) {
        means[at.slot][at.lane * count + j] = sums[j].mean(pivot[j], weight_of);
        deviations[at.slot][at.lane * count + j] = sums[j].deviations(weight_of);
    }
    if (at.lane == 0) pixels[at.slot] = stored;
    __syncthreads();
    const unsigned channel = at.first + threadIdx.x;
    if (threadIdx.x < tile && channel < channels) {
        float count_so_far = 0.0f, mean = 0.0f, squares = 0.0f;
        for (unsigned slot = 0; slot < At::slots; ++slot) {
            const float n = float(pixels[slot]);
            if (n == 0.0f) break;
            const float difference = means[slot][threadIdx.x] - mean, share = n / (count_so_far + n);
            mean += difference * share;
            squares += deviations[slot][threadIdx.x] + difference * difference * share * count_so_far;
            count_so_far += n;
        }
        partial[at.run * 2 * channels + channel] = mean;
        partial[(at.run * 2 + 1) * channels + channel] = squares;
    }
    if (!is_last_block(counters + at.first / tile, shape.runs)) return;
    const auto before_run = [&](unsigned run) {
        return pixels_before(shape, min(run * shape.per_slot * At::slots, items), columns);
    };
    finish_moments<threads>(partial, shape.runs, channels, at.first, tile, finish,
                            shape.images * shape.out_height * shape.out_width,
                            [&](unsigned run) { return before_run(run + 1) - before_run(run); });
}

template <class T, unsigned count, unsigned kernel, unsigned stride, unsigned columns>
__device__ __forceinline__ void backward(const T* x, const T* g, const T* raw, const float* owed, const float* raw_norm,
                                         const float* gate, const float* dpool, const T* weight, T* dx, float* dweight,
                                         const T* skip, const OwedFinish& finish, float* partial, unsigned* counters,
                                         const DepthwiseGeometry& shape) {
    // A row of dy is met by `ages` steps of the input; a strip has `columns` columns of steps.
    constexpr unsigned ages = (kernel - 1) / stride + 1, taps = kernel * kernel, wide = columns * stride;
    constexpr unsigned halo = columns + ages - 1, piece = 2;
    using At = Place<count>;
    __shared__ Row<count, piece> filter[taps], norms[3];
    __shared__ Row<count, count> owing[3], slopes[2];
    __shared__ float totals[threads / 32][taps + 2][tile];
    const At at(shape.channels);
    const unsigned channels = shape.channels, row_size = shape.width * channels, out_row_size = shape.out_width * channels;
    const float* norm = finish.norm;
    fill<taps>(filter, weight, at.first, channels);
    fill<3>(owing, owed, at.first, channels);
    fill(slopes[0], raw_norm, at.first, channels, 0.0f);
    fill(slopes[1], raw_norm == nullptr ? nullptr : raw_norm + channels, at.first, channels, 0.0f);
    fill(norms[0], norm, at.first, channels, 1.0f);
    fill(norms[1], norm == nullptr ? nullptr : norm + channels, at.first, channels, 0.0f);
    fill(norms[2], norm == nullptr ? nullptr : norm + 2 * channels, at.first, channels, 0.0f);
    __syncthreads();
    const Gate sigmoid_of_x(norm != nullptr), sigmoid_of_raw(raw_norm != nullptr);
    // Of the taps, of dz and of dz (y - mean).
    float total[taps + 2][count] = {};
    const unsigned first_step = shape.top / stride, first_column = shape.left / stride;
    const unsigned steps = (shape.height + shape.top - 1) / stride + 1 - first_step;
    const unsigned items = shape.images * shape.cuts * shape.strips;
    for (unsigned k = 0; k < shape.per_slot; ++k) {
        const unsigned index = (at.run * shape.per_slot + k) * At::slots + at.slot;
        if (index >= items || !at.inside) break;
        Strip strip(shape, index, columns, steps);
        const int begin = int(strip.step + first_step), end = int(strip.end + first_step);
        // Of dy and of the input.
        const int column = int(strip.column + first_column) - int(ages - 1);
        const int left = int((strip.column + first_column) * stride) - int(shape.left);
        // Elements are fewer than 2^31: 32 bits name them, and wrap around where nothing is read.
        const unsigned from = (strip.image * shape.height * shape.width + unsigned(left)) * channels + at.channel;
        const unsigned out_from =
            (strip.image * shape.out_height * shape.out_width + unsigned(column)) * channels + at.channel;
        float factor[count], offset[count];
        owing[0].get(at.lane, 0, factor);
#pragma unroll
        for (unsigned j = 0; j < count; ++j) offset[j] = 0.0f;
        if (raw_norm != nullptr) {
#pragma unroll
            for (unsigned j = 0; j < count; ++j) {
                const unsigned of = strip.image * channels + at.channel + j;
                offset[j] = factor[j] * dpool[of];
                factor[j] *= gate[of];
            }
        }
        float dy[ages][halo][count] = {};
        Packed<T, count> arriving[halo], made[halo];
        const auto load_row = [&](int step) {
            const unsigned line = out_from + unsigned(step) * out_row_size;
            const bool there = step >= 0 && step < int(shape.out_height);
#pragma unroll
            for (unsigned q = 0; q < halo; ++q) {
                const bool inside = there && unsigned(column + int(q)) < shape.out_width;
                arriving[q] = load_packed<count>(g + (line + q * channels), inside);
                made[q] = load_packed<count>(raw + (line + q * channels), inside);
            }
        };
        load_row(begin - int(ages - 1));
#pragma unroll 1
        for (int step = begin - int(ages - 1); step < end; ++step) {
            {
#pragma unroll
                for (unsigned age = ages - 1; age > 0; --age)
#pragma unroll
                    for (unsigned q = 0; q < halo; ++q)
#pragma unroll
                        for (unsigned j = 0; j < count; ++j) dy[age][q][j] = dy[age - 1][q][j];
                float (&row)[halo][count] = dy[0];
                if (step >= 0 && step < int(shape.out_height)) {
                    float scale[count], shift[count], slope_of[count], constant[count];
                    slopes[0].get(at.lane, 0, scale);
                    slopes[1].get(at.lane, 0, shift);
                    owing[1].get(at.lane, 0, slope_of);
                    owing[2].get(at.lane, 0, constant);
#pragma unroll
                    for (unsigned q = 0; q < halo; ++q) {
                        float gradient[count], y[count];
                        unpack(arriving[q], gradient);
                        unpack(made[q], y);
                        const bool inside = unsigned(column + int(q)) < shape.out_width;
#pragma unroll
                        for (unsigned j = 0; j < count; ++j) {
                            const float z = scale[j] * y[j] + shift[j], slope = silu_grad(z, sigmoid_of_raw(z));
                            const float value = (factor[j] * gradient[j] + offset[j]) * slope + (slope_of[j] * y[j] + constant[j]);
                            row[q][j] = inside ? value : 0.0f;
                        }
                    }
                } else {
#pragma unroll
                    for (unsigned q = 0; q < halo; ++q)
#pragma unroll
                        for (unsigned j = 0; j < count; ++j) row[q][j] = 0.0f;
                }
                // Under way while the rest of the step is computed.
                if (step + 1 < end) load_row(step + 1);
                if (step < begin) continue;
#pragma unroll
                for (unsigned r = 0; r < stride; ++r) {
                    const int input_row = step * int(stride) + int(r) - int(shape.top);
                    if (input_row < 0 || input_row >= int(shape.height)) continue;
                    const unsigned line = from + unsigned(input_row) * row_size;
                    Packed<T, count> stored[wide];
#pragma unroll
                    for (unsigned v = 0; v < wide; ++v)
                        stored[v] = load_packed<count>(x + (line + v * channels),
                                                       unsigned(left + int(v)) < shape.width);
                    // A few channels at a time: fewer registers.
#pragma unroll
                    for (unsigned part = 0; part < count / piece; ++part) {
                        float active[wide][piece], slope[wide][piece], gradient[wide][piece] = {};
                        float scale[piece], shift[piece], mean[piece];
                        norms[0].get(at.lane, part, scale);
                        norms[1].get(at.lane, part, shift);
                        norms[2].get(at.lane, part, mean);
#pragma unroll
                        for (unsigned v = 0; v < wide; ++v) {
                            float y[piece];
                            unpack(stored[v], y, part * piece);
                            const bool inside = unsigned(left + int(v)) < shape.width;
#pragma unroll
                            for (unsigned j = 0; j < piece; ++j) {
                                const float z = scale[j] * y[j] + shift[j], s = inside ? sigmoid_of_x(z) : 0.0f;
                                active[v][j] = z * s;
                                slope[v][j] = silu_grad(z, s);
                            }
                        }
#pragma unroll
                        for (unsigned age = 0; age < ages; ++age) {
                            const unsigned tap = stride * age + r;
                            if (tap >= kernel) continue;
                            const float (&line_of)[halo][count] = dy[age];
#pragma unroll
                            for (unsigned t = 0; t < kernel; ++t) {
                                float w[piece];
                                filter[tap * kernel + t].get(at.lane, part, w);
#pragma unroll
                                for (unsigned q = 0; q < columns; ++q)
#pragma unroll
                                    for (unsigned j = 0; j < piece; ++j) {
                                        const unsigned v = q * stride + t % stride;
                                        const float d = line_of[q + ages - 1 - t / stride][part * piece + j];
                                        gradient[v][j] += w[j] * d;
                                        total[tap * kernel + t][part * piece + j] += active[v][j] * d;
                                    }
                            }
                        }
#pragma unroll
                        for (unsigned v = 0; v < wide; ++v) {
                            float y[piece];
                            unpack(stored[v], y, part * piece);
#pragma unroll
                            for (unsigned j = 0; j < piece; ++j) {
                                gradient[v][j] *= slope[v][j];
                                total[taps][part * piece + j] += gradient[v][j];
                                total[taps + 1][part * piece + j] += gradient[v][j] * (y[j] - mean[j]);
                            }
                            if (skip != nullptr) {
                                const bool inside = unsigned(left + int(v)) < shape.width;
                                float other[piece];
                                unpack(load_packed<piece>(skip + (line + v * channels + part * piece), inside), other);
#pragma unroll
                                for (unsigned j = 0; j < piece; ++j) gradient[v][j] += other[j];
                            }
                            replace(stored[v], gradient[v], part * piece);
                        }
                    }
#pragma unroll
                    for (unsigned v = 0; v < wide; ++v)
                        if (unsigned(left + int(v)) < shape.width)
                            store_packed(dx + (line + v * channels), stored[v]);
                }
            }
        }
    }

    // What the slots of a warp have is added up in registers, what its warps have in shared memory.
    const auto collect = [&] {
#pragma unroll
        for (unsigned t = 0; t < taps + 2; ++t)
#pragma unroll
            for (unsigned j = 0; j < count; ++j) {
#pragma unroll
                for (unsigned distance = At::lanes; distance < 32; distance *= 2)
                    total[t][j] += __shfl_xor_sync(0xffffffffu, total[t][j], distance);
                if (threadIdx.x % 32 < At::lanes) totals[threadIdx.x / 32][t][at.lane * count + j] = total[t][j];
            }
        __syncthreads();
    };
    const auto sum_of = [&](unsigned t, unsigned channel) {
        float sum = totals[0][t][channel];
#pragma unroll
        for (unsigned w = 1; w < threads / 32; ++w) sum += totals[w][t][channel];
        return sum;
    };
    collect();
    float* tap_sums = partial + 2 * shape.runs * channels;
    for (unsigned i = threadIdx.x; i < (taps + 2) * tile; i += threads) {
        const unsigned t = i / tile, channel = at.first + i % tile;
        if (channel >= channels) continue;
        const float sum = sum_of(t, i % tile);
        if (t < taps)
            tap_sums[(at.run * taps + t) * channels + channel] = sum;
        else
            partial[(at.run * 2 + t - taps) * channels + channel] =
                t == taps || norm == nullptr ? sum : sum * norm[3 * channels + channel];
    }
    if (!is_last_block(counters + at.first / tile, shape.runs)) return;
#pragma unroll
    for (unsigned t = 0; t < taps + 2; ++t)
#pragma unroll
        for (unsigned j = 0; j < count; ++j) total[t][j] = 0.0f;
    if (at.inside)
        for (unsigned run = at.slot; run < shape.runs; run += At::slots)
#pragma unroll
            for (unsigned t = 0; t < taps; ++t) {
                const float* from = tap_sums + (run * taps + t) * channels + at.channel;
                if constexpr (count == 4) {
                    const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
                    total[t][0] += four.x, total[t][1] += four.y, total[t][2] += four.z, total[t][3] += four.w;
                } else {
                    const float2 two = __ldcg(reinterpret_cast<const float2*>(from));
                    total[t][0] += two.x, total[t][1] += two.y;
                }
            }
    collect();
    for (unsigned i = threadIdx.x; i < taps * tile; i += threads) {
        const unsigned t = i / tile, channel = at.first + i % tile;
        if (channel < channels) dweight[t * channels + channel] += sum_of(t, i % tile);
    }
    if (norm == nullptr) return;
    finish_owed<threads>(partial, shape.runs, channels, at.first, tile, finish);
}

} // namespace

#define EFFNETV2_DEPTHWISE(suffix, T, kernel, stride, count, columns, blocks, back_count, back_columns, back_blocks)   \
    extern "C" __global__ void __launch_bounds__(threads, blocks) depthwise_fprop_##kernel##x##kernel##_s##stride##_##suffix( \
        const T* x, const float* norm, const T* weight, T* y, const float* bias, unsigned silu_after, const T* skip, \
        NormFinish finish, float* partial, unsigned* counters, DepthwiseGeometry shape) {                    \
        fprop<T, count, kernel, stride, columns>(x, norm, weight, y, bias, silu_after, skip, finish, partial, counters, \
                                                 shape);                                                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads, back_blocks) depthwise_backward_##kernel##x##kernel##_s##stride##_##suffix( \
        const T* x, const T* g, const T* raw, const float* owed, const float* raw_norm, const float* gate,   \
        const float* dpool, const T* weight, T* dx, float* dweight, const T* skip, OwedFinish finish,        \
        float* partial, unsigned* counters, DepthwiseGeometry shape) {                                       \
        backward<T, back_count, kernel, stride, back_columns>(x, g, raw, owed, raw_norm, gate, dpool, weight, dx, dweight, \
                                                              skip, finish, partial, counters, shape);       \
    }                                                                                                        \
    EFFNETV2_KERNEL(depthwise_fprop_##kernel##x##kernel##_s##stride##_##suffix)                              \
    EFFNETV2_KERNEL(depthwise_backward_##kernel##x##kernel##_s##stride##_##suffix)

#define EFFNETV2_DEPTHWISE_TYPE(suffix, T)                                                                   \
    EFFNETV2_DEPTHWISE(suffix, T, 3, 1, 4, 4, 4, 2, 4, 3)                                                    \
    EFFNETV2_DEPTHWISE(suffix, T, 3, 2, 4, 4, 4, 4, 2, 3)                                                    \
    EFFNETV2_DEPTHWISE(suffix, T, 5, 1, 4, 4, 2, 2, 4, 2)                                                    \
    EFFNETV2_DEPTHWISE(suffix, T, 5, 2, 4, 4, 3, 2, 2, 3)

EFFNETV2_DEPTHWISE_TYPE(f32, float)
EFFNETV2_DEPTHWISE_TYPE(f16, f16)
EFFNETV2_DEPTHWISE_TYPE(bf16, bf16)
