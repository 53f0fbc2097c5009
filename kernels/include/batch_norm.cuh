// Batch normalisation around other kernels: the vectors it is held in, and the partial sums of its two reductions with
// what becomes of them.
//
// norm [4, channels] f32 is what a reader of a raw output y applies: scale, shift, mean, rstd;
//   z = scale y + shift,  xhat = (y - mean) rstd.
// owed [3, channels] f32 is what a reader of a gradient g of z applies: a, b, c;
//   dy = a g + b y + c.
//
// A kernel that makes y or g cuts the pixels into runs and leaves two numbers of each run and channel:
//   partial[(run * 2 + k) * channels + channel],
// k = 0 and 1 being mean and sum of squared deviations from it (forward), or the sums of g and of g xhat (backward).
// The last block adds them up, always in the same order. `partial` is aligned to 16 bytes, channels are a multiple of 8.
#pragma once

#include "platform.cuh"
#include "ptx/memory.cuh"

/// What becomes of the moments of a batch. Arrays are [channels].
struct NormFinish {
    const float *gamma, *beta;
    /// Moved towards the batch by `momentum`.
    float *running_mean, *running_var;
    /// [4, channels], written.
    float* norm;
    /// `correction` is what the biased variance is multiplied with before it enters the running one.
    float epsilon, momentum, correction;
};

/// What becomes of the sums of a backward pass. Arrays are [channels] but for the two noted.
struct OwedFinish {
    /// Of the layer whose output was normalised, [4, channels].
    const float* norm;
    /// The sums are added to them.
    float *dgamma, *dbeta;
    /// [3, channels], written.
    float* owed;
    /// One over the pixels of the batch.
    float reciprocal_count;
};

/// Sums and shifted sums of one channel over some pixels, by a thread. The pivot is any value near them, so that a mean
/// far larger than the deviation costs no digits.
struct ShiftedSums {
    float sum = 0.0f, squares = 0.0f;

    __device__ __forceinline__ void add(float y, float pivot) {
        const float d = y - pivot;
        sum += d;
        squares += d * d;
    }
    __device__ __forceinline__ float mean(float pivot, float count) const { return pivot + sum / count; }
    __device__ __forceinline__ float deviations(float count) const {
        return fmaxf(squares - sum * (sum / count), 0.0f);
    }
};

/// What the sums of g and of g xhat of one channel become.
__device__ __forceinline__ void settle(const OwedFinish& to, unsigned channels, unsigned channel, float dbeta,
                                       float dgamma) {
    const float scale = to.norm[channel], mean = to.norm[2 * channels + channel];
    const float slope = -scale * to.norm[3 * channels + channel] * dgamma * to.reciprocal_count;
    to.dgamma[channel] += dgamma;
    to.dbeta[channel] += dbeta;
    to.owed[channel] = scale;
    to.owed[channels + channel] = slope;
    to.owed[2 * channels + channel] = -scale * dbeta * to.reciprocal_count - slope * mean;
}

namespace batch_norm_detail {

/// What the last block finishes at once: thread t reads the channels from 4 (t % 8) on, of the runs t / 8, t / 8 +
/// threads / 8, ...
constexpr unsigned quads = 8, columns = 4 * quads;

/// Four floats that other blocks have written.
__device__ __forceinline__ void load4(const float* from, float (&x)[4] EFFNETV2_AT_PARAMETER) {
    const float4 four = load16<float4, Cache::l2>(from EFFNETV2_AT_ARGUMENT);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

template <unsigned threads> struct ColumnSums {
    static_assert(threads % 32 == 0 && threads >= columns, "whole warps, and a thread for each column");
    float warps[threads / 32][columns], total[columns];

    /// Adds up what the threads have of each column: into `total`, which stays until the next call.
    __device__ __forceinline__ void add(const float (&value)[4]) {
        const unsigned lane = threadIdx.x % 32;
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            float sum = value[j];
            sum += __shfl_xor_sync(0xffffffffu, sum, quads);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2 * quads);
            if (lane < quads) warps[threadIdx.x / 32][4 * lane + j] = sum;
        }
        __syncthreads();
        if (threadIdx.x < columns) {
            float sum = warps[0][threadIdx.x];
            for (unsigned w = 1; w < threads / 32; ++w) sum += warps[w][threadIdx.x];
            total[threadIdx.x] = sum;
        }
        __syncthreads();
    }
};

/// As `finish_owed`, the sum number k of run r and channel c being partial[k * sum_stride + r * run_stride + c].
template <unsigned threads>
__device__ __forceinline__ void finish_owed(const float* partial, unsigned runs, unsigned run_stride,
                                            unsigned sum_stride, unsigned channels, unsigned first, unsigned width,
                                            const OwedFinish& to) {
    constexpr unsigned slices = threads / quads;
    __shared__ ColumnSums<threads> sums;
    const unsigned end = min(first + width, channels), slice = threadIdx.x / quads, quad = threadIdx.x % quads * 4;
    for (unsigned base = first; base < end; base += columns) {
        const float* from = partial + (base + quad < end ? base + quad : base);
        float both[2][4] = {};
#pragma unroll 4
        for (unsigned run = slice; run < runs; run += slices)
#pragma unroll
            for (unsigned k = 0; k < 2; ++k) {
                float x[4];
                load4(from + k * sum_stride + run * run_stride, x);
#pragma unroll
                for (unsigned j = 0; j < 4; ++j) both[k][j] += x[j];
            }
        sums.add(both[0]);
        const float dbeta = sums.total[threadIdx.x % columns];
        sums.add(both[1]);
        const float dgamma = sums.total[threadIdx.x % columns];
        const unsigned channel = base + threadIdx.x;
        if (threadIdx.x >= columns || channel >= end) continue;
        settle(to, channels, channel, dbeta, dgamma);
    }
}

} // namespace batch_norm_detail

/// By the last block, with all its `threads` threads: from the partial moments of channels first .. first + width - 1
/// (those that exist; both multiples of 4) their norm and running statistics. Of all `pixels`, run r has `pixels_of(r)`,
/// which is not 0.
template <unsigned threads, class PixelsOf>
__device__ __forceinline__ void finish_moments(const float* partial, unsigned runs, unsigned channels,
                                               unsigned first, unsigned width, const NormFinish& to,
                                               unsigned pixels, PixelsOf pixels_of) {
    using namespace batch_norm_detail;
    constexpr unsigned slices = threads / quads;
    __shared__ ColumnSums<threads> sums;
    const unsigned end = min(first + width, channels), slice = threadIdx.x / quads, quad = threadIdx.x % quads * 4;
    for (unsigned base = first; base < end; base += columns) {
        const float* from = partial + (base + quad < end ? base + quad : base);
        // Offsets from the first run's mean, so that a mean far larger than the deviation costs no digits.
        float pivot[4], offset[4] = {}, deviations[4] = {};
        load4(from, pivot);
#pragma unroll 4
        for (unsigned run = slice; run < runs; run += slices) {
            float m[4];
            load4(from + run * 2 * channels, m);
            const float n = float(pixels_of(run));
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) offset[j] += n * (m[j] - pivot[j]);
        }
        sums.add(offset);
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) pivot[j] += sums.total[quad + j] / float(pixels);
        if (slice == 0)
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) sums.warps[0][quad + j] = pivot[j];
        __syncthreads();
        const float mean = sums.warps[0][threadIdx.x % columns];
        __syncthreads();
#pragma unroll 4
        for (unsigned run = slice; run < runs; run += slices) {
            float m[4], q[4];
            load4(from + run * 2 * channels, m);
            load4(from + (run * 2 + 1) * channels, q);
            const float n = float(pixels_of(run));
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                const float d = m[j] - pivot[j];
                deviations[j] += q[j] + n * (d * d);
            }
        }
        sums.add(deviations);
        const unsigned channel = base + threadIdx.x;
        if (threadIdx.x >= columns || channel >= end) continue;
        const float variance = sums.total[threadIdx.x] / float(pixels), rstd = 1.0f / sqrtf(variance + to.epsilon);
        const float scale = to.gamma[channel] * rstd;
        to.norm[channel] = scale;
        to.norm[channels + channel] = to.beta[channel] - scale * mean;
        to.norm[2 * channels + channel] = mean;
        to.norm[3 * channels + channel] = rstd;
        float& running_mean = to.running_mean[channel];
        float& running_var = to.running_var[channel];
        running_mean += to.momentum * (mean - running_mean);
        running_var += to.momentum * (variance * to.correction - running_var);
    }
}

/// By the last block, with all its `threads` threads: from the partial sums of channels first .. first + width - 1 (those
/// that exist; both multiples of 4) the gradients of gamma and beta and what is owed.
template <unsigned threads>
__device__ __forceinline__ void finish_owed(const float* partial, unsigned runs, unsigned channels, unsigned first,
                                            unsigned width, const OwedFinish& to) {
    batch_norm_detail::finish_owed<threads>(partial, runs, 2 * channels, channels, channels, first, width, to);
}
