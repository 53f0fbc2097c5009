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

/// Loads `count` floats, 2 or 4, from shared memory where it is written, every time: the assembler would keep in registers
/// what a loop reads again and again, and spill.
template <unsigned count>
__device__ __forceinline__ void reload_shared(const float* from, float (&x)[count] EFFNETV2_AT_PARAMETER) {
    static_assert(count == 2 || count == 4, "2 or 4 floats");
#ifdef __CUDACC__
    const uint32_t address = shared_address(from);
    if constexpr (count == 4)
        asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                     : "r"(address));
    else
        asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(address));
#else
    if constexpr (count == 4) {
        const float4 four = ::host::load(reinterpret_cast<const float4*>(from), at);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
        const float2 two = ::host::load(reinterpret_cast<const float2*>(from), at);
        x[0] = two.x, x[1] = two.y;
    }
#endif
}
