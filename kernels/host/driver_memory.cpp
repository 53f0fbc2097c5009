// Driver API: memory, pools, copies and fills.

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "driver.hpp"
#include "memory.hpp"
#include "settings.hpp"
#include "stream.hpp"

using namespace host;

namespace {

/// A pool is its attributes; memory itself comes from one place.
struct Pool {
    std::map<int, uint64_t> attributes;
};

constexpr int used_memory_current = 7;
constexpr int used_memory_high = 8;
constexpr int last_int_attribute = 3;

Handles<Pool>& pools() {
    static auto& instance = *new Handles<Pool>("memory pool");
    return instance;
}

Pool* default_pool() {
    static Pool* pool = pools().add(std::make_unique<Pool>());
    return pool;
}

Status allocate_device(DevicePointer* pointer, size_t bytes) {
    void* address = nullptr;
    Status status = device_memory().allocate(bytes, MemoryKind::device, &address);
    if (status.ok()) status = store(pointer, DevicePointer(reinterpret_cast<uintptr_t>(address)));
    return status;
}

Status on_stream(void* handle, Operation operation) {
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    return status.ok() ? stream->submit(std::move(operation)) : status;
}

Status on_stream_now(void* handle, Operation operation) {
    Stream* stream = nullptr;
    Status status = find_stream(handle, &stream);
    if (status.ok()) status = stream->submit(std::move(operation));
    return status.ok() && !stream->capturing() ? stream->synchronize() : status;
}

Operation copy_to_device(DevicePointer to, const void* from, size_t bytes) {
    return {"copy to device", [=] {
                Status status =
                    device_memory().check("copy to device", to_address(to), bytes, MemoryKind::device);
                if (status.ok()) memcpy(to_address(to), from, bytes);
                return status;
            }};
}

/// The source is read now: what cuMemcpyHtoDAsync promises for memory that is not pinned.
Operation staged_copy_to_device(DevicePointer to, const void* from, size_t bytes) {
    const auto* begin = static_cast<const char*>(from);
    auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
    Operation copy = copy_to_device(to, staged->data(), bytes);
    return {copy.name, [staged, run = copy.run] { return run(); }};
}

Operation copy_to_host(void* to, DevicePointer from, size_t bytes) {
    return {"copy to host", [=] {
                Status status =
                    device_memory().check("copy to host", to_address(from), bytes, MemoryKind::device);
                if (status.ok()) memcpy(to, to_address(from), bytes);
                return status;
            }};
}

Operation copy_on_device(DevicePointer to, DevicePointer from, size_t bytes) {
    return {"copy on device", [=] {
                const char* what = "copy on device";
                Status status = device_memory().check(what, to_address(to), bytes, MemoryKind::device);
                if (status.ok())
                    status = device_memory().check(what, to_address(from), bytes, MemoryKind::device);
                if (status.ok() && to < from + bytes && from < to + bytes && bytes != 0)
                    status = failure(Code::invalid_value, "%s: source and destination overlap", what);
                if (status.ok()) memcpy(to_address(to), to_address(from), bytes);
                return status;
            }};
}

template <class Element> Operation fill(DevicePointer to, Element value, size_t count) {
    return {"fill", [=] {
                Status status = device_memory().check("fill", to_address(to), count * sizeof(Element),
                                                      MemoryKind::device);
                if (status.ok() && to % sizeof(Element) != 0)
                    status = failure(Code::invalid_value, "fill: the destination is not aligned to %zu bytes",
                                     sizeof(Element));
                if (status.ok()) std::fill_n(static_cast<Element*>(to_address(to)), count, value);
                return status;
            }};
}

} // namespace

HOST_API int cuMemGetInfo_v2(size_t* free, size_t* total) {
    ApiLock lock;
    const size_t memory = settings().memory;
    Status status = store(total, memory);
    return report(status.ok() ? store(free, memory - std::min(memory, device_memory().device_bytes()))
                              : status);
}

HOST_API int cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
    ApiLock lock;
    Status status = refuse_any_capture("allocating memory");
    return report(status.ok() ? allocate_device(pointer, bytes) : status);
}

HOST_API int cuMemFree_v2(DevicePointer pointer) {
    ApiLock lock;
    if (pointer == 0) return report(success());
    Status status = refuse_any_capture("freeing memory");
    if (status.ok()) status = synchronize_all();
    Status freed = device_memory().release(to_address(pointer), MemoryKind::device);
    return report(status.ok() ? freed : status);
}

HOST_API int cuMemAllocAsync(DevicePointer* pointer, size_t bytes, void* stream_handle) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(stream_handle, &stream);
    if (status.ok()) status = stream->refuse_capture("allocating memory");
    return report(status.ok() ? allocate_device(pointer, bytes) : status);
}

HOST_API int cuMemFreeAsync(DevicePointer pointer, void* stream_handle) {
    ApiLock lock;
    if (pointer == 0) return report(success());
    Stream* stream = nullptr;
    Status status = find_stream(stream_handle, &stream);
    if (status.ok()) status = stream->refuse_capture("freeing memory");
    if (status.ok())
        status = stream->submit(
            {"free", [pointer] { return device_memory().release(to_address(pointer), MemoryKind::device); }});
    return report(status);
}

HOST_API int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    ApiLock lock;
    return report(device_memory().allocate(bytes, MemoryKind::pinned, pointer));
}

HOST_API int cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }

HOST_API int cuMemFreeHost(void* pointer) {
    ApiLock lock;
    Status status = synchronize_all();
    Status freed = device_memory().release(pointer, MemoryKind::pinned);
    return report(status.ok() ? freed : status);
}

HOST_API int cuDeviceGetDefaultMemPool(void** pool, int) {
    ApiLock lock;
    return report(store(pool, static_cast<void*>(default_pool())));
}

HOST_API int cuDeviceGetMemPool(void** pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }

HOST_API int cuDeviceSetMemPool(int, void* handle) {
    ApiLock lock;
    Pool* pool = nullptr;
    return report(pools().find(handle, &pool));
}

HOST_API int cuMemPoolCreate(void** pool, const void*) {
    ApiLock lock;
    return report(store(pool, static_cast<void*>(pools().add(std::make_unique<Pool>()))));
}

HOST_API int cuMemPoolDestroy(void* pool) {
    ApiLock lock;
    return report(pools().remove(pool));
}

HOST_API int cuMemPoolTrimTo(void* handle, size_t) {
    ApiLock lock;
    Pool* pool = nullptr;
    return report(pools().find(handle, &pool));
}

HOST_API int cuMemAllocFromPoolAsync(DevicePointer* pointer, size_t bytes, void* handle, void* stream) {
    ApiLock lock;
    Pool* pool = nullptr;
    Status status = pools().find(handle, &pool);
    return status.ok() ? cuMemAllocAsync(pointer, bytes, stream) : report(status);
}

HOST_API int cuMemPoolSetAttribute(void* handle, int attribute, void* value) {
    ApiLock lock;
    Pool* pool = nullptr;
    Status status = pools().find(handle, &pool);
    if (!status.ok()) return report(status);
    if (attribute <= last_int_attribute)
        pool->attributes[attribute] = uint64_t(*static_cast<int*>(value));
    else
        pool->attributes[attribute] = *static_cast<uint64_t*>(value);
    return report(success());
}

HOST_API int cuMemPoolGetAttribute(void* handle, int attribute, void* value) {
    ApiLock lock;
    Pool* pool = nullptr;
    Status status = pools().find(handle, &pool);
    if (!status.ok()) return report(status);
    const bool used = attribute == used_memory_current || attribute == used_memory_high;
    const uint64_t number = used ? device_memory().device_bytes() : pool->attributes[attribute];
    if (attribute <= last_int_attribute)
        *static_cast<int*>(value) = int(number);
    else
        *static_cast<uint64_t*>(value) = number;
    return report(success());
}

HOST_API int cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void* stream_handle) {
    ApiLock lock;
    Stream* stream = nullptr;
    Status status = find_stream(stream_handle, &stream);
    if (!status.ok()) return report(status);
    const bool later = stream->capturing() || !settings().defer || device_memory().is_pinned(from);
    return report(
        stream->submit(later ? copy_to_device(to, from, bytes) : staged_copy_to_device(to, from, bytes)));
}

HOST_API int cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* stream) {
    ApiLock lock;
    Operation copy = copy_to_host(to, from, bytes);
    // Into memory that is not pinned this call returns only once the copy is done.
    if (!device_memory().is_pinned(to)) return report(on_stream_now(stream, std::move(copy)));
    return report(on_stream(stream, std::move(copy)));
}

HOST_API int cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void* stream) {
    ApiLock lock;
    return report(on_stream(stream, copy_on_device(to, from, bytes)));
}

HOST_API int cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
    ApiLock lock;
    return report(on_stream_now(nullptr, copy_to_device(to, from, bytes)));
}

HOST_API int cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
    ApiLock lock;
    return report(on_stream_now(nullptr, copy_to_host(to, from, bytes)));
}

HOST_API int cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t bytes) {
    ApiLock lock;
    return report(on_stream_now(nullptr, copy_on_device(to, from, bytes)));
}

HOST_API int cuMemsetD8Async(DevicePointer to, unsigned char value, size_t count, void* stream) {
    ApiLock lock;
    return report(on_stream(stream, fill<uint8_t>(to, value, count)));
}

HOST_API int cuMemsetD16Async(DevicePointer to, unsigned short value, size_t count, void* stream) {
    ApiLock lock;
    return report(on_stream(stream, fill<uint16_t>(to, value, count)));
}

HOST_API int cuMemsetD32Async(DevicePointer to, unsigned value, size_t count, void* stream) {
    ApiLock lock;
    return report(on_stream(stream, fill<uint32_t>(to, value, count)));
}

HOST_API int cuMemsetD8_v2(DevicePointer to, unsigned char value, size_t count) {
    ApiLock lock;
    return report(on_stream_now(nullptr, fill<uint8_t>(to, value, count)));
}

HOST_API int cuMemsetD32_v2(DevicePointer to, unsigned value, size_t count) {
    ApiLock lock;
    return report(on_stream_now(nullptr, fill<uint32_t>(to, value, count)));
}
