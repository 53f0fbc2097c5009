// The `cp.async` copies that a thread has issued and not yet waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "source_line.hpp"

namespace host {

struct AsyncCopy {
    void* destination;
    unsigned bytes;
    /// Which commit group it belongs to, counted from the thread's start.
    unsigned group;
    unsigned char data[16];
    SourceLine at;
};

class AsyncCopyQueue {
  public:
    void clear() {
        copies_.clear();
        open_group_ = 0;
    }

    AsyncCopy& push(void* destination, unsigned bytes, SourceLine at) {
        copies_.push_back({destination, bytes, open_group_, {}, at});
        return copies_.back();
    }

    void commit() { ++open_group_; }

    /// Takes out every copy that `wait_group pending` guarantees: all but the `pending` newest groups.
    template <class Deliver> void wait(unsigned pending, Deliver deliver) {
        size_t finished = 0;
        while (finished < copies_.size() && copies_[finished].group + pending < open_group_)
            deliver(copies_[finished++]);
        copies_.erase(copies_.begin(), copies_.begin() + long(finished));
    }

    /// The copy under way to any of these bytes, or nullptr.
    const AsyncCopy* find(const void* address, size_t bytes) const {
        const auto* begin = static_cast<const char*>(address);
        for (const AsyncCopy& copy : copies_) {
            const auto* destination = static_cast<const char*>(copy.destination);
            if (begin < destination + copy.bytes && destination < begin + bytes) return &copy;
        }
        return nullptr;
    }

  private:
    std::vector<AsyncCopy> copies_;
    unsigned open_group_ = 0;
};

} // namespace host
