// Squeeze-excitation: s = sigmoid(W2 silu(W1 p + b1) + b2), p the mean over pixels of a = silu(z), which s gates.
//
// y [images, pixels, channels] and dx, the gradient of a s, likewise, W1 [reduced, channels] and W2 [channels, reduced]
// are of type T, f32, f16 or bf16; everything else is f32. scale, shift, mean and rstd [channels] are the normalisation
// owed to y: z = scale y + shift, xhat = (y - mean) rstd. pooled, gate and dpool are [images, channels], hidden and
// dhidden [images, reduced]; `sums` is [5, images, channels]. Channels are a multiple of 8, `reduced` is any number;
// arrays are aligned to 16 bytes. All sums are in f32 and in a fixed order.
//
// squeeze_excite_pool: pooled = sum over pixels of silu(z) / pixels. Grid images * ceil(channels / 64), block 256. Least
//   bytes: those of y; 6 operations for each element.
// squeeze_excite_hidden: hidden = W1 pooled + b1. Grid ceil(images / 4) * ceil(reduced / 8), block 256.
// squeeze_excite_gate: gate = sigmoid(W2 silu(hidden) + b2). Grid ceil(images / 4) * ceil(channels / 256), block 256.
//   Both: 2 * reduced * channels operations for each image; least bytes the weights once.
//
// Backward, dz = (gate dx + dpool) silu'(z) being left to whoever reads it next:
// squeeze_excite_sums: for each image and channel, sums over the pixels of
//   0: dx silu'(z)   1: silu'(z)   2: dx silu'(z) xhat   3: silu'(z) xhat   4: dx silu(z), the gradient of the gate.
//   Grid as for the pool. Least bytes: those of y and dx; 22 operations for each element.
// squeeze_excite_backward_hidden: dhidden = (W2^T dlogit) silu'(hidden), dlogit = sums[4] gate (1 - gate). Grid
//   ceil(images / 4) * ceil(reduced / 32), block 256.
// squeeze_excite_backward_pool: dpool = W1^T dhidden / pixels. Grid as for the gate.
// squeeze_excite_backward_weights: adds to dW1 dhidden^T pooled, to dW2 dlogit^T silu(hidden), to db1 and db2 the sums of
//   dhidden and dlogit over images. Grid ceil(channels / 128) * ceil(reduced / 4), block 128; 4 * reduced * channels
//   operations for each image; least bytes 16 for each weight.
// squeeze_excite_backward_moments: what batch norm's backward needs, moments [2, channels], without reading a tensor:
//   sum of dz      = sum over images of gate sums[0] + dpool sums[1]
//   sum of dz xhat = sum over images of gate sums[2] + dpool sums[3].
//   Grid ceil(channels / 32), block 256. Least bytes: 24 for each image and channel.

#include "include/activation.cuh"
#include "include/channel_sums.cuh"
#include "include/ptx.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256, warps = threads / 32;
/// Images that share what a block reads of the weights.
constexpr unsigned image_tile = 4;
static_assert(threads == channel_threads, "one block size for all but the weights' gradient");

template <class T>
__device__ __forceinline__ void pool(const T* y, const float* scale, const float* shift, float* pooled,
                                     unsigned pixels, unsigned channels) {
    const ChannelPlace at(channels);
    float sum[1][8] = {}, total[1];
    if (at.inside) {
        float a[8], b[8];
        load8<Cache::read_only>(scale + at.channel, a);
        load8<Cache::read_only>(shift + at.channel, b);
        const T* from = y + at.image * pixels * channels + at.channel;
#pragma unroll 4
        for (unsigned p = threadIdx.x / channel_groups; p < pixels; p += pixel_lanes) {
            float x[8];
            load8(from + p * channels, x);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) sum[0][j] += silu(a[j] * x[j] + b[j]);
        }
    }
    sum_channels(sum, total);
    const unsigned channel = at.tile + threadIdx.x;
    if (threadIdx.x < channel_tile && channel < channels)
        pooled[at.image * channels + channel] = total[0] / float(pixels);
}

template <class T>
__device__ __forceinline__ void pixel_sums(const T* dx, const T* y, const float* scale, const float* shift,
                                           const float* mean, const float* rstd, float* sums, unsigned pixels,
                                           unsigned channels, unsigned images) {
    const ChannelPlace at(channels);
    float sum[5][8] = {}, total[5];
    if (at.inside) {
        float a[8], b[8], m[8];
        load8<Cache::read_only>(scale + at.channel, a);
        load8<Cache::read_only>(shift + at.channel, b);
        load8<Cache::read_only>(mean + at.channel, m);
        const unsigned first = at.image * pixels * channels + at.channel;
#pragma unroll 2
        for (unsigned p = threadIdx.x / channel_groups; p < pixels; p += pixel_lanes) {
            float x[8], g[8];
            load8(y + first + p * channels, x);
            load8(dx + first + p * channels, g);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                const float z = a[j] * x[j] + b[j], s = sigmoid(z), slope = silu_grad(z, s), centred = x[j] - m[j];
                sum[0][j] += g[j] * slope;
                sum[1][j] += slope;
                sum[2][j] += g[j] * slope * centred;
                sum[3][j] += slope * centred;
                sum[4][j] += g[j] * (z * s);
            }
        }
    }
    sum_channels(sum, total);
    const unsigned channel = at.tile + threadIdx.x;
    if (threadIdx.x >= channel_tile || channel >= channels) return;
    const float r = rstd[channel];
#pragma unroll
    for (unsigned k = 0; k < 5; ++k)
        sums[(k * images + at.image) * channels + channel] = k == 2 || k == 3 ? total[k] * r : total[k];
}

/// A warp for each hidden unit.
template <class T>
__device__ __forceinline__ void hidden_layer(const float* pooled, const T* weight, const float* bias, float* hidden,
                                             unsigned images, unsigned channels, unsigned reduced) {
    const unsigned tiles = (reduced + warps - 1) / warps;
    const unsigned n = blockIdx.x / tiles * image_tile, r = blockIdx.x % tiles * warps + threadIdx.x / 32;
    if (r >= reduced) return;
    const unsigned lane = threadIdx.x % 32;
    float sum[image_tile] = {};
    for (unsigned c = lane * 8; c < channels; c += 256) {
        float w[8];
        load8<Cache::read_only>(weight + r * channels + c, w);
#pragma unroll
        for (unsigned i = 0; i < image_tile; ++i) {
            if (n + i >= images) break;
            float p[8];
            load8(pooled + (n + i) * channels + c, p);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) sum[i] += w[j] * p[j];
        }
    }
#pragma unroll
    for (unsigned i = 0; i < image_tile; ++i) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
        if (lane == 0 && n + i < images) hidden[(n + i) * reduced + r] = sum[i] + bias[r];
    }
}

/// A thread for each channel: `finish(n, c, sum over r of weight(c, r) unit(n, r))`. The weights are W2 [channels,
/// reduced] if `by_channel`, else W1 [reduced, channels].
template <bool by_channel, class T, class Unit, class Finish>
__device__ __forceinline__ void to_channels(const T* weight, unsigned images, unsigned channels, unsigned reduced,
                                            Unit unit, Finish finish) {
    constexpr unsigned chunk = threads / image_tile;
    __shared__ float units[chunk][image_tile];
    const unsigned tiles = (channels + threads - 1) / threads;
    const unsigned n = blockIdx.x / tiles * image_tile, c = blockIdx.x % tiles * threads + threadIdx.x;
    float sum[image_tile] = {};
    for (unsigned first = 0; first < reduced; first += chunk) {
        const unsigned count = min(chunk, reduced - first), k = threadIdx.x % chunk, i = threadIdx.x / chunk;
        __syncthreads();
        units[k][i] = k < count && n + i < images ? unit(n + i, first + k) : 0.0f;
        __syncthreads();
        if (c >= channels) continue;
#pragma unroll 4
        for (unsigned r = 0; r < count; ++r) {
            const float w = to_float(weight[by_channel ? c * reduced + first + r : (first + r) * channels + c]);
#pragma unroll
            for (unsigned image = 0; image < image_tile; ++image) sum[image] += w * units[r][image];
        }
    }
    if (c >= channels) return;
#pragma unroll
    for (unsigned image = 0; image < image_tile; ++image)
        if (n + image < images) finish(n + image, c, sum[image]);
}

/// The gradient of what the gate's sigmoid gets.
__device__ __forceinline__ float dlogit(const float* dgate, const float* gate, unsigned index) {
    const float s = gate[index];
    return dgate[index] * (s * (1.0f - s));
}

/// A thread for each hidden unit and every eighth channel.
template <class T>
__device__ __forceinline__ void backward_hidden(const float* sums, const float* gate, const T* weight,
                                                const float* hidden, float* dhidden, unsigned images,
                                                unsigned channels, unsigned reduced) {
    __shared__ float partial[warps][image_tile][32];
    const unsigned tiles = (reduced + 31) / 32, lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const unsigned n = blockIdx.x / tiles * image_tile, r = blockIdx.x % tiles * 32 + lane;
    const float* dgate = sums + 4 * images * channels;
    float sum[image_tile] = {};
    if (r < reduced)
        for (unsigned c = slice; c < channels; c += warps) {
            const float w = to_float(weight[c * reduced + r]);
#pragma unroll
            for (unsigned i = 0; i < image_tile; ++i)
                if (n + i < images) sum[i] += w * dlogit(dgate, gate, (n + i) * channels + c);
        }
#pragma unroll
    for (unsigned i = 0; i < image_tile; ++i) partial[slice][i][lane] = sum[i];
    __syncthreads();
    if (slice >= image_tile || n + slice >= images || r >= reduced) return;
    float total = 0.0f;
    for (unsigned s = 0; s < warps; ++s) total += partial[s][slice][lane];
    const unsigned index = (n + slice) * reduced + r;
    dhidden[index] = total * silu_grad(hidden[index], sigmoid(hidden[index]));
}

} // namespace

#define EFFNETV2_SQUEEZE_EXCITE(suffix, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        squeeze_excite_pool_##suffix(const T* y, const float* scale, const float* shift, float* pooled,      \
                                     unsigned pixels, unsigned channels) {                                   \
        pool(y, scale, shift, pooled, pixels, channels);                                                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        squeeze_excite_hidden_##suffix(const float* pooled, const T* weight, const float* bias,              \
                                       float* hidden, unsigned images, unsigned channels,                    \
                                       unsigned reduced) {                                                   \
        hidden_layer(pooled, weight, bias, hidden, images, channels, reduced);                               \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        squeeze_excite_gate_##suffix(const float* hidden, const T* weight, const float* bias, float* gate,   \
                                     unsigned images, unsigned channels, unsigned reduced) {                 \
        to_channels<true>(                                                                                   \
            weight, images, channels, reduced,                                                               \
            [=](unsigned n, unsigned r) { return silu(hidden[n * reduced + r]); },                           \
            [=](unsigned n, unsigned c, float sum) { gate[n * channels + c] = sigmoid(sum + bias[c]); });    \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        squeeze_excite_sums_##suffix(const T* dx, const T* y, const float* scale, const float* shift,        \
                                     const float* mean, const float* rstd, float* sums, unsigned pixels,     \
                                     unsigned channels, unsigned images) {                                   \
        pixel_sums(dx, y, scale, shift, mean, rstd, sums, pixels, channels, images);                         \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) squeeze_excite_backward_hidden_##suffix(           \
        const float* sums, const float* gate, const T* weight, const float* hidden, float* dhidden,          \
        unsigned images, unsigned channels, unsigned reduced) {                                              \
        backward_hidden(sums, gate, weight, hidden, dhidden, images, channels, reduced);                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) squeeze_excite_backward_pool_##suffix(             \
        const float* dhidden, const T* weight, float* dpool, unsigned images, unsigned channels,             \
        unsigned reduced, unsigned pixels) {                                                                 \
        to_channels<false>(                                                                                  \
            weight, images, channels, reduced,                                                               \
            [=](unsigned n, unsigned r) { return dhidden[n * reduced + r]; },                                \
            [=](unsigned n, unsigned c, float sum) { dpool[n * channels + c] = sum / float(pixels); });      \
    }                                                                                                        \
    EFFNETV2_KERNEL(squeeze_excite_pool_##suffix)                                                            \
    EFFNETV2_KERNEL(squeeze_excite_hidden_##suffix)                                                          \
    EFFNETV2_KERNEL(squeeze_excite_gate_##suffix)                                                            \
    EFFNETV2_KERNEL(squeeze_excite_sums_##suffix)                                                            \
    EFFNETV2_KERNEL(squeeze_excite_backward_hidden_##suffix)                                                 \
    EFFNETV2_KERNEL(squeeze_excite_backward_pool_##suffix)

EFFNETV2_SQUEEZE_EXCITE(f32, float)
EFFNETV2_SQUEEZE_EXCITE(f16, f16)
EFFNETV2_SQUEEZE_EXCITE(bf16, bf16)

extern "C" __global__ void __launch_bounds__(128)
    squeeze_excite_backward_weights(const float* sums, const float* gate, const float* pooled, const float* hidden,
                                    const float* dhidden, float* dreduce, float* dreduce_bias, float* dexpand,
                                    float* dexpand_bias, unsigned images, unsigned channels, unsigned reduced) {
    constexpr unsigned block = 128, units = 4, chunk = block / units;
    __shared__ float active[chunk][units], arriving[chunk][units];
    const unsigned tiles = (channels + block - 1) / block;
    const unsigned first = blockIdx.x / tiles * units, c = blockIdx.x % tiles * block + threadIdx.x;
    const float* dgate = sums + 4 * images * channels;
    const unsigned unit = threadIdx.x % units, r = first + unit;
    float expand[units] = {}, reduce[units] = {}, expand_bias = 0.0f, reduce_bias = 0.0f;
    for (unsigned n0 = 0; n0 < images; n0 += chunk) {
        const unsigned n = n0 + threadIdx.x / units;
        const bool inside = n < images && r < reduced;
        __syncthreads();
        active[threadIdx.x / units][unit] = inside ? silu(hidden[n * reduced + r]) : 0.0f;
        arriving[threadIdx.x / units][unit] = inside ? dhidden[n * reduced + r] : 0.0f;
        __syncthreads();
        const unsigned count = min(chunk, images - n0);
        if (threadIdx.x < units)
            for (unsigned k = 0; k < count; ++k) reduce_bias += arriving[k][unit];
        if (c >= channels) continue;
#pragma unroll 4
        for (unsigned k = 0; k < count; ++k) {
            const unsigned index = (n0 + k) * channels + c;
            const float d = dlogit(dgate, gate, index), p = pooled[index];
            expand_bias += d;
#pragma unroll
            for (unsigned u = 0; u < units; ++u) {
                expand[u] += d * active[k][u];
                reduce[u] += arriving[k][u] * p;
            }
        }
    }
    if (blockIdx.x % tiles == 0 && threadIdx.x < units && r < reduced) dreduce_bias[r] += reduce_bias;
    if (c >= channels) return;
    if (first == 0) dexpand_bias[c] += expand_bias;
#pragma unroll
    for (unsigned u = 0; u < units; ++u) {
        if (first + u >= reduced) break;
        dexpand[c * reduced + first + u] += expand[u];
        dreduce[(first + u) * channels + c] += reduce[u];
    }
}

extern "C" __global__ void __launch_bounds__(threads)
    squeeze_excite_backward_moments(const float* sums, const float* gate, const float* dpool, float* moments,
                                    unsigned images, unsigned channels) {
    __shared__ float partial[warps][2][32];
    const unsigned lane = threadIdx.x % 32, slice = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    const unsigned plane = images * channels;
    float plain = 0.0f, weighted = 0.0f;
    if (c < channels)
        for (unsigned n = slice; n < images; n += warps) {
            const unsigned index = n * channels + c;
            const float g = gate[index], p = dpool[index];
            plain += g * sums[index] + p * sums[plane + index];
            weighted += g * sums[2 * plane + index] + p * sums[3 * plane + index];
        }
    partial[slice][0][lane] = plain;
    partial[slice][1][lane] = weighted;
    __syncthreads();
    if (slice >= 2 || c >= channels) return;
    float total = 0.0f;
    for (unsigned s = 0; s < warps; ++s) total += partial[s][slice][lane];
    moments[slice * channels + c] = total;
}

EFFNETV2_KERNEL(squeeze_excite_backward_weights)
EFFNETV2_KERNEL(squeeze_excite_backward_moments)
