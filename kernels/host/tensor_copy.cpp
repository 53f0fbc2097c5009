#include "tensor_copy.hpp"

#include <cstring>

#include "sanitizer.hpp"

namespace host {

MatrixMap read_tensor_map(const void* map, SourceLine at) {
    MatrixMap matrix;
    memcpy(&matrix, map, sizeof matrix);
    if (matrix.kind != MatrixMap::current)
        fail(Code::launch_failed, at,
             "cp.async.bulk.tensor: what is at %p is no tensor map of cuTensorMapEncodeTiled", map);
    return matrix;
}

void check_tensor_copy(const MatrixMap& map, const void* shared, const void* barrier, SourceLine at) {
    const char* instruction = "cp.async.bulk.tensor";
    const SharedMemory& memory = this_thread().block.shared();
    check_shared(instruction, shared, size_t(map.row_bytes()) * map.box[1], at);
    const size_t offset = memory.offset(shared);
    if (offset >= max_shared_bytes)
        fail(Code::launch_failed, at, "%s: the destination must be in dynamic shared memory on the host device",
             instruction);
    if (offset % 128 != 0)
        fail(Code::misaligned_address, at, "%s: byte %zu of shared memory is no multiple of 128", instruction, offset);
    if (map.swizzle != 0 && memory.promised_alignment() < 8 * map.swizzle)
        fail(Code::misaligned_address, at,
             "%s: the kernel has dynamic shared memory aligned to %u bytes, not to the %u of this swizzle", instruction,
             memory.promised_alignment(), 8 * map.swizzle);
    mbarrier_at(barrier, instruction, at);
    check_fenced(instruction, "signals", barrier, at);
}

TensorCopy& begin_tensor_copy(const void* barrier, SourceLine at) {
    return mbarrier_at(barrier, "cp.async.bulk.tensor", at).copies.emplace_back(TensorCopy{{}, at});
}

void count_tensor_copy(const void* barrier, const TensorCopy& copy, SourceLine at) {
    Mbarrier& to = mbarrier_at(barrier, "cp.async.bulk.tensor", at);
    sanitizer::release(&to.tag[to.phase % 2]);
    to.missing_bytes -= copy.bytes();
    end_phase_if_awaited(to);
}

} // namespace host
