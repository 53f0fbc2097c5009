// A stackful coroutine: runs a function on a stack of its own, and can stop in the middle of it.
#pragma once

#include <cstddef>

namespace host {

class Fiber {
  public:
    /// `colour` staggers where stacks begin, so that equal frames of many fibers do not share a cache set.
    explicit Fiber(unsigned colour);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    /// Makes the next `resume` call `entry(argument)`. A run still suspended is forgotten.
    void start(void (*entry)(void*), void* argument);

    /// Continues the fiber until it suspends. Called by the scheduler.
    void resume();

    /// Gives control back to the scheduler. Called on the fiber.
    void suspend();

    /// Suspends for good after `entry` has done its work: `start` may then begin anew.
    [[noreturn]] void finish();

    /// For ThreadSanitizer: whoever acquires `tag` comes after what this run, which never resumes, has done.
    void release_abandoned(void* tag);

    /// Shown by ThreadSanitizer in its reports.
    void name(const char* text);

    /// Where a signal handler may put the stack pointer to abandon a fiber whose own frames are lost.
    void* emergency_stack() const;

    /// Whether `address` lies in the guard page below the stack, which only an overflow reaches.
    bool overflowed(const void* address) const;

  private:
    static void run(void* self);

    void* handle_ = nullptr;
    void* scheduler_ = nullptr;
    char* mapping_;
    char* top_;
    void (*entry_)(void*) = nullptr;
    void* argument_ = nullptr;
    bool suspended_midway_ = false;

    void* own_fake_stack_ = nullptr;
    void* scheduler_fake_stack_ = nullptr;
    const void* scheduler_bottom_ = nullptr;
    size_t scheduler_bytes_ = 0;
    void* thread_sanitizer_fiber_;
    void* scheduler_sanitizer_fiber_ = nullptr;
};

} // namespace host
