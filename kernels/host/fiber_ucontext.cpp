// Fiber switch for machines without a hand-written one. A suspended context lives on the stack it describes.

#include "fiber_switch.hpp"

#if defined(HOST_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))

#include <ucontext.h>

#include <cstdint>
#include <new>

namespace {

/// `makecontext` passes ints: a pointer travels as two halves.
struct Start {
    void (*entry)(void*);
    void* argument;
};

void begin(unsigned high, unsigned low) {
    const auto* start = reinterpret_cast<Start*>(uintptr_t(uint64_t(high) << 32 | low));
    start->entry(start->argument);
}

} // namespace

void* host_fiber_prepare(void* stack_bottom, void* stack_top, void (*entry)(void*), void* argument) {
    auto* context = new (stack_bottom) ucontext_t;
    auto* start = new (context + 1) Start{entry, argument};
    char* usable = reinterpret_cast<char*>(start + 1);
    getcontext(context);
    context->uc_stack.ss_sp = usable;
    context->uc_stack.ss_size = size_t(static_cast<char*>(stack_top) - usable);
    context->uc_link = nullptr;
    const uint64_t address = reinterpret_cast<uintptr_t>(start);
    makecontext(context, reinterpret_cast<void (*)()>(begin), 2, unsigned(address >> 32), unsigned(address));
    return context;
}

void host_fiber_switch(void** save, void* target) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(target));
}

#endif
