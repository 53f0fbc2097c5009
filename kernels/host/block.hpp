// Runs the threads of one block as fibers of one operating-system thread.
//
// Warps take turns in an order drawn from the seed; each runs until every lane waits or has returned. Waiting
// lanes of a warp whose collective is complete go on at once, a barrier opens when the last thread arrives.
// When nobody can go on and somebody still waits, that is a bug of the kernel, and the scheduler knows which.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "error.hpp"
#include "launch.hpp"
#include "mbarrier.hpp"
#include "random.hpp"
#include "shared_memory.hpp"
#include "thread.hpp"

namespace host {

struct Barrier {
    /// Threads that must arrive, and those that have; 0 while nobody waits.
    unsigned expected = 0;
    unsigned arrived = 0;
    unsigned predicates = 0;
    /// The call that opened this round.
    const char* call = "";
    SourceLine at;
    /// Memory order (sanitizer.hpp): the tag of one round must not be touched by the next.
    unsigned round = 0;
    char tag[2] = {};
};

class Block {
  public:
    static constexpr unsigned barriers = 16;

    /// Runs block `index` from start to end. A Block is reused for many.
    Status run(const Launch& launch, uint3 index);

    const Launch& launch() const { return *launch_; }
    uint3 index() const { return index_; }
    unsigned size() const { return size_; }
    unsigned warps() const { return (size_ + warp_size - 1) / warp_size; }
    Thread& thread(unsigned rank) { return *threads_[rank]; }
    SharedMemory& shared() { return shared_; }
    Mbarriers& mbarriers() { return mbarriers_; }
    void* fence_tag() { return &fence_tag_; }
    const Barrier& barrier(unsigned id) const { return barriers_[id]; }

    /// Called on a thread's fiber: `__syncthreads` and its kin. Returns how many predicates were true.
    unsigned sync_all(bool predicate, const char* call, SourceLine at);

    /// Called on a thread's fiber: `barrier.sync` and `barrier.arrive` of `expected` threads.
    void sync_some(unsigned id, unsigned expected, bool wait, SourceLine at);

    /// Ends the block; the first failure counts.
    void set_failure(Status failure);
    void set_failure(const Thread& thread, Code code, SourceLine at, const std::string& what);
    bool failed() const { return !failure_.ok(); }

    /// "kernel `name`, block (x,y,z), thread (x,y,z)".
    std::string describe(const Thread& thread) const;

  private:
    void prepare(const Launch& launch, uint3 index);
    void schedule();
    bool run_warp(unsigned warp);
    bool run_lanes(unsigned warp);
    void run_thread(Thread& thread);
    unsigned arrive(Thread& thread, unsigned id, unsigned expected, bool predicate, bool wait);
    static void thread_main(void* thread);

    const Launch* launch_ = nullptr;
    uint3 index_{};
    unsigned size_ = 0;
    unsigned done_ = 0;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<unsigned> warp_order_;
    std::array<Barrier, barriers> barriers_;
    SharedMemory shared_;
    Mbarriers mbarriers_;
    Random random_;
    bool shuffled_ = false;
    Status failure_;
    char start_tag_ = 0;
    char end_tag_ = 0;
    char fence_tag_ = 0;
};

/// Completes every collective of this warp that all its named lanes have reached. True if any lane may go on.
bool resolve_collectives(Block& block, unsigned warp);

/// Nobody can go on: finds out why and fails the block.
void explain_deadlock(Block& block);

} // namespace host
