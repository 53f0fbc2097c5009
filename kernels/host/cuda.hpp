// The CUDA C++ that kernels may use, on the CPU: included in place of what nvcc knows by itself.
//
// `__shared__` variables are thread-local here, one set per operating-system thread: a block never leaves its
// thread. Prefer indexing the array itself to a pointer into it: UndefinedBehaviorSanitizer then knows its
// bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "async_copy.hpp"
#include "atomics.hpp"
#include "block.hpp"
#include "collectives.hpp"
#include "half_types.hpp"
#include "kernel.hpp"
#include "math.hpp"
#include "mbarrier.hpp"
#include "memory_access.hpp"
#include "tensor_copy.hpp"
#include "tensor_core.hpp"
#include "thread.hpp"
#include "vector_types.hpp"
#include "wgmma.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static thread_local

#define threadIdx (::host::this_thread().index)
#define blockIdx (::host::this_thread().block.index())
#define blockDim (::host::this_thread().block.launch().block)
#define gridDim (::host::this_thread().block.launch().grid)
#define warpSize (int(::host::warp_size))

#undef assert
#define assert(condition)                                                                                    \
    ((condition) ? void(0)                                                                                   \
                 : ::host::fail(::host::Code::assert_failed, ::host::SourceLine::here(),                     \
                                "assertion `%s` failed", #condition))

[[noreturn]] inline void __trap(host::SourceLine at = host::SourceLine::here()) {
    host::fail(host::Code::launch_failed, at, "__trap");
}
