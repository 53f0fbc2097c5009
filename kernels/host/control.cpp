#include "control.h"

#include <algorithm>

#include "driver.hpp"
#include "kernel.hpp"
#include "launch.hpp"
#include "settings.hpp"

using namespace host;

HOST_API const char* effnetv2_host_last_error() { return last_error_message(); }

HOST_API void effnetv2_host_set_seed(uint64_t seed) { settings().seed = seed; }

HOST_API void effnetv2_host_set_threads(unsigned threads) { settings().threads = std::max(1u, threads); }

HOST_API void effnetv2_host_set_deferred(int deferred) { settings().defer = deferred != 0; }

HOST_API uint64_t effnetv2_host_dependent_count() { return dependent_launches(); }

HOST_API size_t effnetv2_host_kernel_count() { return kernels().size(); }

HOST_API const char* effnetv2_host_kernel_name(size_t index) {
    return index < kernels().size() ? kernels()[index].name.c_str() : nullptr;
}

HOST_API const char* effnetv2_host_kernel_family(size_t index) {
    return index < kernels().size() ? kernels()[index].family.c_str() : nullptr;
}

HOST_API const char* effnetv2_host_kernel_signature(const char* name) {
    const Kernel* kernel = find_kernel(name);
    return kernel ? kernel->signature.c_str() : nullptr;
}
