// A small test harness, and a small way to drive a device: enough for the files beside this one.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../control.h"
#include "../vector_types.hpp"
#include "driver_api.hpp"

namespace harness {

/// Which build this is: faults and NaNs are left to the sanitizers where there are any.
#if defined(HOST_ADDRESS_SANITIZER)
inline constexpr bool plain = false;
#elif defined(HOST_THREAD_SANITIZER)
inline constexpr bool plain = false;
#else
inline constexpr bool plain = true;
#endif

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& failures() {
    static int count = 0;
    return count;
}

struct Registrar {
    Registrar(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

#define TEST(name)                                                                                           \
    static void name();                                                                                      \
    static const harness::Registrar register_##name(#name, name);                                            \
    static void name()

inline void fail_check(const char* file, int line, const std::string& message) {
    ++failures();
    fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
}

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) harness::fail_check(__FILE__, __LINE__, "expected " #condition);                   \
    } while (0)

template <class A, class B>
void check_equal(const char* file, int line, const char* what, const A& a, const B& b) {
    if (a == b) return;
    if constexpr (std::is_arithmetic_v<A>)
        fail_check(file, line, std::string(what) + ": " + std::to_string(a) + " is not " + std::to_string(b));
    else
        fail_check(file, line,
                   std::string(what) + ": \"" + std::string(a) + "\" is not \"" + std::string(b) + "\"");
}

#define CHECK_EQUAL(a, b) harness::check_equal(__FILE__, __LINE__, #a, a, b)

/// A driver call that must succeed.
#define OK(call)                                                                                             \
    do {                                                                                                     \
        if ((call) != 0)                                                                                     \
            harness::fail_check(__FILE__, __LINE__, std::string(#call ": ") + effnetv2_host_last_error());   \
    } while (0)

/// A driver call that must fail with this code and a message that contains each of the texts.
inline void expect_failure(const char* file, int line, int result, int code,
                           const std::vector<std::string>& texts) {
    const std::string message = effnetv2_host_last_error();
    if (result != code)
        fail_check(file, line, "code " + std::to_string(result) + ", not " + std::to_string(code));
    if (result == 0) return;
    for (const std::string& text : texts)
        if (message.find(text) == std::string::npos)
            fail_check(file, line, "no \"" + text + "\" in the message \"" + message + "\"");
}

#define FAILS(call, code, ...) harness::expect_failure(__FILE__, __LINE__, call, code, {__VA_ARGS__})

/// The device's context, current for its lifetime.
class Context {
  public:
    Context() {
        OK(cuInit(0));
        OK(cuDevicePrimaryCtxRetain(&context_, 0));
        OK(cuCtxSetCurrent(context_));
    }
    ~Context() { OK(cuDevicePrimaryCtxRelease_v2(0)); }

  private:
    void* context_ = nullptr;
};

/// An array on the device.
template <class T> class Buffer {
  public:
    explicit Buffer(size_t count) : count_(count) { OK(cuMemAlloc_v2(&pointer, count * sizeof(T))); }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
        OK(cuMemcpyHtoD_v2(pointer, values.data(), count_ * sizeof(T)));
    }
    ~Buffer() {
        if (pointer != 0) OK(cuMemFree_v2(pointer));
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    std::vector<T> read() const {
        std::vector<T> values(count_);
        OK(cuMemcpyDtoH_v2(values.data(), pointer, count_ * sizeof(T)));
        return values;
    }

    CUdeviceptr pointer = 0;

  private:
    size_t count_;
};

/// A fat binary's first bytes: all that the host device looks at.
inline constexpr uint32_t fatbin[4] = {0xba55ed50};

/// The attribute of a launch that may begin before the one ahead of it has ended.
inline CUlaunchAttribute programmatic(int allowed = 1) {
    CUlaunchAttribute attribute{6, {}, {}};
    attribute.value.programmaticStreamSerializationAllowed = allowed;
    return attribute;
}

/// A kernel by name.
class Kernel {
  public:
    explicit Kernel(const char* name) {
        OK(cuModuleLoadData(&module_, fatbin));
        OK(cuModuleGetFunction(&function, module_, name));
    }
    ~Kernel() { OK(cuModuleUnload(module_)); }
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    /// Launches on a stream; the result is the driver's.
    template <class... Arguments>
    int launch_on(void* stream, dim3 grid, dim3 block, unsigned shared, Arguments... arguments) const {
        void* pointers[] = {&arguments..., nullptr};
        return cuLaunchKernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, stream,
                              pointers, nullptr);
    }

    /// The same with one attribute.
    template <class... Arguments>
    int launch_with(CUlaunchAttribute attribute, void* stream, dim3 grid, dim3 block, unsigned shared,
                    Arguments... arguments) const {
        void* pointers[] = {&arguments..., nullptr};
        const CUlaunchConfig config{grid.x,  grid.y, grid.z, block.x,    block.y,
                                    block.z, shared, stream, &attribute, 1};
        return cuLaunchKernelEx(&config, function, pointers, nullptr);
    }

    template <class... Arguments>
    int launch(dim3 grid, dim3 block, unsigned shared, Arguments... arguments) const {
        return launch_on(nullptr, grid, block, shared, arguments...);
    }

    void* function = nullptr;

  private:
    void* module_ = nullptr;
};

/// Pseudo-random numbers for test data.
class Numbers {
  public:
    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state_ >> 32);
    }
    int integer(int low, int high) { return low + int(bits() % unsigned(high - low + 1)); }
    float real() { return float(bits() >> 8) * 0x1p-23f - 1.0f; }

  private:
    uint64_t state_ = 42;
};

template <class T> std::vector<T> iota(int count) {
    std::vector<T> values;
    for (int i = 0; i < count; ++i) values.push_back(T(i));
    return values;
}

} // namespace harness
