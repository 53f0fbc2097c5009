#include "block.hpp"

#include "kernel.hpp"
#include "sanitizer.hpp"

namespace host {

Status Block::run(const Launch& launch, uint3 index) {
    prepare(launch, index);
    sanitizer::release(&start_tag_);
    schedule();
    if (failed())
        for (unsigned rank = 0; rank < size_; ++rank) threads_[rank]->fiber.release_abandoned(&end_tag_);
    sanitizer::acquire(&end_tag_);
    return std::move(failure_);
}

void Block::prepare(const Launch& launch, uint3 index) {
    launch_ = &launch;
    index_ = index;
    size_ = launch.block.x * launch.block.y * launch.block.z;
    done_ = 0;
    failure_ = success();
    barriers_ = {};
    const uint64_t linear = index.x + uint64_t(launch.grid.x) * (index.y + uint64_t(launch.grid.y) * index.z);
    random_ = Random(launch.seed ^ (linear + 1) * 0xd1342543de82ef95u);
    shuffled_ = launch.seed != 0;
    shared_.renew(launch.dynamic_shared);
    mbarriers_.clear();

    while (threads_.size() < size_) threads_.push_back(std::make_unique<Thread>(*this, threads_.size()));
    for (unsigned rank = 0; rank < size_; ++rank) {
        Thread& thread = *threads_[rank];
        const dim3& extent = launch.block;
        thread.index = {rank % extent.x, rank / extent.x % extent.y, rank / extent.x / extent.y};
        thread.state = State::ready;
        thread.awaits_predecessors = launch.dependent;
        thread.copies.clear();
        thread.wgmma.clear();
        thread.fiber.start(&Block::thread_main, &thread);
        if constexpr (sanitizer::thread) thread.fiber.name(describe(thread).c_str());
    }
    warp_order_.resize(warps());
    for (unsigned warp = 0; warp < warps(); ++warp) warp_order_[warp] = warp;
}

void Block::thread_main(void* argument) {
    Thread& thread = *static_cast<Thread*>(argument);
    Block& block = thread.block;
    sanitizer::acquire(&block.start_tag_);
    block.launch_->kernel->invoke(block.launch_->arguments);
    if (thread.awaits_predecessors)
        block.set_failure(failure(Code::launch_failed,
                                  "%s: launched as a programmatic dependent, it never waited for its "
                                  "predecessors",
                                  block.describe(thread).c_str()));
    sanitizer::release(&block.end_tag_);
    thread.state = State::done;
    ++block.done_;
}

void Block::schedule() {
    while (done_ < size_) {
        if (shuffled_) random_.shuffle(warp_order_);
        bool progress = false;
        for (unsigned warp : warp_order_) {
            progress |= run_warp(warp);
            if (failed()) return;
        }
        if (!progress) return explain_deadlock(*this);
    }
    if (const TensorCopy* copy = mbarriers_.copy_under_way())
        set_failure(*threads_[0], Code::launch_failed, copy->at,
                    "the block ends before anybody has waited for this cp.async.bulk.tensor");
}

bool Block::run_warp(unsigned warp) {
    bool progress = false;
    do {
        progress |= run_lanes(warp);
        if (failed()) return true;
    } while (resolve_collectives(*this, warp));
    return progress;
}

bool Block::run_lanes(unsigned warp) {
    const unsigned first = warp * warp_size;
    const unsigned lanes = size_ - first < warp_size ? size_ - first : warp_size;
    const uint64_t dice = shuffled_ ? random_.next() : 0;
    const bool backwards = dice & 1;
    const unsigned offset = unsigned(dice >> 1) % lanes;
    bool progress = false;
    for (unsigned step = 0; step < lanes; ++step) {
        const unsigned turn = (step + offset) % lanes;
        Thread& thread = *threads_[first + (backwards ? lanes - 1 - turn : turn)];
        if (thread.state != State::ready) continue;
        run_thread(thread);
        if (failed()) return true;
        progress = true;
    }
    return progress;
}

void Block::run_thread(Thread& thread) {
    set_running_thread(&thread);
    thread.fiber.resume();
    set_running_thread(nullptr);
}

unsigned Block::arrive(Thread& thread, unsigned id, unsigned expected, bool predicate, bool wait) {
    Barrier& barrier = barriers_[id];
    void* tag = &barrier.tag[barrier.round % 2];
    sanitizer::release(tag);
    barrier.predicates += predicate;
    if (wait) {
        thread.state = State::at_barrier;
        thread.barrier = id;
    }
    if (++barrier.arrived == expected) {
        for (unsigned rank = 0; rank < size_; ++rank) {
            Thread& waiting = *threads_[rank];
            if (waiting.state != State::at_barrier || waiting.barrier != id) continue;
            waiting.predicates = barrier.predicates;
            waiting.state = State::ready;
        }
        barrier.expected = barrier.arrived = barrier.predicates = 0;
        ++barrier.round;
    }
    if (!wait) return 0;
    thread.fiber.suspend();
    sanitizer::acquire(tag);
    return thread.predicates;
}

unsigned Block::sync_all(bool predicate, const char* call, SourceLine at) {
    Thread& thread = this_thread();
    Barrier& barrier = barriers_[0];
    thread.at = at;
    if (barrier.arrived == 0) {
        barrier.expected = size_;
        barrier.call = call;
        barrier.at = at;
    } else if (barrier.at != at || barrier.call != call) {
        fail(Code::launch_failed, at,
             "divergent barrier: this thread is at %s while %u others wait at %s, %s:%d", call,
             barrier.arrived, barrier.call, barrier.at.file, barrier.at.line);
    }
    return arrive(thread, 0, size_, predicate, true);
}

void Block::sync_some(unsigned id, unsigned expected, bool wait, SourceLine at) {
    Thread& thread = this_thread();
    const char* call = wait ? "barrier.sync" : "barrier.arrive";
    if (id >= barriers) fail(Code::launch_failed, at, "%s: there are barriers 0 to 15, not %u", call, id);
    if (expected == 0 || expected % warp_size != 0 ||
        expected > (size_ + warp_size - 1) / warp_size * warp_size)
        fail(Code::launch_failed, at, "%s: %u threads is not a number of whole warps of this block of %u",
             call, expected, size_);
    Barrier& barrier = barriers_[id];
    thread.at = at;
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.call = call;
        barrier.at = at;
    } else if (barrier.expected != expected) {
        fail(Code::launch_failed, at, "%s: barrier %u expects %u threads here but %u at %s:%d", call, id,
             expected, barrier.expected, barrier.at.file, barrier.at.line);
    }
    arrive(thread, id, expected, false, wait);
}

void Block::set_failure(Status failure) {
    if (!failed()) failure_ = std::move(failure);
}

void Block::set_failure(const Thread& thread, Code code, SourceLine at, const std::string& what) {
    set_failure(failure(code, "%s, %s:%d: %s", describe(thread).c_str(), at.file, at.line, what.c_str()));
}

std::string Block::describe(const Thread& thread) const {
    return text("kernel `%s`, block (%u,%u,%u), thread (%u,%u,%u)", launch_->kernel->name.c_str(), index_.x,
                index_.y, index_.z, thread.index.x, thread.index.y, thread.index.z);
}

} // namespace host
