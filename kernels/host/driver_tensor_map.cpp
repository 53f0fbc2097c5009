// Driver API: tensor maps. Matrices alone, without strides between elements; the limits are those of the driver.

#include <cstring>

#include "driver.hpp"
#include "tensor_map.hpp"

using namespace host;

namespace {

constexpr unsigned matrix_rank = 2;

/// Bytes of an element by CUtensorMapDataType, 0 for what there is no such type for.
unsigned element_bytes(int type) {
    constexpr unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
    return type >= 0 && type < int(sizeof bytes / sizeof *bytes) ? bytes[type] : 0;
}

Status check_map(const MatrixMap& map, const uint32_t* element_strides, int swizzle) {
    const auto wrong = [](const std::string& what) {
        return failure(Code::invalid_value, "cuTensorMapEncodeTiled: %s", what.c_str());
    };
    if (map.element_bytes == 0) return wrong("an unknown type of elements");
    if (map.address % 16 != 0) return wrong(text("address 0x%llx is no multiple of 16", (unsigned long long)map.address));
    if (map.pitch % 16 != 0 || map.pitch >= uint64_t(1) << 40)
        return wrong(text("%llu bytes from row to row; multiples of 16 below 2^40 are possible",
                          (unsigned long long)map.pitch));
    for (unsigned i = 0; i < matrix_rank; ++i) {
        if (map.extent[i] == 0 || map.extent[i] > uint64_t(1) << 32)
            return wrong(text("an extent of %llu; 1 to 2^32 are possible", (unsigned long long)map.extent[i]));
        if (map.box[i] == 0 || map.box[i] > 256)
            return wrong(text("a box of %u; 1 to 256 are possible", map.box[i]));
        if (element_strides[i] != 1) return wrong("elements that are no neighbours; they are not emulated");
    }
    if (map.row_bytes() % 16 != 0) return wrong(text("rows of %u bytes, no multiple of 16", map.row_bytes()));
    if (swizzle < 0 || swizzle > 3) return wrong(text("swizzle %d is not 0 to 3", swizzle));
    if (map.swizzle != 0 && map.row_bytes() > map.swizzle)
        return wrong(text("rows of %u bytes where %u are swizzled", map.row_bytes(), map.swizzle));
    if (map.swizzle != 0 && map.row_bytes() < map.swizzle)
        return wrong("rows shorter than those that are swizzled; they are not emulated");
    return success();
}

} // namespace

HOST_API int cuTensorMapEncodeTiled(void* result, int type, uint32_t rank, void* address, const uint64_t* extents,
                                    const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                    int interleave, int swizzle, int, int fill) {
    for (const void* pointer : {static_cast<const void*>(result), static_cast<const void*>(extents),
                                static_cast<const void*>(strides), static_cast<const void*>(box),
                                static_cast<const void*>(element_strides)})
        if (pointer == nullptr) return report(failure(Code::invalid_value, "cuTensorMapEncodeTiled: a null pointer"));
    if (reinterpret_cast<uintptr_t>(result) % 64 != 0)
        return report(failure(Code::invalid_value, "cuTensorMapEncodeTiled: the map at %p is not aligned to 64 bytes", result));
    if (rank != matrix_rank || interleave != 0 || fill != 0)
        return report(failure(Code::not_supported, "cuTensorMapEncodeTiled: the host device knows matrices filled up with "
                                                   "zeros alone"));
    const unsigned swizzled = swizzle > 0 ? 16u << swizzle : 0;
    const MatrixMap map{MatrixMap::current, reinterpret_cast<uintptr_t>(address), {extents[0], extents[1]}, strides[0],
                        {box[0], box[1]}, element_bytes(type), swizzled};
    Status status = check_map(map, element_strides, swizzle);
    if (status.ok()) {
        memset(result, 0, tensor_map_bytes);
        memcpy(result, &map, sizeof map);
    }
    return report(status);
}
