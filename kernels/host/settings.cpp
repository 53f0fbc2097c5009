#include "settings.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "sanitizer.hpp"

namespace host {
namespace {

uint64_t number(const char* variable, uint64_t otherwise) {
    const char* value = getenv(variable);
    return value && *value ? strtoull(value, nullptr, 0) : otherwise;
}

uint64_t machine_memory() { return uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGE_SIZE)); }

/// Two blocks at a time under ThreadSanitizer: its fibers are costly, and two already show races between
/// blocks.
unsigned default_threads() {
    return sanitizer::thread ? 2 : std::max(1u, std::thread::hardware_concurrency());
}

} // namespace

Settings& settings() {
    static auto& instance = *new Settings{
        {number("EFFNETV2_HOST_SEED", 1)},
        {std::max(1u, unsigned(number("EFFNETV2_HOST_THREADS", default_threads())))},
        {number("EFFNETV2_HOST_DEFER", 0) != 0},
        {number("EFFNETV2_HOST_PRINT", 0) != 0},
        {number("EFFNETV2_HOST_MEMORY", machine_memory())},
    };
    return instance;
}

} // namespace host
