// The head around its classifier: global average pool with dropout, softmax cross entropy, and the pool's backward.
//
// y [images, pixels, channels], dz likewise, features and dfeatures [images, channels], logits and dlogits [images,
// classes] are of type T, f32, f16 or bf16; everything else is f32. scale, shift, mean and rstd [channels] are the
// normalisation owed to y: z = scale y + shift, xhat = (y - mean) rstd. Channels are a multiple of 8, arrays aligned
// to 16 bytes. `step` is as in include/step.cuh. All sums are in f32 and in a fixed order.
//
// head_pool: features[n, c] = f(n, c) / pixels sum over pixels of silu(z).
//   f is 0 where the top 24 bits of number c of the stream (seed, epoch, image, 8) are below `threshold`, else `keep`;
//   where the threshold is 0, `step` is not read and may be null.
//   Grid images * ceil(channels / 64), block 256. Least bytes: those of y; 6 operations for each element.
//
// head_pool_backward: dz[n, p, c] = f(n, c) dfeatures[n, c] / pixels silu'(z), and for each image and channel the sums
//   that batch norm's backward needs, sums [2, images, channels]: of dz and of dz xhat, before dz is rounded. The same
//   grid. Least bytes: y and dz once; 14 operations for each element.
//
// head_cross_entropy: with p = softmax(logits[n]) and m = sum_k t_k, losses[n] = -sum_k t_k log p_k and dlogits[n, k] =
//   loss_scale / images (m p_k - t_k). Any number of classes. Grid images, block 256. Least bytes for each logit: 4 and
//   twice the size of T; an exponential and 8 operations.
//
// head_mean_loss: mean = sum of losses / images, in f64. Grid 1, block 256.

#include "include/activation.cuh"
#include "include/channel_sums.cuh"
#include "include/predecessors.cuh"
#include "include/ptx.cuh"
#include "include/step.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256, warps = threads / 32;
constexpr unsigned dropout_purpose = 8;
static_assert(threads == channel_threads, "one block size for the family");

__device__ __forceinline__ float dropout(const Step* step, unsigned image, unsigned channel, unsigned threshold,
                                         float keep) {
    if (threshold == 0) return keep;
    return step->random24(image, dropout_purpose, channel) < threshold ? 0.0f : keep;
}

template <class T>
__device__ __forceinline__ void pool(const T* y, const float* scale, const float* shift, const Step* step,
                                     T* features, unsigned pixels, unsigned channels, unsigned threshold,
                                     float keep) {
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
    if (threadIdx.x >= channel_tile || channel >= channels) return;
    const float mean = total[0] / float(pixels) * dropout(step, at.image, channel, threshold, keep);
    features[at.image * channels + channel] = from_float<T>(mean);
}

template <class T>
__device__ __forceinline__ void pool_backward(const T* dfeatures, const T* y, const float* scale,
                                              const float* shift, const float* mean, const float* rstd,
                                              const Step* step, T* dz, float* sums, unsigned pixels,
                                              unsigned channels, unsigned images, unsigned threshold, float keep) {
    __shared__ float arriving[channel_tile];
    const ChannelPlace at(channels);
    const unsigned channel = at.tile + threadIdx.x;
    const bool owner = threadIdx.x < channel_tile && channel < channels;
    if (owner)
        arriving[threadIdx.x] = to_float(dfeatures[at.image * channels + channel]) / float(pixels) *
                                dropout(step, at.image, channel, threshold, keep);
    __syncthreads();
    float sum[2][8] = {}, total[2];
    if (at.inside) {
        float a[8], b[8], m[8], d[8];
        load8<Cache::read_only>(scale + at.channel, a);
        load8<Cache::read_only>(shift + at.channel, b);
        load8<Cache::read_only>(mean + at.channel, m);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) d[j] = arriving[at.channel - at.tile + j];
        const unsigned first = at.image * pixels * channels + at.channel;
#pragma unroll 2
        for (unsigned p = threadIdx.x / channel_groups; p < pixels; p += pixel_lanes) {
            float x[8], g[8];
            load8<Cache::streaming>(y + first + p * channels, x);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                const float z = a[j] * x[j] + b[j];
                g[j] = d[j] * silu_grad(z, sigmoid(z));
                sum[0][j] += g[j];
                sum[1][j] += g[j] * (x[j] - m[j]);
            }
            store8(dz + first + p * channels, g);
        }
    }
    sum_channels(sum, total);
    if (!owner) return;
    const unsigned index = at.image * channels + channel;
    sums[index] = total[0];
    sums[images * channels + index] = total[1] * rstd[channel];
}

struct Sum {
    template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

/// All values of the block joined, in every thread: pairs within a warp, then the warps in order.
template <class T, class Join> __device__ __forceinline__ T block_join(T value, Join join, T* shared) {
    for (int offset = 16; offset > 0; offset /= 2)
        value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (unsigned warp = 1; warp < warps; ++warp) value = join(value, shared[warp]);
    return value;
}

template <class T>
__device__ __forceinline__ void cross_entropy(const T* logits, const float* targets, const Step* step,
                                              float* losses, T* dlogits, unsigned classes, unsigned images) {
    __shared__ float shared[4][warps];
    const unsigned first = blockIdx.x * classes;
    float top = -INFINITY;
#pragma unroll 4
    for (unsigned k = threadIdx.x; k < classes; k += threads) top = fmaxf(top, to_float(logits[first + k]));
    top = block_join(top, Largest(), shared[0]);
    float sum = 0.0f, mass = 0.0f, below = 0.0f;
#pragma unroll 4
    for (unsigned k = threadIdx.x; k < classes; k += threads) {
        const float l = to_float(logits[first + k]) - top, t = targets[first + k];
        sum += expf(l);
        mass += t;
        below += t * l;
    }
    sum = block_join(sum, Sum(), shared[1]);
    mass = block_join(mass, Sum(), shared[2]);
    below = block_join(below, Sum(), shared[3]);
    // Both terms are positive: nothing cancels.
    if (threadIdx.x == 0) losses[blockIdx.x] = mass * logf(sum) - below;
    const float scale = step->loss_scale / float(images), share = mass / sum;
#pragma unroll 4
    for (unsigned k = threadIdx.x; k < classes; k += threads) {
        const float e = expf(to_float(logits[first + k]) - top);
        dlogits[first + k] = from_float<T>(scale * (share * e - targets[first + k]));
    }
}

} // namespace

#define EFFNETV2_HEAD(suffix, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        head_pool_##suffix(const T* y, const float* scale, const float* shift, const Step* step,             \
                           T* features, unsigned pixels, unsigned channels, unsigned threshold,              \
                           float keep) {                                                                     \
        after_predecessors();                                                                                \
        pool(y, scale, shift, step, features, pixels, channels, threshold, keep);                            \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads) head_pool_backward_##suffix(                       \
        const T* dfeatures, const T* y, const float* scale, const float* shift, const float* mean,           \
        const float* rstd, const Step* step, T* dz, float* sums, unsigned pixels, unsigned channels,         \
        unsigned images, unsigned threshold, float keep) {                                                   \
        after_predecessors();                                                                                \
        pool_backward(dfeatures, y, scale, shift, mean, rstd, step, dz, sums, pixels, channels, images,      \
                      threshold, keep);                                                                      \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads)                                                    \
        head_cross_entropy_##suffix(const T* logits, const float* targets, const Step* step, float* losses,  \
                                    T* dlogits, unsigned classes, unsigned images) {                         \
        after_predecessors();                                                                                \
        cross_entropy(logits, targets, step, losses, dlogits, classes, images);                              \
    }                                                                                                        \
    EFFNETV2_KERNEL(head_pool_##suffix)                                                                      \
    EFFNETV2_KERNEL(head_pool_backward_##suffix)                                                             \
    EFFNETV2_KERNEL(head_cross_entropy_##suffix)

EFFNETV2_HEAD(f32, float)
EFFNETV2_HEAD(f16, f16)
EFFNETV2_HEAD(bf16, bf16)

extern "C" __global__ void __launch_bounds__(threads)
    head_mean_loss(const float* losses, float* mean, unsigned images) {
    after_predecessors();
    __shared__ double shared[warps];
    double sum = 0.0;
    for (unsigned n = threadIdx.x; n < images; n += threads) sum += losses[n];
    sum = block_join(sum, Sum(), shared);
    if (threadIdx.x == 0) *mean = float(sum / double(images));
}

EFFNETV2_KERNEL(head_mean_loss)
