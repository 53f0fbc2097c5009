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
    const AsyncCopy* copy = debtor.copies.find(address, bytes);
    fail(Code::launch_failed, at,
         "touches shared memory that the cp.async of thread (%u,%u,%u), %s:%d, is still to fill: a wait for "
         "its group is "
         "missing",
         debtor.index.x, debtor.index.y, debtor.index.z, copy ? copy->at.file : "", copy ? copy->at.line : 0);
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
