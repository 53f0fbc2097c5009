// `mma.sync`, `ldmatrix` and `stmatrix`, by the fragment layouts of the PTX manual.
#pragma once

#include <cstdint>

#include "block.hpp"
#include "collective.hpp"
#include "memory_access.hpp"
#include "source_line.hpp"
#include "thread.hpp"

namespace host {

/// One lane's registers. `a` and `b` hold packed f16 or bf16 pairs, or tf32 values.
struct MmaOperands {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
    const float* c;
};

/// One lane's part in moving up to four 8x8 matrices of 16-bit elements.
struct MatrixOperands {
    /// Lane 8 i + r holds row r of matrix i.
    uint32_t row[4];
    uint32_t* fragments;
    unsigned matrices;
    bool transposed;
};

extern const Collective mma_m16n8k16_f16, mma_m16n8k16_bf16, mma_m16n8k8_tf32;
extern const Collective ldmatrix, stmatrix;

inline void mma(const Collective& shape, float* d, const uint32_t* a, const uint32_t* b, const float* c,
                SourceLine at) {
    MmaOperands operands{d, a, b, c};
    meet(shape, ~0u, &operands, at);
}

inline void check_row(const char* instruction, const void* row, SourceLine at) {
    check_shared(instruction, row, 16, at);
    check_access(row, 16, 16, at);
}

/// Each of the first 8 * matrices lanes reads its row itself, so that the sanitizers see who read what.
inline void load_matrices(uint32_t* fragments, unsigned matrices, bool transposed, const void* row,
                          SourceLine at) {
    MatrixOperands operands{{}, fragments, matrices, transposed};
    if (this_thread().lane() < 8 * matrices) {
        check_row("ldmatrix", row, at);
        const auto* source = static_cast<const volatile uint32_t*>(row);
        for (int i = 0; i < 4; ++i) operands.row[i] = source[i];
    }
    meet(ldmatrix, ~0u, &operands, at);
    this_thread().wgmma.note_registers(fragments, matrices, at);
}

inline void store_matrices(void* row, const uint32_t* fragments, unsigned matrices, bool transposed,
                           SourceLine at) {
    MatrixOperands operands{{}, const_cast<uint32_t*>(fragments), matrices, transposed};
    const bool writes = this_thread().lane() < 8 * matrices;
    if (writes) check_row("stmatrix", row, at);
    meet(stmatrix, ~0u, &operands, at);
    if (!writes) return;
    auto* destination = static_cast<volatile uint32_t*>(row);
    for (int i = 0; i < 4; ++i) destination[i] = operands.row[i];
    note_write(row, 16);
}

} // namespace host
