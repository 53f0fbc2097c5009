// `cp.async`: the destination is poisoned when the copy is issued and filled when its group is waited for.
//
// The hardware may do either at any time in between. This is the order that shows a kernel that reads too
// early, or that lets a copy overwrite what others still read.
#pragma once

#include "block.hpp"
#include "memory_access.hpp"
#include "source_line.hpp"
#include "thread.hpp"

namespace host {

/// Copies `source_bytes` and fills up with zeros to `bytes` (4, 8 or 16).
inline void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes,
                       SourceLine at) {
    if (source_bytes > bytes)
        fail(Code::launch_failed, at, "cp.async: %u source bytes for a copy of %u", source_bytes, bytes);
    check_shared("cp.async", shared, bytes, at);
    check_access(shared, bytes, bytes, at);
    if (source_bytes != 0) check_access(global, source_bytes, bytes, at);

    Thread& thread = this_thread();
    AsyncCopy& copy = thread.copies.push(shared, bytes, at);
    const auto* source = static_cast<const volatile unsigned char*>(global);
    auto* destination = static_cast<volatile unsigned char*>(shared);
    for (unsigned i = 0; i < source_bytes; ++i) copy.data[i] = source[i];
    for (unsigned i = 0; i < bytes; ++i) destination[i] = 0xff;
    thread.block.shared().owe(shared, bytes, thread.rank);
}

inline void async_commit() { this_thread().copies.commit(); }

/// Waits until at most the `pending` newest groups of this thread are under way.
inline void async_wait(unsigned pending) {
    Thread& thread = this_thread();
    thread.copies.wait(pending, [&](const AsyncCopy& copy) {
        thread.block.shared().settle(copy.destination, copy.bytes);
        auto* destination = static_cast<volatile unsigned char*>(copy.destination);
        for (unsigned i = 0; i < copy.bytes; ++i) destination[i] = copy.data[i];
        note_write(copy.destination, copy.bytes);
    });
}

} // namespace host
