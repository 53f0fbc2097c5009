#include "tensor_core.hpp"

#include "bits.hpp"
#include "half_types.hpp"

namespace host {
namespace {

constexpr int m = 16;
constexpr int n = 8;

/// Products are exact in f32 and summed in f32, k ascending, onto the accumulator.
template <int k> void multiply(float (&d)[m][n], const float (&a)[m][k], const float (&b)[k][n]) {
    for (int row = 0; row < m; ++row)
        for (int i = 0; i < k; ++i)
            for (int column = 0; column < n; ++column) d[row][column] += a[row][i] * b[i][column];
}

/// In all shapes lane 4 g + t holds rows g and g + 8 and columns 2 t and 2 t + 1 of the accumulator.
void gather_accumulator(const Lanes& lanes, float (&c)[m][n]) {
    for (unsigned lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = lanes.operands<MmaOperands>(lane).c[i];
}

void scatter_accumulator(const Lanes& lanes, const float (&d)[m][n]) {
    for (unsigned lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            lanes.operands<MmaOperands>(lane).d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

/// m16n8k16: register i of A holds row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next; register i of B
/// holds rows 2 t + 8 i and the next of column g.
template <float (*value)(uint16_t)> void exchange_m16n8k16(const Lanes& lanes) {
    float a[m][16], b[16][n], d[m][n];
    for (unsigned lane = 0; lane < 32; ++lane) {
        const auto& operands = lanes.operands<MmaOperands>(lane);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned half = 0; half < 2; ++half) {
            for (unsigned i = 0; i < 4; ++i)
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] =
                    value(uint16_t(operands.a[i] >> (16 * half)));
            for (unsigned i = 0; i < 2; ++i)
                b[2 * t + 8 * i + half][g] = value(uint16_t(operands.b[i] >> (16 * half)));
        }
    }
    gather_accumulator(lanes, d);
    multiply<16>(d, a, b);
    scatter_accumulator(lanes, d);
}

/// The tensor core ignores the 13 low bits of a tf32 operand.
float tf32_value(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

/// m16n8k8: register i of A holds row g + 8 (i % 2), column t + 4 (i / 2); register i of B row t + 4 i,
/// column g.
void exchange_m16n8k8_tf32(const Lanes& lanes) {
    float a[m][8], b[8][n], d[m][n];
    for (unsigned lane = 0; lane < 32; ++lane) {
        const auto& operands = lanes.operands<MmaOperands>(lane);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32_value(operands.a[i]);
        for (unsigned i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32_value(operands.b[i]);
    }
    gather_accumulator(lanes, d);
    multiply<8>(d, a, b);
    scatter_accumulator(lanes, d);
}

uint32_t get_element(const uint32_t* row, unsigned column) {
    return row[column / 2] >> (16 * (column % 2)) & 0xffffu;
}

void set_element(uint32_t* row, unsigned column, uint32_t element) {
    const unsigned shift = 16 * (column % 2);
    row[column / 2] = (row[column / 2] & ~(0xffffu << shift)) | element << shift;
}

/// Visits the elements of a lane's fragment of one matrix: visit(half, row, column). Lane l holds columns
/// 2 (l % 4) and the next of row l / 4, or with .trans rows 2 (l % 4) and the next of column l / 4.
template <class Visit> void for_each_element(unsigned lane, bool transposed, Visit visit) {
    for (unsigned half = 0; half < 2; ++half) {
        const unsigned major = lane / 4, minor = 2 * (lane % 4) + half;
        visit(half, transposed ? minor : major, transposed ? major : minor);
    }
}

void exchange_load(const Lanes& lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        const auto& own = lanes.operands<MatrixOperands>(lane);
        for (unsigned i = 0; i < own.matrices; ++i)
            for_each_element(lane, own.transposed, [&](unsigned half, unsigned row, unsigned column) {
                const auto& holder = lanes.operands<MatrixOperands>(8 * i + row);
                set_element(&own.fragments[i], half, get_element(holder.row, column));
            });
    }
}

void exchange_store(const Lanes& lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        const auto& own = lanes.operands<MatrixOperands>(lane);
        for (unsigned i = 0; i < own.matrices; ++i)
            for_each_element(lane, own.transposed, [&](unsigned half, unsigned row, unsigned column) {
                auto& holder = lanes.operands<MatrixOperands>(8 * i + row);
                set_element(holder.row, column, get_element(&own.fragments[i], half));
            });
    }
}

} // namespace

const Collective mma_m16n8k16_f16{"mma.m16n8k16.f16", exchange_m16n8k16<half_value>, true};
const Collective mma_m16n8k16_bf16{"mma.m16n8k16.bf16", exchange_m16n8k16<bfloat16_value>, true};
const Collective mma_m16n8k8_tf32{"mma.m16n8k8.tf32", exchange_m16n8k8_tf32, true};
const Collective ldmatrix{"ldmatrix", exchange_load, true};
const Collective stmatrix{"stmatrix", exchange_store, true};

} // namespace host
