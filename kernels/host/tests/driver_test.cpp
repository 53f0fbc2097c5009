// Memory, modules, streams, events and graphs, and what the driver refuses.

#include <cmath>
#include <thread>

#include "harness.hpp"

using namespace harness;

namespace {

constexpr int invalid_value = 1, out_of_memory = 2, invalid_image = 200, invalid_handle = 400,
              illegal_state = 401, not_found = 500, illegal_address = 700, launch_failed = 719,
              not_supported = 801, capture_unsupported = 900, capture_invalidated = 901,
              capture_unjoined = 904, capture_isolation = 905, captured_event = 907;

class Stream {
  public:
    explicit Stream(unsigned flags = 1) { OK(cuStreamCreate(&handle, flags)); }
    ~Stream() { OK(cuStreamDestroy_v2(handle)); }
    void* handle = nullptr;
};

class Event {
  public:
    Event() { OK(cuEventCreate(&handle, 0)); }
    ~Event() { OK(cuEventDestroy_v2(handle)); }
    void* handle = nullptr;
};

/// y = x with the right twin of a kernel that copies.
int copy_kernel(void* stream, CUdeviceptr x, CUdeviceptr y) {
    return Kernel("right_near_write").launch_on(stream, 1, 64, 0, x, y, 64);
}

} // namespace

TEST(driver_fresh_memory_is_nan) {
    Context context;
    Buffer<float> fresh(1000);
    bool all_nan = true;
    for (float value : fresh.read()) all_nan &= std::isnan(value);
    CHECK(all_nan);
}

TEST(driver_copies_are_checked) {
    Context context;
    Buffer<char> device(100);
    std::vector<char> host(200);
    FAILS(cuMemcpyHtoD_v2(device.pointer, host.data(), 101), invalid_value, "copy to device",
          "0 bytes into the 100-byte");
    FAILS(cuMemcpyDtoH_v2(host.data(), device.pointer + 50, 51), invalid_value, "copy to host",
          "50 bytes into");
    FAILS(cuMemcpyDtoH_v2(host.data(), device.pointer - 1, 1), invalid_value, "copy to host");
    FAILS(cuMemsetD32Async(device.pointer + 2, 0, 1, nullptr), invalid_value, "not aligned to 4 bytes");
    FAILS(cuMemcpyDtoDAsync_v2(device.pointer + 5, device.pointer, 10, nullptr), invalid_value, "overlap");
    OK(cuMemcpyDtoDAsync_v2(device.pointer + 10, device.pointer, 10, nullptr));
    OK(cuMemcpyHtoD_v2(device.pointer, host.data(), 100));
    FAILS(cuMemcpyHtoD_v2(CUdeviceptr(reinterpret_cast<uintptr_t>(host.data())), host.data(), 4),
          invalid_value, "in no allocation of this device");
}

TEST(driver_freed_memory) {
    Context context;
    Buffer<float> y(64);
    CUdeviceptr x = 0;
    OK(cuMemAlloc_v2(&x, 256));
    OK(cuMemFree_v2(x));
    char byte = 0;
    FAILS(cuMemcpyDtoH_v2(&byte, x, 1), invalid_value, "inside a freed allocation of 256 bytes");
    FAILS(cuMemFree_v2(x), invalid_value, "freed twice");
    FAILS(cuMemFree_v2(y.pointer + 4), invalid_value, "not the start of an allocation");
    FAILS(copy_kernel(nullptr, x, y.pointer), illegal_address,
          "kernel `right_near_write`, argument 0 (of \"ppi\")", "inside a freed allocation");
    FAILS(cuMemFreeHost(reinterpret_cast<void*>(y.pointer)), invalid_value,
          "cannot be freed as pinned host memory");
}

TEST(driver_leaks_are_named) {
    CUdeviceptr leaked = 0;
    {
        void* handle = nullptr;
        OK(cuInit(0));
        OK(cuDevicePrimaryCtxRetain(&handle, 0));
        OK(cuCtxSetCurrent(handle));
        OK(cuMemAlloc_v2(&leaked, 1234));
        fprintf(stderr, "on purpose: ");
        FAILS(cuDevicePrimaryCtxRelease_v2(0), illegal_state, "1 device allocations (1234 bytes) still live",
              "1234 bytes at 0x");
    }
    OK(cuMemFree_v2(leaked));
}

TEST(driver_memory_is_limited) {
    Context context;
    size_t free_bytes = 0, total = 0, after = 0;
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    CUdeviceptr pointer = 0;
    FAILS(cuMemAlloc_v2(&pointer, total + 1), out_of_memory, "out of device memory");
    FAILS(cuMemAlloc_v2(&pointer, 0), invalid_value, "0 bytes");
    Buffer<char> some(5000);
    OK(cuMemGetInfo_v2(&after, &total));
    CHECK_EQUAL(free_bytes - after, size_t(5000));
}

TEST(driver_pool_attributes) {
    Context context;
    void* pool = nullptr;
    uint64_t threshold = ~0ull, got = 0;
    OK(cuDeviceGetDefaultMemPool(&pool, 0));
    OK(cuMemPoolSetAttribute(pool, 4, &threshold));
    OK(cuMemPoolGetAttribute(pool, 4, &got));
    CHECK_EQUAL(got, threshold);
}

TEST(driver_modules) {
    Context context;
    void* module = nullptr;
    void* function = nullptr;
    FAILS(cuModuleLoadData(&module, "effnetv2 host kernels: nothing"), invalid_image,
          "no kernels of a file `nothing.cu`", "broken, collectives, example, parameters, tensor_copy, tensor_core");
    FAILS(cuModuleLoadData(&module, "#include"), invalid_image, "neither a fat binary");
    OK(cuModuleLoadData(&module, "effnetv2 host kernels: tensor_core"));
    OK(cuModuleGetFunction(&function, module, "mma_bf16"));
    FAILS(cuModuleGetFunction(&function, module, "votes"), not_found, "no kernel `votes` in tensor_core.cu");
    OK(cuModuleUnload(module));
    FAILS(cuModuleUnload(module), invalid_handle, "not a live module");
    FAILS(cuFuncSetAttribute(function, 8, 1), invalid_handle, "not a live function");
}

TEST(driver_signatures) {
    CHECK_EQUAL(std::string(effnetv2_host_kernel_signature("parameters")), "pcCsSiIlLhbfd{24:8}p");
    CHECK_EQUAL(std::string(effnetv2_host_kernel_signature("example_gemm_bf16")), "ppppiii");
    CHECK(effnetv2_host_kernel_signature("no_such_kernel") == nullptr);
    bool found = false;
    for (size_t i = 0; i < effnetv2_host_kernel_count(); ++i)
        found |= strcmp(effnetv2_host_kernel_name(i), "votes") == 0 &&
                 strcmp(effnetv2_host_kernel_family(i), "collectives") == 0;
    CHECK(found);
    CHECK(effnetv2_host_kernel_name(effnetv2_host_kernel_count()) == nullptr);
}

TEST(driver_parameters) {
    Context context;
    struct Geometry {
        CUdeviceptr data;
        int extent[3];
    };
    Buffer<float> data(std::vector<float>{0.5f});
    Buffer<double> out(14);
    Kernel kernel("parameters");
    OK(kernel.launch(1, 1, 0, CUdeviceptr(0), int8_t(-1), uint8_t(255), int16_t(-2), uint16_t(65535), -3,
                     4000000000u, -5ll, 6ull, uint16_t(0x3c00), uint16_t(0x4000), 0.25f, 0.125,
                     Geometry{data.pointer, {1, 2, 3}}, out.pointer));
    const std::vector<double> expected = {0, -1, 255, -2, 65535, -3, 4e9, -5, 6, 1, 2, 0.25, 0.125, 321.5};
    CHECK(out.read() == expected);
    size_t offset = 0, size = 0;
    OK(cuFuncGetParamInfo(kernel.function, 13, &offset, &size));
    CHECK_EQUAL(offset, size_t(56));
    CHECK_EQUAL(size, size_t(24));
    FAILS(cuFuncGetParamInfo(kernel.function, 15, &offset, &size), invalid_value, "has 15 parameters");
}

TEST(driver_launch_limits) {
    Context context;
    Kernel kernel("indices");
    Buffer<int> out(1024);
    FAILS(kernel.launch(1, 1025, 0, out.pointer), invalid_value, "kernel `indices`", "block of (1025,1,1)");
    FAILS(kernel.launch({1, 70000}, 1, 0, out.pointer), invalid_value, "grid of (1,70000,1)");
    FAILS(kernel.launch({0, 1}, 1, 0, out.pointer), invalid_value, "grid of (0,1,1)");
    FAILS(kernel.launch(1, 1, 49153, out.pointer), invalid_value, "49153 bytes of dynamic shared memory");
    FAILS(cuFuncSetAttribute(kernel.function, 8, 232449), invalid_value, "at most 232448");
    OK(cuFuncSetAttribute(kernel.function, 8, 232448));
    OK(kernel.launch(1, 1024, 232448, out.pointer));
    CHECK(out.read() == iota<int>(1024));
    int blocks = 0, value = -1;
    OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, 256, 100 << 10));
    CHECK_EQUAL(blocks, 2);
    OK(cuFuncGetAttribute(&value, 4, kernel.function));
    CHECK_EQUAL(value, 0);
}

TEST(driver_error_texts) {
    Context context;
    const char* text = nullptr;
    FAILS(cuMemFree_v2(1), invalid_value, "not the start");
    OK(cuGetErrorString(invalid_value, &text));
    CHECK_EQUAL(std::string(text), effnetv2_host_last_error());
    OK(cuGetErrorString(illegal_address, &text));
    CHECK_EQUAL(std::string(text), "an illegal memory access was encountered");
    OK(cuGetErrorName(illegal_address, &text));
    CHECK_EQUAL(std::string(text), "CUDA_ERROR_ILLEGAL_ADDRESS");
    std::string other_thread = "unset";
    std::thread([&] { other_thread = effnetv2_host_last_error(); }).join();
    CHECK_EQUAL(other_thread, "");
}

TEST(streams_events) {
    Context context;
    Stream stream;
    Event start, end, never;
    float milliseconds = -1;
    FAILS(cuEventElapsedTime(&milliseconds, start.handle, end.handle), invalid_handle, "never recorded");
    OK(cuEventQuery(never.handle));
    OK(cuEventRecord(start.handle, stream.handle));
    Buffer<int> out(1024);
    OK(Kernel("indices").launch_on(stream.handle, 1, 1024, 0, out.pointer));
    OK(cuEventRecord(end.handle, stream.handle));
    OK(cuEventSynchronize(end.handle));
    OK(cuEventElapsedTime(&milliseconds, start.handle, end.handle));
    CHECK(milliseconds > 0 && milliseconds < 60000);
    FAILS(cuEventRecord(stream.handle, stream.handle), invalid_handle, "not a live event");
}

TEST(streams_deferred) {
    Context context;
    effnetv2_host_set_deferred(1);
    {
        Stream compute, copies;
        Event copied;
        Buffer<float> x(64), y(64);
        void* raw = nullptr;
        OK(cuMemHostAlloc(&raw, 256, 0));
        auto* pinned = static_cast<float*>(raw);
        for (int i = 0; i < 64; ++i) pinned[i] = float(i);

        // Without the wait for the copy the kernel reads fresh memory.
        OK(cuMemcpyHtoDAsync_v2(x.pointer, pinned, 256, copies.handle));
        OK(copy_kernel(compute.handle, x.pointer, y.pointer));
        OK(cuStreamSynchronize(compute.handle));
        CHECK(std::isnan(y.read()[1]));

        // With it the copy comes first, and reads the pinned memory as late as that.
        OK(cuEventRecord(copied.handle, copies.handle));
        OK(cuStreamWaitEvent(compute.handle, copied.handle, 0));
        OK(copy_kernel(compute.handle, x.pointer, y.pointer));
        pinned[1] = 99;
        OK(cuStreamSynchronize(compute.handle));
        CHECK_EQUAL(y.read()[1], 99.0f);

        // Ordinary memory is read when the copy is issued.
        std::vector<float> pageable(64, 5.0f);
        OK(cuMemcpyHtoDAsync_v2(x.pointer, pageable.data(), 256, compute.handle));
        pageable.assign(64, 6.0f);
        OK(copy_kernel(compute.handle, x.pointer, y.pointer));
        OK(cuMemcpyDtoHAsync_v2(pageable.data(), y.pointer, 256, compute.handle));
        CHECK_EQUAL(pageable[63], 5.0f);

        // An error appears where the stream is waited for.
        OK(Kernel("broken_deadlock").launch_on(compute.handle, 1, 64, 1024, x.pointer, y.pointer, 64));
        FAILS(cuStreamSynchronize(compute.handle), 719, "deadlock");
        OK(cuMemFreeHost(raw));
    }
    effnetv2_host_set_deferred(0);
}

TEST(graphs_replay) {
    Context context;
    Stream stream;
    Buffer<float> x(iota<float>(64)), y(64), z(64);
    void* graph = nullptr;
    void* executable = nullptr;
    unsigned state = 0;
    size_t nodes = 0;
    OK(cuStreamBeginCapture_v2(stream.handle, 1));
    OK(cuStreamIsCapturing(stream.handle, &state));
    CHECK_EQUAL(state, 1u);
    OK(copy_kernel(stream.handle, x.pointer, y.pointer));
    OK(cuMemcpyDtoDAsync_v2(z.pointer, y.pointer, 256, stream.handle));
    OK(cuMemsetD8Async(y.pointer, 0, 256, stream.handle));
    OK(cuStreamEndCapture(stream.handle, &graph));
    CHECK(std::isnan(z.read()[0])); // recorded, not run
    OK(cuGraphGetNodes(graph, nullptr, &nodes));
    CHECK_EQUAL(nodes, size_t(3));
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuGraphDestroy(graph));
    for (float offset : {0.0f, 100.0f}) {
        std::vector<float> values = iota<float>(64);
        for (float& value : values) value += offset;
        OK(cuMemcpyHtoD_v2(x.pointer, values.data(), 256));
        OK(cuGraphLaunch(executable, stream.handle));
        CHECK(z.read() == values);
        CHECK(y.read() == std::vector<float>(64));
    }
    OK(cuGraphExecDestroy(executable));
    FAILS(cuGraphLaunch(executable, stream.handle), invalid_handle, "not a live executable graph");
}

TEST(graphs_of_freed_memory) {
    Context context;
    Stream stream;
    Buffer<float> y(64);
    CUdeviceptr x = 0;
    void* graph = nullptr;
    void* executable = nullptr;
    OK(cuMemAlloc_v2(&x, 256));
    OK(cuStreamBeginCapture_v2(stream.handle, 1));
    OK(copy_kernel(stream.handle, x, y.pointer));
    OK(cuStreamEndCapture(stream.handle, &graph));
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuGraphLaunch(executable, stream.handle));
    OK(cuMemFree_v2(x));
    FAILS(cuGraphLaunch(executable, stream.handle), illegal_address, "argument 0",
          "inside a freed allocation");
    OK(cuGraphExecDestroy(executable));
    OK(cuGraphDestroy(graph));
}

TEST(graphs_fork_and_join) {
    Context context;
    Stream origin, side;
    Event fork, join;
    Buffer<float> x(iota<float>(64)), y(64), z(64);
    for (const bool joined : {true, false}) {
        void* graph = nullptr;
        OK(cuStreamBeginCapture_v2(origin.handle, 1));
        OK(cuEventRecord(fork.handle, origin.handle));
        OK(cuStreamWaitEvent(side.handle, fork.handle, 0));
        OK(copy_kernel(side.handle, x.pointer, y.pointer));
        OK(cuEventRecord(join.handle, side.handle));
        if (joined) OK(cuStreamWaitEvent(origin.handle, join.handle, 0));
        OK(copy_kernel(origin.handle, x.pointer, z.pointer));
        if (!joined) {
            FAILS(cuStreamEndCapture(origin.handle, &graph), capture_unjoined, "does not wait");
            continue;
        }
        OK(cuStreamEndCapture(origin.handle, &graph));
        void* executable = nullptr;
        OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
        OK(cuGraphLaunch(executable, origin.handle));
        CHECK(y.read() == x.read() && z.read() == x.read());
        OK(cuGraphExecDestroy(executable));
        OK(cuGraphDestroy(graph));
    }
    FAILS(cuEventSynchronize(join.handle), captured_event, "recorded during a capture");
}

TEST(graphs_what_a_capture_forbids) {
    Context context;
    Stream stream;
    Event outside;
    void* graph = nullptr;
    CUdeviceptr pointer = 0;
    OK(cuEventRecord(outside.handle, nullptr));
    FAILS(cuStreamBeginCapture_v2(nullptr, 1), capture_unsupported, "default stream");

    OK(cuStreamBeginCapture_v2(stream.handle, 1));
    FAILS(cuStreamSynchronize(stream.handle), capture_unsupported, "waiting for a stream");
    FAILS(cuStreamEndCapture(stream.handle, &graph), capture_invalidated, "waiting for a stream");
    OK(cuStreamBeginCapture_v2(stream.handle, 1));
    FAILS(cuMemAllocAsync(&pointer, 4, stream.handle), capture_unsupported, "allocating memory");
    FAILS(cuStreamEndCapture(stream.handle, &graph), capture_invalidated, "allocating memory");
    OK(cuStreamBeginCapture_v2(stream.handle, 1));
    FAILS(cuStreamWaitEvent(stream.handle, outside.handle, 0), capture_isolation, "outside of the capture");
    FAILS(cuStreamEndCapture(stream.handle, &graph), capture_invalidated, "outside of the capture");
    FAILS(cuStreamEndCapture(stream.handle, &graph), illegal_state, "not being captured");
}

TEST(dependents_must_wait) {
    Context context;
    Stream stream;
    Buffer<float> x(iota<float>(64)), y(64);
    const auto launch = [&](const char* kernel, CUlaunchAttribute attribute, unsigned blocks = 2) {
        return Kernel(kernel).launch_with(attribute, stream.handle, blocks, 64 / blocks, 0, x.pointer, y.pointer, 64);
    };
    const uint64_t before = effnetv2_host_dependent_count();
    for (const char* right : {"right_never_waits", "right_waits_late"}) {
        OK(cuMemsetD8Async(y.pointer, 0, 256, stream.handle));
        OK(launch(right, programmatic()));
        CHECK(y.read() == x.read());
    }
    CHECK_EQUAL(effnetv2_host_dependent_count() - before, uint64_t(2));
    const std::string thread = "block (1,0,0), thread (";
    FAILS(launch("broken_never_waits", programmatic()), launch_failed, "kernel `broken_never_waits`, " + thread,
          "launched as a programmatic dependent, it never waited for its predecessors");
    FAILS(launch("broken_waits_late", programmatic()), launch_failed, "kernel `broken_waits_late`, block (",
          "broken.cu:", "touches device memory before it has waited for its predecessors");
    // A kernel that knows nothing of it.
    FAILS(launch("right_near_write", programmatic(), 1), launch_failed, "never waited");
    // Launched as usual, nobody has to wait.
    for (const char* broken : {"broken_never_waits", "broken_waits_late"}) OK(launch(broken, programmatic(0)));
    OK(launch("right_near_write", programmatic(0), 1));
    CHECK_EQUAL(effnetv2_host_dependent_count() - before, uint64_t(5));
}

TEST(dependents_in_graphs) {
    Context context;
    Stream stream;
    Buffer<float> x(iota<float>(64)), y(64), z(64);
    Kernel right("right_waits_late"), broken("broken_waits_late");
    for (Kernel* second : {&right, &broken}) {
        void* graph = nullptr;
        void* executable = nullptr;
        OK(cuStreamBeginCapture_v2(stream.handle, 1));
        OK(right.launch_with(programmatic(), stream.handle, 1, 64, 0, x.pointer, y.pointer, 64));
        OK(second->launch_with(programmatic(), stream.handle, 1, 64, 0, y.pointer, z.pointer, 64));
        OK(cuStreamEndCapture(stream.handle, &graph));
        OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
        if (second == &right) {
            OK(cuGraphLaunch(executable, stream.handle));
            CHECK(z.read() == x.read());
        } else {
            FAILS(cuGraphLaunch(executable, stream.handle), launch_failed, "before it has waited");
        }
        OK(cuGraphExecDestroy(executable));
        OK(cuGraphDestroy(graph));
    }
}

TEST(launch_attributes_are_checked) {
    Context context;
    Kernel kernel("right_waits_late");
    Buffer<float> x(iota<float>(64)), y(64);
    const auto launch = [&](CUlaunchAttribute attribute) {
        return kernel.launch_with(attribute, nullptr, 1, 64, 0, x.pointer, y.pointer, 64);
    };
    OK(launch({}));
    FAILS(launch(programmatic(2)), invalid_value, "0 or 1, not 2");
    FAILS(launch({4, {}, {}}), not_supported, "launch attribute 4");
    CUlaunchConfig config{1, 1, 1, 64, 1, 1, 0, nullptr, nullptr, 1};
    FAILS(cuLaunchKernelEx(&config, kernel.function, nullptr, nullptr), invalid_value, "1 attributes");
    config.numAttrs = 0;
    FAILS(cuLaunchKernelEx(&config, kernel.function, nullptr, nullptr), invalid_value, "no arguments given");
    FAILS(cuLaunchKernelEx(nullptr, kernel.function, nullptr, nullptr), invalid_value, "null pointer");
    void* extra = nullptr;
    FAILS(cuLaunchKernelEx(&config, kernel.function, nullptr, &extra), not_supported, "not as extra");
}
