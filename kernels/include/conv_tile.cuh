// Spatial tiles for a dense 3x3 convolution of stride 1, whose padding is 1 on every side, so that x and y are images of one
// size. An image is cut into tiles of tile_height x tile_width pixels, those at its right and lower edge may reach over it.
// Tiles are numbered along rows, then down, then from image to image. What a tile needs of the other tensor is its halo, one
// pixel more on every side, fetched once for all nine taps.
//
//     const ConvTile tile = tiles.tile(number);
//     tiles.halo_pixel(tile, h)     // the pixel of the tensor [images, height, width] where halo pixel h lies; h counts along
//                                   // the halo's rows, h < tiles.halo_pixels()
//     tiles.row_pixel(tile, r)      // the same of row r of the GEMM (or k of a weight gradient): the tile's own pixels, along
//                                   // its rows. Rows from tiles.rows() on, and those over the edge, are dead: no_pixel
//     tiles.row_halo(r)             // the halo pixel under the first tap of row r; under tap (kh, kw) it is tiles.tap(kh, kw)
//                                   // further. Of dead rows that of the last: some pixel of the halo
//
// dgrad goes the same way with the taps reversed: tap (kh, kw) of the halo of dy multiplies weight (2 - kh, 2 - kw).
//
// In shared memory a halo pixel has `pieces` (4 or 8) pieces of 16 bytes, next to each other and to those of the next pixel:
// piece c of pixel h lies at slot<pieces>(h, phase, c) times 16 bytes. ldmatrix reads one piece of eight neighbouring rows of
// the GEMM at a time, in one go if they lie in different sixteenths of bytes of the 128 that all banks are. Neighbouring rows
// are neighbouring pixels, but where the tile's next row begins two pixels are skipped. So pieces are swizzled by XOR not
// with h, but with the phase of the pixel, the number that it has if those two are not counted:
//
//     tiles.halo_phase(h)                                  // = h - 2 (row of the halo)
//     tiles.row_phase(r) + tiles.tap_phase(kh, kw)         // the same for row r of the GEMM under a tap, by addition
//
// which grows by one from row to row, everywhere, and is odd where h is odd. Eight in a row then differ in their last three
// bits: with 8 pieces c ^ (phase % 8) are eight slots of one line; with 4 the lowest bit says which half of a line, and
// c ^ (phase / 2 % 4) which of the half's slots.
//
// How large the tiles are is chosen by the host for each image size: src/kernels/conv_tile.rs.
#pragma once

#include "gemm.cuh"

/// What a row is that no pixel belongs to: larger than any.
constexpr unsigned no_pixel = ~0u;

/// A tile's place: its image's first pixel among all, and its own first row and column.
struct ConvTile {
    unsigned image, row, column;
};

/// How images are cut into tiles.
struct ConvTiles {
    unsigned images, height, width, tile_height;
    /// Of a tile, and of its halo.
    FastDivisor tile_width, halo_width;
    /// Tiles across and down an image.
    FastDivisor across, down;

    /// Of all images.
    __device__ __forceinline__ unsigned count() const { return images * down.divisor * across.divisor; }
    __device__ __forceinline__ unsigned rows() const { return tile_height * tile_width.divisor; }
    __device__ __forceinline__ unsigned halo_pixels() const { return (tile_height + 2) * halo_width.divisor; }

    __device__ __forceinline__ ConvTile tile(unsigned number) const {
        const unsigned line = across.quotient(number), image = down.quotient(line);
        return {image * height * width, (line - image * down.divisor) * tile_height,
                (number - line * across.divisor) * tile_width.divisor};
    }

    /// How many pixels the tiles before `number`, which may be count(), have in all.
    __device__ __forceinline__ unsigned pixels_before(unsigned number) const {
        const ConvTile next = tile(number);
        return next.image + next.row * width + min(tile_height, height - next.row) * next.column;
    }

    __device__ __forceinline__ unsigned halo_pixel(const ConvTile& tile, unsigned h) const {
        const unsigned line = halo_width.quotient(h);
        // Before the image's first row or column they wrap, beyond any side.
        const unsigned row = tile.row + line - 1, column = tile.column + (h - line * halo_width.divisor) - 1;
        return row < height && column < width ? tile.image + row * width + column : no_pixel;
    }
    __device__ __forceinline__ unsigned halo_phase(unsigned h) const { return h - 2 * halo_width.quotient(h); }

    __device__ __forceinline__ unsigned row_pixel(const ConvTile& tile, unsigned r) const {
        const unsigned line = tile_width.quotient(r);
        const unsigned row = tile.row + line, column = tile.column + (r - line * tile_width.divisor);
        return line < tile_height && row < height && column < width ? tile.image + row * width + column : no_pixel;
    }
    __device__ __forceinline__ unsigned row_phase(unsigned r) const { return min(r, rows() - 1); }
    __device__ __forceinline__ unsigned row_halo(unsigned r) const {
        const unsigned alive = row_phase(r);
        return alive + 2 * tile_width.quotient(alive);
    }

    __device__ __forceinline__ unsigned tap(unsigned kh, unsigned kw) const { return kh * halo_width.divisor + kw; }
    __device__ __forceinline__ unsigned tap_phase(unsigned kh, unsigned kw) const { return kh * tile_width.divisor + kw; }

    /// Where piece c of halo pixel h lies, in pieces of 16 bytes.
    template <unsigned pieces> __device__ static __forceinline__ unsigned slot(unsigned h, unsigned phase, unsigned c) {
        static_assert(pieces == 4 || pieces == 8, "half a line of all banks, or a line");
        return h * pieces + (c ^ (pieces == 8 ? phase % 8 : phase / 2 % 4));
    }
};
