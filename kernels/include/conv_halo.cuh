// The mainloop of a 3x3 convolution of stride 1 over spatial tiles (conv_tile.cuh), f16 or bf16 on tensor cores, in f32 sums:
//
//     C[pixel, n] = sum over taps and channels k of A(pixel moved by the tap, k) W(n, tap, k)
//
//     using Tile = ConvTileOf<bf16, 48>;                         // block of 256 pixels x 48 columns, 4 x 1 warps
//     convolve<Tile, Direction::backward>(halo, weights, tiles, walk, epilogue);
//
// A block of 128 threads computes, for one range of columns, the tiles walk.first .. + walk.count one after the other, the
// pixels of a tile being 256 rows of a GEMM. For each chunk of 32 channels it has the halo of the tile in shared memory, once
// for all nine taps: a tap is only an offset of the addresses that ldmatrix is given. A step is one tap of one chunk. While
// the steps of a chunk run, the halo of the next one (of the next tile, too) is brought into a second buffer, a sixth of it
// with each of the first six taps. Weights come by cp.async, `stages` - 1 steps ahead. A step has one barrier.
//
// Why these numbers. What limits such a product is what it reads: from the second level for each tile its halo and all
// weights of its columns, so a tile is as large as accumulators allow; from shared memory with each step 64 rows and bn
// columns for a warp. A warp of 64 x 48 reads 4 + 3 times 512 bytes for 24 products of 16 x 8 x 16; with 32 x 48 it would be
// 2 + 3 for 12. That takes 2 bn registers of a thread for sums: up to 168 registers and three blocks on a multiprocessor
// with 48 columns, up to 255 and two with 64, up to 128 and four with 32.
//
// How the halo comes:
//
//     PlainHalo     x as it is, by cp.async
//     OwingHalo     dy = a g + b y + c of two tensors and three vectors, rounded to T. Through registers, loaded before the
//                   products of a step and stored after them: by way of shared memory each value would be written three
//                   times and read twice there, and shared memory is what limits the loop.
//
// What lies outside the image is zero after the transform.
//
// Bank conflicts: none in the loop. For the halo see conv_tile.cuh. Weights are swizzled like it by XOR with their row, where
// rows have 64 bytes (bn columns of 32 channels; or 32 channels of 32 columns) or 128 (32 channels of 48 or 64 columns).
// The dead rows of a tile read the halo somewhere, and are not stored.
#pragma once

#include "conv_tile.cuh"
#include "gemm_operands.cuh"

/// fprop's weights are [columns, taps, channels], dgrad's [channels, taps in reverse, columns].
enum class Direction { forward, backward };

template <class T, unsigned columns> using ConvTileOf = GemmTile<T, 256, columns, 4, 1, 3>;

/// The tiles of a block, and its columns.
struct ConvWalk {
    unsigned first, count, first_column;
};

/// Shared memory: the pipeline of weights, which may be used for other things in the end; a piece for each warp's turn; what
/// epilogues ask for; tables; and two halos, which alone depend on the tiles.
template <class Tile, Direction direction> struct ConvMemory {
    static constexpr unsigned chunk = 32, most_halo = 384;
    /// Of the weights' rows, in pieces of 16 bytes.
    static constexpr unsigned across = direction == Direction::forward || Tile::bn == 32 ? 4 : 8;
    static constexpr unsigned down = direction == Direction::forward ? Tile::bn : chunk;
    static constexpr unsigned stage = down * across * 16, pipeline = Tile::stages * stage;
    static constexpr unsigned turn = pipeline, turn_bytes = Tile::threads / 32 * Tile::turn_floats * sizeof(float);
    static constexpr unsigned pivots = turn + turn_bytes, pivot_bytes = Tile::warps_m * Tile::bn * sizeof(float);
    static constexpr unsigned sources = pivots + pivot_bytes, targets = sources + most_halo * 4;
    static constexpr unsigned halo = targets + most_halo * 4;
    static_assert(halo % 128 == 0, "lines of all banks");
};

/// x [images, height, width, channels].
template <class Element> struct PlainHalo {
    using T = Element;
    const T* x;
    unsigned channels;

    struct Held {};

    __device__ __forceinline__ void fetch(Held&, T* to, unsigned offset, bool inside) const {
        cp_async<16>(to, x + (inside ? offset : 0u), inside ? 16u : 0u);
    }
    template <unsigned count>
    __device__ __forceinline__ void put(Held (&)[count], T* (&)[count], unsigned) const {}
};

/// dy = a g + b y + c of g and y [images, height, width, channels] and `owed` [3, channels] = a, b, c.
template <class Element> struct OwingHalo {
    using T = Element;
    const T *g, *y;
    const float* owed;
    unsigned channels;

    struct Held {
        uint4 g, y;
        bool inside;
    };

    __device__ __forceinline__ void fetch(Held& held, T*, unsigned offset, bool inside) const {
        held.g = held.y = make_uint4(0, 0, 0, 0);
        held.inside = inside;
        if (!inside) return;
        held.g = load16<uint4, Cache::l2>(g + offset);
        held.y = load16<uint4, Cache::l2>(y + offset);
    }
    /// Pieces of the same eight channels from `channel` on, null where there is none.
    template <unsigned count>
    __device__ __forceinline__ void put(Held (&held)[count], T* (&to)[count], unsigned channel) const {
        const auto pay = [](uint32_t& g, uint32_t y, const float* a, const float* b, const float* c) {
            const float2 gradient = unpack2<T>(g), raw = unpack2<T>(y);
            g = pack2<T>(a[0] * gradient.x + (b[0] * raw.x + c[0]), a[1] * gradient.y + (b[1] * raw.y + c[1]));
        };
        // Four channels after the other four, for the registers.
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            OwedColumns v{};
            if (channel < channels) {
                load_vector(owed + channel + 4 * half, v.a);
                load_vector(owed + channels + channel + 4 * half, v.b);
                load_vector(owed + 2 * channels + channel + 4 * half, v.c);
            }
#pragma unroll
            for (unsigned p = 0; p < count; ++p) {
                if (!to[p] || !held[p].inside) continue;
                uint4 &g = held[p].g, &y = held[p].y;
                pay(half == 0 ? g.x : g.z, half == 0 ? y.x : y.z, v.a, v.b, v.c);
                pay(half == 0 ? g.y : g.w, half == 0 ? y.y : y.w, v.a + 2, v.b + 2, v.c + 2);
            }
        }
#pragma unroll
        for (unsigned p = 0; p < count; ++p)
            if (to[p]) store16(to[p], held[p].g);
    }
};

namespace conv_detail {

/// The weights [columns, 9, channels] or [channels, 9, columns] on their way: of a step 32 channels of bn columns.
template <class Tile, Direction direction> struct Weights {
    using T = typename Tile::T;
    using Memory = ConvMemory<Tile, direction>;
    static constexpr bool forward = direction == Direction::forward;
    static constexpr unsigned across = Memory::across, rows = Tile::threads / across, count = Memory::down / rows;
    static_assert(Tile::threads % across == 0 && Memory::down % rows == 0, "every thread fetches as much");

    const T* data;
    unsigned channels, columns, first_column;
    /// Of the step to be fetched next, and how many there are still.
    unsigned chunk, tap, left;

    /// Piece c of row r, in elements.
    __device__ static __forceinline__ unsigned at(unsigned r, unsigned c) {
        return (r * across + (c ^ (across == 8 ? r % 8 : r / 2 % 4))) * 8;
    }

    __device__ __forceinline__ void fetch(T* stage) {
        if (left == 0) return;
        const unsigned c = threadIdx.x % across, r = threadIdx.x / across;
#pragma unroll
        for (unsigned i = 0; i < count; ++i) {
            const unsigned row = r + i * rows;
            const unsigned column = first_column + (forward ? row : 8 * c), channel = chunk + (forward ? 8 * c : row);
            const bool inside = column < columns && channel < channels && (forward || 8 * c < Tile::bn);
            const unsigned line = forward ? column * 9 + tap : channel * 9 + 8 - tap;
            const unsigned offset = forward ? line * channels + channel : line * columns + column;
            cp_async<16>(stage + at(row, c), data + (inside ? offset : 0u), inside ? 16u : 0u);
        }
        --left;
        if (++tap < 9) return;
        tap = 0;
        chunk += Memory::chunk;
        if (chunk >= channels) chunk = 0;
    }
};

} // namespace conv_detail

/// The products of a block, as said above. Once a kernel; the pipeline's shared memory may be used for other things after a
/// barrier.
template <class Tile, Direction direction, class Halo, class Epilogue>
__device__ __forceinline__ void convolve(const Halo& halo, const typename Tile::T* weight, unsigned columns,
                                         const ConvTiles& tiles, const ConvWalk& walk, Epilogue& epilogue) {
    using T = typename Tile::T;
    using Memory = ConvMemory<Tile, direction>;
    using Weights = conv_detail::Weights<Tile, direction>;
    constexpr unsigned stages = Tile::stages, pieces = Memory::chunk / 8, stage_elements = Memory::stage / sizeof(T);
    // Halo pixels that the block brings at once, how often with a step, and with how many steps.
    constexpr unsigned at_once = Tile::threads / pieces, held_pieces = 2;
    constexpr unsigned bringing = Memory::most_halo / at_once / held_pieces;
    static_assert(bringing + stages <= 10, "what comes by cp.async with the steps of one chunk is there for the next");
    static_assert(sizeof(T) == 2 && Tile::warps_n == 1, "16 bits; rows alone are cut for warps");

    const unsigned channels = halo.channels, halo_pixels = tiles.halo_pixels(), buffer = halo_pixels * Memory::chunk;
    const unsigned chunks = (channels + Memory::chunk - 1) / Memory::chunk;
    T* const pipeline = dynamic_shared<T>();
    T* const buffers = dynamic_shared<T>(Memory::halo);
    unsigned* const sources = dynamic_shared<unsigned>(Memory::sources);
    unsigned* const targets = dynamic_shared<unsigned>(Memory::targets);

    // Where each pixel of a halo lies in the tensor, and its first piece in a buffer, both in elements.
    const auto enter = [&](unsigned number) {
        const ConvTile tile = tiles.tile(number);
        for (unsigned h = threadIdx.x; h < halo_pixels; h += Tile::threads) {
            const unsigned pixel = tiles.halo_pixel(tile, h);
            sources[h] = pixel == no_pixel ? no_pixel : pixel * channels;
        }
    };
    for (unsigned h = threadIdx.x; h < halo_pixels; h += Tile::threads)
        targets[h] = ConvTiles::slot<pieces>(h, tiles.halo_phase(h), 0) * 8;
    enter(walk.first);
    __syncthreads();

    // What a thread has brought of a halo, but not stored yet; `to` null: nothing.
    struct Brought {
        typename Halo::Held held[held_pieces];
        T* to[held_pieces];
        unsigned channel;
    };
    const unsigned own_piece = threadIdx.x % pieces, own_pixel = threadIdx.x / pieces;
    const auto bring = [&](Brought& brought, T* to, unsigned chunk, unsigned part) {
        brought.channel = chunk * Memory::chunk + own_piece * 8;
#pragma unroll
        for (unsigned p = 0; p < held_pieces; ++p) {
            const unsigned h = (part * held_pieces + p) * at_once + own_pixel;
            brought.to[p] = nullptr;
            if (h >= halo_pixels) continue;
            const unsigned source = sources[h];
            brought.to[p] = to + (targets[h] ^ own_piece * 8);
            const bool inside = source != no_pixel && brought.channel < channels;
            halo.fetch(brought.held[p], brought.to[p], source + brought.channel, inside);
        }
    };

    Weights weights{weight, channels, columns, walk.first_column, 0, 0, walk.count * chunks * 9};
#pragma unroll 1
    for (unsigned part = 0; part < bringing; ++part) {
        Brought brought;
        bring(brought, buffers, 0, part);
        halo.put(brought.held, brought.to, brought.channel);
    }
#pragma unroll
    for (unsigned s = 0; s + 1 < stages; ++s) {
        weights.fetch(pipeline + s * stage_elements);
        cp_async_commit_group();
    }
    // The tile and chunk whose halo comes next.
    unsigned next_tile = chunks == 1 ? 1 : 0, next_chunk = chunks == 1 ? 0 : 1;
    if (chunks == 1 && walk.count > 1) {
        __syncthreads();
        enter(walk.first + 1);
    }

    // Of the fragments that a lane gives addresses for: rows of the halo, and their phase. 16 rows on it is the same.
    const unsigned lane = threadIdx.x % 32, matrix = lane / 8, first_row = threadIdx.x / 32 * Tile::wm;
    const unsigned own_row = first_row + matrix % 2 * 8 + lane % 8, own_phase = own_row;
    unsigned rows[Tile::fragments_m];
#pragma unroll
    for (unsigned i = 0; i < Tile::fragments_m; ++i) rows[i] = tiles.row_halo(own_row + 16 * i) * Memory::chunk;

    float acc[Tile::fragments_m][Tile::fragments_n][4] = {};
    const auto multiply = [&](const T* from, unsigned phase, const T* stage, unsigned limit) {
        const unsigned swizzled = (matrix / 2 ^ phase / 2 % 4) * 8;
#pragma unroll
        for (unsigned k = 0; k < Memory::chunk; k += 16) {
            if (k >= limit) break;
            uint32_t both[Tile::fragments_n / 2][4];
#pragma unroll
            for (unsigned j = 0; j < Tile::fragments_n / 2; ++j)
                // Matrices: k 0.. and 8.. of columns 0.., then of columns 8...
                if constexpr (direction == Direction::forward)
                    ldmatrix<4>(both[j], stage + Weights::at(16 * j + matrix / 2 * 8 + lane % 8, k / 8 + matrix % 2));
                else
                    ldmatrix_trans<4>(both[j],
                                      stage + Weights::at(k + matrix % 2 * 8 + lane % 8, 2 * j + matrix / 2));
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; ++i) {
                // Matrices: rows 0.. and 8.. of k 0.., then of k 8...
                uint32_t own[4];
                ldmatrix<4>(own, from + rows[i] + (swizzled ^ k));
#pragma unroll
                for (unsigned j = 0; j < Tile::fragments_n; ++j) {
                    const uint32_t column[2] = {both[j / 2][j % 2 * 2], both[j / 2][j % 2 * 2 + 1]};
                    mma_m16n8k16<T>(acc[i][j], own, column, acc[i][j]);
                }
            }
        }
    };

    unsigned slot = 0, held = 0;
    for (unsigned tile = 0, chunk = 0; tile < walk.count;) {
        const T* from = buffers + held * buffer;
        T* const other = buffers + (held ^ 1) * buffer;
        const unsigned limit = channels - chunk * Memory::chunk;
        unsigned phase = own_phase;
#pragma unroll 1
        for (unsigned tap = 0; tap < 9; ++tap) {
            cp_async_wait_group<int(stages) - 2>();
            // All threads have brought what this step needs, and are through with the one before, whose memory is fetched
            // into next.
            __syncthreads();
            weights.fetch(pipeline + (slot == 0 ? stages - 1 : slot - 1) * stage_elements);
            const bool brings = tap < bringing && next_tile < walk.count;
            Brought brought;
            if (brings) bring(brought, other, next_chunk, tap);
            cp_async_commit_group();
            multiply(from, phase, pipeline + slot * stage_elements, limit);
            if (brings) halo.put(brought.held, brought.to, brought.channel);
            if (++slot == stages) slot = 0;
            const bool wraps = tap % 3 == 2;
            from += (wraps ? tiles.tap(1, 0) - 2 : 1) * Memory::chunk;
            phase += wraps ? tiles.tap_phase(1, 0) - 2 : 1;
        }
        if (++next_chunk == chunks) {
            next_chunk = 0;
            // The table was last read some steps ago, and the next step's barrier comes before it is read again.
            if (++next_tile < walk.count) enter(walk.first + next_tile);
        }
        held ^= 1;
        if (++chunk < chunks) continue;
        const ConvTile at = tiles.tile(walk.first + tile);
        gemm_detail::turn<Tile>(dynamic_shared<float>(Memory::turn), acc, walk.first_column, epilogue,
                                [&](unsigned row) { return tiles.row_pixel(at, row); });
#pragma unroll
        for (auto& fragments : acc)
#pragma unroll
            for (auto& fragment : fragments)
#pragma unroll
                for (float& sum : fragment) sum = 0.0f;
        chunk = 0, ++tile;
    }
}
