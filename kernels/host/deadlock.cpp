// Says why a block is stuck: who waits where, and who has gone.

#include "block.hpp"
#include "collective.hpp"

namespace host {
namespace {

bool same_wait(const Thread& a, const Thread& b) {
    if (a.state != b.state) return false;
    if (a.state == State::done) return true;
    if (a.at != b.at) return false;
    if (a.state == State::at_mbarrier) return a.mbarrier == b.mbarrier;
    return a.state == State::at_barrier ? a.barrier == b.barrier
                                        : a.collective == b.collective && a.mask == b.mask;
}

std::string describe_wait(Block& block, const Thread& thread) {
    if (thread.state == State::done) return "have returned";
    const std::string line = text("%s:%d", thread.at.file, thread.at.line);
    if (thread.state == State::at_rendezvous && thread.collective->warps > 1)
        return text("wait in %s for their warpgroup at %s", thread.collective->name, line.c_str());
    if (thread.state == State::at_rendezvous)
        return text("wait in %s, mask 0x%08x, at %s", thread.collective->name, thread.mask, line.c_str());
    if (thread.state == State::at_mbarrier)
        return text("wait for an mbarrier (%s) at %s", thread.mbarrier->describe().c_str(), line.c_str());
    const Barrier& barrier = block.barrier(thread.barrier);
    return text("wait in %s (%u of %u arrived) at %s", barrier.call, barrier.arrived, barrier.expected,
                line.c_str());
}

/// "threads 0-31 wait in ..., threads 32-63 have returned", by rank, at most eight groups.
std::string describe_groups(Block& block) {
    std::string groups;
    unsigned listed = 0;
    for (unsigned first = 0; first < block.size();) {
        unsigned last = first;
        while (last + 1 < block.size() && same_wait(block.thread(first), block.thread(last + 1))) ++last;
        if (++listed > 8) return groups + "; ...";
        groups += text("%sthreads %u-%u %s", listed > 1 ? "; " : "", first, last,
                       describe_wait(block, block.thread(first)).c_str());
        first = last + 1;
    }
    return groups;
}

} // namespace

void explain_deadlock(Block& block) {
    const Thread* waiting = nullptr;
    bool all_at_one_barrier = true;
    unsigned returned = 0;
    for (unsigned rank = 0; rank < block.size(); ++rank) {
        const Thread& thread = block.thread(rank);
        if (thread.state == State::done) {
            ++returned;
            continue;
        }
        if (waiting == nullptr) waiting = &thread;
        all_at_one_barrier &= thread.state == State::at_barrier && thread.barrier == waiting->barrier;
    }
    const char* verdict = all_at_one_barrier && returned > 0
                              ? "barrier that some threads never reach because they have returned"
                              : "deadlock";
    block.set_failure(*waiting, Code::launch_failed, waiting->at,
                      text("%s: %s", verdict, describe_groups(block).c_str()));
}

} // namespace host
