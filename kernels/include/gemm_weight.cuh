// How a gradient of weights, dW [height, width] += sum over pixels of dy^T x, is cut and put together: Major::rows of both
// operands in gemm.cuh, k being the pixels. The pixels are cut into `splits`; a block has one of them and one tile of dW and
// leaves it in `partial` [splits, tiles, bm, bn]. The last blocks to come add the tiles of all splits to dW, in a fixed order:
// of each `radix` splits first, then of those sums. Without splits a block adds its tile to dW itself.
#pragma once

#include "gemm.cuh"
#include "last_block.cuh"

/// How the pixels and dW are cut: `splits` of `steps` steps of the mainloop; tiles along outputs and inputs. Blocks of one
/// split follow each other, since they read the same pixels.
struct WeightGrid {
    unsigned steps, splits, row_tiles, column_tiles;
};

/// Stores a tile of dW: added to it, or as the block's partial result.
template <class Tile> struct WeightEpilogue {
    struct Extra {
        Pack8<float> before;
    };
    float *dweight, *partial;
    unsigned height, width;
    /// The block's number among those of the gradient.
    unsigned block;
    bool add;

    __device__ __forceinline__ Extra prefetch(unsigned row, unsigned column) const {
        Extra extra{};
        if (add && row < height && column < width) extra.before = load_pack8(dweight + row * width + column);
        return extra;
    }
    __device__ __forceinline__ void store(unsigned row, unsigned column, float (&x)[8], const Extra& extra) {
        if (!add)
            return store8(partial + (block * Tile::bm + row % Tile::bm) * Tile::bn + column % Tile::bn, x);
        if (row >= height || column >= width) return;
        float before[8];
        unpack8(extra.before, before);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) x[j] += before[j];
        store8(dweight + row * width + column, x);
    }
};

/// Partial results that one block adds up: a block cannot read many as fast as many blocks.
constexpr unsigned radix = 16;

/// Of four neighbours the sum over `count` partial results, `stride` apart, eight of them under way at a time.
__device__ __forceinline__ float4 sum_partial(const float* partial, unsigned count, unsigned stride) {
    constexpr unsigned batch = 8;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (unsigned first = 0; first < count; first += batch) {
        float4 v[batch];
#pragma unroll
        for (unsigned i = 0; i < batch; ++i)
            v[i] = first + i < count ? load16<float4, Cache::l2>(partial + (first + i) * stride)
                                     : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (unsigned i = 0; i < batch; ++i) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
    }
    return sum;
}

/// Adds the partial results of all `splits` to dW. `each(use)` calls use(offset, to) for the quads of the block's part of
/// dW, shared among its threads: where a quad lies in the partial result of a split, which are `stride` floats apart, and
/// where in dW. A counter for every `radix` splits, and one for the part.
template <class Each>
__device__ __forceinline__ void add_splits(const Each& each, float* partial, unsigned stride, unsigned splits,
                                           unsigned split, unsigned* group_counters, unsigned* counter) {
    const unsigned groups = (splits + radix - 1) / radix, group = split / radix;
    const unsigned members = min(radix, splits - group * radix);
    const auto add = [&](unsigned step, unsigned count) {
        each([&](unsigned offset, float* to) {
            const float4 sum = sum_partial(partial + offset, count, step * stride);
            const float4 before = load16<float4>(to);
            store16(to, make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w));
        });
    };
    if (!is_last_block(group_counters + group, members)) return;
    if (groups == 1) return add(1, members);
    float* const of_group = partial + group * radix * stride;
    each([&](unsigned offset, float*) {
        store16(of_group + offset, sum_partial(of_group + offset, members, stride));
    });
    if (is_last_block(counter, groups)) add(radix, groups);
}

/// Adds the partial tiles of all splits to dW; `block` is the block's number among those of the gradient.
template <class Tile>
__device__ __forceinline__ void add_partial(float* dweight, unsigned outputs, unsigned inputs, const WeightGrid& grid,
                                            unsigned block, float* partial, unsigned* counters) {
    constexpr unsigned elements = Tile::bm * Tile::bn;
    const unsigned tiles = grid.row_tiles * grid.column_tiles, tile = block % tiles, split = block / tiles;
    const unsigned groups = (grid.splits + radix - 1) / radix;
    const auto each = [&](auto use) {
        const unsigned first_row = tile / grid.column_tiles * Tile::bm;
        const unsigned first_column = tile % grid.column_tiles * Tile::bn;
        for (unsigned e = threadIdx.x * 4; e < elements; e += Tile::threads * 4) {
            const unsigned row = first_row + e / Tile::bn, column = first_column + e % Tile::bn;
            if (row < outputs && column < inputs) use(e, dweight + row * inputs + column);
        }
    };
    add_splits(each, partial + tile * elements, tiles * elements, grid.splits, split, counters + tile * groups,
               counters + tiles * groups + tile);
}
