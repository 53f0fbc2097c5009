// The mainloop of a 3x3 convolution over spatial tiles (conv_tile.cuh), f16 or bf16 on tensor cores, in f32 sums:
//
//     C[pixel, n] = sum over taps and channels k of A(pixel moved by the tap, k) W(n, tap, k)
//
//     using Tile = ConvTileOf<bf16, 256, 48>;                    // block of 256 pixels x 48 columns, 4 x 1 warps
//     convolve<Tile, Direction::backward>(halo, weights, columns, UnitStride{tiles}, walk, epilogue);
//
// A block of 128 threads computes, for one range of columns, the tiles walk.first .. + walk.count one after the other, the
// pixels of a tile being the rows of a GEMM. For each chunk of 32 channels it has the halo of the tile in shared memory, once
// for all nine taps: a tap is only an offset of the addresses that ldmatrix is given. A step is one tap of one chunk. While
// the steps of a chunk run, the halo of the next one (of the next tile, too) is brought into a second buffer, 64 pixels of it
// with each of the first steps. Weights come by cp.async, two steps ahead. A step has one barrier. dgrad of stride 2 goes
// the same way, its rows being cells of four pixels, each with sums of its own: CellStride below.
//
// Why these numbers. What limits such a product is what it reads: from the second level for each tile its halo and all
// weights of its columns, so a tile is as large as sums fit in registers; from shared memory with each step 64 rows and bn
// columns for a warp. A warp of 64 x 48 reads 4 + 3 times 512 bytes for 24 products of 16 x 8 x 16; with 32 x 48 it would be
// 2 + 3 for 12. That takes 2 bn registers of a thread for sums: up to 168 registers and three blocks on a multiprocessor
// with 48 columns, up to 255 and two with 64, up to 128 and four with 32. With stride 2 sums are of four classes: 2 bn
// registers again with 64 cells for a block and 48 columns, 4 bn with 128 cells and 32 columns.
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
// How it multiplies:
//
//     Products::of_warps       Each warp its own rows, by weights that it has loaded, too (mma.sync).
//     Products::of_warpgroup   The four warps together 64 rows, 16 of each, that they have loaded, by weights that the tensor
//                              cores read in shared memory themselves (wgmma), once for all four: as many bytes as ldmatrix
//                              brings, whose 64 rows of a warp use them as often, but by 8 instructions of a step for 64 and
//                              half the ldmatrix. They go on while the pixels of the next are loaded and the next piece of
//                              halo is made, over the barrier into the next step: hence one stage of weights more, and
//                              with 32 columns up to 168 registers and three blocks. Only where there is wgmma.
//
// Bank conflicts: none in the loop. For the halo see conv_tile.cuh. Weights are swizzled like it by XOR with their row, where
// rows have 64 bytes (bn columns of 32 channels; or 32 channels of 32 columns) or 128 (32 channels of 48 or 64 columns). Those
// are layouts that wgmma reads, but of 48 columns, which it reads in threes of 16 columns: Weights below.
// The dead rows of a tile read the halo somewhere, and are not stored.
#pragma once

#include "conv_tile.cuh"
#include "gemm_operands.cuh"

/// fprop's weights are [columns, taps, channels], dgrad's [channels, taps in reverse, columns].
enum class Direction { forward, backward };

template <class T, unsigned rows, unsigned columns, Products multiplied = Products::of_warps>
struct ConvTileOf : GemmTile<T, rows, columns, 4, 1, multiplied == Products::of_warps ? 3 : 4> {
    static constexpr Products products = multiplied;
};

/// The tiles of a block, and its columns.
struct ConvWalk {
    unsigned first, count, first_column;
};

/// Shared memory: the pipeline of weights, which may be used for other things in the end; a piece for each warp's turn; what
/// epilogues ask for; a table; and two halos, which alone depend on the tiles.
template <class Tile, Direction direction, unsigned most_halo> struct ConvMemory {
    static constexpr unsigned chunk = 32;
    /// Of the weights' rows, in pieces of 16 bytes.
    static constexpr unsigned across = direction == Direction::forward || Tile::bn == 32 ? 4 : 8;
    static constexpr unsigned down = direction == Direction::forward ? Tile::bn : chunk;
    static constexpr unsigned stage = down * across * 16, pipeline = Tile::stages * stage;
    static constexpr unsigned turn = pipeline, turn_bytes = Tile::threads / 32 * Tile::turn_floats * sizeof(float);
    static constexpr unsigned pivots = turn + turn_bytes, pivot_bytes = Tile::warps_m * Tile::bn * sizeof(float);
    static constexpr unsigned table = pivots + pivot_bytes, halo = table + most_halo * 8;
    static_assert(halo % 128 == 0, "lines of all banks");
};

/// x [images, height, width, channels].
template <class Element> struct PlainHalo {
    using T = Element;
    const T* x;
    unsigned channels;

    struct Held {};

    /// Eight channels to byte `to` of shared memory, which is not 0, or nothing.
    __device__ __forceinline__ void fetch(Held&, unsigned to, unsigned offset, bool inside) const {
        if (to == 0) return;
        cp_async<16>(dynamic_shared<T>(to), x + (inside ? offset : 0u), inside ? 16u : 0u);
    }
    template <unsigned count> __device__ __forceinline__ void put(Held (&)[count], unsigned) const {}
};

/// dy = a g + b y + c of g and y [images, height, width, channels] and `owed` [3, channels] = a, b, c.
template <class Element> struct OwingHalo {
    using T = Element;
    const T *g, *y;
    const float* owed;
    unsigned channels;

    struct Held {
        uint4 g, y;
        unsigned to;
        bool inside;
    };

    __device__ __forceinline__ void fetch(Held& held, unsigned to, unsigned offset, bool inside) const {
        held.to = to;
        held.inside = inside;
        held.g = load16<uint4, Cache::l2>(g + (inside ? offset : 0u));
        held.y = load16<uint4, Cache::l2>(y + (inside ? offset : 0u));
    }
    /// Pieces of the same eight channels from `channel` on; none are inside if those do not exist.
    template <unsigned count> __device__ __forceinline__ void put(Held (&held)[count], unsigned channel) const {
        const unsigned first = min(channel, channels - 8);
        const auto pay = [](uint32_t g, uint32_t y, const OwedColumns& v, unsigned j, bool inside) {
            const float2 gradient = unpack2<T>(g), raw = unpack2<T>(y);
            const float low = v.a[j] * gradient.x + (v.b[j] * raw.x + v.c[j]);
            const float high = v.a[j + 1] * gradient.y + (v.b[j + 1] * raw.y + v.c[j + 1]);
            return inside ? pack2<T>(low, high) : 0u;
        };
        // Four channels after the other four, for the registers.
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            OwedColumns v;
            load_vector(owed + first + 4 * half, v.a);
            load_vector(owed + channels + first + 4 * half, v.b);
            load_vector(owed + 2 * channels + first + 4 * half, v.c);
#pragma unroll
            for (unsigned p = 0; p < count; ++p) {
                uint4 &g = held[p].g, &y = held[p].y;
                if (half == 0) {
                    g.x = pay(g.x, y.x, v, 0, held[p].inside);
                    g.y = pay(g.y, y.y, v, 2, held[p].inside);
                } else {
                    g.z = pay(g.z, y.z, v, 0, held[p].inside);
                    g.w = pay(g.w, y.w, v, 2, held[p].inside);
                }
            }
        }
#pragma unroll
        for (unsigned p = 0; p < count; ++p)
            if (held[p].to != 0) store16(dynamic_shared<T>(held[p].to), held[p].g);
    }
};

namespace conv_detail {

/// The weights [columns, 9, channels] or [channels, 9, columns] on their way: of a step 32 channels of bn columns. A thread
/// fetches one piece of rows r, r + rows, ..., which in shared memory are swizzled alike.
template <class Tile, Direction direction, bool reversed, class Memory> struct Weights {
    using T = typename Tile::T;
    static constexpr bool forward = direction == Direction::forward;
    static_assert(!(forward && reversed), "only dgrad goes backward");
    static constexpr unsigned across = Memory::across, rows = Tile::threads / across, count = Memory::down / rows;
    static_assert(Tile::threads % across == 0 && Memory::down % rows == 0 && rows % 8 == 0, "all threads alike");
    /// wgmma wants as many columns as a swizzled row has, 64, 32 or 16, or a multiple of that. Of 48 columns rows of 32 bytes
    /// are swizzled, 8 rows of 16 columns lying together.
    static constexpr bool in_threes = by_warpgroups<Tile> && !forward && Tile::bn == 48;

    const T* data;
    unsigned channels, columns;
    /// The thread's first piece: where it comes from with the next step, in elements, and where it goes in a stage, in bytes.
    unsigned offset, to;
    /// Of its first row, and of its pieces in a row.
    unsigned row, column;
    /// Of the next step; and how many steps there are still.
    unsigned chunk = 0, tap = 0, left;

    /// Byte of piece c of row r in a stage.
    __device__ static __forceinline__ unsigned at(unsigned r, unsigned c) {
        if constexpr (in_threes) return (r / 8 * 8 * across + c / 2 * 16 + r % 8 * 2 + (c ^ r / 4) % 2) * 16;
        return (r * across + (c ^ (across == 8 ? r % 8 : r / 2 % 4))) * 16;
    }

    __device__ __forceinline__ Weights(const T* weight, unsigned channels, unsigned columns, unsigned first_column,
                                       unsigned steps)
        : data(weight), channels(channels), columns(columns), left(steps) {
        // Eight lanes together write where all banks are different: all pieces of a row or two, or two pieces of four rows.
        const unsigned lane = threadIdx.x % 32;
        const unsigned r = in_threes ? threadIdx.x / 32 * 4 + lane / 2 % 4 : threadIdx.x / across;
        const unsigned c = in_threes ? lane / 8 * 2 + lane % 2 : threadIdx.x % across;
        to = at(r, c);
        row = forward ? first_column + r : r;
        column = forward ? 8 * c : 8 * c < Tile::bn ? first_column + 8 * c : columns;
        offset = forward ? row * 9 * channels + column : (row * 9 + (reversed ? 8 : 0)) * columns + column;
    }

    /// To byte `stage` of shared memory.
    __device__ __forceinline__ void fetch(unsigned stage) {
        if (left == 0) return;
        const bool inside = forward ? column + chunk < channels : column < columns;
        const unsigned first = forward ? row : row + chunk, end = forward ? columns : channels;
#pragma unroll
        for (unsigned i = 0; i < count; ++i) {
            const bool exists = inside && first + i * rows < end;
            const unsigned from = offset + i * rows * 9 * (forward ? channels : columns);
            cp_async<16>(dynamic_shared<T>(stage + to + i * rows * across * 16), data + (exists ? from : 0u),
                         exists ? 16u : 0u);
        }
        --left;
        offset += forward ? channels : reversed ? 0 - columns : columns;
        if (++tap < 9) return;
        tap = 0;
        chunk += Memory::chunk;
        offset += forward ? Memory::chunk - 9 * channels : (reversed ? Memory::chunk + 1 : Memory::chunk - 1) * 9 * columns;
        if (chunk < channels) return;
        offset -= forward ? chunk : chunk * 9 * columns;
        chunk = 0;
    }
};

/// acc += the products of a step's pixels and weights, of which the first `limit` channels exist. load(fragment, i, k) gives a
/// warp the pixels of its 16 rows number i, channels k to k + 15.
template <class Tile, Direction direction, class Weights, class Memory> struct WarpProducts {
    using T = typename Tile::T;
    using Sums = float[Tile::fragments_m][Tile::fragments_n][4];
    /// Of the weights of a stage, the first piece that a lane gives the address of.
    unsigned own_weight;

    __device__ __forceinline__ WarpProducts() {
        const unsigned lane = threadIdx.x % 32, matrix = lane / 8;
        own_weight = direction == Direction::forward ? Weights::at(matrix / 2 * 8 + lane % 8, matrix % 2)
                                                     : Weights::at(matrix % 2 * 8 + lane % 8, matrix / 2);
    }

    template <class Load>
    __device__ __forceinline__ void multiply(Sums& acc, unsigned stage, unsigned limit, const Load& load) const {
        const unsigned weight = stage + own_weight;
#pragma unroll
        for (unsigned k = 0; k < Memory::chunk; k += 16) {
            if (k >= limit) break;
            uint32_t both[Tile::fragments_n / 2][4];
#pragma unroll
            for (unsigned j = 0; j < Tile::fragments_n / 2; ++j)
                // Matrices: k 0.. and 8.. of columns 0.., then of columns 8... Neither 16 rows on nor two pieces on changes
                // the swizzle: Weights::at(row + 16, piece) is 16 rows more, Weights::at(row, piece + 2) an XOR with 32.
                if constexpr (direction == Direction::forward)
                    ldmatrix<4>(both[j], dynamic_shared<T>((weight ^ 2 * k) + 16 * j * Weights::across * 16));
                else
                    ldmatrix_trans<4>(both[j], dynamic_shared<T>((weight ^ 32 * j) + k * Weights::across * 16));
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; ++i) {
                uint32_t pixels[4];
                load(pixels, i, k);
#pragma unroll
                for (unsigned j = 0; j < Tile::fragments_n; ++j) {
                    const uint32_t column[2] = {both[j / 2][j % 2 * 2], both[j / 2][j % 2 * 2 + 1]};
                    mma_m16n8k16<T>(acc[i][j], pixels, column, acc[i][j]);
                }
            }
        }
    }

    __device__ __forceinline__ void publish() const {}
    __device__ __forceinline__ void finish(Sums&) const {}
};

/// The same, still going on after multiply(): of its products at most the last two groups when it returns, and none of the step
/// before. What threads have written to a stage, they publish() before the barrier. Sums are there after finish().
template <class Tile, Direction direction, class Weights, class Memory> struct WarpgroupProducts {
    using T = typename Tile::T;
    using Sums = float[Tile::fragments_m][Tile::fragments_n][4];
    static constexpr bool forward = direction == Direction::forward;
    /// Bytes of a row in a stage, and of a swizzled one.
    static constexpr unsigned row = Weights::across * 16, swizzled = Weights::in_threes ? 32 : row;
    /// Fragments of a group of products: two, or for the registers of three blocks on a multiprocessor one.
    static constexpr unsigned together = Tile::bn == 48 ? 1 : 2, groups = Tile::fragments_m / together;
    static_assert(Tile::threads == 128 && Memory::stage % (8 * row) == 0, "a warpgroup; a swizzle's pattern is 8 rows");
    static_assert(groups >= 2, "with its second group a step has waited for all of the one before");
    /// Of the weights of stage 0.
    uint64_t weights;

    __device__ __forceinline__ WarpgroupProducts()
        : weights(wgmma_descriptor<swizzled>(dynamic_shared<T, 1024>(), swizzled < row ? 8 * swizzled : 0, 8 * row)) {}

    template <class Load>
    __device__ __forceinline__ void multiply(Sums& acc, unsigned stage, unsigned limit, const Load& load) const {
#pragma unroll
        for (unsigned k = 0; k < Memory::chunk; k += 16) {
            if (k >= limit) break;
            // A descriptor counts in units of 16 bytes.
            const uint64_t from = weights + (stage + k * (forward ? unsigned(sizeof(T)) : row)) / 16;
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; i += together) {
                uint32_t pixels[together][4];
                // While the last group goes on, the registers of the one before are free.
                wgmma_wait_group<1>();
#pragma unroll
                for (unsigned f = 0; f < together; ++f) load(pixels[f], i + f, k);
                wgmma_fence();
#pragma unroll
                for (unsigned f = 0; f < together; ++f)
                    wgmma_m64k16<T, Tile::bn, !forward>(acc[i + f], pixels[f], from);
                wgmma_commit_group();
            }
        }
    }

    __device__ __forceinline__ void publish() const { fence_proxy_async_shared(); }
    __device__ __forceinline__ void finish(Sums& acc) const {
        // Lanes may have parted on their way from the last product.
        __syncwarp();
        wgmma_wait_group<0>();
#pragma unroll
        for (auto& fragments : acc) wgmma_settle(fragments);
    }
};

} // namespace conv_detail

/// Stride 1: a row of the GEMM is a pixel, each tap another pixel of the halo.
struct UnitStride {
    static constexpr unsigned stride = 1, most_halo = 384;
    const ConvTiles& tiles;

    __device__ __forceinline__ unsigned halo_pixels() const { return tiles.halo_pixels(); }
    __device__ __forceinline__ unsigned halo_pixel(unsigned number, unsigned h) const {
        return tiles.halo_pixel(tiles.tile(number), h);
    }
    __device__ __forceinline__ unsigned row_pixel(unsigned number, unsigned, unsigned r) const {
        return tiles.row_pixel(tiles.tile(number), r);
    }
};

/// dgrad of stride 2. Pixel (ih, iw) of x belongs to cell ((ih + pad_top) / 2, (iw + pad_left) / 2) and, by the remainders, to
/// one of four classes. Of cell (a, b) tap (kh, kw) takes dy at (a - kh / 2, b - kw / 2) to class (kh % 2, kw % 2): so nine
/// products of four pixels of dy, none of which is with a zero. Tiles are of cells, whose rows and columns are one more than
/// those of y where x has them. A row of the GEMM is a cell, which has sums of four classes.
struct CellStride {
    static constexpr unsigned stride = 2, most_halo = 192;
    /// Of cells; and of y and x.
    ConvTiles tiles;
    unsigned out_height, out_width, height, width, pad_top, pad_left;

    /// A tile's cells and those before them, in rows as long as those of other halos: the phases of conv_tile.cuh want that.
    __device__ __forceinline__ unsigned halo_pixels() const {
        return (tiles.tile_height + 1) * tiles.halo_width.divisor;
    }
    __device__ __forceinline__ unsigned halo_pixel(unsigned number, unsigned h) const {
        const ConvTile tile = tiles.tile(number);
        const unsigned line = tiles.halo_width.quotient(h), along = h - line * tiles.halo_width.divisor;
        const unsigned row = tile.row + line - 1, column = tile.column + along - 1;
        const bool inside = along <= tiles.tile_width.divisor && row < out_height && column < out_width;
        return inside ? (image(number) * out_height + row) * out_width + column : no_pixel;
    }
    /// The pixel of x of cell r of a tile, of class (c / 2, c % 2).
    __device__ __forceinline__ unsigned row_pixel(unsigned number, unsigned c, unsigned r) const {
        const ConvTile tile = tiles.tile(number);
        const unsigned line = tiles.tile_width.quotient(r), along = r - line * tiles.tile_width.divisor;
        // Before the image's first row or column they wrap, beyond any side.
        const unsigned row = 2 * (tile.row + line) + c / 2 - pad_top;
        const unsigned column = 2 * (tile.column + along) + c % 2 - pad_left;
        const bool inside = line < tiles.tile_height && row < height && column < width;
        return inside ? (image(number) * height + row) * width + column : no_pixel;
    }

  private:
    __device__ __forceinline__ unsigned image(unsigned number) const {
        return tiles.down.quotient(tiles.across.quotient(number));
    }
};

/// The products of a block, as said above. Once a kernel; the pipeline's shared memory may be used for other things after a
/// barrier.
template <class Tile, Direction direction, class Halo, class Geometry, class Epilogue>
__device__ __forceinline__ void convolve(const Halo& halo, const typename Tile::T* weight, unsigned columns,
                                         const Geometry& geometry, const ConvWalk& walk, Epilogue& epilogue) {
    using T = typename Tile::T;
    using Memory = ConvMemory<Tile, direction, Geometry::most_halo>;
    // The taps of the halo in order are those of the weights in reverse where dgrad has stride 1.
    constexpr bool cells = Geometry::stride == 2;
    using Weights = conv_detail::Weights<Tile, direction, direction == Direction::backward && !cells, Memory>;
    using Multiply = std::conditional_t<by_warpgroups<Tile>,
                                        conv_detail::WarpgroupProducts<Tile, direction, Weights, Memory>,
                                        conv_detail::WarpProducts<Tile, direction, Weights, Memory>>;
    constexpr unsigned stages = Tile::stages, ahead = 2, pieces = Memory::chunk / 8, pixel_bytes = pieces * 16;
    static_assert(sizeof(T) == 2 && Tile::warps_n == 1, "16 bits; rows alone are cut for warps");
    // Halo pixels that a thread brings with a step, those that the block does, and steps that do so.
    constexpr unsigned held = 2, at_once = held * Tile::threads / pieces;
    static_assert(Geometry::most_halo / at_once + ahead < 9, "what comes with a chunk's steps is there for the next");

    const ConvTiles& tiles = geometry.tiles;
    const unsigned channels = halo.channels, halo_pixels = geometry.halo_pixels();
    const unsigned chunks = (channels + Memory::chunk - 1) / Memory::chunk;
    // Where each pixel of a halo lies in the tensor, in elements, and its first piece in a buffer, in bytes.
    uint2* const table = dynamic_shared<uint2>(Memory::table);
    const auto enter = [&](unsigned number) {
        for (unsigned h = threadIdx.x; h < halo_pixels; h += Tile::threads) {
            const unsigned pixel = geometry.halo_pixel(number, h);
            table[h] = make_uint2(pixel == no_pixel ? no_pixel : pixel * channels,
                                  ConvTiles::slot<pieces>(h, tiles.halo_phase(h), 0) * 16);
        }
    };
    const unsigned own_piece = threadIdx.x % pieces, own_pixel = threadIdx.x / pieces;
    const auto bring = [&](typename Halo::Held (&brought)[held], unsigned buffer, unsigned channel, unsigned first) {
#pragma unroll
        for (unsigned p = 0; p < held; ++p) {
            const unsigned h = first + p * (at_once / held) + own_pixel;
            const bool exists = h < halo_pixels;
            const uint2 entry = exists ? table[h] : make_uint2(no_pixel, 0);
            const bool inside = entry.x != no_pixel && channel < channels;
            halo.fetch(brought[p], exists ? buffer + (entry.y ^ own_piece * 16) : 0, entry.x + channel, inside);
        }
    };

    enter(walk.first);
    __syncthreads();
#pragma unroll 1
    for (unsigned first = 0; first < halo_pixels; first += at_once) {
        typename Halo::Held brought[held];
        bring(brought, Memory::halo, own_piece * 8, first);
        halo.put(brought, own_piece * 8);
    }
    Weights weights(weight, channels, columns, walk.first_column, walk.count * chunks * 9);
#pragma unroll
    for (unsigned s = 0; s < ahead; ++s) {
        weights.fetch(s * Memory::stage);
        cp_async_commit_group();
    }
    // The tile and chunk whose halo comes next.
    unsigned next_tile = chunks == 1 ? 1 : 0, next_chunk = chunks == 1 ? 0 : 1;
    if (chunks == 1 && walk.count > 1) {
        __syncthreads();
        enter(walk.first + 1);
    }

    // Of the fragments that a lane gives addresses for: rows of the halo, and the phase of the first, which that of the
    // others is but for a multiple of 16.
    const unsigned lane = threadIdx.x % 32, matrix = lane / 8;
    const unsigned own_row = threadIdx.x / 32 * Tile::wm + matrix % 2 * 8 + lane % 8;
    unsigned rows[Tile::fragments_m];
#pragma unroll
    for (unsigned i = 0; i < Tile::fragments_m; ++i) rows[i] = tiles.row_halo(own_row + 16 * i) * pixel_bytes;
    const Multiply products;
    typename Multiply::Sums acc[cells ? 4 : 1] = {};

    const unsigned buffers = 2 * Memory::halo + halo_pixels * pixel_bytes;
    unsigned buffer = Memory::halo;
    // The stage of a step, whose tap is in column kw of the kernel: of three stages each has a column.
    unsigned next_slot = 0;
    const auto slot_of = [&](unsigned kw) {
        if constexpr (stages == 3) return kw;
        const unsigned slot = next_slot;
        next_slot = slot + 1 == stages ? 0 : slot + 1;
        return slot;
    };
    for (unsigned tile = 0; tile < walk.count; ++tile) {
#pragma unroll 1
        for (unsigned chunk = 0; chunk < chunks; ++chunk) {
            const unsigned limit = channels - chunk * Memory::chunk, next_channel = next_chunk * Memory::chunk + own_piece * 8;
            const unsigned brings = next_tile < walk.count ? halo_pixels : 0;
            // Tap number `first` / at_once, whose weights are in stage `slot`.
            const auto step = [&](auto& sums, unsigned first, unsigned slot, unsigned from, unsigned phase) {
                cp_async_wait_group<int(ahead) - 1>();
                products.publish();
                // All threads have brought what this step needs, and are through with what lies where is fetched to next:
                // the step before or, where its products go on, the one before that.
                __syncthreads();
                weights.fetch((slot + ahead < stages ? slot + ahead : slot + ahead - stages) * Memory::stage);
                typename Halo::Held brought[held];
                const bool bringing = first < Geometry::most_halo && first < brings;
                if (bringing) bring(brought, buffers - buffer, next_channel, first);
                cp_async_commit_group();
                const unsigned own = from + (matrix / 2 ^ phase / 2 % 4) * 16;
                products.multiply(sums, slot * Memory::stage, limit, [&](uint32_t (&pixels)[4], unsigned i, unsigned k) {
                    // Matrices: rows 0.. and 8.. of k 0.., then of k 8...
                    ldmatrix<4>(pixels, dynamic_shared<T>(rows[i] + (own ^ 2 * k)));
                });
                if (bringing) halo.put(brought, next_channel);
            };
            if constexpr (cells) {
#pragma unroll
                for (unsigned kh = 0; kh < 3; ++kh)
#pragma unroll
                    for (unsigned kw = 0; kw < 3; ++kw) {
                        const unsigned down = 1 - kh / 2, right = 1 - kw / 2;
                        step(acc[kh % 2 * 2 + kw % 2], (3 * kh + kw) * at_once, slot_of(kw),
                             buffer + tiles.tap(down, right) * pixel_bytes, own_row + tiles.tap_phase(down, right));
                    }
            } else {
                unsigned from = buffer, phase = own_row, kw = 0;
#pragma unroll 1
                for (unsigned first = 0; first < 9 * at_once; first += at_once) {
                    step(acc[0], first, slot_of(kw), from, phase);
                    from += pixel_bytes, ++phase;
                    if (++kw < 3) continue;
                    kw = 0;
                    from += tiles.tap(1, 0) * pixel_bytes - 3 * pixel_bytes;
                    phase += tiles.tap_phase(1, 0) - 3;
                }
            }
            if (++next_chunk == chunks) {
                next_chunk = 0;
                // The table was last read some steps ago, and the next step's barrier comes before it is read again.
                if (++next_tile < walk.count) enter(walk.first + next_tile);
            }
            buffer = buffers - buffer;
        }
#pragma unroll
        for (unsigned c = 0; c < (cells ? 4 : 1); ++c) {
            products.finish(acc[c]);
            gemm_detail::turn<Tile>(dynamic_shared<float>(Memory::turn), acc[c], walk.first_column, epilogue,
                                    [&](unsigned row) { return geometry.row_pixel(walk.first + tile, c, row); });
#pragma unroll
            for (auto& fragments : acc[c])
#pragma unroll
                for (auto& fragment : fragments)
#pragma unroll
                    for (float& sum : fragment) sum = 0.0f;
        }
    }
}
