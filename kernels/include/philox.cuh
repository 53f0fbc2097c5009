// Philox4x32-10 (Salmon et al. 2011), the same bits as src/random.rs.
#pragma once

#include "platform.cuh"

/// 128 random bits for a 128-bit counter under a 64-bit key.
__device__ __forceinline__ uint4 philox4x32(uint4 c, uint2 k) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
        c = make_uint4(high1 ^ c.y ^ k.x, low1, high0 ^ c.w ^ k.y, low0);
        k.x += 0x9E3779B9u;
        k.y += 0xBB67AE85u;
    }
    return c;
}

/// Number `index` of the stream (seed, epoch, image, purpose).
__device__ __forceinline__ uint32_t stream_bits(uint2 seed, uint32_t epoch, uint32_t image, uint32_t purpose,
                                                uint32_t index) {
    const uint4 block = philox4x32(make_uint4(index / 4, purpose, image, epoch), seed);
    const uint32_t pair[2] = {index & 1 ? block.y : block.x, index & 1 ? block.w : block.z};
    return index & 2 ? pair[1] : pair[0];
}
