// Sums over the pixels of one image, 64 channels a block: thread t has the channels 8 (t % 8) .. 8 (t % 8) + 7 of
// the pixels t / 8, t / 8 + 32, ... Always in the same order.
#pragma once

#include "types.cuh"

constexpr unsigned channel_threads = 256, channel_tile = 64, channel_groups = channel_tile / 8;
constexpr unsigned pixel_lanes = channel_threads / channel_groups;

/// A thread's place: the grid is images * ceil(channels / 64) blocks, channels fastest.
struct ChannelPlace {
    /// The block's image and first channel; the first channel of the thread's eight.
    unsigned image, tile, channel;
    bool inside;

    __device__ __forceinline__ explicit ChannelPlace(unsigned channels) {
        const unsigned tiles = (channels + channel_tile - 1) / channel_tile;
        image = blockIdx.x / tiles;
        tile = (blockIdx.x - image * tiles) * channel_tile;
        channel = tile + threadIdx.x % channel_groups * 8;
        inside = channel < channels;
    }
};

/// Adds up what the threads have of each channel: into `total`, of channel tile + t in thread t < 64. Once a kernel.
template <unsigned count>
__device__ __forceinline__ void sum_channels(float (&sum)[count][8], float (&total)[count]) {
    __shared__ float warps[channel_threads / 32][count][channel_tile];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned k = 0; k < count; ++k)
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            sum[k][j] += __shfl_xor_sync(0xffffffffu, sum[k][j], 8);
            sum[k][j] += __shfl_xor_sync(0xffffffffu, sum[k][j], 16);
            if (lane < channel_groups) warps[warp][k][lane * 8 + j] = sum[k][j];
        }
    __syncthreads();
#pragma unroll
    for (unsigned k = 0; k < count; ++k) {
        total[k] = 0.0f;
        if (threadIdx.x < channel_tile)
#pragma unroll
            for (unsigned w = 0; w < channel_threads / 32; ++w) total[k] += warps[w][k][threadIdx.x];
    }
}
