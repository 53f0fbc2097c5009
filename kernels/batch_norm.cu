// Batch normalisation where no convolution does it on the way: moments, the output of a block and its backward, the
// normalisation of inference, and the factors of stochastic depth.
//
// y, g, dz, skip and out [images, image_pixels, channels] are of type T, f32, f16 or bf16; everything else is f32. norm
// [4, channels], owed [3, channels] and the partial sums are as in include/batch_norm.cuh: z = scale y + shift, xhat =
// (y - mean) rstd. factors [images], one where null, are those of stochastic depth. Channels are a multiple of 8, arrays
// aligned to 16 bytes. All sums are in f32 and in a fixed order.
//
// A grid of runs x tiles, block 256: block (r, t) has the pixels from r `run` on, `run` of them, of all images together,
// and the 8 `groups` channels from 8 `groups` t on, groups being at most 16. `counters` has one for each tile.
//
// batch_norm_moments: mean and variance of each channel -> norm and running statistics. Least bytes: those of y; 4
//   operations for each element.
// batch_norm_merge: out = f act(z) + skip, act being SiLU or, where `silu` is 0, nothing; f act(z) where skip is null. Least
//   bytes: y, skip and out once; 4 operations for each element, 8 with SiLU.
// batch_norm_backward: with dz = f g, the sums of dz and dz xhat -> dgamma, dbeta, owed. Least bytes: g and y once; 5
//   operations for each element.
// batch_norm_backward_silu: dz = f g silu'(z), and the same sums, of dz before it is rounded. Least bytes: g, y and dz once;
//   15 operations for each element.
//
// batch_norm_owe: the same from sums [2, rows, channels], added up over rows. Grid ceil(channels / 32), block 256. Least
//   bytes: 8 for each row and channel.
// batch_norm_evaluate: for each part p of `parts`, a layer's channels first .. first + count - 1, in `norms`: scale = gamma /
//   sqrt(running variance + epsilon), shift = beta - scale running mean, and running mean and 1 / sqrt(...). Grid parts,
//   block 256; least bytes 32 for each channel.
// batch_norm_fold: folded[i] = scale[i / row] weights[i], of type T: a convolution's weights [channels, row] with the
//   normalisation of inference in them. Grid ceil(channels row / 2048), block 256; least bytes those of weights and folded.
// batch_norm_factors: factors[b stride + n] = 0 where the top 24 bits of the first number of the stream (seed, epoch, image
//   n, purpose of block b) are below its threshold, else its keep. Grid blocks x ceil(images / 256), block 256.

#include "include/activation.cuh"
#include "include/batch_norm.cuh"
#include "include/last_block.cuh"
#include "include/predecessors.cuh"
#include "include/ptx.cuh"
#include "include/step.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256;

/// How the pixels of all images and their channels fall to blocks.
struct Tiling {
    unsigned pixels, channels;
    /// Pixels of a block, but for the last one.
    unsigned run;
    /// Groups of 8 channels of a block.
    unsigned groups;
};

/// A thread's place: the pixels from `first` on, every `lanes`-th up to `end`, and 8 channels from `channel` on.
struct Place {
    unsigned group, lane, lanes, channel, first, end;
    /// Some threads are left over, and the last tile may be short.
    bool inside;

    __device__ __forceinline__ explicit Place(const Tiling& t) {
        lane = threadIdx.x / t.groups;
        group = threadIdx.x - lane * t.groups;
        lanes = threads / t.groups;
        channel = (blockIdx.y * t.groups + group) * 8;
        first = blockIdx.x * t.run + lane;
        end = min((blockIdx.x + 1) * t.run, t.pixels);
        inside = lane < lanes && channel < t.channels;
    }
};

/// Pixels whose loads a thread has under way at once.
template <class T> constexpr unsigned batch_of = sizeof(T) == 4 ? 2 : 4;

/// `use(pixel, ...)` for a thread's pixels, with eight elements of each tensor; a null tensor is not read.
template <unsigned batch, Cache cache, class T, class Use>
__device__ __forceinline__ void for_pixels(const Place& at, unsigned channels, const T* one, const T* two, Use use) {
    for (unsigned p = at.first; p < at.end; p += batch * at.lanes) {
        Pack8<T> packs[2][batch] = {};
#pragma unroll
        for (unsigned i = 0; i < batch; ++i) {
            const unsigned pixel = p + i * at.lanes;
            if (pixel >= at.end) break;
            packs[0][i] = load_pack8<T, cache>(one + pixel * channels + at.channel);
            if (two) packs[1][i] = load_pack8<T, cache>(two + pixel * channels + at.channel);
        }
#pragma unroll
        for (unsigned i = 0; i < batch; ++i) {
            const unsigned pixel = p + i * at.lanes;
            if (pixel >= at.end) break;
            float x[8], v[8] = {};
            unpack8(packs[0][i], x);
            if (two) unpack8(packs[1][i], v);
            use(pixel, x, v);
        }
    }
}

/// Adds up what the lanes have of each channel: the sums of lane 0 become those of all.
__device__ __forceinline__ void sum_lanes(const Place& at, unsigned groups, float (&sum)[2][8]) {
    __shared__ float4 shared[4][threads];
    for (unsigned live = at.lanes; live > 1;) {
        const unsigned half = (live + 1) / 2;
        if (at.lane >= half && at.lane < live)
#pragma unroll
            for (unsigned k = 0; k < 4; ++k) {
                const float* x = sum[k / 2] + k % 2 * 4;
                shared[k][threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
            }
        __syncthreads();
        if (at.lane < live - half)
#pragma unroll
            for (unsigned k = 0; k < 4; ++k) {
                const float4 other = shared[k][threadIdx.x + half * groups];
                float* x = sum[k / 2] + k % 2 * 4;
                x[0] += other.x, x[1] += other.y, x[2] += other.z, x[3] += other.w;
            }
        __syncthreads();
        live = half;
    }
}

/// Leaves a block's two numbers of each channel to the last block.
__device__ __forceinline__ void store_partial(const Place& at, unsigned channels, const float (&sum)[2][8],
                                              float* partial) {
    if (at.lane != 0 || !at.inside) return;
#pragma unroll
    for (unsigned k = 0; k < 2; ++k) store8(partial + (blockIdx.x * 2 + k) * channels + at.channel, sum[k]);
}

__device__ __forceinline__ bool is_last_of_tile(unsigned* counters) {
    return is_last_block(counters + blockIdx.y, gridDim.x);
}

template <class T>
__device__ __forceinline__ void moments(const T* y, float* partial, unsigned* counters, const Tiling& tiling,
                                        const NormFinish& to) {
    const Place at(tiling);
    const auto pixels_of = [&](unsigned run) { return min(tiling.run, tiling.pixels - run * tiling.run); };
    float sum[2][8] = {}, pivot[8] = {};
    if (at.inside) {
        // All lanes have the same pivot, so their sums can be added.
        load8(y + blockIdx.x * tiling.run * tiling.channels + at.channel, pivot);
        const T* none = nullptr;
        const auto add = [&](unsigned, const float(&x)[8], const float(&)[8]) {
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                const float d = x[j] - pivot[j];
                sum[0][j] += d;
                sum[1][j] += d * d;
            }
        };
        for_pixels<batch_of<T>, Cache::normal>(at, tiling.channels, y, none, add);
    }
    sum_lanes(at, tiling.groups, sum);
    const float count = float(pixels_of(blockIdx.x));
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        const ShiftedSums shifted{sum[0][j], sum[1][j]};
        sum[0][j] = shifted.mean(pivot[j], count);
        sum[1][j] = shifted.deviations(count);
    }
    store_partial(at, tiling.channels, sum, partial);
    if (is_last_of_tile(counters))
        finish_moments<threads>(partial, gridDim.x, tiling.channels, blockIdx.y * tiling.groups * 8,
                                tiling.groups * 8, to, tiling.pixels, pixels_of);
}

template <class T>
__device__ __forceinline__ void merge(const T* y, const float* norm, const T* skip, const float* factors, T* out,
                                      const Tiling& tiling, unsigned image_pixels, unsigned with_silu) {
    const Place at(tiling);
    if (!at.inside) return;
    float a[8], b[8];
    load8<Cache::read_only>(norm + at.channel, a);
    load8<Cache::read_only>(norm + tiling.channels + at.channel, b);
    const auto write = [&](unsigned pixel, float(&x)[8], const float(&s)[8]) {
        const float factor = factors ? factors[pixel / image_pixels] : 1.0f;
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) x[j] = a[j] * x[j] + b[j];
        if (with_silu)
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) x[j] = silu(x[j]);
        if (skip)
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) x[j] = factor * x[j] + s[j];
        else
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) x[j] *= factor;
        store8(out + pixel * tiling.channels + at.channel, x);
    };
    // Nobody reads y or skip again before the backward pass.
    for_pixels<batch_of<T>, Cache::streaming>(at, tiling.channels, y, skip, write);
}

/// With SiLU, and `dz` written, or without both.
template <bool with_silu, class T>
__device__ __forceinline__ void backward(const T* g, const T* y, const float* factors, T* dz, float* partial,
                                         unsigned* counters, const Tiling& tiling, unsigned image_pixels,
                                         const OwedFinish& to) {
    // SiLU needs registers.
    constexpr unsigned batch = batch_of<T> / (with_silu ? 2 : 1);
    const Place at(tiling);
    float sum[2][8] = {};
    if (at.inside) {
        float a[8], b[8], mean[8], rstd[8];
        if (with_silu) {
            load8<Cache::read_only>(to.norm + at.channel, a);
            load8<Cache::read_only>(to.norm + tiling.channels + at.channel, b);
        }
        load8<Cache::read_only>(to.norm + 2 * tiling.channels + at.channel, mean);
        const auto add = [&](unsigned pixel, float(&d)[8], const float(&x)[8]) {
            const float factor = factors ? factors[pixel / image_pixels] : 1.0f;
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                d[j] *= factor;
                if (with_silu) {
                    const float z = a[j] * x[j] + b[j];
                    d[j] *= silu_grad(z, sigmoid(z));
                }
                sum[0][j] += d[j];
                sum[1][j] += d[j] * (x[j] - mean[j]);
            }
            if (with_silu) store8(dz + pixel * tiling.channels + at.channel, d);
        };
        for_pixels<batch, Cache::normal>(at, tiling.channels, g, y, add);
        load8<Cache::read_only>(to.norm + 3 * tiling.channels + at.channel, rstd);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) sum[1][j] *= rstd[j];
    }
    sum_lanes(at, tiling.groups, sum);
    store_partial(at, tiling.channels, sum, partial);
    if (is_last_of_tile(counters))
        finish_owed<threads>(partial, gridDim.x, tiling.channels, blockIdx.y * tiling.groups * 8,
                             tiling.groups * 8, to);
}

/// Up to 256 channels of a layer, 32 bytes. gamma and beta lie in `params`, the statistics in `stats`.
struct EvaluatePart {
    unsigned gamma, beta, mean, var;
    /// Where the layer's norm begins, the part's first channel in it, and the layer's channels.
    unsigned norm, channels, count;
    float epsilon;
};

struct Drop {
    unsigned threshold;
    float keep;
    unsigned purpose;
};

template <class T>
__device__ __forceinline__ void fold(const float* weights, const float* scale, T* folded, unsigned count,
                                     unsigned row) {
    const unsigned first = (blockIdx.x * threads + threadIdx.x) * 8;
    // Channels are a multiple of 8, and so are weights.
    if (first >= count) return;
    float w[8];
    load8(weights + first, w);
    unsigned channel = first / row, left = row - (first - channel * row);
#pragma unroll
    for (float& value : w) {
        value *= scale[channel];
        if (--left == 0) ++channel, left = row;
    }
    store8(folded + first, w);
}

} // namespace

#define EFFNETV2_BATCH_NORM(suffix, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        batch_norm_moments_##suffix(const T* y, float* partial, unsigned* counters, const Tiling tiling,     \
                                    const NormFinish to) {                                                   \
        after_predecessors();                                                                                \
        moments(y, partial, counters, tiling, to);                                                           \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        batch_norm_merge_##suffix(const T* y, const float* norm, const T* skip, const float* factors,        \
                                  T* out, const Tiling tiling, unsigned image_pixels, unsigned silu) {       \
        after_predecessors();                                                                                \
        merge(y, norm, skip, factors, out, tiling, image_pixels, silu);                                      \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) batch_norm_backward_##suffix(                      \
        const T* g, const T* y, const float* factors, float* partial, unsigned* counters,                    \
        const Tiling tiling, unsigned image_pixels, const OwedFinish to) {                                   \
        after_predecessors();                                                                                \
        backward<false>(g, y, factors, static_cast<T*>(nullptr), partial, counters, tiling, image_pixels,    \
                        to);                                                                                 \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) batch_norm_backward_silu_##suffix(               \
        const T* g, const T* y, const float* factors, T* dz, float* partial, unsigned* counters,             \
        const Tiling tiling, unsigned image_pixels, const OwedFinish to) {                                   \
        after_predecessors();                                                                                \
        backward<true>(g, y, factors, dz, partial, counters, tiling, image_pixels, to);                      \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) batch_norm_fold_##suffix(                          \
        const float* weights, const float* scale, T* folded, unsigned count, unsigned row) {                 \
        after_predecessors();                                                                                \
        fold(weights, scale, folded, count, row);                                                            \
    }                                                                                                        \
    EFFNETV2_KERNEL(batch_norm_fold_##suffix)                                                                \
    EFFNETV2_KERNEL(batch_norm_moments_##suffix)                                                             \
    EFFNETV2_KERNEL(batch_norm_merge_##suffix)                                                               \
    EFFNETV2_KERNEL(batch_norm_backward_##suffix)                                                            \
    EFFNETV2_KERNEL(batch_norm_backward_silu_##suffix)

EFFNETV2_BATCH_NORM(f32, float)
EFFNETV2_BATCH_NORM(f16, f16)
EFFNETV2_BATCH_NORM(bf16, bf16)

extern "C" __global__ void __launch_bounds__(threads)
    batch_norm_owe(const float* sums, unsigned rows, unsigned channels, const OwedFinish to) {
    after_predecessors();
    batch_norm_detail::finish_owed<threads>(sums, rows, channels, rows * channels, channels,
                                            blockIdx.x * batch_norm_detail::columns, batch_norm_detail::columns,
                                            to);
}

extern "C" __global__ void __launch_bounds__(threads)
    batch_norm_evaluate(const EvaluatePart* parts, const float* params, const float* stats, float* norms) {
    after_predecessors();
    const EvaluatePart part = parts[blockIdx.x];
    const unsigned c = threadIdx.x;
    if (c >= part.count) return;
    const float mean = stats[part.mean + c], rstd = 1.0f / sqrtf(stats[part.var + c] + part.epsilon);
    const float scale = params[part.gamma + c] * rstd;
    float* norm = norms + part.norm + c;
    norm[0] = scale;
    norm[part.channels] = params[part.beta + c] - scale * mean;
    norm[2 * part.channels] = mean;
    norm[3 * part.channels] = rstd;
}

extern "C" __global__ void __launch_bounds__(threads)
    batch_norm_factors(const Step* step, const Drop* drops, float* factors, unsigned images, unsigned stride) {
    after_predecessors();
    const Drop drop = drops[blockIdx.x];
    const unsigned n = blockIdx.y * threads + threadIdx.x;
    if (n < images)
        factors[blockIdx.x * stride + n] = step->random24(n, drop.purpose, 0) < drop.threshold ? 0.0f : drop.keep;
}

EFFNETV2_KERNEL(batch_norm_owe)
EFFNETV2_KERNEL(batch_norm_evaluate)
EFFNETV2_KERNEL(batch_norm_factors)
