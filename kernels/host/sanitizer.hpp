// What the runtime tells AddressSanitizer and ThreadSanitizer; every call is nothing in a plain build.
//
// ThreadSanitizer sees one of its fibers per CUDA thread. Switching between fibers orders nothing by itself:
// only barriers, `__syncwarp` and fences say `release` and `acquire`, so a kernel that relies on the order in
// which this scheduler happens to run its threads is reported as a data race. The runtime itself is compiled
// without ThreadSanitizer's instrumentation; only kernels are watched.
#pragma once

#include <cstddef>

#if defined(HOST_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(HOST_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

namespace host::sanitizer {

#if defined(HOST_ADDRESS_SANITIZER)
inline constexpr bool address = true;
inline void forbid(const void* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void allow(const void* from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
inline void leave_stack(void** saved, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(saved, bottom, bytes);
}
inline void enter_stack(void* saved, const void** old_bottom, size_t* old_bytes) {
    __sanitizer_finish_switch_fiber(saved, old_bottom, old_bytes);
}
#else
inline constexpr bool address = false;
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
#endif

#if defined(HOST_THREAD_SANITIZER)
inline constexpr bool thread = true;
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void name_fiber(void* fiber, const char* name) { __tsan_set_fiber_name(fiber, name); }
inline void switch_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
inline void release(void* tag) { __tsan_release(tag); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
#else
inline constexpr bool thread = false;
inline void* current_fiber() { return nullptr; }
inline void* create_fiber() { return nullptr; }
inline void destroy_fiber(void*) {}
inline void name_fiber(void*, const char*) {}
inline void switch_fiber(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

} // namespace host::sanitizer
