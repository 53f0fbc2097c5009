// Squeeze-excitation: s = sigmoid(W2 silu(W1 p + b1) + b2), p the mean over pixels of a = silu(z), which s gates.
//
// y [images, pixels, channels] and dx, the gradient of a s, likewise, W1 [reduced, channels] and W2 [channels, reduced]
// are of type T, f32, f16 or bf16; everything else is f32. scale, shift, mean and rstd [channels] are the normalisation
// owed to y: z = scale y + shift, xhat = (y - mean) rstd. pooled, gate and dpool are [images, channels], hidden and
// dhidden [images, reduced]; `sums` is [5, images, channels]. Channels are a multiple of 8, `reduced` is any number up to
// 8192; arrays are aligned to 16 bytes. `partial` and `counters` are scratch memory, the counters 0 before and after. All
// sums are in f32 and in a fixed order.
//
// squeeze_excite_forward: pooled, hidden = W1 pooled + b1, and the gate. Each block pools 64 channels of an image and adds
//   what they contribute to all hidden units to partial [images, ceil(channels / 64), reduced]; the last block of an image
//   does the second layer. Grid images * ceil(channels / 64), block 256, 4 * reduced bytes of dynamic shared memory, a
//   counter for each image. Least bytes: those of y, and the weights once; 6 operations for each element, 4 * reduced *
//   channels for each image.
//
// Backward, dz = (gate dx + dpool) silu'(z) being left to whoever reads it next:
// squeeze_excite_sums: for each image and channel, sums over the pixels of
//   0: dx silu'(z)   1: silu'(z)   2: dx silu'(z) xhat   3: silu'(z) xhat   4: dx silu(z), the gradient of the gate.
//   Grid images * ceil(channels / 64), block 256. Least bytes: those of y and dx; 22 operations for each element.
// squeeze_excite_backward_hidden: dhidden = (W2^T dlogit) silu'(hidden), dlogit = sums[4] gate (1 - gate). Each block
//   leaves what 64 channels contribute for 4 images in partial [ceil(channels / 64), images, reduced]; the last one of the
//   4 images adds up. Grid ceil(images / 4) * ceil(channels / 64), block 256, a counter for each 4 images. Least bytes: W2
//   once, and 8 for each image and channel; 2 * reduced * channels operations for each image.
// squeeze_excite_backward: dpool = W1^T dhidden / pixels; adds to dW1 dhidden^T pooled, to dW2 dlogit^T silu(hidden), to
//   db1 and db2 the sums of dhidden and dlogit over images; and does what batch norm's backward has to do, without reading
//   a tensor, for
//   sum of dz      = sum over images of gate sums[0] + dpool sums[1]
//   sum of dz xhat = sum over images of gate sums[2] + dpool sums[3].
//   Grid ceil(channels / 32), block 256. Least bytes: W1 once, 16 for each weight, 32 for each image and channel; 6 *
//   reduced * channels operations for each image.

#include "include/activation.cuh"
#include "include/batch_norm.cuh"
#include "include/channel_sums.cuh"
#include "include/last_block.cuh"
#include "include/predecessors.cuh"
#include "include/ptx.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256, warps = threads / 32;
static_assert(threads == channel_threads, "one block size for the family");

/// gate = sigmoid(W2 active + b2) for one image; `active` lies in shared memory.
template <class T>
__device__ __forceinline__ void second_layer(const float* active, const T* weight, const float* bias, float* gate,
                                             unsigned channels, unsigned reduced) {
    // Four threads for each channel, and four channels for each thread.
    constexpr unsigned share = 4, many = 4, step = threads / share;
    const unsigned part = threadIdx.x % share;
    for (unsigned base = threadIdx.x / share; base - threadIdx.x / share < channels; base += many * step) {
        float sum[many] = {};
        if (reduced % 8 == 0) {
#pragma unroll 2
            for (unsigned r = part * 8; r < reduced; r += share * 8) {
                float a[8];
                load8(active + r, a);
#pragma unroll
                for (unsigned k = 0; k < many; ++k) {
                    const unsigned c = base + k * step;
                    if (c >= channels) break;
                    float w[8];
                    load8<Cache::read_only>(weight + c * reduced + r, w);
#pragma unroll
                    for (unsigned j = 0; j < 8; ++j) sum[k] += w[j] * a[j];
                }
            }
        } else {
#pragma unroll 2
            for (unsigned r = part; r < reduced; r += share)
#pragma unroll
                for (unsigned k = 0; k < many; ++k) {
                    const unsigned c = base + k * step;
                    if (c < channels) sum[k] += to_float(weight[c * reduced + r]) * active[r];
                }
        }
#pragma unroll
        for (unsigned k = 0; k < many; ++k) {
            const unsigned c = base + k * step;
            sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 1);
            sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 2);
            if (part == 0 && c < channels) gate[c] = sigmoid(sum[k] + bias[c]);
        }
    }
}

template <class T>
__device__ __forceinline__ void forward(const T* y, const float* scale, const float* shift, const T* reduce,
                                        const float* reduce_bias, const T* expand, const float* expand_bias,
                                        float* pooled, float* hidden, float* gate, float* partial,
                                        unsigned* counters, unsigned pixels, unsigned channels, unsigned reduced) {
    __shared__ float4 means[channel_tile / 4];
    float* mean = reinterpret_cast<float*>(means);
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
    if (threadIdx.x < channel_tile) {
        mean[threadIdx.x] = total[0] / float(pixels);
        if (channel < channels) pooled[at.image * channels + channel] = mean[threadIdx.x];
    }
    __syncthreads();

    // A row of W1 for each eight threads.
    const unsigned tiles = (channels + channel_tile - 1) / channel_tile, group = threadIdx.x % channel_groups;
    float* of_image = partial + at.image * tiles * reduced;
    float x[8];
    load8(mean + group * 8, x);
#pragma unroll 2
    for (unsigned base = 0; base < reduced; base += pixel_lanes) {
        const unsigned r = base + threadIdx.x / channel_groups;
        float dot = 0.0f;
        if (at.inside && r < reduced) {
            float w[8];
            load8<Cache::read_only>(reduce + r * channels + at.channel, w);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) dot += w[j] * x[j];
        }
#pragma unroll
        for (int offset = channel_groups / 2; offset > 0; offset /= 2)
            dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        if (group == 0 && r < reduced) of_image[at.tile / channel_tile * reduced + r] = dot;
    }
    if (!is_last_block(counters + at.image, tiles)) return;

    float* active = dynamic_shared<float>();
    for (unsigned r = threadIdx.x; r < reduced; r += threads) {
        float h = 0.0f;
#pragma unroll 4
        for (unsigned tile = 0; tile < tiles; ++tile) h += __ldcg(of_image + tile * reduced + r);
        h += reduce_bias[r];
        hidden[at.image * reduced + r] = h;
        active[r] = silu(h);
    }
    __syncthreads();
    second_layer(active, expand, expand_bias, gate + at.image * channels, channels, reduced);
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

/// The gradient of what the gate's sigmoid gets.
__device__ __forceinline__ float dlogit(const float* dgate, const float* gate, unsigned index) {
    const float s = gate[index];
    return dgate[index] * (s * (1.0f - s));
}

template <class T>
__device__ __forceinline__ void backward_hidden(const float* sums, const float* gate, const T* weight,
                                                const float* hidden, float* dhidden, float* partial,
                                                unsigned* counters, unsigned images, unsigned channels,
                                                unsigned reduced) {
    /// Images that share what a block reads of the weights; channels of a warp.
    constexpr unsigned group = 4, share = channel_tile / warps;
    static_assert(group * channel_tile == threads, "a thread for each image and channel");
    __shared__ float4 logits[channel_tile];
    __shared__ float slices[warps][group][32];
    const unsigned tiles = (channels + channel_tile - 1) / channel_tile;
    const unsigned n = blockIdx.x / tiles * group, tile = blockIdx.x % tiles;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    {
        const unsigned c = tile * channel_tile + threadIdx.x % channel_tile, i = threadIdx.x / channel_tile;
        const bool inside = c < channels && n + i < images;
        reinterpret_cast<float*>(logits)[threadIdx.x % channel_tile * group + i] =
            inside ? dlogit(sums + 4 * images * channels, gate, (n + i) * channels + c) : 0.0f;
    }
    __syncthreads();
    for (unsigned base = 0; base < reduced; base += 32) {
        const unsigned r = base + lane;
        float sum[group] = {};
        if (r < reduced)
#pragma unroll
            for (unsigned k = 0; k < share; ++k) {
                const unsigned of_tile = warp * share + k, c = tile * channel_tile + of_tile;
                if (c >= channels) break;
                const float w = to_float(weight[c * reduced + r]);
                const float4 d = logits[of_tile];
                sum[0] += w * d.x, sum[1] += w * d.y, sum[2] += w * d.z, sum[3] += w * d.w;
            }
#pragma unroll
        for (unsigned i = 0; i < group; ++i) slices[warp][i][lane] = sum[i];
        __syncthreads();
        if (warp < group && n + warp < images && r < reduced) {
            float total = 0.0f;
#pragma unroll
            for (unsigned w = 0; w < warps; ++w) total += slices[w][warp][lane];
            partial[(tile * images + n + warp) * reduced + r] = total;
        }
        __syncthreads();
    }
    if (!is_last_block(counters + n / group, tiles)) return;
    const unsigned first = n * reduced, end = min(n + group, images) * reduced;
    for (unsigned index = first + threadIdx.x; index < end; index += threads) {
        float total = 0.0f;
#pragma unroll 4
        for (unsigned t = 0; t < tiles; ++t) total += __ldcg(partial + t * images * reduced + index);
        dhidden[index] = total * silu_grad(hidden[index], sigmoid(hidden[index]));
    }
}

/// The gradients of both layers, [reduced, channels], [reduced], [channels, reduced] and [channels].
struct LayerGradients {
    float *reduce, *reduce_bias, *expand, *expand_bias;
};

/// All images, and 32 hidden units at a time, of 32 channels: lane l of each warp has channel l.
template <class T>
__device__ __forceinline__ void backward(const float* sums, const float* gate, const float* pooled,
                                         const float* hidden, const float* dhidden, const T* weight, float* dpool,
                                         unsigned images, unsigned channels, unsigned reduced, unsigned pixels,
                                         const LayerGradients& gradients, const OwedFinish& to) {
    /// Hidden units and images of a warp.
    constexpr unsigned side = 32, share = side / warps;
    /// By image and unit; W1 by unit and channel; and what is on the way from channels to units.
    __shared__ float4 arriving[side][side / share], active[side][side / share];
    __shared__ float weights[side][side], turned[side][side + 1];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned tile = blockIdx.x * side, c = tile + lane;
    const bool inside = c < channels;
    const float* dgate = sums + 4 * images * channels;
    float expand_bias = 0.0f;
    for (unsigned r0 = 0; r0 < reduced; r0 += side) {
        float expand[share] = {}, reduce[share] = {}, reduce_bias = 0.0f;
        for (unsigned n0 = 0; n0 < images; n0 += side) {
            __syncthreads();
#pragma unroll
            for (unsigned k = 0; k < share; ++k) {
                const unsigned row = warp + k * warps, n = n0 + row, r = r0 + lane;
                const bool exists = n < images && r < reduced;
                reinterpret_cast<float*>(arriving[row])[lane] = exists ? dhidden[n * reduced + r] : 0.0f;
                reinterpret_cast<float*>(active[row])[lane] = exists ? silu(hidden[n * reduced + r]) : 0.0f;
                weights[row][lane] =
                    inside && r0 + row < reduced ? to_float(weight[(r0 + row) * channels + c]) : 0.0f;
            }
            __syncthreads();
            const unsigned count = min(side, images - n0);
            if (blockIdx.x == 0 && warp == 0)
                for (unsigned k = 0; k < count; ++k) reduce_bias += reinterpret_cast<float*>(arriving[k])[lane];
            if (!inside) continue;
#pragma unroll 4
            for (unsigned k = 0; k < count; ++k) {
                const unsigned index = (n0 + k) * channels + c;
                const float d = dlogit(dgate, gate, index), p = pooled[index];
                const float4 a = active[k][warp], h = arriving[k][warp];
                expand[0] += d * a.x, expand[1] += d * a.y, expand[2] += d * a.z, expand[3] += d * a.w;
                reduce[0] += p * h.x, reduce[1] += p * h.y, reduce[2] += p * h.z, reduce[3] += p * h.w;
                if (r0 == 0) expand_bias += d;
            }
            float sum[share] = {};
#pragma unroll
            for (unsigned q = 0; q < side / share; ++q)
#pragma unroll
                for (unsigned i = 0; i < share; ++i) {
                    const float4 h = arriving[warp * share + i][q];
                    sum[i] += weights[4 * q][lane] * h.x;
                    sum[i] += weights[4 * q + 1][lane] * h.y;
                    sum[i] += weights[4 * q + 2][lane] * h.z;
                    sum[i] += weights[4 * q + 3][lane] * h.w;
                }
#pragma unroll
            for (unsigned i = 0; i < share; ++i) {
                const unsigned n = n0 + warp * share + i;
                if (n >= images) break;
                float& to_image = dpool[n * channels + c];
                if (r0 > 0) sum[i] += to_image;
                to_image = r0 + side < reduced ? sum[i] : sum[i] / float(pixels);
            }
        }
#pragma unroll
        for (unsigned u = 0; u < share; ++u) {
            const unsigned r = r0 + warp * share + u;
            turned[lane][warp * share + u] = expand[u];
            if (inside && r < reduced) gradients.reduce[r * channels + c] += reduce[u];
        }
        __syncthreads();
        const unsigned r = r0 + lane;
        if (r >= reduced) continue;
        if (blockIdx.x == 0 && warp == 0) gradients.reduce_bias[r] += reduce_bias;
#pragma unroll
        for (unsigned k = 0; k < share; ++k) {
            const unsigned row = warp + k * warps;
            if (tile + row < channels) gradients.expand[(tile + row) * reduced + r] += turned[row][lane];
        }
    }
    if (inside && warp == 0) gradients.expand_bias[c] += expand_bias;

    const unsigned plane = images * channels;
    float plain = 0.0f, weighted = 0.0f;
    if (inside)
        for (unsigned n0 = warp * share; n0 < images; n0 += side)
#pragma unroll
            for (unsigned i = 0; i < share; ++i) {
                // Of the images whose dpool this thread has written.
                const unsigned n = n0 + i, index = n * channels + c;
                if (n >= images) break;
                const float g = gate[index], p = dpool[index];
                plain += g * sums[index] + p * sums[plane + index];
                weighted += g * sums[2 * plane + index] + p * sums[3 * plane + index];
            }
    __syncthreads();
    weights[warp][lane] = plain;
    weights[warps + warp][lane] = weighted;
    __syncthreads();
    if (warp != 0 || !inside) return;
    plain = weighted = 0.0f;
    for (unsigned w = 0; w < warps; ++w) {
        plain += weights[w][lane];
        weighted += weights[warps + w][lane];
    }
    settle(to, channels, c, plain, weighted);
}

} // namespace

#define EFFNETV2_SQUEEZE_EXCITE(suffix, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(threads) squeeze_excite_forward_##suffix(                   \
        const T* y, const float* scale, const float* shift, const T* reduce, const float* reduce_bias,       \
        const T* expand, const float* expand_bias, float* pooled, float* hidden, float* gate,                \
        float* partial, unsigned* counters, unsigned pixels, unsigned channels, unsigned reduced) {          \
        after_predecessors();                                                                                \
        forward(y, scale, shift, reduce, reduce_bias, expand, expand_bias, pooled, hidden, gate, partial,    \
                counters, pixels, channels, reduced);                                                        \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        squeeze_excite_sums_##suffix(const T* dx, const T* y, const float* scale, const float* shift,        \
                                     const float* mean, const float* rstd, float* sums, unsigned pixels,     \
                                     unsigned channels, unsigned images) {                                   \
        after_predecessors();                                                                                \
        pixel_sums(dx, y, scale, shift, mean, rstd, sums, pixels, channels, images);                         \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) squeeze_excite_backward_hidden_##suffix(           \
        const float* sums, const float* gate, const T* weight, const float* hidden, float* dhidden,          \
        float* partial, unsigned* counters, unsigned images, unsigned channels, unsigned reduced) {          \
        after_predecessors();                                                                                \
        backward_hidden(sums, gate, weight, hidden, dhidden, partial, counters, images, channels, reduced);  \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) squeeze_excite_backward_##suffix(                  \
        const float* sums, const float* gate, const float* pooled, const float* hidden,                      \
        const float* dhidden, const T* weight, float* dpool, float* dreduce, float* dreduce_bias,            \
        float* dexpand, float* dexpand_bias, unsigned images, unsigned channels, unsigned reduced,           \
        unsigned pixels, const OwedFinish to) {                                                              \
        after_predecessors();                                                                                \
        backward(sums, gate, pooled, hidden, dhidden, weight, dpool, images, channels, reduced, pixels,      \
                 {dreduce, dreduce_bias, dexpand, dexpand_bias}, to);                                        \
    }                                                                                                        \
    EFFNETV2_KERNEL(squeeze_excite_forward_##suffix)                                                         \
    EFFNETV2_KERNEL(squeeze_excite_sums_##suffix)                                                            \
    EFFNETV2_KERNEL(squeeze_excite_backward_hidden_##suffix)                                                 \
    EFFNETV2_KERNEL(squeeze_excite_backward_##suffix)

EFFNETV2_SQUEEZE_EXCITE(f32, float)
EFFNETV2_SQUEEZE_EXCITE(f16, f16)
EFFNETV2_SQUEEZE_EXCITE(bf16, bf16)
