// `mbarrier`, and what copies by TMA bring to it.
//
// A phase ends at the last moment that is allowed: when somebody waits for it, or when the next one begins. Only then its
// copies are delivered.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "source_line.hpp"

namespace host {

class Block;
struct Thread;

/// A box on its way to shared memory: 16-byte pieces with their places.
struct TensorCopy {
    struct Piece {
        unsigned char* destination;
        unsigned char data[16];
    };

    std::vector<Piece> pieces;
    SourceLine at;

    unsigned bytes() const { return unsigned(pieces.size() * sizeof(Piece::data)); }
};

struct Mbarrier {
    const void* address;
    /// Arrivals of a phase, and those that this one still lacks.
    unsigned expected, pending;
    /// Bytes that this phase expects, less those of its copies.
    int64_t missing_bytes = 0;
    unsigned phase = 0;
    std::vector<TensorCopy> copies;
    /// Memory order (sanitizer.hpp) of even and odd phases.
    char tag[2] = {};

    bool is_complete() const { return pending == 0 && missing_bytes == 0; }
    /// "1 of 2 arrivals and 64 bytes are missing", for error messages.
    std::string describe() const;
};

class Mbarriers {
  public:
    void clear() { barriers_.clear(); }

    Mbarrier* find(const void* address);
    Mbarrier& add(const void* address, unsigned arrivals);

    /// The copy under way to any of these bytes, or nullptr.
    const TensorCopy* copy_to(const void* address, size_t bytes) const;
    /// Any copy under way, or nullptr.
    const TensorCopy* copy_under_way() const;

  private:
    /// Each stays where it is: its tags have addresses.
    std::vector<std::unique_ptr<Mbarrier>> barriers_;
};

/// The barrier at this address; fails if none was made there.
Mbarrier& mbarrier_at(const void* address, const char* instruction, SourceLine at);

/// Fails unless 8 bytes of dynamic shared memory are there; the barrier begins anew.
void begin_mbarrier(void* address, unsigned arrivals, SourceLine at);
void arrive_expect(const void* address, unsigned bytes, SourceLine at);
void wait_for_phase(const void* address, unsigned parity, SourceLine at);
/// What may end a phase has happened: if somebody waits for it, now it does.
void end_phase_if_awaited(Mbarrier& barrier);

// The barrier's own memory is written by `init` and read by the others in the kernel's code, so that ThreadSanitizer sees a
// barrier that is used before it is known.

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals, SourceLine at) {
    begin_mbarrier(barrier, arrivals, at);
    *const_cast<volatile uint64_t*>(barrier) = 0;
}

inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, SourceLine at) {
    static_cast<void>(*const_cast<volatile uint64_t*>(barrier));
    arrive_expect(barrier, bytes, at);
}

inline void mbarrier_wait(uint64_t* barrier, unsigned parity, SourceLine at) {
    static_cast<void>(*const_cast<volatile uint64_t*>(barrier));
    wait_for_phase(barrier, parity, at);
}

} // namespace host
