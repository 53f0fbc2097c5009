#include "thread.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "block.hpp"

namespace host {
namespace {

thread_local Thread* running = nullptr;

} // namespace

Thread& this_thread() { return *running; }

Thread* running_thread() { return running; }

void set_running_thread(Thread* thread) { running = thread; }

const void* running_thread_word() { return &running; }

void fail(Code code, SourceLine at, const char* format, ...) {
    Thread& thread = this_thread();
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    thread.block.set_failure(thread, code, at, message);
    thread.fiber.suspend();
    abort(); // the scheduler never resumes a thread of a failed block
}

} // namespace host
