// How a fault becomes an error: the signal handler notes what happened and rewrites the interrupted context,
// so that on its return the fiber continues in `land`, on a clean part of its own stack, and reports the
// fault like any other failure. Faults outside of kernels go to whoever handled them before.
//
// Reporting takes memory. A fault in the allocator leaves its lock taken for ever, and whoever allocates next
// waits for it; so after a fault outside of this library a thread of its own tries the locks first. If they are
// not to be had, or if explaining a fault is what faults, the bare facts go to standard error and the signal
// ends the process.
//
// Sanitizer builds leave faults to the sanitizer (fault_reported.cpp).

#include "fault.hpp"

#include "sanitizer.hpp"

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)) &&                                   \
    !defined(HOST_ADDRESS_SANITIZER) && !defined(HOST_THREAD_SANITIZER)

#include <dlfcn.h>
#include <link.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>

#include "block.hpp"
#include "kernel.hpp"
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
    /// From its report's beginning to its end.
    volatile sig_atomic_t under_report = 0;
};

/// One of each worker's, kept with its alternate stack, which the handler runs on.
struct AlternateStack {
    Fault fault;
    char memory[64 << 10];
};

/// A line for standard error, put together in the memory that it has.
class Line {
  public:
    Line& operator<<(const char* text) {
        while (*text != '\0' && length_ < sizeof text_) text_[length_++] = *text++;
        return *this;
    }

    Line& number(uintptr_t value, unsigned base = 10) {
        char digits[24];
        char* digit = digits + sizeof digits;
        *--digit = '\0';
        do *--digit = "0123456789abcdef"[value % base];
        while ((value /= base) != 0);
        return *this << digit;
    }

    Line& index(uint3 at) {
        (*this << "(").number(at.x) << ",";
        return (number(at.y) << ",").number(at.z) << ")";
    }

    void write() const {
        for (size_t done = 0; done < length_;) {
            const ssize_t count = ::write(STDERR_FILENO, text_ + done, length_ - done);
            if (count <= 0) return;
            done += size_t(count);
        }
    }

  private:
    char text_[512];
    size_t length_ = 0;
};

const char* signal_name(int signal) {
    switch (signal) {
    case SIGSEGV: return "SIGSEGV";
    case SIGBUS: return "SIGBUS";
    case SIGFPE: return "SIGFPE";
    default: return "SIGILL";
    }
}

/// Ends the process by the fault's own signal; only calls that a signal handler may make.
[[noreturn]] void end_process(const Thread& thread, const Fault& fault, const char* why) {
    Line line;
    line << "effnetv2 host device: kernel `" << thread.block.launch().kernel->name.c_str() << "`, block ";
    line.index(thread.block.index()) << ", thread ";
    line.index(thread.index) << ": " << signal_name(fault.signal) << " at address 0x";
    line.number(reinterpret_cast<uintptr_t>(fault.address), 16) << ", instruction 0x";
    line.number(fault.pc, 16) << ", " << why << "; the process ends\n";
    line.write();
    signal(fault.signal, SIG_DFL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, fault.signal);
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    raise(fault.signal);
    _exit(128 + fault.signal);
}

/// Where this library's instructions are.
struct Instructions {
    uintptr_t begin = 0;
    uintptr_t end = 0;

    bool contains(uintptr_t pc) const { return pc >= begin && pc < end; }
} own_instructions;

/// dl_iterate_phdr callback: finds the executable segment that has the function `result->begin`.
int find_instructions(dl_phdr_info* object, size_t, void* result) {
    auto& found = *static_cast<Instructions*>(result);
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const auto& header = object->dlpi_phdr[i];
        if (header.p_type != PT_LOAD || (header.p_flags & PF_X) == 0) continue;
        const uintptr_t begin = object->dlpi_addr + header.p_vaddr;
        if (found.begin < begin || found.begin >= begin + header.p_memsz) continue;
        found = {begin, begin + header.p_memsz};
        return 1;
    }
    return 0;
}

/// Tries the locks of the allocator: `fork` takes them all, and waits for ever for one that is never released.
class LockTrial {
  public:
    LockTrial() {
        sem_init(&wanted_, 0, 0);
        sem_init(&passed_, 0, 0);
        std::thread(&LockTrial::serve, this).detach();
    }

    /// Whether they could be had within a time that nobody holds one for. Allocates nothing.
    bool passes() {
        std::lock_guard one_at_a_time(mutex_);
        sem_post(&wanted_);
        timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += patience_seconds;
        int result;
        do result = sem_timedwait(&passed_, &until);
        while (result != 0 && errno == EINTR);
        return result == 0;
    }

  private:
    static constexpr int patience_seconds = 5;

    [[noreturn]] void serve() {
        for (;;) {
            while (sem_wait(&wanted_) != 0) {}
            const pid_t child = fork();
            if (child == 0) _exit(0);
            while (child > 0 && waitpid(child, nullptr, 0) < 0 && errno == EINTR) {}
            sem_post(&passed_);
        }
    }

    std::mutex mutex_;
    sem_t wanted_;
    sem_t passed_;
};

LockTrial* lock_trial = nullptr;

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
    if (!own_instructions.contains(fault->pc) && !lock_trial->passes())
        end_process(thread, *fault, "which has left a lock of the C library that nobody can release");
    thread.block.set_failure(explain(thread, *fault));
    fault->under_report = 0;
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
    const bool again = fault->under_report;
    *fault = {signal, info->si_addr, program_counter(context), 1};
    if (again) end_process(*thread, *fault, "while another fault was explained");
    redirect(context, thread->fiber.emergency_stack(), fault);
}

void install_handlers() {
    own_instructions.begin = reinterpret_cast<uintptr_t>(&handle);
    dl_iterate_phdr(find_instructions, &own_instructions);
    lock_trial = new LockTrial; // as long-lived as its thread, which never ends
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
