// One CUDA thread: a fiber, its place in the block, and what it waits for.
#pragma once

#include <cstdint>

#include "async_copy_queue.hpp"
#include "error.hpp"
#include "fiber.hpp"
#include "source_line.hpp"
#include "vector_types.hpp"
#include "wgmma_queue.hpp"

namespace host {

class Block;
struct Collective;
struct Mbarrier;

enum class State : uint8_t { ready, at_barrier, at_mbarrier, at_rendezvous, done };

struct Thread {
    Thread(Block& block, unsigned rank) : block(block), rank(rank), fiber(rank) {}

    Block& block;
    /// Position in the block, x fastest; `rank / 32` is the warp and `rank % 32` the lane.
    const unsigned rank;
    uint3 index{};
    State state = State::done;
    /// The call it waits in.
    SourceLine at;
    /// Whether it belongs to a programmatic dependent and has not yet waited for the grids before its own.
    bool awaits_predecessors = false;

    /// While `at_barrier`: which one. Afterwards: how many threads arrived with a true predicate.
    unsigned barrier = 0;
    unsigned predicates = 0;

    /// While `at_mbarrier`: which one.
    const Mbarrier* mbarrier = nullptr;

    /// While `at_rendezvous`: the collective, the lanes it names, this lane's operands and result.
    const Collective* collective = nullptr;
    uint32_t mask = 0;
    void* operands = nullptr;

    /// Memory order (sanitizer.hpp) of the `__syncwarp`s whose lowest lane this is.
    char syncwarp_tag = 0;

    AsyncCopyQueue copies;
    WgmmaQueue wgmma;
    Fiber fiber;

    unsigned lane() const { return rank % 32; }
};

/// The thread whose fiber runs on this operating-system thread; a kernel's code is never anywhere else.
[[gnu::const]] Thread& this_thread();

/// The same for the runtime: nullptr outside of kernels.
Thread* running_thread();
void set_running_thread(Thread* thread);

/// Where `set_running_thread` keeps its pointer: the one word of this library's thread-local memory that is
/// not
/// `__shared__`, so that poisoning shared memory can leave it alone.
const void* running_thread_word();

/// Ends the launch with an error that names kernel, block, thread and line. The calling fiber never
/// continues.
[[noreturn, gnu::format(printf, 3, 4)]] void fail(Code code, SourceLine at, const char* format, ...);

} // namespace host
