#include "wgmma.hpp"

#include <cstring>

#include "half_types.hpp"

namespace host {
namespace {

constexpr unsigned m = 64, k = 16, max_n = 256, lanes_of_group = 128;

/// Lane 32 w + 4 g + t holds rows 16 w + g and + 8 and, of each eight columns, columns 2 t and 2 t + 1; sums[4 j + i] is
/// that of row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2.
template <class Visit> void for_each_sum(const Lanes& lanes, unsigned n, Visit visit) {
    for (unsigned lane = 0; lane < lanes_of_group; ++lane) {
        float* sums = lanes.operands<WgmmaOperands>(lane).sums;
        const unsigned g = lane % 32 / 4, t = lane % 4;
        for (unsigned i = 0; i < n / 2; ++i)
            visit(sums[i], 16 * (lane / 32) + g + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * t + i % 2);
    }
}

/// The first lane whose call is another than lane 0's, or 0.
unsigned other_call(const Lanes& lanes) {
    const auto& first = lanes.operands<WgmmaOperands>(0);
    for (unsigned lane = 1; lane < lanes_of_group; ++lane) {
        const auto& own = lanes.operands<WgmmaOperands>(lane);
        if (own.descriptor != first.descriptor || own.n != first.n || own.b_rows != first.b_rows) return lane;
    }
    return 0;
}

/// A as in mma.m16n8k16, for each warp's 16 rows. Products are exact in f32 and summed in f32, k ascending, onto the
/// accumulator.
template <float (*value)(uint16_t)> void exchange_product(const Lanes& lanes) {
    const auto& first = lanes.operands<WgmmaOperands>(0);
    const unsigned n = first.n;
    if (const unsigned lane = other_call(lanes))
        return lanes.fail(lane, "the descriptor 0x%016llx is not the 0x%016llx of the warpgroup's first thread",
                          static_cast<unsigned long long>(lanes.operands<WgmmaOperands>(lane).descriptor),
                          static_cast<unsigned long long>(first.descriptor));
    float a[m][k], b[k][max_n], d[m][max_n];
    for (unsigned lane = 0; lane < lanes_of_group; ++lane) {
        const uint32_t* registers = lanes.operands<WgmmaOperands>(lane).a;
        const unsigned row = 16 * (lane / 32) + lane % 32 / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; ++i)
            for (unsigned half = 0; half < 2; ++half)
                a[row + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = value(uint16_t(registers[i] >> 16 * half));
    }
    for (unsigned i = 0; i < 2 * n; ++i) {
        const uint32_t* piece = lanes.operands<WgmmaOperands>(i % lanes_of_group).b[i / lanes_of_group];
        for (unsigned e = 0; e < 8; ++e) {
            const float element = value(uint16_t(piece[e / 2] >> 16 * (e % 2)));
            if (first.b_rows)
                b[i / (n / 8)][i % (n / 8) * 8 + e] = element;
            else
                b[i % 2 * 8 + e][i / 2] = element;
        }
    }
    for_each_sum(lanes, n, [&](float sum, unsigned row, unsigned column) { d[row][column] = sum; });
    for (unsigned row = 0; row < m; ++row)
        for (unsigned i = 0; i < k; ++i)
            for (unsigned column = 0; column < n; ++column) d[row][column] += a[row][i] * b[i][column];
    for_each_sum(lanes, n, [&](float& sum, unsigned row, unsigned column) { sum = d[row][column]; });
}

void exchange_nothing(const Lanes&) {}

bool is_poisoned(const float* accumulators, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, accumulators + i, sizeof bits);
        if (bits != ~0u) return false;
    }
    return true;
}

} // namespace

const Collective wgmma_m64k16_f16{"wgmma.m64k16.f16", exchange_product<half_value>, true, false, 4};
const Collective wgmma_m64k16_bf16{"wgmma.m64k16.bf16", exchange_product<bfloat16_value>, true, false, 4};
const Collective wgmma_fence_sync{"wgmma.fence", exchange_nothing, true};
const Collective wgmma_commit_sync{"wgmma.commit_group", exchange_nothing, true};
const Collective wgmma_wait_sync{"wgmma.wait_group", exchange_nothing, true};

uint32_t wgmma_address(const void* shared, unsigned alignment, SourceLine at) {
    const SharedMemory& memory = this_thread().block.shared();
    check_shared("wgmma's descriptor", shared, 16, at);
    const size_t offset = memory.offset(shared);
    if (offset >= max_shared_bytes)
        fail(Code::launch_failed, at, "wgmma's descriptor: B must be in dynamic shared memory on the host device");
    if (memory.promised_alignment() < alignment)
        fail(Code::misaligned_address, at,
             "wgmma's descriptor: the kernel has dynamic shared memory aligned to %u bytes, not to the %u of this "
             "swizzle",
             memory.promised_alignment(), alignment);
    if (offset % 16 != 0)
        fail(Code::misaligned_address, at, "wgmma's descriptor: byte %zu of shared memory is no multiple of 16",
             offset);
    return uint32_t(offset);
}

void check_descriptor(const Collective& product, uint64_t bits, unsigned n, bool b_rows, SourceLine at) {
    const MatrixDescriptor descriptor(bits);
    const auto [start, leading, stride, swizzle] = descriptor;
    // Bits that are not those of the three numbers and the mode: unused, or the base offset of misaligned atoms.
    if (swizzle == 0 || (bits & 0x3fffc000c000c000u) != 0)
        fail(Code::launch_failed, at, "%s: 0x%016llx is no descriptor of a swizzled matrix", product.name,
             static_cast<unsigned long long>(bits));
    const unsigned atom = 8 * swizzle, first_row = b_rows ? 16 : swizzle;
    if (start % atom >= first_row || stride % atom != 0 || (b_rows && leading % atom != 0))
        fail(Code::misaligned_address, at,
             "%s: start %u, leading %u or stride %u does not keep the atoms of %u bytes aligned to their size",
             product.name, start, leading, stride, atom);
    if (!b_rows && start % swizzle + 32 > swizzle)
        fail(Code::launch_failed, at, "%s: 16 k from byte %u of a row of %u bytes on are not in this row",
             product.name, start % swizzle, swizzle);
    if (b_rows && 2 * n % swizzle != 0)
        fail(Code::launch_failed, at, "%s: %u columns are not whole rows of %u bytes", product.name, n, swizzle);
}

float* begin_product(const Collective& product, float* accumulators, unsigned n, const uint32_t* a, SourceLine at) {
    WgmmaQueue& queue = this_thread().wgmma;
    const size_t count = n / 2;
    if (const SourceLine* line = queue.written(a))
        fail(Code::launch_failed, at, "%s: the ldmatrix at %s:%d has written A's registers, and no wgmma.fence since",
             product.name, line->file, line->line);
    WgmmaProduct* under_way = queue.find(accumulators, count);
    if (under_way == nullptr) {
        if (!queue.fenced())
            fail(Code::launch_failed, at,
                 "%s: wgmma.fence is missing between other accesses to the accumulators and it", product.name);
        under_way = &queue.push(accumulators, count, at);
    } else if (under_way->accumulators != accumulators || under_way->sums.size() != count) {
        fail(Code::launch_failed, at, "%s: a product of another shape, %s:%d, still works on these accumulators",
             product.name, under_way->at.file, under_way->at.line);
    } else if (!is_poisoned(accumulators, count)) {
        fail(Code::launch_failed, at, "%s: the accumulators were written while the product of %s:%d was under way",
             product.name, under_way->at.file, under_way->at.line);
    }
    queue.join(*under_way, at);
    memset(accumulators, 0xff, count * sizeof *accumulators);
    return under_way->sums.data();
}

void deliver(const WgmmaProduct& product, SourceLine at) {
    if (!is_poisoned(product.accumulators, product.sums.size()))
        fail(Code::launch_failed, at, "the accumulators of the wgmma at %s:%d were written before it was waited for",
             product.at.file, product.at.line);
    memcpy(product.accumulators, product.sums.data(), product.sums.size() * sizeof(float));
}

void fence_proxy_async() { this_thread().wgmma.fence_proxy(); }

void fail_changed(const WgmmaPiece& piece, SourceLine at) {
    fail(Code::launch_failed, at, "the B of the wgmma at %s:%d was written before it was waited for", piece.at.file,
         piece.at.line);
}

} // namespace host
