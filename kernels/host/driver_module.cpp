// Driver API: modules, functions, launches, occupancy.
//
// The kernels are compiled into this library, so a module's image only says which of them it stands for. A
// fat binary or cubin stands for all of them. An image that begins with `image_marker`, followed by the name
// of a family (a .cu file's stem) and a NUL byte, stands for that file's kernels alone.

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "device_attributes.hpp"
#include "driver.hpp"
#include "kernel.hpp"
#include "launch.hpp"
#include "memory.hpp"
#include "settings.hpp"
#include "stream.hpp"

using namespace host;

namespace {

constexpr char image_marker[] = "effnetv2 host kernels: ";
constexpr uint32_t fatbin_magic = 0xba55ed50;
constexpr uint32_t elf_magic = 0x464c457f;

enum FunctionAttribute {
    max_threads_per_block = 0,
    static_shared_bytes = 1,
    constant_bytes = 2,
    local_bytes = 3,
    registers = 4,
    ptx_version = 5,
    binary_version = 6,
    max_dynamic_shared = 8,
};

struct Module {
    /// Only kernels of this family; all of them if empty.
    std::string family;
};

struct Function {
    const Module* module;
    const Kernel* kernel;
    size_t max_dynamic_shared = default_shared_bytes;
};

Handles<Module>& modules() {
    static auto& instance = *new Handles<Module>("module");
    return instance;
}

Handles<Function>& functions() {
    static auto& instance = *new Handles<Function>("function");
    return instance;
}

std::string families() {
    std::vector<std::string> names;
    for (const Kernel& kernel : kernels()) names.push_back(kernel.family);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    std::string list;
    for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
    return list.empty() ? "none" : list;
}

Status family_of_image(const void* image, std::string* family) {
    if (image == nullptr) return failure(Code::invalid_value, "a module needs an image, not a null pointer");
    if (strncmp(static_cast<const char*>(image), image_marker, sizeof image_marker - 1) == 0) {
        *family = static_cast<const char*>(image) + sizeof image_marker - 1;
        for (const Kernel& kernel : kernels())
            if (kernel.family == *family) return success();
        return failure(Code::invalid_image, "no kernels of a file `%s.cu` in this library; it has: %s",
                       family->c_str(), families().c_str());
    }
    uint32_t magic = 0;
    memcpy(&magic, image, sizeof magic);
    if (magic == fatbin_magic || magic == elf_magic) return success();
    return failure(Code::invalid_image,
                   "the module's image is neither a fat binary, nor a cubin, nor \"%s<family>\"",
                   image_marker);
}

/// Copies of a launch's arguments: CUDA, too, reads them when the launch is issued.
class Arguments {
  public:
    Arguments(const Kernel& kernel, void** values) {
        for (const Parameter& parameter : kernel.parameters) {
            void* copy = ::operator new(parameter.size, std::align_val_t(parameter.alignment));
            memcpy(copy, values[pointers_.size()], parameter.size);
            alignments_.push_back(std::align_val_t(parameter.alignment));
            pointers_.push_back(copy);
        }
    }
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;
    ~Arguments() {
        for (size_t i = 0; i < pointers_.size(); ++i) ::operator delete(pointers_[i], alignments_[i]);
    }

    void** pointers() { return pointers_.data(); }

  private:
    std::vector<void*> pointers_;
    std::vector<std::align_val_t> alignments_;
};

/// Every pointer handed to a kernel must point into live memory, whether the kernel follows it or not.
Status check_pointers(const Kernel& kernel, void** arguments) {
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
        if (!kernel.parameters[i].is_pointer) continue;
        const void* pointer = *static_cast<void**>(arguments[i]);
        if (pointer == nullptr) continue;
        Status status = device_memory().check_argument(pointer);
        if (!status.ok())
            return failure(status.code, "kernel `%s`, argument %zu (of \"%s\"): %s", kernel.name.c_str(), i,
                           kernel.signature.c_str(), status.message.c_str());
    }
    return success();
}

Status check_shape(const Function& function, dim3 grid, dim3 block, size_t shared) {
    const char* name = function.kernel->name.c_str();
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > max_block_threads || block.z > 64)
        return failure(Code::invalid_value,
                       "kernel `%s`: a block of (%u,%u,%u) threads; 1 to %u are possible, z to 64", name,
                       block.x, block.y, block.z, max_block_threads);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return failure(Code::invalid_value,
                       "kernel `%s`: a grid of (%u,%u,%u) blocks; at least 1 each, y and z at most 65535",
                       name, grid.x, grid.y, grid.z);
    if (shared > function.max_dynamic_shared)
        return failure(
            Code::invalid_value,
            "kernel `%s`: %zu bytes of dynamic shared memory, but only %zu are allowed until the function's "
            "MAX_DYNAMIC_SHARED_SIZE_BYTES is raised",
            name, shared, function.max_dynamic_shared);
    return success();
}

/// CUlaunchAttribute, of whose values only one is known here.
struct LaunchAttribute {
    unsigned id;
    char padding[4];
    union {
        char bytes[64];
        int programmatic_stream_serialization;
        void* aligned;
    } value;
};

constexpr unsigned attribute_ignore = 0, attribute_programmatic_stream_serialization = 6;

/// CUlaunchConfig.
struct LaunchConfiguration {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};

/// Whether the attributes make the launch a programmatic dependent of the one before it.
Status read_attributes(const LaunchConfiguration& configuration, bool* dependent) {
    *dependent = false;
    if (configuration.attribute_count != 0 && configuration.attributes == nullptr)
        return failure(Code::invalid_value, "cuLaunchKernelEx: %u attributes at a null pointer",
                       configuration.attribute_count);
    for (unsigned i = 0; i < configuration.attribute_count; ++i) {
        const LaunchAttribute& attribute = configuration.attributes[i];
        if (attribute.id == attribute_ignore) continue;
        if (attribute.id != attribute_programmatic_stream_serialization)
            return failure(Code::not_supported,
                           "cuLaunchKernelEx: the host device does not know the launch attribute %u",
                           attribute.id);
        const int value = attribute.value.programmatic_stream_serialization;
        if (value != 0 && value != 1)
            return failure(Code::invalid_value,
                           "cuLaunchKernelEx: programmatic stream serialization is 0 or 1, not %d", value);
        *dependent = value == 1;
    }
    return success();
}

Status launch(void* handle, dim3 grid, dim3 block, size_t shared, void* stream_handle, void** values,
              bool dependent) {
    Function* function = nullptr;
    Stream* stream = nullptr;
    Status status = functions().find(handle, &function);
    if (status.ok()) status = find_stream(stream_handle, &stream);
    if (status.ok()) status = check_shape(*function, grid, block, shared);
    if (!status.ok()) return status;
    const Kernel& kernel = *function->kernel;
    if (values == nullptr && !kernel.parameters.empty())
        return failure(Code::invalid_value, "kernel `%s`: no arguments given for \"%s\"", kernel.name.c_str(),
                       kernel.signature.c_str());
    auto arguments = std::make_shared<Arguments>(kernel, values);
    return stream->submit(
        {kernel.name, [=, &kernel] {
             Status checked = check_pointers(kernel, arguments->pointers());
             if (!checked.ok()) return checked;
             return run(Launch{&kernel, arguments->pointers(), grid, block, shared, settings().seed, dependent});
         }});
}

Status function_attribute(const Function& function, int attribute, int* value) {
    switch (attribute) {
    case max_threads_per_block:
        *value = max_block_threads;
        return success();
    case max_dynamic_shared:
        *value = int(function.max_dynamic_shared);
        return success();
    case ptx_version:
    case binary_version:
        *value = 80;
        return success();
    default:
        *value = 0;
        return success(); // registers and local memory mean nothing here
    }
}

int resident_blocks(int block_threads, size_t dynamic_shared) {
    if (block_threads <= 0 || block_threads > int(max_block_threads)) return 0;
    const int warps = (block_threads + int(warp_size) - 1) / int(warp_size);
    const int by_threads = threads_per_multiprocessor / (warps * int(warp_size));
    const int reserved = device_attribute(111);
    const int by_shared = int(size_t(device_attribute(81)) / (dynamic_shared + size_t(reserved)));
    return std::min({by_threads, by_shared, blocks_per_multiprocessor});
}

} // namespace

HOST_API int cuModuleLoadData(void** module, const void* image) {
    ApiLock lock;
    std::string family;
    Status status = family_of_image(image, &family);
    if (!status.ok()) return report(status);
    return report(store(module, static_cast<void*>(modules().add(std::make_unique<Module>(Module{family})))));
}

HOST_API int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

HOST_API int cuModuleLoadFatBinary(void** module, const void* image) {
    return cuModuleLoadData(module, image);
}

HOST_API int cuModuleLoad(void** module, const char* path) {
    ApiLock lock;
    std::ifstream file(path, std::ios::binary);
    if (!file) return report(failure(Code::file_not_found, "%s: cannot be read", path));
    std::string image{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    image.append(sizeof(uint32_t), '\0');
    return cuModuleLoadData(module, image.data());
}

HOST_API int cuModuleUnload(void* handle) {
    ApiLock lock;
    functions().remove_if([handle](const Function& function) { return function.module == handle; });
    return report(modules().remove(handle));
}

HOST_API int cuModuleGetFunction(void** result, void* handle, const char* name) {
    ApiLock lock;
    Module* module = nullptr;
    Status status = modules().find(handle, &module);
    if (!status.ok()) return report(status);
    const Kernel* kernel = find_kernel(name);
    if (kernel == nullptr || (!module->family.empty() && kernel->family != module->family))
        return report(failure(Code::not_found,
                              "no kernel `%s` in %s%s; is EFFNETV2_KERNEL(%s) at the end of its file?", name,
                              module->family.empty() ? "this library" : module->family.c_str(),
                              module->family.empty() ? "" : ".cu", name));
    Function* known = nullptr;
    functions().for_each([&](Function& function) {
        if (function.module == module && function.kernel == kernel) known = &function;
    });
    if (known == nullptr) known = functions().add(std::make_unique<Function>(Function{module, kernel}));
    return report(store(result, static_cast<void*>(known)));
}

HOST_API int cuModuleGetGlobal_v2(DevicePointer*, size_t*, void*, const char* name) {
    return report(failure(Code::not_found, "the host device has no module-level variable `%s`", name));
}

HOST_API int cuFuncGetName(const char** name, void* handle) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    return report(status.ok() ? store(name, function->kernel->name.c_str()) : status);
}

HOST_API int cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* size) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    if (!status.ok()) return report(status);
    const std::vector<Parameter>& parameters = function->kernel->parameters;
    if (index >= parameters.size())
        return report(failure(Code::invalid_value, "kernel `%s` has %zu parameters, \"%s\"",
                              function->kernel->name.c_str(), parameters.size(),
                              function->kernel->signature.c_str()));
    status = store(offset, parameters[index].offset);
    if (status.ok() && size != nullptr) *size = parameters[index].size;
    return report(status);
}

HOST_API int cuFuncGetParamCount(void* handle, size_t* count) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    return report(status.ok() ? store(count, function->kernel->parameters.size()) : status);
}

HOST_API int cuFuncGetAttribute(int* value, int attribute, void* handle) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    return report(status.ok() ? function_attribute(*function, attribute, value) : status);
}

HOST_API int cuFuncSetAttribute(void* handle, int attribute, int value) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    if (!status.ok() || attribute != max_dynamic_shared) return report(status);
    if (value < 0 || size_t(value) > max_shared_bytes)
        return report(failure(Code::invalid_value,
                              "kernel `%s`: %d bytes of dynamic shared memory; at most %zu exist",
                              function->kernel->name.c_str(), value, max_shared_bytes));
    function->max_dynamic_shared = size_t(value);
    return report(success());
}

HOST_API int cuFuncSetCacheConfig(void* handle, int) {
    ApiLock lock;
    Function* function = nullptr;
    return report(functions().find(handle, &function));
}

HOST_API int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                            void* stream, void** arguments, void** extra) {
    ApiLock lock;
    if (extra != nullptr)
        return report(
            failure(Code::not_supported, "cuLaunchKernel: pass arguments as kernelParams, not as extra"));
    return report(launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream,
                         arguments, false));
}

HOST_API int cuLaunchKernelEx(const LaunchConfiguration* configuration, void* function, void** arguments,
                              void** extra) {
    ApiLock lock;
    if (configuration == nullptr)
        return report(failure(Code::invalid_value, "cuLaunchKernelEx: a null pointer for the configuration"));
    if (extra != nullptr)
        return report(
            failure(Code::not_supported, "cuLaunchKernelEx: pass arguments as kernelParams, not as extra"));
    const auto& [grid_x, grid_y, grid_z] = configuration->grid;
    const auto& [block_x, block_y, block_z] = configuration->block;
    bool dependent = false;
    Status status = read_attributes(*configuration, &dependent);
    if (status.ok())
        status = launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, configuration->shared,
                        configuration->stream, arguments, dependent);
    return report(status);
}

HOST_API int cuLaunchCooperativeKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                       unsigned, void*, void**) {
    return report(
        failure(Code::not_supported, "the host device runs blocks one after another: no grid-wide barrier"));
}

HOST_API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int block_threads,
                                                         size_t dynamic_shared) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    return report(status.ok() ? store(blocks, resident_blocks(block_threads, dynamic_shared)) : status);
}

HOST_API int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle,
                                                                  int block_threads, size_t dynamic_shared,
                                                                  unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, handle, block_threads, dynamic_shared);
}

HOST_API int cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, void* handle, int blocks, int) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    if (status.ok() && blocks <= 0) status = failure(Code::invalid_value, "occupancy of %d blocks", blocks);
    if (!status.ok()) return report(status);
    const size_t share = size_t(device_attribute(81)) / size_t(blocks) - size_t(device_attribute(111));
    return report(store(bytes, std::min(share, max_shared_bytes)));
}

/// The largest block not above the limit, as nothing here makes a smaller one better.
HOST_API int cuOccupancyMaxPotentialBlockSize(int* grid, int* block, void* handle,
                                              size_t (*shared_of_block)(int), size_t dynamic_shared,
                                              int limit) {
    ApiLock lock;
    Function* function = nullptr;
    Status status = functions().find(handle, &function);
    const int threads = limit > 0 && limit < int(max_block_threads) ? limit : int(max_block_threads);
    const size_t shared = shared_of_block != nullptr ? shared_of_block(threads) : dynamic_shared;
    if (status.ok()) status = store(block, threads);
    return report(status.ok() ? store(grid, multiprocessors * resident_blocks(threads, shared)) : status);
}

HOST_API int cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, void* handle,
                                                       size_t (*shared_of_block)(int), size_t dynamic_shared,
                                                       int limit, unsigned) {
    return cuOccupancyMaxPotentialBlockSize(grid, block, handle, shared_of_block, dynamic_shared, limit);
}
