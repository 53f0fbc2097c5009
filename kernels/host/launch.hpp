// A kernel, its arguments, and the grid to run it on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "error.hpp"
#include "vector_types.hpp"

namespace host {

struct Kernel;

/// Limits of an sm_80 device, with the shared memory of an sm_90 one.
inline constexpr unsigned warp_size = 32;
inline constexpr unsigned max_block_threads = 1024;
inline constexpr size_t default_shared_bytes = 48 << 10;
inline constexpr size_t max_shared_bytes = 227 << 10;

struct Launch {
    const Kernel* kernel;
    void** arguments;
    dim3 grid;
    dim3 block;
    size_t dynamic_shared;
    uint64_t seed;
    /// Whether it may begin before the grid ahead of it has ended, so that its threads have to wait for that.
    bool dependent;
};

/// Runs every block of the launch to its end, or to the first error.
Status run(const Launch& launch);

/// How many that have run were dependents.
uint64_t dependent_launches();

} // namespace host
