// Every bug of kernels/broken.cu is caught where it is marked, and its right twin is not.

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <fstream>

#include "harness.hpp"

using namespace harness;

namespace {

constexpr int illegal_address = 700, assert_failed = 710, misaligned_address = 716,
              invalid_address_space = 717, launch_failed = 719;

/// How a pair of kernels is launched.
struct Shape {
    unsigned grid = 1;
    unsigned block = 64;
    /// Length of x and y, and the argument n.
    int n = 64;
    unsigned shared = 64 * 16;
};

/// Lines of broken.cu marked `bug: name`, as "broken.cu:123".
std::vector<std::string> marked_lines(const std::string& name) {
    std::ifstream file(BROKEN_CU);
    std::vector<std::string> lines;
    std::string line;
    for (int number = 1; std::getline(file, line); ++number) {
        const size_t mark = line.find("// bug: " + name);
        if (mark != std::string::npos && line.substr(mark + 8) == name)
            lines.push_back("broken.cu:" + std::to_string(number));
    }
    return lines;
}

/// n floats in rows of 16, of which a box has 4.
CUtensorMap rows_of_16(const Buffer<float>& x, int n) {
    constexpr int of_floats = 7;
    const uint64_t extents[2] = {16, uint64_t(n) / 16}, strides[1] = {64};
    const unsigned box[2] = {16, 4}, element_strides[2] = {1, 1};
    CUtensorMap map;
    OK(cuTensorMapEncodeTiled(&map, of_floats, 2, reinterpret_cast<void*>(uintptr_t(x.pointer)), extents, strides, box,
                              element_strides, 0, 0, 0, 0));
    return map;
}

/// Launches; y starts as zeros and comes back in *result if that is not null.
int launch(const std::string& kernel, Shape shape, std::vector<float>* result = nullptr) {
    std::vector<float> values(shape.n);
    for (int i = 0; i < shape.n; ++i) values[i] = float(i);
    Buffer<float> x(values), y(std::vector<float>(shape.n));
    const Kernel launched(kernel.c_str());
    const int code =
        kernel.find("tensor_copy") == std::string::npos
            ? launched.launch(shape.grid, shape.block, shape.shared, x.pointer, y.pointer, shape.n)
            : launched.launch(shape.grid, shape.block, shape.shared, rows_of_16(x, shape.n), y.pointer, shape.n);
    if (result != nullptr) *result = y.read();
    return code;
}

/// The broken kernel fails with `code`, its own name, the marked line and the other texts; the right one
/// runs.
void check_caught(const std::string& name, int code, std::vector<std::string> texts, Shape shape = {}) {
    texts.push_back("kernel `broken_" + name + "`, block (0,0,0), thread (");
    for (const std::string& line : marked_lines(name)) texts.push_back(line);
    for (uint64_t seed : {0, 1, 2}) {
        effnetv2_host_set_seed(seed);
        expect_failure(name.c_str(), int(seed), launch("broken_" + name, shape), code, texts);
        OK(launch("right_" + name, shape));
    }
    effnetv2_host_set_seed(1);
}

#if defined(__GLIBC__)

/// The broken kernel ends a process of its own by SIGSEGV, before a minute is over, and standard error has each
/// text; the right one ends it well.
void check_fatal(const std::string& name, const std::vector<std::string>& texts) {
    for (const bool broken : {true, false}) {
        const std::string kernel = (broken ? "broken_" : "right_") + name;
        int ends[2];
        CHECK_EQUAL(pipe(ends), 0);
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            dup2(ends[1], STDERR_FILENO);
            close(ends[0]);
            close(ends[1]);
            execl("/proc/self/exe", "host_tests", "--launch", kernel.c_str(), nullptr);
            _exit(127);
        }
        close(ends[1]);
        std::string said;
        char bytes[256];
        for (ssize_t count; (count = read(ends[0], bytes, sizeof bytes)) > 0;) said.append(bytes, size_t(count));
        close(ends[0]);
        int status = 0;
        CHECK_EQUAL(waitpid(child, &status, 0), child);
        if (broken && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV))
            fail_check(__FILE__, __LINE__, kernel + ": status " + std::to_string(status) + ", " + said);
        if (!broken) CHECK(status == 0 && said.empty());
        for (const std::string& text : texts)
            if (broken && said.find(text) == std::string::npos)
                fail_check(__FILE__, __LINE__, kernel + ": no \"" + text + "\" in \"" + said + "\"");
    }
}

#endif

/// The broken kernel leaves NaN in y, the right one does not.
void check_poisoned(const std::string& name, Shape shape = {}) {
    for (const bool broken : {true, false}) {
        std::vector<float> y;
        OK(launch((broken ? "broken_" : "right_") + name, shape, &y));
        bool poisoned = false;
        for (float value : y) poisoned |= std::isnan(value);
        CHECK_EQUAL(poisoned, broken);
    }
}

} // namespace

TEST(bugs_barriers) {
    Context context;
    check_caught("divergent_barrier", launch_failed,
                 {"divergent barrier", "32 others wait at __syncthreads"});
    check_caught("early_return", launch_failed,
                 {"returned", "threads 32-63 have returned", "32 of 64 arrived"});
    check_caught("barrier_count", launch_failed, {"barrier 3 expects"});
    check_caught("deadlock", launch_failed,
                 {"deadlock", "threads 0-15 wait in __shfl_xor_sync, mask 0xffffffff",
                  "wait in __syncthreads (32 of 64 arrived)"});
}

TEST(bugs_collectives) {
    Context context;
    check_caught("exited_lane", launch_failed, {"names lane 31", "already returned"});
    check_caught("mask_without_caller", launch_failed, {"mask 0x7fffffff does not name the calling lane 31"});
    check_caught("reads_outside_mask", launch_failed, {"__shfl_xor_sync: reads lane", "not among the lanes"});
    check_caught("odd_width", launch_failed, {"width 12 is not a power of two"});
    check_caught("partial_warp", launch_failed, {"mma.m16n8k16.bf16 needs all 32 lanes"}, {1, 48});
}

TEST(bugs_alignment) {
    Context context;
    check_caught("misaligned_load", misaligned_address, {"not aligned to the 16 bytes"});
    check_caught("misaligned_ldmatrix", misaligned_address, {"not aligned to the 16 bytes"});
    check_caught("misaligned_copy", misaligned_address, {"not aligned to the 8 bytes"});
}

TEST(bugs_async_copies) {
    Context context;
    check_caught("early_read", launch_failed, {"cp.async of thread (", "a wait for its group is missing"});
    check_caught("copy_over_copy", launch_failed,
                 {"cp.async of thread (", "a wait for its group is missing"});
    check_caught("copy_to_local", invalid_address_space, {"cp.async: the 4 bytes at", "not shared memory"});
    if (plain) check_poisoned("early_plain_read");
}

TEST(bugs_warpgroups) {
    Context context;
    const Shape shape{1, 128, 128, 4096};
    check_poisoned("wgmma_early_read", shape);
    check_poisoned("wgmma_missing_commit", shape);
    const auto caught = [&](const std::string& name, std::vector<std::string> texts, int code = launch_failed) {
        check_caught("wgmma_" + name, code, texts, shape);
    };
    caught("missing_fence", {"wgmma.m64k16.bf16: wgmma.fence is missing between other accesses to the accumulators"});
    caught("loaded_registers", {"has written A's registers, and no wgmma.fence since"});
    caught("unseen_store", {"wgmma.m64k16.bf16 reads what thread (", "without a fence.proxy.async after it"});
    caught("unseen_copy", {"wgmma.m64k16.bf16 reads what thread (", "without a fence.proxy.async after it"});
    caught("divergence", {"deadlock: threads 0-63 wait in wgmma.m64k16.bf16 for their warpgroup at ",
                          "threads 64-95 wait in __syncthreads (32 of 128 arrived)"});
    caught("early_return", {"waits for all 128 threads of its warpgroup, but thread 96 of the block has already "
                            "returned"});
    check_caught("wgmma_partial_warpgroup", launch_failed, {"the last one of this block of 192 threads is partial"},
                 {1, 192, 192, 4096});
    caught("descriptors", {"is not the 0x", "of the warpgroup's first thread"});
    caught("misaligned_atom", {"start 256,", "does not keep the atoms of 512 bytes aligned"}, misaligned_address);
    caught("misaligned_memory", {"has dynamic shared memory aligned to 128 bytes, not to the 1024 of this swizzle"},
           misaligned_address);
    // ThreadSanitizer sees a race first.
    if (plain) caught("overwritten", {"the B of the wgmma at ", "was written before it was waited for"});
    caught("written_accumulators", {"the accumulators of the wgmma at", "were written before it was waited for"});
}

TEST(bugs_tensor_copies) {
    Context context;
    const auto caught = [&](const std::string& name, std::vector<std::string> texts, int code = launch_failed) {
        check_caught("tensor_copy_" + name, code, texts);
    };
    const char* under_way = "touches shared memory that the cp.async.bulk.tensor of thread (0,0,0), ";
    caught("early_read", {under_way, "is still to fill: a wait for its mbarrier is missing"});
    caught("wrong_parity", {under_way});
    caught("wrong_bytes", {"deadlock: threads 0-63 wait for an mbarrier (0 of 1 arrivals are missing, and 64 bytes)"});
    caught("early_phase", {"mbarrier.arrive: the phase before is not over, 256 bytes are missing"});
    caught("unseen_barrier", {"cp.async.bulk.tensor signals what thread (0,0,0) has written", "fence.proxy.async"});
    caught("unseen_store", {"cp.async.bulk.tensor overwrites what thread (", "fence.proxy.async"});
    caught("unknown_barrier", {"there is no mbarrier at 0x"});
    caught("never_awaited", {"the block ends before anybody has waited for this cp.async.bulk.tensor"});
    caught("misaligned", {"byte 64 of shared memory is no multiple of 128"}, misaligned_address);
}

TEST(bugs_traps) {
    Context context;
    check_caught("trap", launch_failed, {"thread (7,0,0)", "__trap"});
    check_caught("assertion", assert_failed, {"thread (63,0,0)", "assertion `int(threadIdx.x) < n"});
}

TEST(bugs_poison) {
    if (!plain) return; // the sanitizers stop at the access
    Context context;
    effnetv2_host_set_seed(0); // first warp first: it reads before the second has written
    check_poisoned("missing_barrier");
    check_poisoned("uninitialised");
    effnetv2_host_set_seed(1);
}

TEST(bugs_faults) {
    if (!plain) return; // the sanitizers report them in their own way
    Context context;
    // A page of floats ends where its allocation does.
    check_caught("far_write", illegal_address, {"bytes past the end of the 4096-byte device allocation"},
                 {1, 1024, 1024, 0});
    check_caught("near_read", illegal_address,
                 {"thread (1023,0,0)", "0 bytes past the end of the 4096-byte device allocation"},
                 {1, 1024, 1024, 0});
    check_caught("shared_overflow", illegal_address,
                 {"past the end of the 4096 bytes of dynamic shared memory"}, {1, 1024, 1024, 4096});
#if defined(__x86_64__) // AArch64 divides by zero without a word
    check_caught("division_by_zero", launch_failed, {"integer division by zero"});
#endif
    check_caught("stack_overflow", launch_failed, {"stack overflow"});
    // In the C library, which holds no lock then.
    check_caught("far_fill", illegal_address, {"0 bytes past the end of the 4096-byte device allocation"},
                 {1, 1024, 1024, 0});
}

#if defined(__GLIBC__)

/// What is left of the process could only wait for the lock.
TEST(bugs_faults_that_end_the_process) {
    if (!plain) return;
    const std::string kernel = "effnetv2 host device: kernel `broken_fault_in_";
    const std::string where = "`, block (0,0,0), thread (0,0,0): SIGSEGV at address 0x";
    check_fatal("fault_in_malloc", {kernel + "malloc" + where, "a lock of the C library that nobody can release"});
    check_fatal("fault_in_explanation", {kernel + "explanation" + where, "while another fault was explained"});
}

#endif

TEST(bugs_write_into_padding) {
    if (!plain) return;
    Context context;
    // 240 bytes leave 16 to the next multiple of 256, too few for the guard page to notice.
    for (const bool broken : {true, false}) {
        Buffer<float> x(std::vector<float>(60)), y(std::vector<float>(60));
        OK(Kernel(broken ? "broken_near_write" : "right_near_write")
               .launch(1, 60, 0, x.pointer, y.pointer, 60));
        const int code = cuMemFree_v2(y.pointer);
        y.pointer = 0;
        if (broken)
            FAILS(code, illegal_address, "wrote just before or behind", "240 bytes");
        else
            OK(code);
    }
}

TEST(bugs_recovery) {
    // After an error the device goes on, on every worker and fiber.
    Context context;
    for (int round = 0; round < 20; ++round) {
        FAILS(launch("broken_deadlock", {8, 64, 64, 1024}), launch_failed, "deadlock");
        std::vector<float> y;
        OK(launch("right_missing_barrier", {}, &y));
        for (int i = 0; i < 64; ++i) CHECK_EQUAL(y[i], float(63 - i));
    }
}

/// Runs one kernel; what it does wrong is for a sanitizer to say.
int launch_bug(const char* kernel) {
    Context context;
    const std::string name = kernel;
    const auto is = [&](const char* bug) { return name.find(bug) != std::string::npos; };
    Shape shape;
    if (is("race_of_blocks") || is("missing_fence")) shape = {2, 32, 64, 0};
    if (is("wgmma")) shape = {1, 128, 128, 4096};
    // The first thread first: otherwise another finds no barrier.
    if (is("early_barrier")) effnetv2_host_set_seed(0);
    if (is("shared_overflow")) shape.shared = 64 * sizeof(float);
    OK(launch(name, shape));
    return failures() == 0 ? 0 : 1;
}
