// Depthwise convolution, one k x k filter a channel, k = 3 or 5, stride s = 1 or 2: forward, and the gradients of
// input and weights in one pass.
//
//   y[n, oh, ow, c] = sum over kh, kw of w[kh, kw, c] x[n, s oh + kh - top, s ow + kw - left, c]
//
// Shapes: input [n, h, w, c], output and its gradient [n, oh, ow, c], weights [k, k, c], all of the element type T; the
// gradient of the weights [k, k, c] f32, added to. Channels are a multiple of 8; every array is aligned to 16 bytes.
// Sums are in f32 and in a fixed order.
//
// depthwise_fprop_*: x is the input, or with `norm` [4, c] SiLU(scale input + shift); zero beyond the border. Stored is
// y, of which `finish` makes a normalisation; or, with `bias` [c], act(y + bias) + skip, skip [n, oh, ow, c].
//
// depthwise_backward_*: dy = a dz + b raw + c with `owed` [3, c], raw being the convolution's output; dz = g, or with
// `raw_norm` [4, c] (gate[n, c] g + dpool[n, c]) SiLU'(scale raw + shift). Stored is dx + skip, skip [n, h, w, c]; or,
// where x is SiLU(z), dz = dx SiLU'(z), and of its sums and those of dz xhat `finish` makes the producer's debt.
//
// A thread has 4 or 2 channels of a strip: a few columns, and rows one after the other. What rows share stays in
// registers: forward the outputs that the rows so far have begun, backward the last rows of dy, so that each element of
// the input is needed only once. So every row is read and transformed once a strip; strips side by side share k - 1
// columns (stride 1) and read them twice. 64 channels lie side by side in a warp's lanes, which is at least a line.
//
// Rows are counted in steps: step o is row o of the output, and of the input the rows s o ... s o + s - 1 in the
// coordinate u = row + top. Columns likewise. Tap t of input row u = s o + r then meets output row o - age, where
// t = s age + r.
//
// Grid: runs * ceil(c / 64) blocks of 128 threads, channel tiles fastest. A block has 64 channels, 64 / (channels of a
// thread) lanes side by side, and as many slots as that leaves threads for; run i has the strips from i * per_slot *
// slots on, one for each slot at a time. The last block of a channel tile adds up the partial sums of all runs.
//
// Least bytes: forward input, y and skip; backward input, g, raw, dx and skip; beside them weights, vectors and, twice,
// partial sums: [runs, 2, c], backward [runs, k k + 2, c] floats. Operations: 2 k k for each element of y forward,
// 4 k k backward, and an exponential and a reciprocal for each SiLU.

#include "include/activation.cuh"
#include "include/batch_norm.cuh"
#include "include/last_block.cuh"
#include "include/predecessors.cuh"
#include "include/types.cuh"

/// The sides of both tensors, and how they are cut. Steps begin at 0 forward, at top / stride backward.
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
template <unsigned count, class T>
__device__ __forceinline__ Packed<T, count> load_packed(const T* from, bool inside) {
    Packed<T, count> pack = {};
    constexpr unsigned size = Packed<T, count>::size;
    if (!inside) return pack;
    if constexpr (size >= 4) {
#pragma unroll
        for (unsigned i = 0; i < size; i += 4) {
            const uint4 four = load16<uint4>(reinterpret_cast<const uint32_t*>(from) + i);
            pack.words[i] = four.x, pack.words[i + 1] = four.y, pack.words[i + 2] = four.z,
            pack.words[i + 3] = four.w;
        }
    } else if constexpr (size == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        pack.words[0] = two.x, pack.words[1] = two.y;
    } else {
        pack.words[0] = *reinterpret_cast<const uint32_t*>(from);
    }
    return pack;
}

template <class T, unsigned count>
__device__ __forceinline__ void store_packed(T* to, const Packed<T, count>& pack) {
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

template <class T, unsigned count>
__device__ __forceinline__ void unpack(const Packed<T, count>& pack, float (&x)[count]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (unsigned i = 0; i < count; ++i) x[i] = __uint_as_float(pack.words[i]);
    } else {
#pragma unroll
        for (unsigned i = 0; i < count / 2; ++i) {
            const float2 pair = unpack2<T>(pack.words[i]);
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

/// The sigmoid, or 1 for all finite z: with that SiLU is the identity and its derivative 1, at no cost.
struct Gate {
    float exponent, weight;

    __device__ __forceinline__ explicit Gate(bool sigmoid)
        : exponent(sigmoid ? -1.442695041f : 0.0f), weight(sigmoid ? 1.0f : 0.0f) {}
    __device__ __forceinline__ float operator()(float z) const {
        return rcp_approx(weight * ex2_approx(exponent * z) + 1.0f);
    }
};

/// One float for each channel of a tile, in shared memory.
template <unsigned count> struct Row {
    alignas(16) float values[tile];

    /// Those of one lane.
    __device__ __forceinline__ void get(unsigned lane, float (&x)[count]) const {
#pragma unroll
        for (unsigned j = 0; j < count; ++j) x[j] = values[lane * count + j];
    }
};

/// rows[i] <- the tile's part of vector i of `from` [rows, channels], zeros beyond the channels.
template <unsigned rows, unsigned count, class T>
__device__ __forceinline__ void fill(Row<count>* to, const T* from, unsigned first, unsigned channels) {
    for (unsigned i = threadIdx.x; i < rows * tile; i += threads) {
        const unsigned row = i / tile, channel = i % tile;
        to[row].values[channel] =
            first + channel < channels ? to_float(from[row * channels + first + channel]) : 0.0f;
    }
}

/// The same for a vector that may be absent.
template <unsigned count>
__device__ __forceinline__ void fill(Row<count>& to, const float* from, unsigned first, unsigned channels,
                                     float absent) {
    for (unsigned channel = threadIdx.x; channel < tile; channel += threads)
        to.values[channel] = from != nullptr && first + channel < channels ? from[first + channel] : absent;
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

    __device__ __forceinline__ Strip(const DepthwiseGeometry& shape, unsigned index, unsigned columns,
                                     unsigned total) {
        const unsigned above = index / shape.strips;
        column = (index - above * shape.strips) * columns;
        image = above / shape.cuts;
        step = (above - image * shape.cuts) * shape.steps;
        end = min(step + shape.steps, total);
    }
};

/// The pixels of the output in the first `strips` strips, of `columns` columns each.
__device__ __forceinline__ unsigned pixels_before(const DepthwiseGeometry& shape, unsigned strips,
                                                  unsigned columns) {
    const unsigned above = strips / shape.strips, image = above / shape.cuts;
    const unsigned row = min((above - image * shape.cuts) * shape.steps, shape.out_height);
    const unsigned rows = min(shape.steps, shape.out_height - row);
    return (image * shape.out_height + row) * shape.out_width +
           rows * min((strips - above * shape.strips) * columns, shape.out_width);
}

template <class T, unsigned count, unsigned kernel, unsigned stride, unsigned columns>
__device__ __forceinline__ void fprop(const T* x, const float* norm, const T* weight, T* y, const float* bias,
                                      unsigned silu_after, const T* skip, const NormFinish& finish,
                                      float* partial, unsigned* counters, const DepthwiseGeometry& shape) {
    // A row of the input takes part in `ages` rows of the output.
    constexpr unsigned ages = (kernel - 1) / stride + 1, wide = (columns - 1) * stride + kernel;
    using At = Place<count>;
    __shared__ Row<count> filter[kernel * kernel], scales, shifts, biases;
    __shared__ float means[At::slots][tile], deviations[At::slots][tile];
    __shared__ unsigned pixels[At::slots];
    const At at(shape.channels);
    const unsigned channels = shape.channels, row_size = shape.width * channels,
                   out_row_size = shape.out_width * channels;
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
        const unsigned from =
            (strip.image * shape.height * shape.width + unsigned(left)) * channels + at.channel;
        const unsigned to =
            (strip.image * shape.out_height * shape.out_width + strip.column) * channels + at.channel;
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
                        raw[v] = load_packed<count>(x + (line + v * channels),
                                                    unsigned(left + int(v)) < shape.width);

                    float active[wide][count], scale[count], shift[count];
                    scales.get(at.lane, scale);
                    shifts.get(at.lane, shift);
#pragma unroll
                    for (unsigned v = 0; v < wide; ++v) {
                        unpack(raw[v], active[v]);
                        const bool inside = unsigned(left + int(v)) < shape.width;
#pragma unroll
                        for (unsigned j = 0; j < count; ++j) {
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
                            float w[count];
                            filter[tap * kernel + t].get(at.lane, w);
#pragma unroll
                            for (unsigned q = 0; q < columns; ++q)
#pragma unroll
                                for (unsigned j = 0; j < count; ++j)
                                    line_of[q][j] += w[j] * active[q * stride + t][j];
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
                            float offset[count];
                            biases.get(at.lane, offset);
#pragma unroll
                            for (unsigned j = 0; j < count; ++j) {
                                const float z = done[q][j] + offset[j];
                                done[q][j] = z * after(z);
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
__device__ __forceinline__ void
backward(const T* x, const T* g, const T* raw, const float* owed, const float* raw_norm, const float* gate,
         const float* dpool, const T* weight, T* dx, float* dweight, const T* skip, const OwedFinish& finish,
         float* partial, unsigned* counters, const DepthwiseGeometry& shape) {
    // A row of dy is met by `ages` steps of the input; a strip has `columns` columns of steps.
    constexpr unsigned ages = (kernel - 1) / stride + 1, taps = kernel * kernel, wide = columns * stride;
    constexpr unsigned halo = columns + ages - 1;
    using At = Place<count>;
    __shared__ Row<count> filter[taps], norms[3];
    __shared__ Row<count> owing[3], slopes[2];
    __shared__ float totals[threads / 32][taps + 2][tile];
    const At at(shape.channels);
    const unsigned channels = shape.channels, row_size = shape.width * channels,
                   out_row_size = shape.out_width * channels;
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
        const unsigned from =
            (strip.image * shape.height * shape.width + unsigned(left)) * channels + at.channel;
        const unsigned out_from =
            (strip.image * shape.out_height * shape.out_width + unsigned(column)) * channels + at.channel;
        float factor[count], offset[count];
        owing[0].get(at.lane, factor);
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
        const auto inside = [&](unsigned v) { return unsigned(left + int(v)) < shape.width; };
        const auto inside_out = [&](unsigned q) { return unsigned(column + int(q)) < shape.out_width; };
        const auto row_of = [&](int step, unsigned r) {
            return step * int(stride) + int(r) - int(shape.top);
        };
        const auto load_row = [&](int step) {
            const unsigned line = out_from + unsigned(step) * out_row_size;
            const bool there = step >= 0 && step < int(shape.out_height);
#pragma unroll
            for (unsigned q = 0; q < halo; ++q) {
                const bool needed = there && inside_out(q);
                arriving[q] = load_packed<count>(g + (line + q * channels), needed);
                made[q] = load_packed<count>(raw + (line + q * channels), needed);
            }
        };
        load_row(begin - int(ages - 1));
#pragma unroll 1
        for (int step = begin - int(ages - 1); step < end; ++step) {
#pragma unroll
            for (unsigned age = ages - 1; age > 0; --age)
#pragma unroll
                for (unsigned q = 0; q < halo; ++q)
#pragma unroll
                    for (unsigned j = 0; j < count; ++j) dy[age][q][j] = dy[age - 1][q][j];
            Packed<T, count> stored[stride][wide];
#pragma unroll
            for (unsigned r = 0; r < stride; ++r) {
                const unsigned line = from + unsigned(row_of(step, r)) * row_size;
                const bool there = step >= begin && unsigned(row_of(step, r)) < shape.height;
#pragma unroll
                for (unsigned v = 0; v < wide; ++v)
                    stored[r][v] = load_packed<count>(x + (line + v * channels), there && inside(v));
            }
            float (&row)[halo][count] = dy[0];
            if (step >= 0 && step < int(shape.out_height)) {
                float scale[count], shift[count], slope_of[count], constant[count];
                slopes[0].get(at.lane, scale);
                slopes[1].get(at.lane, shift);
                owing[1].get(at.lane, slope_of);
                owing[2].get(at.lane, constant);
#pragma unroll
                for (unsigned q = 0; q < halo; ++q) {
                    float gradient[count], y[count];
                    unpack(arriving[q], gradient);
                    unpack(made[q], y);
#pragma unroll
                    for (unsigned j = 0; j < count; ++j) {
                        const float z = scale[j] * y[j] + shift[j], slope = silu_grad(z, sigmoid_of_raw(z));
                        const float value = (factor[j] * gradient[j] + offset[j]) * slope +
                                            (slope_of[j] * y[j] + constant[j]);
                        row[q][j] = inside_out(q) ? value : 0.0f;
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
                if (unsigned(row_of(step, r)) >= shape.height) continue;
                const unsigned line = from + unsigned(row_of(step, r)) * row_size;
                float active[wide][count], slope[wide][count], gradient[wide][count] = {};
                float scale[count], shift[count], mean[count];
                norms[0].get(at.lane, scale);
                norms[1].get(at.lane, shift);
                norms[2].get(at.lane, mean);
#pragma unroll
                for (unsigned v = 0; v < wide; ++v) {
                    float y[count];
                    unpack(stored[r][v], y);
#pragma unroll
                    for (unsigned j = 0; j < count; ++j) {
                        const float z = scale[j] * y[j] + shift[j], s = inside(v) ? sigmoid_of_x(z) : 0.0f;
                        active[v][j] = z * s;
                        // As silu_grad has it, s (1 + z (1 - s)), with one operation less.
                        slope[v][j] = s + (active[v][j] - active[v][j] * s);
                    }
                }
#pragma unroll
                for (unsigned age = 0; age < ages; ++age) {
                    const unsigned tap = stride * age + r;
                    if (tap >= kernel) continue;
                    const float (&line_of)[halo][count] = dy[age];
#pragma unroll
                    for (unsigned t = 0; t < kernel; ++t) {
                        float w[count];
                        filter[tap * kernel + t].get(at.lane, w);
#pragma unroll
                        for (unsigned q = 0; q < columns; ++q)
#pragma unroll
                            for (unsigned j = 0; j < count; ++j) {
                                const unsigned v = q * stride + t % stride;
                                const float d = line_of[q + ages - 1 - t / stride][j];
                                gradient[v][j] += w[j] * d;
                                total[tap * kernel + t][j] += active[v][j] * d;
                            }
                    }
                }
#pragma unroll
                for (unsigned v = 0; v < wide; ++v) {
                    float y[count];
                    unpack(stored[r][v], y);
#pragma unroll
                    for (unsigned j = 0; j < count; ++j) {
                        gradient[v][j] *= slope[v][j];
                        total[taps][j] += gradient[v][j];
                        total[taps + 1][j] += gradient[v][j] * (y[j] - mean[j]);
                    }
                    if (skip != nullptr) {
                        float other[count];
                        unpack(load_packed<count>(skip + (line + v * channels), inside(v)), other);
#pragma unroll
                        for (unsigned j = 0; j < count; ++j) gradient[v][j] += other[j];
                    }
                    if (inside(v)) store_packed(dx + (line + v * channels), pack<T>(gradient[v]));
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
                if (threadIdx.x % 32 < At::lanes)
                    totals[threadIdx.x / 32][t][at.lane * count + j] = total[t][j];
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
                const float2 two = __ldcg(reinterpret_cast<const float2*>(from));
                total[t][0] += two.x, total[t][1] += two.y;
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

/// `cut` names a kernel of other columns than the usual ones.
#define EFFNETV2_DEPTHWISE_BACKWARD(suffix, T, kernel, stride, columns, cut, blocks)                         \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        depthwise_backward_##kernel##x##kernel##_s##stride##cut##_##suffix(                                  \
            const T* x, const T* g, const T* raw, const float* owed, const float* raw_norm,                  \
            const float* gate, const float* dpool, const T* weight, T* dx, float* dweight, const T* skip,    \
            OwedFinish finish, float* partial, unsigned* counters, DepthwiseGeometry shape) {                \
        after_predecessors();                                                                                \
        backward<T, 2, kernel, stride, columns>(x, g, raw, owed, raw_norm, gate, dpool, weight, dx, dweight, \
                                                skip, finish, partial, counters, shape);                     \
    }                                                                                                        \
    EFFNETV2_KERNEL(depthwise_backward_##kernel##x##kernel##_s##stride##cut##_##suffix)

#define EFFNETV2_DEPTHWISE(suffix, T, kernel, stride, blocks, columns, back_blocks)                          \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                            \
        depthwise_fprop_##kernel##x##kernel##_s##stride##_##suffix(                                          \
            const T* x, const float* norm, const T* weight, T* y, const float* bias, unsigned silu_after,    \
            const T* skip, NormFinish finish, float* partial, unsigned* counters, DepthwiseGeometry shape) { \
        after_predecessors();                                                                                \
        fprop<T, 4, kernel, stride, 4>(x, norm, weight, y, bias, silu_after, skip, finish, partial,          \
                                       counters, shape);                                                     \
    }                                                                                                        \
    EFFNETV2_KERNEL(depthwise_fprop_##kernel##x##kernel##_s##stride##_##suffix)                              \
    EFFNETV2_DEPTHWISE_BACKWARD(suffix, T, kernel, stride, columns, , back_blocks)

// The blocks of a multiprocessor are as many as leave enough registers for nothing to be spilled.
#define EFFNETV2_DEPTHWISE_TYPE(suffix, T, blocks)                                                           \
    EFFNETV2_DEPTHWISE(suffix, T, 3, 1, blocks, 4, 3)                                                        \
    EFFNETV2_DEPTHWISE(suffix, T, 3, 2, blocks, 4, 2)                                                        \
    EFFNETV2_DEPTHWISE(suffix, T, 5, 1, 2, 3, 2)                                                             \
    EFFNETV2_DEPTHWISE(suffix, T, 5, 2, 3, 2, 2)

EFFNETV2_DEPTHWISE_TYPE(f32, float, 3)
EFFNETV2_DEPTHWISE_TYPE(f16, f16, 4)
EFFNETV2_DEPTHWISE_TYPE(bf16, bf16, 4)

// For images that strips of 5 columns divide better than strips of 4.
EFFNETV2_DEPTHWISE_BACKWARD(f16, f16, 3, 1, 5, c5, 3)
EFFNETV2_DEPTHWISE_BACKWARD(bf16, bf16, 3, 1, 5, c5, 3)
