// What the random numbers of a training step depend on. It lies on the device, so that a captured graph sees new ones.
#pragma once

#include "philox.cuh"

/// src/kernels/step.rs writes it, and behind it the index of each image in its dataset.
struct Step {
    uint2 seed;
    unsigned epoch;
    /// What the loss's gradient is multiplied with.
    float loss_scale;

    /// The top 24 of number `index` of the random bits that image n of the batch has for a purpose.
    __device__ __forceinline__ unsigned random24(unsigned n, unsigned purpose, unsigned index) const {
        const unsigned image = reinterpret_cast<const unsigned*>(this + 1)[n];
        return stream_bits(seed, epoch, image, purpose, index) >> 8;
    }
};
