// Shared memory of the block that an operating-system thread runs: dynamic, and the `__shared__` variables.
//
// `__shared__` is `static thread_local`, so the static part is this library's thread-local storage. Both are
// filled with 0xff (a NaN in every float type) before each block. While a `cp.async` is under way the bytes
// it will write are owed: whoever reads them through the checked accesses is told so. Marks say who has written
// last, for what reads past the order of ordinary accesses (wgmma.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace host {

class SharedMemory {
  public:
    SharedMemory();
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    /// Fresh poisoned memory for the next block.
    void renew(size_t dynamic_bytes);

    /// The start of the dynamic part, by a kernel that takes it to be aligned to so many bytes.
    unsigned char* dynamic(unsigned alignment);
    /// The most that a kernel has asked for.
    unsigned promised_alignment() const { return alignment_; }

    /// A place in the dynamic part, and back.
    size_t offset(const void* address) const {
        return size_t(static_cast<const unsigned char*>(address) - dynamic_.begin);
    }
    unsigned char* at(size_t offset) const { return dynamic_.begin + offset; }

    /// Leaves a mark on every 16 bytes of the dynamic part that these bytes touch, if any; 0 is none.
    void mark(const void* address, size_t bytes, uint32_t value);
    uint32_t mark_of(const void* address) const;

    bool contains(const void* address, size_t bytes) const;

    /// Whether a faulting address is just behind the dynamic part.
    bool overrun(const void* address) const;

    void owe(const void* address, size_t bytes, unsigned debtor);
    void settle(const void* address, size_t bytes);

    /// Rank of the thread that owes any of these bytes, or -1.
    int debtor(const void* address, size_t bytes) const {
        return owed_ == 0 ? -1 : find_debtor(address, bytes);
    }

  private:
    struct Window {
        unsigned char* begin = nullptr;
        size_t bytes = 0;
        /// For every four bytes: one more than the rank of the thread that owes them.
        std::vector<uint16_t> debts;

        bool contains(const void* address, size_t bytes) const;
    };

    Window* window(const void* address, size_t bytes);
    int find_debtor(const void* address, size_t bytes) const;
    void forget_debts();

    Window dynamic_;
    Window static_;
    size_t owed_ = 0;
    unsigned alignment_ = 0;
    std::vector<uint32_t> marks_;
    unsigned char* mapping_ = nullptr;
};

} // namespace host
