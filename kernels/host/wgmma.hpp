// `wgmma` with A in registers and B in shared memory, by the descriptors and layouts of the PTX manual.
//
// A product is computed when it is issued and delivered when its group is waited for; until then the accumulators are
// poisoned, and shared memory must stay as it was: the two moments at which a wrong kernel shows it.
#pragma once

#include <cstdint>

#include "block.hpp"
#include "collective.hpp"
#include "memory_access.hpp"
#include "source_line.hpp"
#include "thread.hpp"

namespace host {

/// Pieces of 16 bytes of B that one lane reads, at most: B has 16 x 256 elements.
inline constexpr unsigned wgmma_pieces = 4;

/// One lane's part in a product: its accumulators and A, and piece 128 i + lane of B.
struct WgmmaOperands {
    float* sums;
    const uint32_t* a;
    uint64_t descriptor;
    unsigned n;
    bool b_rows;
    uint32_t b[wgmma_pieces][4];
};

/// A descriptor's fields in bytes.
struct MatrixDescriptor {
    unsigned start, leading, stride, swizzle;

    explicit MatrixDescriptor(uint64_t bits)
        : start(unsigned(bits & 0x3fff) << 4), leading(unsigned(bits >> 16 & 0x3fff) << 4),
          stride(unsigned(bits >> 32 & 0x3fff) << 4), swizzle(bits >> 62 == 0 ? 0 : 256u >> (bits >> 62)) {}

    /// Where a piece of B lies: of K-major B 2 n pieces, two to a column; else 2 n, n / 8 to each k.
    unsigned piece(unsigned n, bool b_rows, unsigned i) const {
        unsigned offset;
        if (b_rows) {
            const unsigned k = i / (n / 8), byte = i % (n / 8) * 16;
            offset = byte / swizzle * leading + k / 8 * stride + k % 8 * swizzle + byte % swizzle;
        } else {
            const unsigned column = i / 2;
            offset = column / 8 * stride + column % 8 * swizzle + i % 2 * 16;
        }
        const unsigned address = start + offset;
        return address ^ ((address >> 7) % (swizzle / 16)) << 4;
    }
};

extern const Collective wgmma_m64k16_f16, wgmma_m64k16_bf16;
extern const Collective wgmma_fence_sync, wgmma_commit_sync, wgmma_wait_sync;

/// Shared memory's address as a descriptor wants it: here from the start of the dynamic part.
uint32_t wgmma_address(const void* shared, unsigned alignment, SourceLine at);

/// Fails where the layout is not one that hardware and this device are known to understand alike.
void check_descriptor(const Collective& product, uint64_t bits, unsigned n, bool b_rows, SourceLine at);

/// The accumulators' place in the queue, poisoned; fails if their registers are not ready.
float* begin_product(const Collective& product, float* accumulators, unsigned n, const uint32_t* a, SourceLine at);

[[noreturn]] void fail_changed(const WgmmaPiece& piece, SourceLine at);

/// Gives a product's accumulators back.
void deliver(const WgmmaProduct& product, SourceLine at);

/// Each lane reads its pieces of B itself, so that the sanitizers see who read what, now and when it waits.
inline void wgmma(const Collective& product, float* accumulators, unsigned n, const uint32_t* a, uint64_t bits,
                  bool b_rows, SourceLine at) {
    Thread& thread = this_thread();
    SharedMemory& shared = thread.block.shared();
    check_descriptor(product, bits, n, b_rows, at);
    const MatrixDescriptor descriptor(bits);
    WgmmaOperands operands{nullptr, a, bits, n, b_rows, {}};
    for (unsigned slot = 0, i = thread.rank % 128; i < 2 * n; ++slot, i += 128) {
        const unsigned char* address = shared.at(descriptor.piece(n, b_rows, i));
        check_shared(product.name, address, 16, at);
        check_access(address, 16, 1, at);
        check_fenced(product.name, "reads", address, at);
        WgmmaPiece& piece = thread.wgmma.read(address, at);
        const auto* source = reinterpret_cast<const volatile uint32_t*>(address);
        for (int word = 0; word < 4; ++word) operands.b[slot][word] = piece.words[word] = source[word];
    }
    operands.sums = begin_product(product, accumulators, n, a, at);
    meet(product, ~0u, &operands, at);
}

inline void wgmma_fence(SourceLine at) {
    meet(wgmma_fence_sync, ~0u, nullptr, at);
    this_thread().wgmma.fence();
}

inline void wgmma_commit(SourceLine at) {
    meet(wgmma_commit_sync, ~0u, nullptr, at);
    this_thread().wgmma.commit();
}

/// Waits until at most the `pending` newest groups of this thread are under way.
inline void wgmma_wait(unsigned pending, SourceLine at) {
    meet(wgmma_wait_sync, ~0u, nullptr, at);
    const auto check = [&](const WgmmaPiece& piece) {
        const auto* source = reinterpret_cast<const volatile uint32_t*>(piece.address);
        for (int word = 0; word < 4; ++word)
            if (source[word] != piece.words[word]) fail_changed(piece, at);
    };
    this_thread().wgmma.wait(pending, check, [&](const WgmmaProduct& product) { deliver(product, at); });
}

void fence_proxy_async();

} // namespace host
