#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "fiber_switch.hpp"
#include "sanitizer.hpp"

namespace host {
namespace {

constexpr size_t guard_bytes = 4096 * 4;
// AddressSanitizer surrounds every local with a margin, and keeps apart what the compiler would overlay.
constexpr size_t stack_bytes = sanitizer::address ? 512 << 10 : 128 << 10;

} // namespace

Fiber::Fiber(unsigned colour) : thread_sanitizer_fiber_(sanitizer::create_fiber()) {
    void* mapping = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(mapping);
    mprotect(mapping_, guard_bytes, PROT_NONE);
    top_ = mapping_ + guard_bytes + stack_bytes - (colour % 32) * 192;
}

Fiber::~Fiber() {
    sanitizer::destroy_fiber(thread_sanitizer_fiber_);
    munmap(mapping_, guard_bytes + stack_bytes);
}

void Fiber::start(void (*entry)(void*), void* argument) {
    if (suspended_midway_) {
        sanitizer::allow(mapping_ + guard_bytes, stack_bytes);
        sanitizer::destroy_fiber(thread_sanitizer_fiber_);
        thread_sanitizer_fiber_ = sanitizer::create_fiber();
        suspended_midway_ = false;
    }
    entry_ = entry;
    argument_ = argument;
    own_fake_stack_ = nullptr;
    handle_ = host_fiber_prepare(mapping_ + guard_bytes, top_, &Fiber::run, this);
}

void Fiber::run(void* self) {
    auto* fiber = static_cast<Fiber*>(self);
    sanitizer::enter_stack(nullptr, &fiber->scheduler_bottom_, &fiber->scheduler_bytes_);
    fiber->entry_(fiber->argument_);
    fiber->finish();
}

void Fiber::resume() {
    suspended_midway_ = true;
    scheduler_sanitizer_fiber_ = sanitizer::current_fiber();
    sanitizer::leave_stack(&scheduler_fake_stack_, mapping_ + guard_bytes, stack_bytes);
    sanitizer::switch_fiber(thread_sanitizer_fiber_);
    host_fiber_switch(&scheduler_, handle_);
    sanitizer::enter_stack(scheduler_fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() {
    sanitizer::leave_stack(&own_fake_stack_, scheduler_bottom_, scheduler_bytes_);
    sanitizer::switch_fiber(scheduler_sanitizer_fiber_);
    host_fiber_switch(&handle_, scheduler_);
    sanitizer::enter_stack(own_fake_stack_, &scheduler_bottom_, &scheduler_bytes_);
}

void Fiber::finish() {
    suspended_midway_ = false;
    sanitizer::leave_stack(nullptr, scheduler_bottom_, scheduler_bytes_);
    sanitizer::switch_fiber(scheduler_sanitizer_fiber_);
    host_fiber_switch(&handle_, scheduler_);
    abort(); // a finished fiber is only ever started anew
}

void Fiber::release_abandoned(void* tag) {
    if (!sanitizer::thread || !suspended_midway_) return;
    // To the sanitizer this fiber runs once more, just to say so.
    void* scheduler = sanitizer::current_fiber();
    sanitizer::switch_fiber(thread_sanitizer_fiber_);
    sanitizer::release(tag);
    sanitizer::switch_fiber(scheduler);
}

void Fiber::name(const char* text) { sanitizer::name_fiber(thread_sanitizer_fiber_, text); }

void* Fiber::emergency_stack() const {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(top_ - 256) & ~uintptr_t(63));
}

bool Fiber::overflowed(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= mapping_ && at < mapping_ + guard_bytes;
}

} // namespace host
