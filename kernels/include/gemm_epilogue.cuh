// Epilogues for gemm.cuh of what training stores: a raw output with the moments of batch norm, an inference output, and the
// gradient of an input with the sums that batch norm's or squeeze-excitation's backward needs.
//
// The column groups of a launch are added up on their own: the rows are cut into `runs` of whole row tiles, a block has one
// run of one group, and the last block of a group to come finishes it (batch_norm.cuh, last_block.cuh).
#pragma once

#include "activation.cuh"
#include "batch_norm.cuh"
#include "gemm.cuh"
#include "last_block.cuh"

/// A block's run and column group: a grid of runs * groups blocks, groups fastest, so that blocks which read the same rows
/// run at the same time.
struct GemmGrid {
    /// Row tiles of a run, runs, column groups.
    unsigned tiles, runs, groups;

    /// Of the block of this number.
    __device__ __forceinline__ unsigned run(unsigned block = blockIdx.x) const { return block / groups; }
    __device__ __forceinline__ unsigned group(unsigned block = blockIdx.x) const { return block % groups; }
    /// The rows of `run` where there are `rows` in all.
    template <class Tile> __device__ __forceinline__ unsigned rows_of(unsigned run, unsigned rows) const {
        return min(tiles * Tile::bm, rows - run * tiles * Tile::bm);
    }
    template <class Tile>
    __device__ __forceinline__ GemmWalk walk(unsigned rows, unsigned k, unsigned block = blockIdx.x) const {
        return {run(block) * tiles * Tile::bm, (rows_of<Tile>(run(block), rows) + Tile::bm - 1) / Tile::bm,
                group(block) * Tile::bn, 0, (k + Tile::bk - 1) / Tile::bk};
    }
};

/// What to store: y [height, width] itself, or act(y + bias) + skip. `moments`: take those of what is stored, of a y
/// without bias and skip. Only without skip and moments may `width` be any number.
template <class T> struct ForwardOutput {
    T* y;
    const float* bias;
    const T* skip;
    unsigned silu, moments;
};

/// Stores a run of an output without moments.
template <class Tile> struct FoldedEpilogue {
    using T = typename Tile::T;
    struct Extra {
        Pack8<T> skip;
    };

    ForwardOutput<T> to;
    unsigned height, width;

    __device__ __forceinline__ Extra prefetch(unsigned row, unsigned column) const {
        Extra extra{};
        if (to.skip && row < height && column < width) extra.skip = load_pack8(to.skip + row * width + column);
        return extra;
    }

    __device__ __forceinline__ void store(unsigned row, unsigned column, float (&x)[8], const Extra& extra) const {
        if (row >= height || column >= width) return;
        if (to.bias) {
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                x[j] += column + j < width ? __ldg(to.bias + column + j) : 0.0f;
                if (to.silu) x[j] = silu(x[j]);
            }
            if (to.skip) {
                float skip[8];
                unpack8(extra.skip, skip);
#pragma unroll
                for (unsigned j = 0; j < 8; ++j) x[j] += skip[j];
            }
        }
        T* y = to.y + row * width + column;
        if (width % 8 == 0) return store8(y, x);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j)
            if (column + j < width) y[j] = from_float<T>(x[j]);
    }
};

/// Stores a run of a raw output y [height, width] and takes the moments of what it stores.
template <class Tile> struct MomentsEpilogue {
    using T = typename Tile::T;
    struct Extra {};

    T* y;
    unsigned height, width;
    /// The first value of each warp row and column, [Tile::warps_m, Tile::bn]: no other warp reads it before the end.
    float* pivots;
    GemmThread<Tile> thread;
    float sums[2][8] = {};
    bool started = false;

    __device__ __forceinline__ MomentsEpilogue(T* output, unsigned rows, unsigned columns, float* shared)
        : y(output), height(rows), width(columns), pivots(shared) {}

    __device__ __forceinline__ Extra prefetch(unsigned, unsigned) const { return {}; }

    __device__ __forceinline__ void store(unsigned row, unsigned column, float (&x)[8], const Extra&) {
        const bool inside = row < height && column < width;
        const Pack8<T> rounded = pack8<T>(x);
        if (inside) store_pack8(y + row * width + column, rounded);
        unpack8(rounded, x);
        float* pivot = pivots + thread.warp_m * Tile::bn + thread.column;
        const unsigned alive = started ? 0 : __ballot_sync(0xffffffffu, row < height);
        if (alive != 0) {
            // The first of the warp's rows that is inside; its lanes are neighbours.
            const unsigned from = unsigned(__ffs(int(alive))) - 1 + thread.lane % GemmThread<Tile>::groups;
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                const float first = __shfl_sync(0xffffffffu, x[j], int(from));
                if (thread.lane < GemmThread<Tile>::groups) pivot[j] = first;
            }
            __syncwarp();
            started = true;
        }
        if (!inside) return;
        float p[8];
        load8(pivot, p);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            const float d = x[j] - p[j];
            sums[0][j] += d;
            sums[1][j] += d * d;
        }
    }

    /// Leaves the moments of the block's run; the last block of the group finishes them. `partial` is [runs, 2, width].
    __device__ __forceinline__ void finish(const GemmGrid& grid, float* partial, unsigned* counters,
                                           const NormFinish& norm) {
        const unsigned rows = grid.rows_of<Tile>(grid.run(), height), whole = (rows - 1) / Tile::bm;
        const auto of_warp = [&](unsigned w) {
            const unsigned last = rows - whole * Tile::bm, before = w * Tile::wm;
            return whole * Tile::wm + (last > before ? min(last - before, Tile::wm) : 0);
        };
        finish(grid, partial, counters, norm, of_warp, [&](unsigned r) { return grid.rows_of<Tile>(r, height); });
    }

    /// The same where rows are outside anywhere: the block's warp row w has had `of_warp(w)` inside, and run r
    /// `of_run(r)`, more than none.
    template <class OfWarp, class OfRun>
    __device__ __forceinline__ void finish(const GemmGrid& grid, float* partial, unsigned* counters,
                                           const NormFinish& norm, OfWarp of_warp, OfRun of_run) {
        auto& shared = *dynamic_shared<float[Tile::warps_m][2][Tile::bn]>();
        gemm_column_sums<Tile>(sums, shared);
        const unsigned run = grid.run(), group = grid.group(), c = threadIdx.x, column = group * Tile::bn + c;
        if (c < Tile::bn && column < width) {
            // Of each warp row: pixels, and where the moments of rows so far are merged with them (Chan's formula).
            float count = 0.0f, mean = 0.0f, deviations = 0.0f;
#pragma unroll
            for (unsigned w = 0; w < Tile::warps_m; ++w) {
                const unsigned own = of_warp(w);
                if (own == 0) continue;
                const float n = float(own), total = count + n;
                const ShiftedSums warp{shared[w][0][c], shared[w][1][c]};
                const float d = warp.mean(pivots[w * Tile::bn + c], n) - mean;
                mean += d * (n / total);
                deviations += warp.deviations(n) + d * d * (count * (n / total));
                count = total;
            }
            partial[run * 2 * width + column] = mean;
            partial[(run * 2 + 1) * width + column] = deviations;
        }
        if (!is_last_block(counters + group, grid.runs)) return;
        finish_moments<Tile::threads>(partial, grid.runs, width, group * Tile::bn, Tile::bn, norm, height, of_run);
    }
};

/// What to store of dx [height, width], the gradient of an input. `y` null: dx + skip, `skip` null: dx. Else the input was
/// made of z = scale y + shift, `norm` being [4, width]: dx SiLU'(z), or, with squeeze-excitation's five sums, dx.
template <class T> struct GradientTarget {
    T* dx;
    const T *skip, *y;
    const float* norm;
};

/// Stores a run of a gradient and takes `count` sums over its rows: 2 of dz = dx SiLU'(z), of dz and dz xhat; or 5, of
/// dx SiLU'(z), SiLU'(z), both times xhat, and dx SiLU(z). Sums are of values that are not yet rounded to T.
template <class Tile, unsigned count> struct GradientEpilogue {
    using T = typename Tile::T;
    static_assert(count == 2 || count == 5, "batch norm's or squeeze-excitation's");
    struct Extra {
        Pack8<T> other;
    };

    GradientTarget<T> to;
    unsigned height, width;
    float sums[count][8] = {};

    __device__ __forceinline__ GradientEpilogue(const GradientTarget<T>& target, unsigned rows, unsigned columns)
        : to(target), height(rows), width(columns) {}

    __device__ __forceinline__ Extra prefetch(unsigned row, unsigned column) const {
        Extra extra{};
        const T* other = to.y ? to.y : to.skip;
        if (other && row < height && column < width) extra.other = load_pack8(other + row * width + column);
        return extra;
    }

    __device__ __forceinline__ void store(unsigned row, unsigned column, float (&x)[8], const Extra& extra) {
        if (row >= height || column >= width) return;
        float other[8];
        unpack8(extra.other, other);
        if (to.y) {
            float scale[8], shift[8], mean[8];
            load8<Cache::read_only>(to.norm + column, scale);
            load8<Cache::read_only>(to.norm + width + column, shift);
            load8<Cache::read_only>(to.norm + 2 * width + column, mean);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                const float z = scale[j] * other[j] + shift[j], s = sigmoid(z), slope = silu_grad(z, s);
                const float centred = other[j] - mean[j], dz = x[j] * slope;
                if constexpr (count == 2) {
                    x[j] = dz;
                    sums[0][j] += dz;
                    sums[1][j] += dz * centred;
                } else {
                    sums[0][j] += dz;
                    sums[1][j] += slope;
                    sums[2][j] += dz * centred;
                    sums[3][j] += slope * centred;
                    sums[4][j] += x[j] * (z * s);
                }
            }
        } else if (to.skip) {
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) x[j] += other[j];
        }
        store8(to.dx + row * width + column, x);
    }

    /// Hands the sum k of a column to `use(k, column, sum)`, by one thread for each column that exists.
    template <class Use> __device__ __forceinline__ void each_sum(unsigned first_column, Use use) {
        auto& shared = *dynamic_shared<float[Tile::warps_m][count][Tile::bn]>();
        gemm_column_sums<Tile>(sums, shared);
        const unsigned c = threadIdx.x, column = first_column + c;
        if (c >= Tile::bn || column >= width) return;
        const float rstd = to.norm[3 * width + column];
#pragma unroll
        for (unsigned k = 0; k < count; ++k) {
            float sum = shared[0][k][c];
#pragma unroll
            for (unsigned w = 1; w < Tile::warps_m; ++w) sum += shared[w][k][c];
            const bool of_xhat = count == 2 ? k == 1 : k == 2 || k == 3;
            use(k, column, of_xhat ? sum * rstd : sum);
        }
    }

    /// Leaves the two sums of the run of the grid's `block`; the last block of the group finishes them. `partial` is
    /// [runs, 2, width].
    __device__ __forceinline__ void finish(const GemmGrid& grid, unsigned block, float* partial, unsigned* counters,
                                           const OwedFinish& owed) {
        if (!to.y) return;
        const unsigned run = grid.run(block), group = grid.group(block);
        each_sum(group * Tile::bn, [&](unsigned k, unsigned column, float sum) {
            partial[(run * 2 + k) * width + column] = sum;
        });
        if (!is_last_block(counters + group, grid.runs)) return;
        finish_owed<Tile::threads>(partial, grid.runs, width, group * Tile::bn, Tile::bn, owed);
    }
};
