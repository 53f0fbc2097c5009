// Copies by TMA against the layouts of the CUDA documentation, and what cuTensorMapEncodeTiled refuses.

#include "harness.hpp"

using namespace harness;

namespace {

constexpr int invalid_value = 1, not_supported = 801;
constexpr int of_u16 = 1, of_u32 = 2, of_bf16 = 9;

/// Arguments of cuTensorMapEncodeTiled for a matrix.
struct Encoding {
    int type = of_u16;
    unsigned rank = 2;
    CUdeviceptr address = 0;
    uint64_t extents[2] = {40, 300}, strides[1] = {80};
    unsigned box[2] = {32, 128}, element_strides[2] = {1, 1};
    int interleave = 0, swizzle = 2, fill = 0;

    int encode(CUtensorMap* map) const {
        return cuTensorMapEncodeTiled(map, type, rank, reinterpret_cast<void*>(uintptr_t(address)), extents, strides, box,
                                      element_strides, interleave, swizzle, 0, fill);
    }
};

} // namespace

TEST(tensor_copy_layouts) {
    Context context;
    const Kernel kernel("tensor_copy_boxes");
    // Rows of 32, 64 and 128 bytes, swizzled; 96 bytes as they lie.
    for (const auto& [swizzle, row_bytes] : {std::pair(1, 32u), {2, 64u}, {3, 128u}, {0, 96u}})
        for (const unsigned element : {2u, 4u}) {
            const unsigned width = 88 / element, pitch = 96 / element, height = 150, rows = 128, step = 37, count = 3;
            const unsigned columns = row_bytes / element, bytes = rows * row_bytes;
            std::vector<unsigned char> x(height * pitch * element);
            Numbers numbers;
            for (unsigned char& value : x) value = static_cast<unsigned char>(numbers.integer(1, 255));
            Buffer<unsigned char> matrix(x), y(count * bytes);
            Encoding encoding;
            encoding.type = element == 2 ? of_bf16 : of_u32;
            encoding.address = matrix.pointer;
            encoding.extents[0] = width, encoding.extents[1] = height, encoding.strides[0] = pitch * element;
            encoding.box[0] = columns, encoding.box[1] = rows, encoding.swizzle = swizzle;
            CUtensorMap map;
            OK(encoding.encode(&map));
            // The first box is inside but for its last columns; the last one ends below the matrix.
            for (const unsigned column : {0u, 16 / element}) {
                OK(kernel.launch(1, 96, bytes + 8, map, y.pointer, bytes, column, 5u, step, count));
                const std::vector<unsigned char> copied = y.read();
                for (unsigned box = 0; box < count; ++box)
                    for (unsigned r = 0; r < rows; ++r)
                        for (unsigned byte = 0; byte < row_bytes; ++byte) {
                            const unsigned line = 5 + box * step + r, from = column * element + byte;
                            const bool inside = line < height && from < width * element;
                            const unsigned row_of_pieces = r * row_bytes / 128;
                            const unsigned exchanged = swizzle == 0   ? 0
                                                       : swizzle == 1 ? row_of_pieces % 2
                                                       : swizzle == 2 ? row_of_pieces % 4
                                                                      : row_of_pieces % 8;
                            const unsigned at = (r * row_bytes + byte) ^ exchanged << 4;
                            CHECK_EQUAL(unsigned(copied[box * bytes + at]),
                                        inside ? unsigned(x[line * pitch * element + from]) : 0u);
                        }
            }
        }
}

TEST(tensor_copy_maps) {
    Context context;
    Buffer<unsigned char> x(300 * 80);
    CUtensorMap map;
    Encoding right;
    right.address = x.pointer;
    OK(right.encode(&map));
    const auto refused = [&](void (*change)(Encoding&), int code, const char* text) {
        Encoding wrong = right;
        change(wrong);
        FAILS(wrong.encode(&map), code, "cuTensorMapEncodeTiled", text);
    };
    refused([](Encoding& e) { e.address += 8; }, invalid_value, "is no multiple of 16");
    refused([](Encoding& e) { e.strides[0] = 72; }, invalid_value, "72 bytes from row to row");
    refused([](Encoding& e) { e.extents[1] = 0; }, invalid_value, "an extent of 0");
    refused([](Encoding& e) { e.box[1] = 257; }, invalid_value, "a box of 257");
    refused([](Encoding& e) { e.box[0] = 20; }, invalid_value, "rows of 40 bytes, no multiple of 16");
    refused([](Encoding& e) { e.box[0] = 64; }, invalid_value, "rows of 128 bytes where 64 are swizzled");
    refused([](Encoding& e) { e.box[0] = 16; }, invalid_value, "rows shorter than those that are swizzled");
    refused([](Encoding& e) { e.element_strides[0] = 2; }, invalid_value, "no neighbours");
    refused([](Encoding& e) { e.swizzle = 4; }, invalid_value, "swizzle 4");
    refused([](Encoding& e) { e.type = 77; }, invalid_value, "an unknown type");
    refused([](Encoding& e) { e.rank = 3; }, not_supported, "matrices");
    refused([](Encoding& e) { e.fill = 1; }, not_supported, "zeros");
    FAILS(right.encode(nullptr), invalid_value, "a null pointer");
}
