#include "mbarrier.hpp"

#include <cstring>

#include "block.hpp"
#include "memory_access.hpp"
#include "sanitizer.hpp"
#include "thread.hpp"

namespace host {
namespace {

/// Ends the phase if it can end: copies are there, and who waits goes on.
void end_phase(Block& block, Mbarrier& barrier) {
    for (const TensorCopy& copy : barrier.copies)
        for (const TensorCopy::Piece& piece : copy.pieces) {
            block.shared().settle(piece.destination, sizeof piece.data);
            memcpy(piece.destination, piece.data, sizeof piece.data);
            // TMA itself has written it: wgmma needs no fence.
            block.shared().mark(piece.destination, sizeof piece.data, 0);
        }
    barrier.copies.clear();
    barrier.pending = barrier.expected;
    ++barrier.phase;
    for (unsigned rank = 0; rank < block.size(); ++rank) {
        Thread& waiting = block.thread(rank);
        if (waiting.state == State::at_mbarrier && waiting.mbarrier == &barrier) waiting.state = State::ready;
    }
}

} // namespace

std::string Mbarrier::describe() const {
    return text("%u of %u arrivals are missing, and %lld bytes", pending, expected,
                static_cast<long long>(missing_bytes));
}

Mbarrier* Mbarriers::find(const void* address) {
    for (const auto& barrier : barriers_)
        if (barrier->address == address) return barrier.get();
    return nullptr;
}

Mbarrier& Mbarriers::add(const void* address, unsigned arrivals) {
    barriers_.push_back(std::make_unique<Mbarrier>(Mbarrier{address, arrivals, arrivals, 0, 0, {}, {}}));
    return *barriers_.back();
}

const TensorCopy* Mbarriers::copy_to(const void* address, size_t bytes) const {
    const auto* begin = static_cast<const unsigned char*>(address);
    for (const auto& barrier : barriers_)
        for (const TensorCopy& copy : barrier->copies)
            for (const TensorCopy::Piece& piece : copy.pieces)
                if (begin < piece.destination + sizeof piece.data && piece.destination < begin + bytes) return &copy;
    return nullptr;
}

const TensorCopy* Mbarriers::copy_under_way() const {
    for (const auto& barrier : barriers_)
        if (!barrier->copies.empty()) return &barrier->copies.front();
    return nullptr;
}

Mbarrier& mbarrier_at(const void* address, const char* instruction, SourceLine at) {
    Mbarrier* barrier = this_thread().block.mbarriers().find(address);
    if (barrier == nullptr) fail(Code::launch_failed, at, "%s: there is no mbarrier at %p", instruction, address);
    return *barrier;
}

void begin_mbarrier(void* address, unsigned arrivals, SourceLine at) {
    Thread& thread = this_thread();
    check_shared("mbarrier.init", address, sizeof(uint64_t), at);
    check_access(address, sizeof(uint64_t), alignof(uint64_t), at);
    if (arrivals == 0 || arrivals >= 1u << 20)
        fail(Code::launch_failed, at, "mbarrier.init: %u arrivals; 1 to 2^20 - 1 are possible", arrivals);
    if (thread.block.mbarriers().find(address) != nullptr)
        fail(Code::launch_failed, at, "mbarrier.init: there is an mbarrier at %p already", address);
    thread.block.mbarriers().add(address, arrivals);
    note_write(address, sizeof(uint64_t));
}

void end_phase_if_awaited(Mbarrier& barrier) {
    Block& block = this_thread().block;
    if (!barrier.is_complete()) return;
    for (unsigned rank = 0; rank < block.size(); ++rank) {
        const Thread& waiting = block.thread(rank);
        if (waiting.state == State::at_mbarrier && waiting.mbarrier == &barrier) return end_phase(block, barrier);
    }
}

void arrive_expect(const void* address, unsigned bytes, SourceLine at) {
    Block& block = this_thread().block;
    Mbarrier& barrier = mbarrier_at(address, "mbarrier.arrive", at);
    if (barrier.pending == 0) {
        if (!barrier.is_complete())
            fail(Code::launch_failed, at, "mbarrier.arrive: the phase before is not over, %lld bytes are missing",
                 static_cast<long long>(barrier.missing_bytes));
        end_phase(block, barrier);
    }
    sanitizer::release(&barrier.tag[barrier.phase % 2]);
    --barrier.pending;
    barrier.missing_bytes += bytes;
    end_phase_if_awaited(barrier);
}

void wait_for_phase(const void* address, unsigned parity, SourceLine at) {
    Thread& thread = this_thread();
    Mbarrier& barrier = mbarrier_at(address, "mbarrier.try_wait", at);
    if (parity > 1) fail(Code::launch_failed, at, "mbarrier.try_wait: parity %u is not 0 or 1", parity);
    if (barrier.phase % 2 == parity) {
        if (barrier.is_complete()) {
            end_phase(thread.block, barrier);
        } else {
            thread.at = at;
            thread.mbarrier = &barrier;
            thread.state = State::at_mbarrier;
            thread.fiber.suspend();
        }
    }
    sanitizer::acquire(&barrier.tag[parity]);
}

} // namespace host
