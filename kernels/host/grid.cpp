// Spreads the blocks of a launch over operating-system threads.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>

#include "block.hpp"
#include "fault.hpp"
#include "random.hpp"
#include "sanitizer.hpp"
#include "settings.hpp"

namespace host {
namespace {

/// The order of blocks: a bijection i -> (a * i + b) mod n, as if the device dealt them out at random.
class BlockOrder {
  public:
    explicit BlockOrder(const Launch& launch)
        : grid_(launch.grid), blocks_(uint64_t(grid_.x) * grid_.y * grid_.z) {
        if (launch.seed == 0) return;
        Random random(launch.seed);
        offset_ = random.below(blocks_);
        do stride_ = 1 + random.below(blocks_);
        while (std::gcd(stride_, blocks_) != 1);
    }

    uint64_t blocks() const { return blocks_; }

    uint3 at(uint64_t turn) const {
        const uint64_t i = uint64_t((unsigned __int128)turn * stride_ + offset_) % blocks_;
        return {unsigned(i % grid_.x), unsigned(i / grid_.x % grid_.y), unsigned(i / grid_.x / grid_.y)};
    }

  private:
    dim3 grid_;
    uint64_t blocks_;
    uint64_t stride_ = 1;
    uint64_t offset_ = 0;
};

/// A launch that workers take blocks from.
class Job {
  public:
    Job(const Launch& launch, unsigned workers) : launch_(launch), order_(launch), workers_(workers) {}

    /// One worker's share. Under ThreadSanitizer shares are dealt in turn: blocks of one worker are ordered,
    /// and a race between two blocks is seen only if they belong to different workers.
    void work(unsigned worker, Block& block) {
        for (uint64_t i = worker; !failed_ && i < order_.blocks(); i += workers_) {
            const uint64_t turn = sanitizer::thread ? i : next_++;
            if (turn >= order_.blocks()) break;
            Status status = block.run(launch_, order_.at(turn));
            if (!status.ok()) keep_first(std::move(status));
        }
    }

    Status result() { return std::move(first_failure_); }

  private:
    void keep_first(Status status) {
        std::lock_guard lock(mutex_);
        if (first_failure_.ok()) first_failure_ = std::move(status);
        failed_ = true;
    }

    const Launch& launch_;
    BlockOrder order_;
    unsigned workers_;
    std::atomic<uint64_t> next_{0};
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    Status first_failure_;
};

/// Threads that live as long as the process, asleep between launches.
class Pool {
  public:
    Status run(const Launch& launch) {
        std::lock_guard one_launch_at_a_time(launch_mutex_);
        const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
        const unsigned workers = unsigned(std::min<uint64_t>(settings().threads, blocks));
        Job job(launch, workers);
        std::unique_lock lock(mutex_);
        while (size_ < workers) std::thread(&Pool::serve, this, size_++).detach();
        job_ = &job;
        invited_ = busy_ = workers;
        ++generation_;
        wake_.notify_all();
        finished_.wait(lock, [this] { return busy_ == 0; });
        return job.result();
    }

  private:
    void serve(unsigned self) {
        catch_faults_of_this_thread();
        Block block;
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen && self < invited_; });
            seen = generation_;
            Job& job = *job_;
            lock.unlock();
            job.work(self, block);
            lock.lock();
            if (--busy_ == 0) finished_.notify_one();
        }
    }

    std::mutex launch_mutex_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable finished_;
    Job* job_ = nullptr;
    unsigned size_ = 0;
    unsigned invited_ = 0;
    unsigned busy_ = 0;
    uint64_t generation_ = 0;
};

std::atomic<uint64_t> dependents{0};

} // namespace

Status run(const Launch& launch) {
    static auto& pool = *new Pool; // never destroyed: its threads outlive main
    dependents += launch.dependent;
    return pool.run(launch);
}

uint64_t dependent_launches() { return dependents; }

} // namespace host
