// The gradient of the weights of a dense 3x3 convolution, for f16 and bf16: dweight[o, kh, kw, i] summed over pixels, on
// tensor cores, with every value of dy = a g + b y + c fetched and made once for all nine taps, and every value of x fetched
// once for each tile of outputs.
//
// Strips. y is cut into strips, 8 columns of one image wide and as high as it. A team of warps has one tile of dweight,
// (16 warps_m outputs) x 9 taps x (8 fragments warps_n inputs), in its registers, a warp 16 outputs, all taps and
// 8 `fragments` inputs of it, and walks down strips, two rows of y, 16 pixels, at a time: the k of one tensor-core product. Of x
// it takes the rows that come with them, 10 columns of two rows, or with stride 2 17 columns of four. A row of x meets three
// rows of y, one for each kh, and those of y before the new ones are still in registers. So nothing is fetched twice along a
// strip, a tap is a shift of an address (kw) or another choice of registers (kh), and a fragment of x that has come from
// shared memory enters three products (with stride 2 one or two).
//
// Steps. `pairs` pairs of rows are a step of the pipeline; cp.async brings it two steps ahead. Steps of all strips are numbered
// one after the other; a team has `run` of them. Where a team enters a strip, at its top or not, it first takes the rows of y
// before, without x. Each step of x is of one team, so each product of a row of x and one of y is made once. Teams of a block
// wait for each other only at the end, where the first adds up what all have, one after the other.
//
// Fetching. A thread brings always the same 16 bytes of always the same column: what it knows of its piece is made once, what
// follows from the strip where one is entered, and a step adds a constant.
//
// Zeros. What lies outside comes as zeros; dy, where a zero would become c, is zeroed again: for columns c is what is zero,
// rows are zeroed as they leave the transform, which works on fragments of g and y in registers.
//
// Shared memory is free of bank conflicts where it is read: a pixel's pitch is an odd number of 16 bytes, so that the 8
// pixels of an 8 x 8 matrix, which are neighbours, lie in different groups of 4 banks. For stride 2 the even columns of x
// come first, then the odd ones, which makes neighbours of every other one. cp.async writes a warp's 512 bytes in a row,
// but for a hole of 16 bytes after each pixel of an even number of pieces: at most two of eight lanes share a group.
//
// Results. Each of `splits` blocks of a tile leaves its sum in `partial` [splits, tiles, team_warps, 9 fragments, 32 lanes, 4],
// as it lies in registers. The tiles are large, and one block would be long about adding up so many: sum_strips, a
// launch of its own, adds them to dweight with as many blocks as there are fragments.
#pragma once

#include "gemm_operands.cuh"

/// How y, x and dweight are cut.
struct StripShape {
    /// Of x, of y.
    unsigned height, width, out_height, out_width, inputs, outputs;
    /// Row 0 of a strip's first step in y; row `first_row` + stride r of x is under the first tap of row r of y, column
    /// `first_column` under that of column 0. No row of y from `end_out` on meets one of x.
    int first_out, first_row, first_column, end_out;
    /// Strips of an image; steps of a strip.
    FastDivisor across, down;
    /// Steps of all strips, and of a team; pairs of rows of a step.
    unsigned steps, run, pairs;
    unsigned warps_m, warps_n, team_warps, teams;
    unsigned tiles, column_tiles, splits;
    /// Pieces of 16 bytes that a tile takes of a pixel of x, and rows of x that a team fetches at once.
    unsigned pieces, x_rows;
    /// Of shared memory, in elements: from pixel to pixel of g, y and of x; from g to y; from the beginning of a step to x, and
    /// to the next step.
    unsigned y_pitch, x_pitch, y_source, x_begin, stage;
};

namespace strip_detail {

constexpr unsigned taps_across = 3, all_taps = 9;

/// Of x under a pair of rows of y.
template <unsigned stride> struct StripWindow {
    static constexpr unsigned columns = 8 * stride + 3 - stride, rows = 2 * stride;
    /// The place of a column in its row.
    __device__ static __forceinline__ constexpr unsigned slot(unsigned column) {
        return stride == 1 ? column : column % 2 * 9 + column / 2;
    }
};

constexpr unsigned chunk = 8, stages = 3;

/// Where a team walks: the step, the one with which its strip ends, and the step's first row of y. It `enters` a strip with
/// the rows of y before the step.
struct StripWalk {
    unsigned step, until;
    int row;
    bool enters;

    __device__ __forceinline__ explicit StripWalk(unsigned first) : step(first), until(0), row(0), enters(true) {}

    /// At the beginning of a strip: which one of which image.
    __device__ __forceinline__ void enter(const StripShape& s, unsigned& image, unsigned& across) {
        const unsigned strip = s.down.quotient(step), top = strip * s.down.divisor;
        image = s.across.quotient(strip), across = strip - image * s.across.divisor;
        until = top + s.down.divisor;
        row = s.first_out + (int(step - top) - 1) * int(2 * s.pairs);
    }
    __device__ __forceinline__ void advance(const StripShape& s) {
        row += int(2 * s.pairs);
        step += enters ? 0 : 1;
        enters = step == until;
    }
};

/// What a thread needs to know where it enters a strip, in shared memory for want of registers: of the piece that it fetches
/// the first output and below it the column, 4 times the first input and below it the column; c of its two outputs.
struct StripKept {
    unsigned of_y, of_x;
    float c[2];
};

/// Fetches steps.
template <class T, unsigned stride> struct StripFetch {
    using Window = StripWindow<stride>;
    const T *g, *y, *x;
    const StripShape& s;
    const StripKept& kept;
    /// Its first row of a step, and where it goes; offsets of the step; how many rows of the image a column has, none outside.
    unsigned y_row, x_row, y_to, x_to, y_from, x_from, y_height, x_height;

    __device__ __forceinline__ StripFetch(const T* of_g, const T* of_y, const T* of_x, const StripShape& shape, StripKept& keep,
                                          unsigned thread, unsigned first_output, unsigned first_input)
        : g(of_g), y(of_y), x(of_x), s(shape), kept(keep), y_from(0), x_from(0), y_height(0), x_height(0) {
        const unsigned y_pieces = 2 * s.warps_m, pixel = thread / y_pieces, y_piece = thread - pixel * y_pieces;
        y_row = pixel / 8, y_to = pixel * s.y_pitch + y_piece * chunk;
        const unsigned of_row = Window::columns * s.pieces, row = thread / of_row, in_row = thread - row * of_row;
        const unsigned x_column = in_row / s.pieces, x_piece = in_row - x_column * s.pieces;
        // Threads beyond the last whole row have no piece: theirs is in no row of a step.
        x_row = row < s.x_rows ? row : ~0u / 2;
        x_to = s.x_begin + (row * Window::columns + Window::slot(x_column)) * s.x_pitch + x_piece * chunk;
        keep.of_y = first_output + y_piece * chunk + pixel % 8;
        keep.of_x = (first_input + x_piece * chunk) * 4 + x_column;
    }

    /// Of a strip.
    __device__ __forceinline__ void enter(StripWalk& walk) {
        unsigned image, across;
        walk.enter(s, image, across);
        const unsigned output = kept.of_y & ~7u, of_y = across * 8 + kept.of_y % 8, input = kept.of_x / 32 * 8;
        y_height = of_y < s.out_width && output < s.outputs ? s.out_height : 0;
        y_from = ((image * s.out_height + unsigned(walk.row) + y_row) * s.out_width + of_y) * s.outputs + output;
        const unsigned of_x = unsigned(s.first_column) + across * 8 * stride + kept.of_x % 32;
        const unsigned row_of_x = unsigned(s.first_row + walk.row * int(stride)) + x_row;
        x_height = of_x < s.width && input < s.inputs ? s.height : 0;
        x_from = ((image * s.height + row_of_x) * s.width + of_x) * s.inputs + input;
    }

    __device__ __forceinline__ void operator()(T* stage, StripWalk& walk) {
        const unsigned rows = 2 * s.pairs;
        if (walk.enters) enter(walk);
        T* to = stage + y_to;
        unsigned from = y_from;
#pragma unroll 1
        for (unsigned r = y_row; r < rows; r += 2 * s.warps_n) {
            const bool inside = unsigned(walk.row) + r < y_height;
            cp_async<16>(to, g + (inside ? from : 0), inside ? 16u : 0u);
            cp_async<16>(to + s.y_source, y + (inside ? from : 0), inside ? 16u : 0u);
            to += 16 * s.warps_n * s.y_pitch, from += 2 * s.warps_n * s.out_width * s.outputs;
        }
        if (!walk.enters) {
            const unsigned first = unsigned(s.first_row + walk.row * int(stride));
            to = stage + x_to, from = x_from;
#pragma unroll 1
            for (unsigned r = x_row; r < rows * stride; r += s.x_rows) {
                const bool inside = first + r < x_height;
                cp_async<16>(to, x + (inside ? from : 0), inside ? 16u : 0u);
                to += s.x_rows * Window::columns * s.x_pitch, from += s.x_rows * s.width * s.inputs;
            }
        }
        y_from += rows * s.out_width * s.outputs, x_from += rows * stride * s.width * s.inputs;
        walk.advance(s);
    }
};

/// dy as a warp's lanes hold it for mma's A: of outputs lane / 4 and 8 more, pixels 2 (lane % 4) and the next of a row.
template <class T> struct StripGradient {
    const StripShape& s;
    const StripKept& kept;
    float a[2], b[2];
    /// Of each pixel; zero outside.
    float c[2][2];

    __device__ __forceinline__ StripGradient(const StripShape& shape, StripKept& keep, const float* owed,
                                             unsigned first_output)
        : s(shape), kept(keep) {
#pragma unroll
        for (unsigned h = 0; h < 2; ++h) {
            const unsigned output = first_output + threadIdx.x % 32 / 4 + 8 * h;
            const bool exists = output < s.outputs;
            a[h] = exists ? __ldg(owed + output) : 0.0f;
            b[h] = exists ? __ldg(owed + s.outputs + output) : 0.0f;
            keep.c[h] = exists ? __ldg(owed + 2 * s.outputs + output) : 0.0f;
        }
    }
    /// Before the rows of another strip.
    __device__ __forceinline__ void enter(unsigned across) {
        const unsigned column = across * 8 + threadIdx.x % 4 * 2;
#pragma unroll
        for (unsigned h = 0; h < 2; ++h)
#pragma unroll
            for (unsigned k = 0; k < 2; ++k) c[h][k] = column + k < s.out_width ? kept.c[h] : 0.0f;
    }
    /// Of half h of the outputs, for two pixels.
    __device__ __forceinline__ uint32_t operator()(unsigned h, uint32_t g, uint32_t y) const {
        const float2 own = unpack2<T>(g), raw = unpack2<T>(y);
        return pack2<T>(a[h] * own.x + (b[h] * raw.x + c[h][0]), a[h] * own.y + (b[h] * raw.y + c[h][1]));
    }
};

/// A fragment of x: mma's B.
struct Values {
    uint32_t of[2];
};

/// Two rows of x as mma's B, one kw after the other, all inputs of a warp: hands use(kw, fragment, values) what it loads.
/// `from` is where a lane finds its row of the matrices of kw = 0, of kw = 1 and 2 it is `one` and `two` further.
template <class T, unsigned fragments, class Use>
__device__ __forceinline__ void load_columns(const T* from, unsigned one, unsigned two, const Use& use) {
#pragma unroll
    for (unsigned kw = 0; kw < taps_across; ++kw) {
        const T* at = from + (kw == 0 ? 0 : kw == 1 ? one : two);
#pragma unroll
        for (unsigned j = 0; j + 1 < fragments; j += 2) {
            uint32_t both[4];
            ldmatrix_trans<4>(both, at + 8 * j);
            use(kw, j, {both[0], both[1]});
            use(kw, j + 1, {both[2], both[3]});
        }
        if constexpr (fragments % 2 == 1) {
            uint32_t last[2];
            ldmatrix_trans<2>(last, at + 8 * (fragments - 1));
            use(kw, fragments - 1, {last[0], last[1]});
        }
    }
}

} // namespace strip_detail

/// A block's part of the gradient, as said above. Grid tiles * splits.
template <class T, unsigned stride, unsigned fragments>
__device__ __forceinline__ void strip_wgrad(const T* g, const T* y, const float* owed, const T* x, float* partial,
                                            const StripShape& s) {
    using namespace strip_detail;
    using Window = StripWindow<stride>;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned team = warp / s.team_warps, own = warp - team * s.team_warps;
    const unsigned warp_m = own / s.warps_n, warp_n = own - warp_m * s.warps_n;
    const unsigned split = blockIdx.x / s.tiles, tile = blockIdx.x - split * s.tiles;
    const unsigned row_tile = tile / s.column_tiles, column_tile = tile - row_tile * s.column_tiles;
    const unsigned first_output = row_tile * s.warps_m * 16;
    float acc[taps_across][taps_across][fragments][4] = {};

    if (team < s.teams) {
        StripKept& kept = dynamic_shared<StripKept>(s.teams * stages * s.stage * sizeof(T))[threadIdx.x];
        StripFetch<T, stride> fetch(g, y, x, s, kept, own * 32 + lane, first_output, column_tile * s.pieces * chunk);
        StripGradient<T> gradient(s, kept, owed, first_output + warp_m * 16);
        T* const pipeline = dynamic_shared<T>() + team * stages * s.stage;

        // Where this lane finds its row of the first matrices: pixels, then outputs or inputs, 8 at a time.
        const unsigned matrix = lane / 8, r = lane % 8;
        const unsigned in_y = (matrix / 2 * 8 + r) * s.y_pitch + (warp_m * 2 + matrix % 2) * 8;
        const unsigned in_x = s.x_begin + (matrix % 2 * stride * Window::columns + r) * s.x_pitch +
                              (warp_n * fragments + matrix / 2) * 8;

        const unsigned first = (split * s.teams + team) * s.run, end = min(first + s.run, s.steps);
        StripWalk fetched(first), done(first);
        const auto bring = [&](unsigned slot) {
            if (fetched.step < end) fetch(pipeline + slot * s.stage, fetched);
            cp_async_commit_group();
        };
#pragma unroll 1
        for (unsigned k = 0; k + 1 < stages; ++k) bring(k);
        // Rows of dy, the newest two last, each for outputs lane / 4 and 8 more.
        uint32_t rows[4][2] = {};
        unsigned slot = 0;
        while (done.step < end) {
            cp_async_wait_group<int(stages) - 2>();
            // The team has brought this step and is through with the one before, whose memory is fetched into next.
            barrier_sync(1 + team, s.team_warps * 32);
            bring(slot == 0 ? stages - 1 : slot - 1);
            if (done.enters) {
                unsigned image, across;
                done.enter(s, image, across);
                gradient.enter(across);
            }
            const T *of_y = pipeline + slot * s.stage + in_y, *of_x = pipeline + slot * s.stage + in_x;
            const int below = done.row + int(2 * s.pairs);
            // Of the rows before a strip's first own ones the last two.
            int row = done.row;
            if (done.enters) row = below - 2, of_y += (s.pairs - 1) * 16 * s.y_pitch;
            const int last = done.enters ? below : min(below, s.end_out);
#pragma unroll 1
            for (; row < last; row += 2) {
                uint32_t g_values[4], y_values[4];
                ldmatrix_trans<4>(g_values, of_y);
                ldmatrix_trans<4>(y_values, of_y + s.y_source);
                of_y += 16 * s.y_pitch;
                const uint32_t exists[2] = {unsigned(row) < s.out_height ? ~0u : 0u,
                                            unsigned(row + 1) < s.out_height ? ~0u : 0u};
#pragma unroll
                for (unsigned h = 0; h < 2; ++h) {
                    rows[0][h] = rows[2][h], rows[1][h] = rows[3][h];
                    rows[2][h] = gradient(h, g_values[h], y_values[h]) & exists[0];
                    rows[3][h] = gradient(h, g_values[2 + h], y_values[2 + h]) & exists[1];
                }
                if (done.enters) break;
                // Rows of dy before the newest one and the newest one of a kh.
                const auto two_rows = [&](uint32_t(&two)[4], unsigned newest) {
                    two[0] = rows[newest - 1][0], two[1] = rows[newest - 1][1];
                    two[2] = rows[newest][0], two[3] = rows[newest][1];
                };
                const unsigned one = Window::slot(1) * s.x_pitch, two = Window::slot(2) * s.x_pitch;
                if constexpr (stride == 1) {
                    // Rows r and r + 1 of x, counted from the first tap of row r of y.
                    uint32_t of_kh[3][4];
                    two_rows(of_kh[0], 3), two_rows(of_kh[1], 2), two_rows(of_kh[2], 1);
                    load_columns<T, fragments>(of_x, one, two,
                                               [&](unsigned kw, unsigned j, const Values& values) {
#pragma unroll
                                                   for (unsigned kh = 0; kh < 3; ++kh)
                                                       mma_m16n8k16<T>(acc[kh][kw][j], of_kh[kh], values.of, acc[kh][kw][j]);
                                               });
                } else {
                    // Rows 2r and 2r + 2 of x are kh = 0 of rows r and r + 1 of y, and kh = 2 of those before; rows 2r + 1
                    // and 2r + 3 are kh = 1.
                    uint32_t of_kh[2][4];
                    two_rows(of_kh[0], 3), two_rows(of_kh[1], 2);
                    load_columns<T, fragments>(of_x, one, two,
                                               [&](unsigned kw, unsigned j, const Values& values) {
                                                   mma_m16n8k16<T>(acc[0][kw][j], of_kh[0], values.of, acc[0][kw][j]);
                                                   mma_m16n8k16<T>(acc[2][kw][j], of_kh[1], values.of, acc[2][kw][j]);
                                               });
                    load_columns<T, fragments>(of_x + Window::columns * s.x_pitch, one, two,
                                               [&](unsigned kw, unsigned j, const Values& values) {
                                                   mma_m16n8k16<T>(acc[1][kw][j], of_kh[0], values.of, acc[1][kw][j]);
                                               });
                }
                of_x += Window::rows * Window::columns * s.x_pitch;
            }
            done.advance(s);
            if (++slot == stages) slot = 0;
        }
    }

    // Tap by tap, through memory that the pipeline is through with.
    float4* const shared = dynamic_shared<float4>();
    if (s.teams > 1) {
#pragma unroll
        for (unsigned tap = 0; tap < all_taps; ++tap) {
            float(&sums)[fragments][4] = acc[tap / taps_across][tap % taps_across];
            __syncthreads();
            if (team > 0 && team < s.teams)
#pragma unroll
                for (unsigned j = 0; j < fragments; ++j)
                    store16(shared + ((warp - s.team_warps) * fragments + j) * 32 + lane,
                            make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
            __syncthreads();
            if (team > 0) continue;
#pragma unroll 1
            for (unsigned other = 0; other + 1 < s.teams; ++other)
#pragma unroll
                for (unsigned j = 0; j < fragments; ++j) {
                    const float4 v = load16<float4>(shared + ((other * s.team_warps + warp) * fragments + j) * 32 + lane);
                    sums[j][0] += v.x, sums[j][1] += v.y, sums[j][2] += v.z, sums[j][3] += v.w;
                }
        }
    }
    if (team > 0) return;
    float* const to = partial + size_t(blockIdx.x * s.team_warps + warp) * (all_taps * fragments * 128) + lane * 4;
#pragma unroll
    for (unsigned f = 0; f < all_taps * fragments; ++f) {
        const float(&v)[4] = acc[f / fragments / taps_across][f / fragments % taps_across][f % fragments];
        store16(to + f * 128, make_float4(v[0], v[1], v[2], v[3]));
    }
}

/// Adds a fragment's sums of all splits to dweight. Grid tiles * warps_m * warps_n * 9 fragments, blocks of 256 threads: each
/// warp adds up every eighth split, then the first adds those sums, one after the other.
__device__ __forceinline__ void sum_strips(const float* partial, float* dweight, const StripShape& s, unsigned fragments) {
    using namespace strip_detail;
    constexpr unsigned warps = 8;
    __shared__ float4 shared[warps][32];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* from = partial + size_t(blockIdx.x) * 128 + lane * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto add = [&](const float4& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; };
#pragma unroll 4
    for (unsigned split = warp; split < s.splits; split += warps)
        add(load16<float4>(from + size_t(split) * gridDim.x * 128));
    store16(&shared[warp][lane], sum);
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (unsigned other = 1; other < warps; ++other) add(load16<float4>(&shared[other][lane]));
    const unsigned of_warp = all_taps * fragments, of_tile = s.team_warps * of_warp;
    const unsigned tile = blockIdx.x / of_tile, in_tile = blockIdx.x - tile * of_tile;
    const unsigned own = in_tile / of_warp, fragment = in_tile - own * of_warp;
    const unsigned warp_m = own / s.warps_n, warp_n = own - warp_m * s.warps_n;
    const unsigned row_tile = tile / s.column_tiles, column_tile = tile - row_tile * s.column_tiles;
    const unsigned tap = fragment / fragments;
    const unsigned input = ((column_tile * s.warps_n + warp_n) * fragments + fragment - tap * fragments) * 8;
    if (input >= s.inputs) return;
    const auto pair = [&](unsigned half, float first, float second) {
        const unsigned output = (row_tile * s.warps_m + warp_m) * 16 + half * 8 + lane / 4;
        if (output >= s.outputs) return;
        float2* to = reinterpret_cast<float2*>(dweight + (output * all_taps + tap) * s.inputs + input + lane % 4 * 2);
        const float2 before = *to;
        *to = make_float2(before.x + first, before.y + second);
    };
    pair(0, sum.x, sum.y);
    pair(1, sum.z, sum.w);
}
