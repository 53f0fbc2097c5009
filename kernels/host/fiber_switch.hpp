// The machine-dependent part of a fiber: exchanging one stack for another.
//
// Written in assembly for x86-64 (System V) and AArch64, where a switch costs about ten nanoseconds;
// everywhere else, or with HOST_UCONTEXT, by `swapcontext`.
#pragma once

extern "C" {

/// Lays out a suspended fiber just below `stack_top` that will call `entry(argument)`; `entry` never returns.
void* host_fiber_prepare(void* stack_bottom, void* stack_top, void (*entry)(void*), void* argument);

/// Suspends the caller, leaving its handle in `*save`, and continues the suspended `target`.
void host_fiber_switch(void** save, void* target);
}
