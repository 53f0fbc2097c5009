// The mainloop of every dense product: C[m, n] = sum over k of A(m, k) B(n, k), on tensor cores for f16 and bf16, in plain
// arithmetic or, rounded to tf32, on tensor cores for f32; sums in f32, k ascending from tensor-core step to step.
//
// A kernel is a mainloop, two loaders and an epilogue:
//
//     using Tile = GemmTile<bf16, 128, 64, 4, 2, 3>;      // block 128 x 64, 4 x 2 warps, 3 stages
//     gemm<Tile, Major::k, Major::k>(a, b, walk, epilogue);
//
// or a WarpgroupTile, whose products are Hopper's wgmma: A goes through registers as ever, B is read by the tensor cores
// where the pipeline has it.
//
// A block of Tile::threads threads computes, for one range of columns, `walk.tiles` row tiles one after the other: rows
// walk.first_row + i Tile::bm .. of A, columns walk.first_column .. + Tile::bn (rows of B), over walk.k_steps steps of
// Tile::bk from walk.first_k on, side by side or others' between them. The steps of all tiles are one pipeline: while a
// tile is being stored, the next one is already being fetched. Dynamic shared memory: GemmMemory<Tile, A, B>::bytes.
//
// Operands and loaders. `Major::k`: consecutive k lie side by side, memory is [rows, k]; `Major::rows`: memory is
// [k, rows], transposed on its way to the tensor cores. So fprop is <k, k>, dgrad <k, rows> and wgrad <rows, rows>, its k
// being the pixels. A loader knows nothing of that: it is asked for 16 bytes of memory row r from column c on, c a
// multiple of Tile::chunk (8 elements of 16 bits, 4 of 32), and of `Major::k` r is the operand's row and c the k, of
// `Major::rows` the other way round. It has
//
//     static constexpr unsigned sources;              // 1, or 2: a value is made of two tensors of one shape
//     struct Row;                                     // what it likes to know of a memory row, best 1 to 3 registers
//     Row row(unsigned r) const;                      // r may be out of range
//     GemmPlace place(const Row&, unsigned c) const;  // offset in elements, and whether it is inside; else it is zero
//     const T* base(unsigned source) const;
//     static constexpr bool may_transform;            // if not, the rest is not needed
//     static constexpr bool keeps_rows;               // keep them in registers for transform: row() is dear
//     bool transforms() const;                        // the same for all threads
//     struct Columns;                                 // what transform needs of the 4 columns from c on, if anything
//     Columns columns(unsigned c) const;              // c may be out of range: then anything may be returned
//     void transform(float (&x)[4], const float (&second)[4], const Row&, const Columns&) const;
//
// row() is asked once for each row tile where r is a row of the operand, and in every step where it is a k, for a
// WarpgroupTile or more than two rows a thread, or if the loader transforms and does not keep rows; place() and columns() in every step. Everything comes
// by cp.async, `stages - 1` steps ahead, without a register held; a loader that transforms does it in shared memory one
// step before the product, each thread the pieces that it fetched, so that no barrier is added and a value is made once
// for a block. What is outside stays zero: transform() never sees it. GemmMatrix below is the loader of a plain matrix.
//
// Where both operands are plain matrices of Major::k they may be GemmTensors instead: then one thread has TMA bring
// their boxes, Tile::bm or Tile::bn rows of 64 bytes, swizzled so, and the others only wait. On sm_90 and later.
//
// Epilogues. A warp turns its part of the tile, 16 or 8 rows at a time, through its own piece of shared memory, after which
// a lane has eight neighbouring columns of a row, so that all global accesses are of 16 bytes:
//
//     struct Extra;                                              // what else is read for these eight, or empty
//     Extra prefetch(unsigned row, unsigned column) const;       // issued before x is there
//     void store(unsigned row, unsigned column, float (&x)[8], const Extra&);
//
// for row and column in C, by all lanes of a warp together, also where they are outside: the epilogue checks. In all tiles
// of a block a thread has the same columns, first_column + GemmThread<Tile>::column .. + 7, if a warp has a power of two of
// them; so sums over rows stay in registers, and gemm_column_sums adds them up over the block at the end, in a fixed order.
//
// Shared memory is free of bank conflicts: pieces of 16 bytes are swizzled by XOR with their row. Of a WarpgroupTile that is
// how wgmma wants B: rows of 64 bytes of k, or panels of 64 columns.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "types.cuh"

/// What is side by side in an operand's memory.
enum class Major { k, rows };

/// What multiplies: each warp for itself (mma.sync), or four together (wgmma).
enum class Products { of_warps, of_warpgroup };

/// Whether there are such where this is compiled for.
template <Products products> constexpr bool exist = products == Products::of_warps || has_wgmma;

/// Of a block: bm x bn of C in steps of 64 bytes of k, by warps_m x warps_n warps. `in_tf32`: both factors are rounded to
/// tf32 as they are multiplied; elements are f32.
template <class Element, unsigned block_m, unsigned block_n, unsigned along_m, unsigned along_n, unsigned depth,
          bool in_tf32 = false>
struct GemmTile {
    using T = Element;
    static constexpr Products products = Products::of_warps;
    static constexpr bool tf32 = in_tf32;
    static_assert(!tf32 || sizeof(T) == 4, "what is rounded to tf32 is f32");
    static constexpr unsigned bm = block_m, bn = block_n, warps_m = along_m, warps_n = along_n, stages = depth;
    static constexpr unsigned threads = 32 * warps_m * warps_n;
    static constexpr unsigned chunk = 16 / sizeof(T), bk = 4 * chunk;
    /// Of a warp: wm x wn, in fragments of 16 x 8.
    static constexpr unsigned wm = bm / warps_m, wn = bn / warps_n;
    static constexpr unsigned fragments_m = wm / 16, fragments_n = wn / 8;
    static_assert(bm % (16 * warps_m) == 0 && bn % (16 * warps_n) == 0 && bm >= 64 && bn >= 32 && stages >= 2);
    /// A warp's piece for the turn: 16 or 8 rows, 8 floats apart from a multiple of 32 banks.
    static constexpr unsigned turn_rows = wn < 64 ? 16 : 8, turn_pitch = wn + 8, turn_floats = turn_rows * turn_pitch;
};

/// Of a block the same by warpgroups, each of four of its `along_m` warps; a warp has all columns.
template <class Element, unsigned block_m, unsigned block_n, unsigned along_m, unsigned depth>
struct WarpgroupTile : GemmTile<Element, block_m, block_n, along_m, 1, depth> {
    static constexpr Products products = Products::of_warpgroup;
    static_assert(sizeof(Element) == 2 && along_m % 4 == 0, "f16 or bf16, and whole warpgroups");
    static_assert(block_n % 64 == 0 && block_m % 16 == 0, "stages and panels begin at atoms of swizzled rows");
};

template <class Tile> constexpr bool by_warpgroups = Tile::products == Products::of_warpgroup;

/// Where 16 bytes lie, and whether they exist.
struct GemmPlace {
    unsigned offset;
    bool inside;
};

/// The tiles of a block, and its steps along k: every `apart`th from first_k on.
struct GemmWalk {
    unsigned first_row, tiles, first_column, first_k, k_steps, apart = 1;
};

/// A thread's place in the turned tile.
template <class Tile> struct GemmThread {
    static constexpr unsigned groups = Tile::wn / 8;
    unsigned lane, warp, warp_m, warp_n;
    /// The first of its columns within the tile.
    unsigned column;

    __device__ __forceinline__ explicit GemmThread(unsigned thread = threadIdx.x)
        : lane(thread % 32), warp(thread / 32), warp_m(warp / Tile::warps_n), warp_n(warp % Tile::warps_n),
          column(warp_n * Tile::wn + lane % groups * 8) {}
};

/// An operand that TMA brings: a matrix [height, width] as it lies, by a map of boxes of 64 bytes in as many rows as the
/// operand's side of a tile has, pieces of 16 bytes swizzled in rows of 64.
struct GemmTensor {
    static constexpr unsigned sources = 1;
    const TensorMap& map;
};

template <class Tile, class A, class B> struct GemmMemory {
    static constexpr bool by_tensors = std::is_same_v<A, GemmTensor>;
    static_assert(by_tensors == std::is_same_v<B, GemmTensor>, "both operands come in the same way");
    static constexpr unsigned a_elements = Tile::bm * Tile::bk, b_elements = Tile::bn * Tile::bk;
    static constexpr unsigned stage_elements = A::sources * a_elements + B::sources * b_elements;
    static constexpr unsigned pipeline = Tile::stages * stage_elements * sizeof(typename Tile::T);
    static constexpr unsigned turn = Tile::threads / 32 * Tile::turn_floats * sizeof(float);
    /// A barrier for each stage.
    static constexpr unsigned barriers = by_tensors ? (Tile::stages + 1) / 2 * 16 : 0;
    static constexpr unsigned bytes = pipeline + turn + barriers;
};

/// A matrix [height, width] as it lies, width a multiple of the chunk.
template <class T> struct GemmMatrix {
    static constexpr unsigned sources = 1;
    static constexpr bool may_transform = false;
    const T* data;
    unsigned height, width;

    struct Row {
        unsigned offset;
        bool inside;
    };

    __device__ __forceinline__ Row row(unsigned r) const { return {r * width, r < height}; }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned column) const {
        return {row.offset + column, row.inside && column < width};
    }
    __device__ __forceinline__ const T* base(unsigned) const { return data; }
};

/// x / divisor for x < 2^31, by a multiplication. For a divisor of 1 the multiplier is 0; for others, with s the least
/// number such that divisor <= 2^s, it is ceil(2^(31 + s) / divisor) and the shift s - 1: what it is too much is less
/// than 2^s / divisor in 2^(31 + s), which x < 2^31 does not make a whole.
struct FastDivisor {
    unsigned divisor, multiplier, shift;

    __device__ __forceinline__ unsigned quotient(unsigned x) const {
        return multiplier == 0 ? x : __umulhi(x, multiplier) >> shift;
    }
};

namespace gemm_detail {

/// Four elements from or to shared memory.
template <class T> __device__ __forceinline__ void load4(const T* from, float (&x)[4]) {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack2<T>(bits.x), high = unpack2<T>(bits.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}
__device__ __forceinline__ void load4(const float* from, float (&x)[4]) {
    const float4 v = load16<float4>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
template <class T> __device__ __forceinline__ void store4(T* to, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
}
__device__ __forceinline__ void store4(float* to, const float (&x)[4]) {
    store16(to, make_float4(x[0], x[1], x[2], x[3]));
}

/// Whether a loader that transforms wants its rows kept in registers for it.
template <class Loader> constexpr bool keeps_rows() {
    if constexpr (Loader::may_transform)
        return Loader::keeps_rows;
    else
        return false;
}

/// Where an operand lies in shared memory: `width` rows of it and Tile::bk of k.
template <class Tile, Major operand_major, unsigned width> struct Layout {
    using T = typename Tile::T;
    static constexpr Major major = operand_major;
    static constexpr unsigned chunk = Tile::chunk, elements = width * Tile::bk;
    /// Pieces of 16 bytes in a row of shared memory, and its rows.
    static constexpr unsigned across = (major == Major::k ? Tile::bk : width) / chunk;
    static constexpr unsigned down = major == Major::k ? width : Tile::bk;

    /// Whether it is in panels of 128 bytes, all rows of one before the next.
    static constexpr bool in_panels = by_warpgroups<Tile> && across > 8;

    /// The piece `c` of row `r` of shared memory.
    __device__ static __forceinline__ unsigned at(unsigned r, unsigned c) {
        if constexpr (in_panels) return ((c / 8 * down + r) * 8 + (c % 8 ^ r % 8)) * chunk;
        return (r * across + (across == 4 ? c ^ (r / 2 % 4) : c ^ (r % 8))) * chunk;
    }
    /// From there to the same piece of the row `rows` further on, a multiple of 8: those are swizzled alike.
    __device__ static constexpr __forceinline__ unsigned further(unsigned rows) { return rows * (in_panels ? 8 : across) * chunk; }

    /// The 16 k from k on, of all rows of the operand, as wgmma's B.
    __device__ static __forceinline__ uint64_t descriptor(const T* stage, unsigned k) {
        if constexpr (major == Major::k) {
            constexpr unsigned row_bytes = across * 16;
            return wgmma_descriptor<row_bytes>(stage + k, 0, 8 * row_bytes);
        } else {
            return wgmma_descriptor<128>(stage + k * 64, down * 128, 8 * 128);
        }
    }

};

/// One operand by its loader, once for each source.
template <class Tile, Major major, unsigned width, class Loader> struct Operand : Layout<Tile, major, width> {
    using Place = Layout<Tile, major, width>;
    using Place::across, Place::at, Place::chunk, Place::elements, Place::further;
    using T = typename Tile::T;
    using Row = typename Loader::Row;
    /// Rows of shared memory between the pieces of one thread, and how many it has.
    static constexpr unsigned step = Tile::threads / across, count = Place::down / step;
    static_assert(Tile::threads % across == 0 && Place::down % step == 0, "every thread fetches as much");
    static_assert(step % 8 == 0, "pieces of one thread are swizzled alike");

    const Loader& loader;
    /// Of the tile that is being fetched, where memory rows are the operand's and few. A WarpgroupTile has no registers left
    /// for it.
    static constexpr bool enters = major == Major::k && count <= 2 && !by_warpgroups<Tile>;
    Row fetched[enters ? count : 1];
    /// Of the tile that is being transformed, if its loader likes them kept.
    static constexpr bool keeps = major == Major::k && keeps_rows<Loader>();
    Row kept[keeps ? count : 1];

    __device__ __forceinline__ explicit Operand(const Loader& l) : loader(l) {}

    __device__ __forceinline__ void enter(unsigned first) {
        if constexpr (enters)
#pragma unroll
            for (unsigned i = 0; i < count; ++i) fetched[i] = row(first, 0, i);
    }

    __device__ __forceinline__ void keep(unsigned first) {
        if constexpr (keeps)
#pragma unroll
            for (unsigned i = 0; i < count; ++i) kept[i] = row(first, 0, i);
    }

    /// `first` is the operand's first row, `k` that of the step.
    __device__ __forceinline__ void fetch(T* stage, unsigned first, unsigned k) {
        const unsigned c = threadIdx.x % across, r = threadIdx.x / across;
        const unsigned column = (major == Major::k ? k : first) + c * chunk;
        T* const first_piece = stage + at(r, c);
#pragma unroll
        for (unsigned i = 0; i < count; ++i) {
            const Row own = enters ? fetched[enters ? i : 0] : row(first, k, i);
            const GemmPlace place = loader.place(own, column);
            T* to = first_piece + further(i * step);
#pragma unroll
            for (unsigned s = 0; s < Loader::sources; ++s)
                cp_async<16>(to + s * elements, loader.base(s) + (place.inside ? place.offset : 0u),
                             place.inside ? 16u : 0u);
        }
    }

    __device__ __forceinline__ void transform(T* stage, unsigned first, unsigned k) {
        if constexpr (Loader::may_transform) {
            if (!loader.transforms()) return;
            const unsigned c = threadIdx.x % across, r = threadIdx.x / across;
            const unsigned column = (major == Major::k ? k : first) + c * chunk;
            T* const first_piece = stage + at(r, c);
            Row own[count];
#pragma unroll
            for (unsigned i = 0; i < count; ++i) own[i] = keeps ? kept[keeps ? i : 0] : row(first, k, i);
            // Four columns at a time, one after the other, for the registers; every other eight lanes begin with the last.
#pragma unroll 1
            for (unsigned four = 0; four < chunk; four += 4) {
                const unsigned at_column = chunk == 4 ? 0 : four ^ (threadIdx.x / 2 & 4);
                const typename Loader::Columns columns = loader.columns(column + at_column);
#pragma unroll
                for (unsigned i = 0; i < count; ++i) {
                    if (!loader.place(own[i], column).inside) continue;
                    T* piece = first_piece + further(i * step) + at_column;
                    float x[4], second[4];
                    load4(piece, x);
                    if constexpr (Loader::sources == 2) load4(piece + elements, second);
                    loader.transform(x, second, own[i], columns);
                    store4(piece, x);
                }
            }
        }
    }

  private:
    /// Of this thread's piece `i`.
    __device__ __forceinline__ Row row(unsigned first, unsigned k, unsigned i) const {
        return loader.row((major == Major::k ? first : k) + threadIdx.x / across + i * step);
    }
};

/// A step of a tile.
struct Cursor {
    unsigned tile = 0, step = 0;

    __device__ __forceinline__ Cursor next(unsigned k_steps) const {
        return step + 1 == k_steps ? Cursor{tile + 1, 0} : Cursor{tile, step + 1};
    }
};

/// The steps of a block, one after the other, and where they are in the operands.
template <class Tile> struct Steps {
    GemmWalk walk;

    __device__ __forceinline__ unsigned row(const Cursor& at) const { return walk.first_row + at.tile * Tile::bm; }
    __device__ __forceinline__ unsigned k(const Cursor& at) const {
        return walk.first_k + at.step * walk.apart * Tile::bk;
    }
    __device__ __forceinline__ bool has(const Cursor& at) const { return at.tile < walk.tiles; }
};

/// A pipeline of stages in shared memory that loaders fill by cp.async.
template <class Tile, Major a_major, Major b_major, class LoaderA, class LoaderB> struct LoaderPipeline {
    using T = typename Tile::T;
    using A = Operand<Tile, a_major, Tile::bm, LoaderA>;
    using B = Operand<Tile, b_major, Tile::bn, LoaderB>;
    using Memory = GemmMemory<Tile, LoaderA, LoaderB>;

    A rows;
    B columns;
    Steps<Tile> steps;
    T* stages = dynamic_shared<T, by_warpgroups<Tile> ? 1024 : 128>();
    Cursor fetched;

    __device__ __forceinline__ LoaderPipeline(const LoaderA& a, const LoaderB& b, const GemmWalk& walk)
        : rows(a), columns(b), steps{walk} {
        columns.enter(walk.first_column);
    }

    __device__ __forceinline__ T* a(unsigned slot) const { return stages + slot * Memory::stage_elements; }
    __device__ __forceinline__ T* b(unsigned slot) const { return a(slot) + LoaderA::sources * Memory::a_elements; }

    /// Begins to bring the next step, if there is one, to the stage.
    __device__ __forceinline__ void fetch(unsigned slot) {
        if (steps.has(fetched)) {
            if (fetched.step == 0) rows.enter(steps.row(fetched));
            rows.fetch(a(slot), steps.row(fetched), steps.k(fetched));
            columns.fetch(b(slot), steps.walk.first_column, steps.k(fetched));
            fetched = fetched.next(steps.walk.k_steps);
        }
        cp_async_commit_group();
    }

    /// The thread's part of the step `at` is there, and is made what it is to be.
    __device__ __forceinline__ void receive(const Cursor& at, unsigned slot) {
        cp_async_wait_group<int(Tile::stages) - 2>();
        if (!steps.has(at)) return;
        if (at.step == 0) rows.keep(steps.row(at));
        rows.transform(a(slot), steps.row(at), steps.k(at));
        columns.transform(b(slot), steps.walk.first_column, steps.k(at));
        // What this thread has copied and made of it is in place; the barrier ahead then tells the tensor cores, too.
        if constexpr (by_warpgroups<Tile>) fence_proxy_async_shared();
    }
};

/// The same, filled by TMA.
template <class Tile> struct TensorPipeline {
    using T = typename Tile::T;
    using A = Layout<Tile, Major::k, Tile::bm>;
    using B = Layout<Tile, Major::k, Tile::bn>;
    using Memory = GemmMemory<Tile, GemmTensor, GemmTensor>;
    static_assert(A::across == 4 && B::across == 4, "rows as maps have them swizzled");

    const TensorMap &rows, &columns;
    Steps<Tile> steps;
    T* stages = dynamic_shared<T, 1024>();
    uint64_t* full = dynamic_shared<uint64_t>(Memory::pipeline + Memory::turn);
    Cursor fetched;
    /// Of the phase that the next step to be received ends.
    unsigned parity = 0;

    __device__ __forceinline__ TensorPipeline(const GemmTensor& a, const GemmTensor& b, const GemmWalk& walk)
        : rows(a.map), columns(b.map), steps{walk} {
        if (threadIdx.x == 0) {
#pragma unroll
            for (unsigned slot = 0; slot < Tile::stages; ++slot) mbarrier_init(full + slot, 1);
            fence_proxy_async_shared();
        }
        __syncthreads();
    }

    __device__ __forceinline__ T* a(unsigned slot) const { return stages + slot * Memory::stage_elements; }
    __device__ __forceinline__ T* b(unsigned slot) const { return a(slot) + Memory::a_elements; }

    __device__ __forceinline__ void fetch(unsigned slot) {
        if (!steps.has(fetched)) return;
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(full + slot, Memory::stage_elements * sizeof(T));
            tensor_copy(a(slot), rows, steps.k(fetched), steps.row(fetched), full + slot);
            tensor_copy(b(slot), columns, steps.k(fetched), steps.walk.first_column, full + slot);
        }
        __syncwarp();
        fetched = fetched.next(steps.walk.k_steps);
    }

    __device__ __forceinline__ void receive(const Cursor& at, unsigned slot) {
        if (!steps.has(at)) return;
        mbarrier_wait(full + slot, parity);
        if (slot + 1 == Tile::stages) parity ^= 1;
    }
};

/// Four matrices of A as tensor cores take 16 rows from `row` on and 16 k from `k` on.
template <class A, class T>
__device__ __forceinline__ void load_rows(uint32_t (&rows)[4], const T* a, unsigned row, unsigned k) {
    const unsigned lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    // Rows 0.. and 8.. of k 0.., then of k 8...
    if constexpr (A::major == Major::k)
        ldmatrix<4>(rows, a + A::at(row + matrix % 2 * 8 + r, k / 8 + matrix / 2));
    else
        ldmatrix_trans<4>(rows, a + A::at(k + matrix / 2 * 8 + r, row / 8 + matrix % 2));
}

/// acc += A B^T of one step, by the layouts of both; of a WarpgroupTile under way until finish_products.
template <class Tile, class A, class B>
__device__ __forceinline__ void multiply(const typename Tile::T* a, const typename Tile::T* b,
                                         float (&acc)[Tile::fragments_m][Tile::fragments_n][4]) {
    using T = typename Tile::T;
    constexpr Major a_major = A::major, b_major = B::major;
    const GemmThread<Tile> thread;
    const unsigned lane = thread.lane, matrix = lane / 8, r = lane % 8;
    const unsigned m = thread.warp_m * Tile::wm, n = thread.warp_n * Tile::wn;
    if constexpr (by_warpgroups<Tile>) {
        // All of A first: registers may not be written between the fence and the products that read them.
        uint32_t rows[Tile::bk / 16][Tile::fragments_m][4];
#pragma unroll
        for (unsigned k = 0; k < Tile::bk; k += 16)
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; ++i)
                load_rows<A>(rows[k / 16][i], a, m + 16 * i, k);
        wgmma_fence();
#pragma unroll
        for (unsigned k = 0; k < Tile::bk; k += 16)
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; ++i)
                wgmma_m64k16<T, Tile::bn, b_major == Major::rows>(acc[i], rows[k / 16][i], B::descriptor(b, k));
        wgmma_commit_group();
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (unsigned k = 0; k < Tile::bk; k += 16) {
            uint32_t columns[Tile::fragments_n][2];
#pragma unroll
            for (unsigned j = 0; j < Tile::fragments_n; j += 2) {
                const unsigned column = n + 8 * j;
                // Matrices: k 0.. and 8.. of columns 0.., then of columns 8...
                uint32_t both[4];
                if constexpr (b_major == Major::k)
                    ldmatrix<4>(both, b + B::at(column + matrix / 2 * 8 + r, k / 8 + matrix % 2));
                else
                    ldmatrix_trans<4>(both, b + B::at(k + matrix % 2 * 8 + r, column / 8 + matrix / 2));
                columns[j][0] = both[0], columns[j][1] = both[1];
                columns[j + 1][0] = both[2], columns[j + 1][1] = both[3];
            }
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; ++i) {
                uint32_t rows[4];
                load_rows<A>(rows, a, m + 16 * i, k);
#pragma unroll
                for (unsigned j = 0; j < Tile::fragments_n; ++j)
                    mma_m16n8k16<T>(acc[i][j], rows, columns[j], acc[i][j]);
            }
        }
    } else if constexpr (Tile::tf32) {
        // A matrix of ldmatrix is 8 rows of 4 elements here. It cannot transpose them: of an operand in rows a lane reads its
        // elements one by one, and its two k are neighbours if both operands are, for which all lanes' are in different banks.
        constexpr bool one_by_one = a_major == Major::rows && b_major == Major::rows;
        const unsigned g = lane / 4, t = lane % 4;
        const auto k_of = [&](unsigned half) { return one_by_one ? 2 * t + half : t + 4 * half; };
        const auto round = [](uint32_t& bits) { bits = to_tf32(__uint_as_float(bits)); };
#pragma unroll
        for (unsigned k = 0; k < Tile::bk; k += 8) {
            uint32_t columns[Tile::fragments_n][2];
#pragma unroll
            for (unsigned j = 0; j < Tile::fragments_n; j += 2) {
                const unsigned column = n + 8 * j;
                // Matrices: k 0.. and 4.. of columns 0.., then of columns 8...
                uint32_t both[4];
                if constexpr (b_major == Major::k)
                    ldmatrix<4>(both, b + B::at(column + matrix / 2 * 8 + r, k / 4 + matrix % 2));
                else
#pragma unroll
                    for (unsigned i = 0; i < 4; ++i)
                        both[i] = __float_as_uint(b[B::at(k + k_of(i % 2), (column + i / 2 * 8 + g) / 4) + g % 4]);
#pragma unroll
                for (unsigned i = 0; i < 4; ++i) {
                    round(both[i]);
                    columns[j + i / 2][i % 2] = both[i];
                }
            }
#pragma unroll
            for (unsigned i = 0; i < Tile::fragments_m; ++i) {
                const unsigned row = m + 16 * i;
                // Matrices: rows 0.. and 8.. of k 0.., then of k 4...
                uint32_t rows[4];
                if constexpr (a_major == Major::k)
                    ldmatrix<4>(rows, a + A::at(row + matrix % 2 * 8 + r, k / 4 + matrix / 2));
                else
#pragma unroll
                    for (unsigned q = 0; q < 4; ++q)
                        rows[q] = __float_as_uint(a[A::at(k + k_of(q / 2), (row + q % 2 * 8 + g) / 4) + g % 4]);
#pragma unroll
                for (uint32_t& element : rows) round(element);
#pragma unroll
                for (unsigned j = 0; j < Tile::fragments_n; ++j)
                    mma_m16n8k8_tf32(acc[i][j], rows, columns[j], acc[i][j]);
            }
        }
    } else {
        // A thread has the same elements of C as with tensor cores: rows g, g + 8 and columns 2t, 2t + 1 of a fragment.
        const unsigned g = lane / 4, t = lane % 4;
#pragma unroll 1
        for (unsigned k = 0; k < Tile::bk; k += 4) {
            float rows[2 * Tile::fragments_m][4];
#pragma unroll
            for (unsigned i = 0; i < 2 * Tile::fragments_m; ++i) {
                const unsigned row = m + 8 * i + g;
                if constexpr (a_major == Major::k)
                    load4(a + A::at(row, k / 4), rows[i]);
                else
#pragma unroll
                    for (unsigned q = 0; q < 4; ++q) rows[i][q] = a[A::at(k + q, row / 4) + row % 4];
            }
#pragma unroll
            for (unsigned j = 0; j < 2 * Tile::fragments_n; ++j) {
                const unsigned column = n + j / 2 * 8 + 2 * t + j % 2;
                float columns[4];
                if constexpr (b_major == Major::k)
                    load4(b + B::at(column, k / 4), columns);
                else
#pragma unroll
                    for (unsigned q = 0; q < 4; ++q) columns[q] = b[B::at(k + q, column / 4) + column % 4];
#pragma unroll
                for (unsigned q = 0; q < 4; ++q)
#pragma unroll
                    for (unsigned i = 0; i < 2 * Tile::fragments_m; ++i)
                        acc[i / 2][j / 2][i % 2 * 2 + j % 2] += rows[i][q] * columns[q];
            }
        }
    }
}

/// Until here acc and the step in shared memory belong to the tensor cores.
template <class Tile>
__device__ __forceinline__ void finish_products(float (&acc)[Tile::fragments_m][Tile::fragments_n][4]) {
    if constexpr (by_warpgroups<Tile>) {
        // Lanes may have parted in a loader's transform.
        __syncwarp();
        wgmma_wait_group<0>();
#pragma unroll
        for (auto& fragments : acc) wgmma_settle(fragments);
    }
}

/// Hands a tile to the epilogue, turn_rows rows of a warp at a time; row r of the tile is `row_of(r)` there.
template <class Tile, class Epilogue, class RowOf>
__device__ __forceinline__ void turn(float* memory, const float (&acc)[Tile::fragments_m][Tile::fragments_n][4],
                                     unsigned first_column, Epilogue& epilogue, RowOf row_of) {
    using Thread = GemmThread<Tile>;
    // Its addresses and rows are not to stay in registers from tile to tile.
    const Thread thread(opaque(threadIdx.x));
    float* piece = memory + thread.warp * Tile::turn_floats;
    const unsigned g = thread.lane / 4, t = thread.lane % 4;
    constexpr unsigned eights = Tile::turn_rows / 8, count = Tile::turn_rows * Thread::groups / 32;
    static_assert(Tile::turn_rows * Thread::groups % 32 == 0, "every lane has as much");
    // So many are prefetched at a time; more would not be left registers.
    constexpr unsigned batch = count < 4 ? count : 2;
    static_assert(count % batch == 0);
#pragma unroll
    for (unsigned i = 0; i < 2 * Tile::fragments_m; i += eights) {
        const unsigned first_row = thread.warp_m * Tile::wm + 8 * i;
        __syncwarp();
#pragma unroll
        for (unsigned j = 0; j < Tile::fragments_n; ++j)
#pragma unroll
            for (unsigned h = 0; h < eights; ++h) {
                const unsigned half = (i + h) % 2 * 2;
                float* to = piece + (8 * h + g) * Tile::turn_pitch + 8 * j + 2 * t;
                *reinterpret_cast<float2*>(to) = make_float2(acc[i / 2][j][half], acc[i / 2][j][half + 1]);
            }
        // The lane's eight columns number h.
        const auto r = [&](unsigned h) { return (thread.lane + 32 * h) / Thread::groups; };
        const auto c = [&](unsigned h) { return (thread.lane + 32 * h) % Thread::groups * 8; };
        const unsigned column = first_column + thread.warp_n * Tile::wn;
#pragma unroll
        for (unsigned first = 0; first < count; first += batch) {
            unsigned row[batch];
            typename Epilogue::Extra extra[batch];
#pragma unroll
            for (unsigned h = 0; h < batch; ++h) {
                row[h] = row_of(first_row + r(first + h));
                extra[h] = epilogue.prefetch(row[h], column + c(first + h));
            }
            if (first == 0) __syncwarp();
#pragma unroll
            for (unsigned h = 0; h < batch; ++h) {
                float x[8];
                load8(piece + r(first + h) * Tile::turn_pitch + c(first + h), x);
                epilogue.store(row[h], column + c(first + h), x, extra[h]);
            }
        }
    }
}

} // namespace gemm_detail

/// The products of a block, as said above. Once a kernel; shared memory may be used for other things after a barrier.
template <class Tile, Major a_major, Major b_major, class A, class B, class Epilogue>
__device__ __forceinline__ void gemm(const A& a, const B& b, const GemmWalk& walk, Epilogue& epilogue) {
    using namespace gemm_detail;
    using Memory = GemmMemory<Tile, A, B>;
    static_assert(!Memory::by_tensors || (a_major == Major::k && b_major == Major::k), "TMA brings rows along k");
    using Pipeline = std::conditional_t<Memory::by_tensors, TensorPipeline<Tile>,
                                        LoaderPipeline<Tile, a_major, b_major, A, B>>;
    constexpr unsigned stages = Tile::stages;
    Pipeline pipeline(a, b, walk);
    float* turned = dynamic_shared<float>(Memory::pipeline);
    float acc[Tile::fragments_m][Tile::fragments_n][4] = {};
#pragma unroll
    for (unsigned s = 0; s + 1 < stages; ++s) pipeline.fetch(s);
    Cursor done;
    pipeline.receive(done, 0);
    unsigned slot = 0;
    while (done.tile < walk.tiles) {
        // All threads have received this step, and are through with the one before, whose memory is fetched into next.
        __syncthreads();
        pipeline.fetch(slot == 0 ? stages - 1 : slot - 1);
        multiply<Tile, typename Pipeline::A, typename Pipeline::B>(pipeline.a(slot), pipeline.b(slot), acc);
        const Cursor next = done.next(walk.k_steps);
        if (next.step == 0) {
            finish_products<Tile>(acc);
            const unsigned first = pipeline.steps.row(done);
            turn<Tile>(turned, acc, walk.first_column, epilogue, [&](unsigned row) { return first + row; });
#pragma unroll
            for (auto& fragments : acc)
#pragma unroll
                for (auto& fragment : fragments)
#pragma unroll
                    for (float& sum : fragment) sum = 0.0f;
        }
        done = next;
        if (++slot == stages) slot = 0;
        // A WarpgroupTile's products go on meanwhile: this writes another stage than theirs. Theirs is fetched into behind the
        // next barrier, and then no warp's products read it any more.
        pipeline.receive(done, slot);
        finish_products<Tile>(acc);
    }
}

/// Adds up what the warps' lanes have of each column: shared[warp row][k][column of the tile], valid after the barrier
/// that ends it. `shared` may lie where the pipeline was.
template <class Tile, unsigned count>
__device__ __forceinline__ void gemm_column_sums(float (&sum)[count][8], float (&shared)[Tile::warps_m][count][Tile::bn]) {
    using Thread = GemmThread<Tile>;
    const Thread thread;
    __syncthreads();
#pragma unroll
    for (unsigned k = 0; k < count; ++k)
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
#pragma unroll
            for (unsigned offset = Thread::groups; offset < 32; offset *= 2)
                sum[k][j] += __shfl_xor_sync(0xffffffffu, sum[k][j], int(offset));
            if (thread.lane < Thread::groups) shared[thread.warp_m][k][thread.column + j] = sum[k][j];
        }
    __syncthreads();
}
