// What the driver's entry points share. They are the ones that cudarc looks up by name in `libcuda.so.1`,
// plus the few that a C++ program needs beside; parameters and meanings are those of the CUDA driver API.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "error.hpp"

#define HOST_API extern "C" [[gnu::visibility("default")]]

namespace host {

/// CUdeviceptr.
using DevicePointer = unsigned long long;

inline void* to_address(DevicePointer pointer) { return reinterpret_cast<void*>(uintptr_t(pointer)); }

/// One entry point at a time. Recursive, because a host function on a stream may call the driver.
class ApiLock {
  public:
    ApiLock() : lock_(mutex()) {}

  private:
    static std::recursive_mutex& mutex() {
        static auto& instance = *new std::recursive_mutex;
        return instance;
    }

    std::lock_guard<std::recursive_mutex> lock_;
};

/// Where a result belongs that the caller must provide room for.
template <class T> Status store(T* where, T value) {
    if (where == nullptr) return failure(Code::invalid_value, "a null pointer was passed for a result");
    *where = value;
    return success();
}

} // namespace host
