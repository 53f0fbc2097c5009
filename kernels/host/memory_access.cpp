#include "memory_access.hpp"

#include "memory.hpp"

namespace host {

void note_write(const void* address, size_t bytes) {
    const Thread& thread = this_thread();
    thread.block.shared().mark(address, bytes, thread.wgmma.mark_of(thread.rank));
}

void fail_misaligned(const void* address, size_t alignment, SourceLine at) {
    fail(Code::misaligned_address, at, "%p is not aligned to the %zu bytes of this access", address,
         alignment);
}

void fail_owed(const void* address, size_t bytes, SourceLine at) {
    Block& block = this_thread().block;
    const Thread& debtor = block.thread(unsigned(block.shared().debtor(address, bytes)));
    if (const TensorCopy* copy = block.mbarriers().copy_to(address, bytes))
        fail(Code::launch_failed, at,
             "touches shared memory that the cp.async.bulk.tensor of thread (%u,%u,%u), %s:%d, is still to fill: a wait "
             "for its mbarrier is missing",
             debtor.index.x, debtor.index.y, debtor.index.z, copy->at.file, copy->at.line);
    const AsyncCopy* copy = debtor.copies.find(address, bytes);
    fail(Code::launch_failed, at,
         "touches shared memory that the cp.async of thread (%u,%u,%u), %s:%d, is still to fill: a wait for "
         "its group is "
         "missing",
         debtor.index.x, debtor.index.y, debtor.index.z, copy ? copy->at.file : "", copy ? copy->at.line : 0);
}

void check_fenced(const char* instruction, const char* touches, const void* address, SourceLine at) {
    Block& block = this_thread().block;
    const uint32_t mark = block.shared().mark_of(address);
    if (mark == 0) return;
    const Thread& writer = block.thread(mark % 2048 - 1);
    if (mark == writer.wgmma.mark_of(writer.rank))
        fail(Code::launch_failed, at,
             "%s %s what thread (%u,%u,%u) has written to shared memory without a fence.proxy.async after it",
             instruction, touches, writer.index.x, writer.index.y, writer.index.z);
}

void check_early(const void* address, SourceLine at) {
    if (device_memory().check_argument(address).ok())
        fail(Code::launch_failed, at,
             "launched as a programmatic dependent, it touches device memory before it has waited for its "
             "predecessors");
}

void fail_not_shared(const char* instruction, const void* address, size_t bytes, SourceLine at) {
    fail(Code::invalid_address_space, at, "%s: the %zu bytes at %p are not shared memory of this block",
         instruction, bytes, address);
}

} // namespace host
