// Driver API: initialisation, the device, its context.

#include <cstdio>
#include <cstring>

#include "device_attributes.hpp"
#include "driver.hpp"
#include "kernel.hpp"
#include "memory.hpp"
#include "settings.hpp"
#include "stream.hpp"

using namespace host;

namespace {

bool initialized = false;
unsigned primary_references = 0;
char primary_context;
thread_local void* current_context = nullptr;

Status check_device(int device) {
    if (!initialized) return failure(Code::not_initialized, "cuInit has not been called");
    if (device == 0) return success();
    return failure(Code::invalid_device, "there is one host device, 0; not %d", device);
}

Status check_context() {
    if (current_context != nullptr) return success();
    return failure(Code::invalid_context, "no context is current on this thread");
}

} // namespace

HOST_API int cuInit(unsigned flags) {
    ApiLock lock;
    if (flags != 0) return report(failure(Code::invalid_value, "cuInit takes no flags"));
    if (!registration_error().empty())
        return report(failure(Code::invalid_source, "%s", registration_error().c_str()));
    initialized = true;
    return report(success());
}

HOST_API int cuDriverGetVersion(int* version) { return report(store(version, driver_version)); }

HOST_API int cuDeviceGetCount(int* count) {
    ApiLock lock;
    Status status = check_device(0);
    return report(status.ok() ? store(count, 1) : status);
}

HOST_API int cuDeviceGet(int* device, int ordinal) {
    ApiLock lock;
    Status status = check_device(ordinal);
    return report(status.ok() ? store(device, ordinal) : status);
}

HOST_API int cuDeviceGetName(char* name, int length, int device) {
    ApiLock lock;
    Status status = check_device(device);
    if (status.ok() && (name == nullptr || length <= 0))
        status = failure(Code::invalid_value, "cuDeviceGetName: no room for the name");
    if (status.ok()) snprintf(name, size_t(length), "%s", device_name);
    return report(status);
}

HOST_API int cuDeviceGetUuid_v2(char* uuid, int device) {
    ApiLock lock;
    Status status = check_device(device);
    if (status.ok()) memcpy(uuid, "effnetv2-host-00", 16);
    return report(status);
}

HOST_API int cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

HOST_API int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    ApiLock lock;
    Status status = check_device(device);
    return report(status.ok() ? store(bytes, size_t(settings().memory)) : status);
}

HOST_API int cuDeviceGetAttribute(int* value, int attribute, int device) {
    ApiLock lock;
    Status status = check_device(device);
    return report(status.ok() ? store(value, device_attribute(attribute)) : status);
}

HOST_API int cuDevicePrimaryCtxRetain(void** context, int device) {
    ApiLock lock;
    Status status = check_device(device);
    if (status.ok()) status = store(context, static_cast<void*>(&primary_context));
    if (status.ok()) ++primary_references;
    return report(status);
}

/// The last release lists what the program forgot to free.
HOST_API int cuDevicePrimaryCtxRelease_v2(int device) {
    ApiLock lock;
    Status status = check_device(device);
    if (!status.ok()) return report(status);
    if (primary_references == 0)
        return report(
            failure(Code::invalid_context, "the primary context is released more often than retained"));
    if (--primary_references > 0) return report(success());
    status = synchronize_all();
    const std::string leaks = device_memory().leaks();
    if (!status.ok() || leaks.empty()) return report(status);
    // Said aloud as well: programs rarely look at the result of their last call.
    fprintf(stderr, "effnetv2 host device: context released with %s\n", leaks.c_str());
    return report(failure(Code::illegal_state, "context released with %s", leaks.c_str()));
}

HOST_API int cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }

HOST_API int cuCtxGetCurrent(void** context) { return report(store(context, current_context)); }

HOST_API int cuCtxSetCurrent(void* context) {
    if (context != nullptr && context != &primary_context)
        return report(failure(Code::invalid_context, "%p is not the context of the host device", context));
    current_context = context;
    return report(success());
}

HOST_API int cuCtxGetDevice(int* device) {
    Status status = check_context();
    return report(status.ok() ? store(device, 0) : status);
}

HOST_API int cuCtxSynchronize() {
    ApiLock lock;
    Status status = check_context();
    return report(status.ok() ? synchronize_all() : status);
}

HOST_API int cuCtxSetFlags(unsigned) { return report(check_context()); }

HOST_API int cuCtxSetLimit(int, size_t) { return report(check_context()); }

HOST_API int cuCtxGetLimit(size_t* value, int) {
    Status status = check_context();
    return report(status.ok() ? store(value, size_t(0)) : status);
}

HOST_API int cuCtxSetCacheConfig(int) { return report(check_context()); }

HOST_API int cuCtxGetCacheConfig(int* config) {
    Status status = check_context();
    return report(status.ok() ? store(config, 0) : status);
}

HOST_API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    Status status = store(least, 0);
    return report(status.ok() ? store(greatest, 0) : status);
}

HOST_API int cuProfilerStart() { return report(success()); }

HOST_API int cuProfilerStop() { return report(success()); }

HOST_API int cuGetErrorName(int code, const char** name) {
    *name = code_name(code);
    return int(*name ? Code::success : Code::invalid_value);
}

/// The message of this thread's last error if it was this one, else the driver's own words.
HOST_API int cuGetErrorString(int code, const char** description) {
    *description = last_error_message(Code(code));
    if (*description == nullptr) *description = code_description(code);
    return int(*description ? Code::success : Code::invalid_value);
}
