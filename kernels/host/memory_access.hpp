// Accesses that are checked: aligned, not to shared memory that a `cp.async` has yet to fill, and not to device
// memory that a grid before may still be using.
//
// Plain C++ loads and stores cannot be checked here; the sanitizers do it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "block.hpp"
#include "source_line.hpp"
#include "thread.hpp"

namespace host {

[[noreturn]] void fail_misaligned(const void* address, size_t alignment, SourceLine at);
[[noreturn]] void fail_owed(const void* address, size_t bytes, SourceLine at);
/// For a thread that has not waited for the grids before its own.
void check_early(const void* address, SourceLine at);
[[noreturn]] void fail_not_shared(const char* instruction, const void* address, size_t bytes, SourceLine at);

/// The calling thread has written these bytes: if they are dynamic shared memory, that is kept in mind (wgmma.hpp).
void note_write(const void* address, size_t bytes);

/// Fails where the last thread that has written these 16 bytes has not said fence.proxy.async since: `instruction`, which
/// goes past the order of ordinary accesses, `touches` them.
void check_fenced(const char* instruction, const char* touches, const void* address, SourceLine at);

inline void check_access(const void* address, size_t bytes, size_t alignment, SourceLine at) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail_misaligned(address, alignment, at);
    if (this_thread().block.shared().debtor(address, bytes) >= 0) fail_owed(address, bytes, at);
    if (this_thread().awaits_predecessors) check_early(address, at);
}

inline void check_shared(const char* instruction, const void* address, size_t bytes, SourceLine at) {
    if (!this_thread().block.shared().contains(address, bytes))
        fail_not_shared(instruction, address, bytes, at);
}

template <class T> T load(const T* address, SourceLine at) {
    check_access(address, sizeof(T), alignof(T), at);
    return *address;
}

template <class T> void store(T* address, const T& value, SourceLine at) {
    check_access(address, sizeof(T), alignof(T), at);
    *address = value;
    note_write(address, sizeof(T));
}

} // namespace host

#define HOST_LOAD(name)                                                                                      \
    template <class T> T name(const T* address, host::SourceLine at = host::SourceLine::here()) {            \
        return host::load(address, at);                                                                      \
    }

#define HOST_STORE(name)                                                                                     \
    template <class T> void name(T* address, T value, host::SourceLine at = host::SourceLine::here()) {      \
        host::store(address, value, at);                                                                     \
    }

HOST_LOAD(__ldg)
HOST_LOAD(__ldca)
HOST_LOAD(__ldcg)
HOST_LOAD(__ldcs)
HOST_LOAD(__ldcv)
HOST_LOAD(__ldlu)
HOST_STORE(__stcg)
HOST_STORE(__stcs)
HOST_STORE(__stwb)
HOST_STORE(__stwt)

#undef HOST_LOAD
#undef HOST_STORE
