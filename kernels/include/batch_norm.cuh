// Batch normalisation around other kernels: the vectors it is held in, and the partial sums of its two reductions with
// what becomes of them.
//
// norm [4, channels] f32 is what a reader of a raw output y applies: scale, shift, mean, rstd;
//   z = scale y + shift,  xhat = (y - mean) rstd.
// owed [3, channels] f32 is what a reader of a gradient g of z applies: a, b, c;
//   dy = a g + b y + c.
//
// A kernel that makes y or g cuts the pixels into `blocks` runs and leaves two numbers of each run and channel:
//   partial[(run * 2 + k) * channels + channel],
// k = 0 and 1 being mean and sum of squared deviations from it (forward), or the sums of g and of g xhat (backward).
// Forward, behind them, partial[2 * blocks * channels + run] is the number of pixels in the run, unless the kernel knows
// it anyway. Everything is added in a fixed order.
#pragma once

#include "platform.cuh"

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

namespace batch_norm_detail {

constexpr unsigned columns = 32;

/// The sum over runs of `term(run)`, for the channel of this thread's column; in every thread of the column.
template <unsigned threads, class Term>
__device__ __forceinline__ float sum_runs(unsigned runs, Term term, float (&shared)[threads / columns][columns]) {
    constexpr unsigned slices = threads / columns;
    const unsigned column = threadIdx.x % columns, slice = threadIdx.x / columns;
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned run = slice; run < runs; run += slices) sum += term(run);
    __syncthreads();
    shared[slice][column] = sum;
    __syncthreads();
    sum = shared[0][column];
#pragma unroll
    for (unsigned s = 1; s < slices; ++s) sum += shared[s][column];
    return sum;
}

} // namespace batch_norm_detail

/// By the last block, with all its `threads` threads: from the partial moments of channels first .. first + width - 1
/// (those that exist) their norm and running statistics. `count_of(run)`: its pixels.
template <unsigned threads, class Count>
__device__ __forceinline__ void finish_moments(const float* partial, unsigned runs, unsigned channels,
                                               unsigned first, unsigned width, const NormFinish& to,
                                               Count count_of) {
    using namespace batch_norm_detail;
    __shared__ float shared[threads / columns][columns];
    for (unsigned base = first; base < first + width && base < channels; base += columns) {
        const unsigned channel = base + threadIdx.x % columns;
        const bool inside = channel < channels && channel < first + width;
        const unsigned safe = inside ? channel : base;
        const auto mean_of = [&](unsigned run) { return __ldcg(partial + run * 2 * channels + safe); };
        const float pivot = mean_of(0);
        const float pixels =
            sum_runs<threads>(runs, [&](unsigned run) { return count_of(run); }, shared);
        const float offset = sum_runs<threads>(
            runs, [&](unsigned run) { return count_of(run) * (mean_of(run) - pivot); }, shared);
        const float mean = pivot + offset / pixels;
        const float deviations = sum_runs<threads>(
            runs,
            [&](unsigned run) {
                const float d = mean_of(run) - mean;
                return __ldcg(partial + (run * 2 + 1) * channels + safe) + count_of(run) * (d * d);
            },
            shared);
        if (!inside || threadIdx.x >= columns) continue;
        const float variance = deviations / pixels, rstd = 1.0f / sqrtf(variance + to.epsilon);
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

/// The same where the numbers of pixels lie behind the moments.
template <unsigned threads>
__device__ __forceinline__ void finish_moments(const float* partial, unsigned runs, unsigned channels,
                                               unsigned first, unsigned width, const NormFinish& to) {
    const float* counts = partial + 2 * runs * channels;
    finish_moments<threads>(partial, runs, channels, first, width, to,
                            [=](unsigned run) { return __ldcg(counts + run); });
}

/// By the last block, with all its `threads` threads: from the partial sums of channels first .. first + width - 1 (those
/// that exist) the gradients of gamma and beta and what is owed.
template <unsigned threads>
__device__ __forceinline__ void finish_owed(const float* partial, unsigned runs, unsigned channels, unsigned first,
                                            unsigned width, const OwedFinish& to) {
    using namespace batch_norm_detail;
    __shared__ float shared[threads / columns][columns];
    for (unsigned base = first; base < first + width && base < channels; base += columns) {
        const unsigned channel = base + threadIdx.x % columns;
        const bool inside = channel < channels && channel < first + width;
        const unsigned safe = inside ? channel : base;
        const auto sum = [&](unsigned k) {
            return sum_runs<threads>(
                runs, [&](unsigned run) { return __ldcg(partial + (run * 2 + k) * channels + safe); }, shared);
        };
        const float dbeta = sum(0), dgamma = sum(1);
        if (!inside || threadIdx.x >= columns) continue;
        const float scale = to.norm[channel], mean = to.norm[2 * channels + channel];
        const float slope = -scale * to.norm[3 * channels + channel] * dgamma * to.reciprocal_count;
        to.dgamma[channel] += dgamma;
        to.dbeta[channel] += dbeta;
        to.owed[channel] = scale;
        to.owed[channels + channel] = slope;
        to.owed[2 * channels + channel] = -scale * dbeta * to.reciprocal_count - slope * mean;
    }
}
