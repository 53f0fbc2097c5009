// Device and pinned host memory: every allocation is known, so that copies can be checked and leaks be named.
//
// In a plain build an allocation has pages of its own, its end close to 16 MB of inaccessible ones, and freed
// pages stay inaccessible: a kernel that runs over the end or uses freed memory faults (fault.hpp). In
// sanitizer builds memory comes from malloc, which AddressSanitizer watches to the byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>

#include "error.hpp"

namespace host {

enum class MemoryKind { device, pinned };

class Memory {
  public:
    /// Fresh memory full of 0xff, aligned to 256 bytes.
    Status allocate(size_t bytes, MemoryKind kind, void** result);
    Status release(void* address, MemoryKind kind);

    /// Whether [address, address + bytes) lies in one live allocation of this kind; `what` is named in the
    /// error.
    Status check(const char* what, const void* address, size_t bytes, MemoryKind kind) const;

    /// Whether `address` may be handed to a kernel: inside a live allocation, or just behind one.
    Status check_argument(const void* address) const;

    /// "4 bytes past the end of the 4096-byte device allocation at 0x...", for error messages.
    std::string describe(const void* address) const;

    bool is_pinned(const void* address) const;

    size_t device_bytes() const;

    /// Message about device allocations still live; empty if there are none. They are not freed.
    std::string leaks() const;

  private:
    struct Allocation {
        size_t bytes;
        MemoryKind kind;
        /// Counts allocations from the start of the process.
        uint64_t serial;
        char* mapping;
        size_t mapping_bytes;
    };
    using Table = std::map<uintptr_t, Allocation>;

    Table::const_iterator at_or_before(uintptr_t address) const;
    struct Freed {
        uintptr_t address;
        Allocation allocation;
    };
    /// The latest freed allocation that `address` was in, or nullptr.
    const Freed* freed_at(uintptr_t address) const;
    void retire(uintptr_t address, const Allocation& allocation);

    mutable std::mutex mutex_;
    Table live_;
    /// The latest freed allocations. In a plain build their addresses are not used again while they are
    /// listed.
    std::deque<Freed> freed_;
    size_t device_bytes_ = 0;
    uint64_t serial_ = 0;
};

Memory& device_memory();

} // namespace host
