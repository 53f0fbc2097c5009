// 16-byte loads and stores with cache hints.
#pragma once

#include "../platform.cuh"

/// What the caller knows about the next use of a line. Only a hint, and only for global memory.
enum class Cache {
    /// Nothing; also right for shared memory.
    normal,
    /// The whole kernel only reads it, and other blocks soon read it again: through the read-only path.
    read_only,
    /// Nobody reads it again soon: evict first.
    streaming,
    /// Other blocks of the same kernel have written it: past the first level, which is not coherent.
    l2,
};

/// Loads 16 bytes, aligned to 16, as a Vector (uint4 or float4).
template <class Vector, Cache cache = Cache::normal>
__device__ __forceinline__ Vector load16(const void* from EFFNETV2_AT_PARAMETER) {
    static_assert(sizeof(Vector) == 16, "a vector of 16 bytes");
    const Vector* address = static_cast<const Vector*>(from);
#ifdef __CUDACC__
    if constexpr (cache == Cache::read_only) return __ldg(address);
    if constexpr (cache == Cache::streaming) return __ldcs(address);
    if constexpr (cache == Cache::l2) return __ldcg(address);
    return *address;
#else
    return ::host::load(address, at);
#endif
}

/// Stores 16 bytes, aligned to 16.
template <Cache cache = Cache::normal, class Vector>
__device__ __forceinline__ void store16(void* to, const Vector& value EFFNETV2_AT_PARAMETER) {
    static_assert(sizeof(Vector) == 16, "a vector of 16 bytes");
    Vector* address = static_cast<Vector*>(to);
#ifdef __CUDACC__
    if constexpr (cache == Cache::streaming)
        __stcs(address, value);
    else
        *address = value;
#else
    ::host::store(address, value, at);
#endif
}

#ifdef __CUDACC__
/// Address of shared memory as PTX instructions want it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif
