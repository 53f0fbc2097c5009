// One source, two devices: nvcc for the GPU, a C++ compiler with kernels/host/ for the CPU.
#pragma once

#ifdef __CUDACC__

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define EFFNETV2_KERNEL(name)
#define EFFNETV2_AT_PARAMETER
#define EFFNETV2_AT_SOLE_PARAMETER
#define EFFNETV2_AT_ARGUMENT

#else

#include "../host/cuda.hpp"

/// Written at the end of a .cu file for each of its kernels: puts it into the host device's table, with the
/// types of its parameters.
#define EFFNETV2_KERNEL(name)                                                                                \
    static const ::host::Registration effnetv2_registration_of_##name(::host::Thunk<&name>::describe(#name), \
                                                                      __FILE__);

/// Last parameter of a function that wraps a checked access: lets errors name the line that called the
/// wrapper.
#define EFFNETV2_AT_PARAMETER , ::host::SourceLine at = ::host::SourceLine::here()
/// The same where there is no other parameter.
#define EFFNETV2_AT_SOLE_PARAMETER ::host::SourceLine at = ::host::SourceLine::here()
/// The same, passed on as the last argument.
#define EFFNETV2_AT_ARGUMENT , at

#endif

/// The block's dynamic shared memory from byte `offset` on; the start is aligned to `alignment` bytes, 128 or 1024.
template <class T, unsigned alignment = 128> __device__ __forceinline__ T* dynamic_shared(unsigned offset = 0) {
    static_assert(alignment == 128 || alignment == 1024, "128 or 1024 bytes");
#ifdef __CUDACC__
    // All external arrays begin at one place, aligned as the strictest of the .cu file: where any of its kernels asks for
    // 1024, what the others have of static shared memory is rounded up to that.
    if constexpr (alignment == 1024) {
        extern __shared__ __align__(1024) unsigned char effnetv2_dynamic_shared_1024[];
        return reinterpret_cast<T*>(effnetv2_dynamic_shared_1024 + offset);
    } else {
        extern __shared__ __align__(128) unsigned char effnetv2_dynamic_shared[];
        return reinterpret_cast<T*>(effnetv2_dynamic_shared + offset);
    }
#else
    return reinterpret_cast<T*>(::host::this_thread().block.shared().dynamic(alignment) + offset);
#endif
}
