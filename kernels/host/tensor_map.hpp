// What a tensor map says. On the device it is 128 bytes that the driver alone understands; here they are these.
#pragma once

#include <cstdint>

#include "source_line.hpp"

namespace host {

/// A matrix [extent[1], extent[0]] of elements, `pitch` bytes from row to row, and a box of it.
struct MatrixMap {
    static constexpr uint64_t current = 0x50414d54534f48u;

    /// `current`, if it is one.
    uint64_t kind;
    uint64_t address;
    uint64_t extent[2];
    uint64_t pitch;
    uint32_t box[2];
    uint32_t element_bytes;
    /// Bytes of a row whose pieces are swizzled, or 0.
    uint32_t swizzle;

    unsigned row_bytes() const { return box[0] * element_bytes; }
};

inline constexpr unsigned tensor_map_bytes = 128;
static_assert(sizeof(MatrixMap) <= tensor_map_bytes);

/// Fails unless it was made by cuTensorMapEncodeTiled.
MatrixMap read_tensor_map(const void* map, SourceLine at);

} // namespace host
