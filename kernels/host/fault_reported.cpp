// Faults in builds that do not catch them: a sanitizer reports them and ends the program, elsewhere they are
// fatal. To AddressSanitizer's report is added which CUDA thread it is about, and what it cannot know about
// the address.

#include "fault.hpp"

#include "sanitizer.hpp"

#if defined(HOST_ADDRESS_SANITIZER)

#include <cstdio>
#include <mutex>

#include "block.hpp"

namespace {

void name_the_thread(const char*) {
    host::Thread* thread = host::running_thread();
    if (thread == nullptr) return;
    const bool owed = thread->block.shared().debtor(__asan_get_report_address(), 1) >= 0;
    fprintf(stderr, "effnetv2 host device: this report is about %s%s\n",
            thread->block.describe(*thread).c_str(),
            owed ? ": shared memory that a cp.async is still to fill" : "");
}

} // namespace

void host::catch_faults_of_this_thread() {
    static std::once_flag once;
    std::call_once(once, [] { __asan_set_error_report_callback(name_the_thread); });
}

#elif defined(HOST_THREAD_SANITIZER) || !defined(__linux__) || !(defined(__x86_64__) || defined(__aarch64__))

void host::catch_faults_of_this_thread() {}

#endif
