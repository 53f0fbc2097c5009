// `cp.async.bulk.tensor` of two dimensions: the destination is poisoned when the copy is issued and filled when the phase of
// its mbarrier ends (mbarrier.hpp).
#pragma once

#include "block.hpp"
#include "mbarrier.hpp"
#include "memory_access.hpp"
#include "source_line.hpp"
#include "tensor_map.hpp"
#include "thread.hpp"

namespace host {

/// Fails unless `box` can be copied to `shared`, in the layout that the map asks for.
void check_tensor_copy(const MatrixMap& map, const void* shared, const void* barrier, SourceLine at);

/// A copy without pieces yet; the barrier has it, for a thread that fails leaves all behind that it had.
TensorCopy& begin_tensor_copy(const void* barrier, SourceLine at);

/// The copy counts for the phase.
void count_tensor_copy(const void* barrier, const TensorCopy& copy, SourceLine at);

/// The issuing thread itself reads and poisons, so that the sanitizers see who does.
inline void tensor_copy(void* shared, const void* tensor_map, unsigned column, unsigned row, uint64_t* barrier,
                        SourceLine at) {
    static_cast<void>(*const_cast<volatile uint64_t*>(barrier));
    const MatrixMap map = read_tensor_map(tensor_map, at);
    check_tensor_copy(map, shared, barrier, at);
    SharedMemory& memory = this_thread().block.shared();
    const unsigned row_bytes = map.row_bytes(), elements = 16 / map.element_bytes;
    const size_t begin = memory.offset(shared);
    TensorCopy& copy = begin_tensor_copy(barrier, at);
    copy.pieces.reserve(map.box[1] * row_bytes / 16);
    for (unsigned r = 0; r < map.box[1]; ++r)
        for (unsigned c = 0; c < row_bytes / 16; ++c) {
            size_t place = begin + r * row_bytes + c * 16;
            if (map.swizzle != 0) place ^= (place >> 7) % (map.swizzle / 16) << 4;
            TensorCopy::Piece piece{memory.at(place), {}};
            const uint64_t first = uint64_t(column) + c * elements, line = uint64_t(row) + r;
            const uint64_t inside = line < map.extent[1] && first < map.extent[0] ? map.extent[0] - first : 0;
            const auto* source = reinterpret_cast<const unsigned char*>(map.address + line * map.pitch) +
                                 first * map.element_bytes;
            const unsigned bytes = inside < elements ? unsigned(inside) * map.element_bytes : 16;
            if (bytes != 0) check_access(source, bytes, map.element_bytes, at);
            for (unsigned i = 0; i < bytes; ++i) piece.data[i] = static_cast<const volatile unsigned char*>(source)[i];
            check_access(piece.destination, 16, 16, at);
            check_fenced("cp.async.bulk.tensor", "overwrites", piece.destination, at);
            for (unsigned i = 0; i < 16; ++i) static_cast<volatile unsigned char*>(piece.destination)[i] = 0xff;
            memory.owe(piece.destination, 16, this_thread().rank);
            copy.pieces.push_back(piece);
        }
    count_tensor_copy(barrier, copy, at);
}

} // namespace host
