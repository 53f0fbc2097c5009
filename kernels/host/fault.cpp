// How a fault becomes an error: the signal handler notes what happened and rewrites the interrupted context,
// so that on its return the fiber continues in `land`, on a clean part of its own stack, and reports the
// fault like any other failure. Faults outside of kernels go to whoever handled them before.
//
// Sanitizer builds leave faults to the sanitizer (fault_reported.cpp).

#include "fault.hpp"

#include "sanitizer.hpp"

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)) &&                                   \
    !defined(HOST_ADDRESS_SANITIZER) && !defined(HOST_THREAD_SANITIZER)

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>

#include "block.hpp"
#include "memory.hpp"

namespace host {
namespace {

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[NSIG];

/// What the handler noted for `land`, on the same operating-system thread. Not thread_local: that memory is
/// `__shared__` (thread.hpp).
struct Fault {
    int signal = 0;
    const void* address = nullptr;
    uintptr_t pc = 0;
};

/// One of each worker's, kept with its alternate stack, which the handler runs on.
struct AlternateStack {
    Fault fault;
    char memory[64 << 10];
};

/// The line of an instruction of this library, asked of `addr2line` where there is one.
std::string source_of(uintptr_t pc) {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(pc), &info) == 0 || info.dli_fname == nullptr) return "unknown line";
    const uintptr_t offset = pc - reinterpret_cast<uintptr_t>(info.dli_fbase);
    const std::string command = text("addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, size_t(offset));
    char line[512] = "";
    if (FILE* pipe = popen(command.c_str(), "r")) {
        if (fgets(line, sizeof line, pipe) == nullptr) line[0] = '\0';
        pclose(pipe);
    }
    line[strcspn(line, " \n")] = '\0';
    if (line[0] == '\0' || line[0] == '?') return text("%s+0x%zx", info.dli_fname, size_t(offset));
    return line;
}

Status explain(Thread& thread, const Fault& fault) {
    const std::string where = thread.block.describe(thread) + ", " + source_of(fault.pc);
    const char* who = where.c_str();
    if (fault.signal == SIGFPE) return failure(Code::launch_failed, "%s: integer division by zero", who);
    if (fault.signal == SIGILL) return failure(Code::illegal_instruction, "%s: trap", who);
    if (thread.fiber.overflowed(fault.address))
        return failure(Code::launch_failed, "%s: stack overflow: too many or too large local variables", who);
    if (thread.block.shared().overrun(fault.address))
        return failure(Code::illegal_address,
                       "%s: access past the end of the %zu bytes of dynamic shared memory", who,
                       thread.block.launch().dynamic_shared);
    return failure(Code::illegal_address, "%s: illegal access at %p: %s", who, fault.address,
                   device_memory().describe(fault.address).c_str());
}

/// Where an interrupted fiber continues. Its frames are lost; it reports and never returns.
[[noreturn]] void land(Fault* fault) {
    Thread& thread = *running_thread();
    thread.block.set_failure(explain(thread, *fault));
    thread.fiber.suspend();
    abort();
}

void redirect(ucontext_t& context, void* stack, Fault* fault) {
#if defined(__x86_64__)
    auto& registers = context.uc_mcontext.gregs;
    // As after a call: the stack pointer is eight below a multiple of sixteen.
    registers[REG_RSP] = greg_t(reinterpret_cast<uintptr_t>(stack) - 8);
    registers[REG_RBP] = 0;
    registers[REG_RDI] = greg_t(reinterpret_cast<uintptr_t>(fault));
    registers[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&land));
#else
    context.uc_mcontext.sp = reinterpret_cast<uintptr_t>(stack);
    context.uc_mcontext.regs[0] = reinterpret_cast<uintptr_t>(fault);
    context.uc_mcontext.regs[29] = 0;
    context.uc_mcontext.pc = reinterpret_cast<uintptr_t>(&land);
#endif
}

uintptr_t program_counter(const ucontext_t& context) {
#if defined(__x86_64__)
    return uintptr_t(context.uc_mcontext.gregs[REG_RIP]);
#else
    return context.uc_mcontext.pc;
#endif
}

void pass_on(int signal, siginfo_t* info, void* context) {
    const struct sigaction& old = previous[signal];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
    // Restored, the default action strikes when the faulting instruction runs again.
    sigaction(signal, &old, nullptr);
}

void handle(int signal, siginfo_t* info, void* raw_context) {
    Thread* thread = running_thread();
    if (thread == nullptr) return pass_on(signal, info, raw_context);
    auto& context = *static_cast<ucontext_t*>(raw_context);
    stack_t stack;
    sigaltstack(nullptr, &stack);
    auto* fault =
        reinterpret_cast<Fault*>(static_cast<char*>(stack.ss_sp) - offsetof(AlternateStack, memory));
    *fault = {signal, info->si_addr, program_counter(context)};
    redirect(context, thread->fiber.emergency_stack(), fault);
}

void install_handlers() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int signal : signals) sigaction(signal, &action, &previous[signal]);
}

} // namespace

void catch_faults_of_this_thread() {
    static std::once_flag once;
    std::call_once(once, install_handlers);
    auto* alternate = new AlternateStack; // as long-lived as the thread, which never ends
    stack_t stack = {};
    stack.ss_sp = alternate->memory;
    stack.ss_size = sizeof alternate->memory;
    sigaltstack(&stack, nullptr);
}

} // namespace host

#endif
