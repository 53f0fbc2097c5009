// What a user of the host device can choose: by environment variable at start, or by the functions of
// control.h.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace host {

struct Settings {
    /// EFFNETV2_HOST_SEED: order in which warps, lanes and blocks run. 0 is first to last; anything else
    /// shuffles.
    std::atomic<uint64_t> seed;

    /// EFFNETV2_HOST_THREADS: operating-system threads that blocks are spread over.
    std::atomic<unsigned> threads;

    /// EFFNETV2_HOST_DEFER=1: work on a stream waits until something waits for the stream.
    std::atomic<bool> defer;

    /// EFFNETV2_HOST_PRINT=1: every error is also printed on standard error.
    std::atomic<bool> print_errors;

    /// EFFNETV2_HOST_MEMORY: bytes of device memory; as much as the machine has unless given.
    std::atomic<size_t> memory;
};

Settings& settings();

} // namespace host
