#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "sanitizer.hpp"
#include "settings.hpp"

namespace host {
namespace {

constexpr int poison = 0xff;
constexpr size_t alignment = 256;
constexpr size_t freed_kept = 4096;
/// Inaccessible addresses behind every allocation: an index that goes astray rarely strays further.
constexpr size_t guard_bytes = 16 << 20;
constexpr bool sanitized = sanitizer::address || sanitizer::thread;

size_t page_bytes() {
    static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

const char* kind_name(MemoryKind kind) { return kind == MemoryKind::device ? "device" : "pinned host"; }

/// The bytes between the start of the mapping and the allocation, and between its end and the guard.
bool margins_intact(const char* mapping, const char* begin, size_t bytes, const char* guard) {
    for (const char* p = mapping; p < begin; ++p)
        if (static_cast<unsigned char>(*p) != poison) return false;
    for (const char* p = begin + bytes; p < guard; ++p)
        if (static_cast<unsigned char>(*p) != poison) return false;
    return true;
}

} // namespace

Status Memory::allocate(size_t bytes, MemoryKind kind, void** result) {
    if (bytes == 0)
        return failure(Code::invalid_value, "allocation of 0 bytes of %s memory", kind_name(kind));
    std::lock_guard lock(mutex_);
    if (kind == MemoryKind::device &&
        bytes > settings().memory - std::min<size_t>(settings().memory, device_bytes_))
        return failure(Code::out_of_memory, "out of device memory: %zu bytes asked for, %zu of %zu in use",
                       bytes, device_bytes_, size_t(settings().memory));
    Allocation allocation{bytes, kind, ++serial_, nullptr, 0};
    char* begin = nullptr;
    if (sanitized) {
        void* block = nullptr;
        if (posix_memalign(&block, alignment, bytes) == 0) begin = static_cast<char*>(block);
    } else {
        const size_t usable = round_up(bytes, page_bytes());
        allocation.mapping_bytes = usable + guard_bytes;
        void* mapping = mmap(nullptr, allocation.mapping_bytes, PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping != MAP_FAILED && mprotect(mapping, usable, PROT_READ | PROT_WRITE) == 0) {
            allocation.mapping = static_cast<char*>(mapping);
            memset(allocation.mapping, poison, usable);
            begin = allocation.mapping + usable - round_up(bytes, alignment);
        }
    }
    if (begin == nullptr)
        return failure(Code::out_of_memory, "the machine has no memory for %zu bytes of %s memory", bytes,
                       kind_name(kind));
    if (sanitized) memset(begin, poison, bytes);
    if (kind == MemoryKind::device) device_bytes_ += bytes;
    live_.emplace(reinterpret_cast<uintptr_t>(begin), allocation);
    *result = begin;
    return success();
}

Status Memory::release(void* address, MemoryKind kind) {
    std::lock_guard lock(mutex_);
    const auto found = live_.find(reinterpret_cast<uintptr_t>(address));
    if (found == live_.end()) {
        const Freed* freed = freed_at(reinterpret_cast<uintptr_t>(address));
        if (freed != nullptr && freed->address == reinterpret_cast<uintptr_t>(address))
            return failure(Code::invalid_value, "the %zu-byte allocation at %p is freed twice",
                           freed->allocation.bytes, address);
        return failure(Code::invalid_value, "%p is not the start of an allocation, so it cannot be freed",
                       address);
    }
    if (found->second.kind != kind)
        return failure(Code::invalid_value, "%p is %s memory and cannot be freed as %s memory", address,
                       kind_name(found->second.kind), kind_name(kind));
    const Allocation allocation = found->second;
    live_.erase(found);
    if (kind == MemoryKind::device) device_bytes_ -= allocation.bytes;
    const char* begin = static_cast<const char*>(address);
    const bool intact =
        sanitized || margins_intact(allocation.mapping, begin, allocation.bytes,
                                    allocation.mapping + allocation.mapping_bytes - guard_bytes);
    retire(reinterpret_cast<uintptr_t>(address), allocation);
    if (!intact)
        return failure(
            Code::illegal_address,
            "a kernel wrote just before or behind allocation %llu (%zu bytes at %p): seen as it was freed",
            static_cast<unsigned long long>(allocation.serial), allocation.bytes, address);
    return success();
}

void Memory::retire(uintptr_t address, const Allocation& allocation) {
    freed_.push_back({address, allocation});
    if (sanitized) {
        free(reinterpret_cast<void*>(address));
    } else {
        // A fresh inaccessible mapping in its place gives the memory back and keeps the addresses.
        mmap(allocation.mapping, allocation.mapping_bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    }
    if (freed_.size() <= freed_kept) return;
    if (!sanitized) munmap(freed_.front().allocation.mapping, freed_.front().allocation.mapping_bytes);
    freed_.pop_front();
}

Memory::Table::const_iterator Memory::at_or_before(uintptr_t address) const {
    auto next = live_.upper_bound(address);
    return next == live_.begin() ? live_.end() : std::prev(next);
}

const Memory::Freed* Memory::freed_at(uintptr_t address) const {
    for (auto freed = freed_.rbegin(); freed != freed_.rend(); ++freed)
        if (address >= freed->address && address < freed->address + freed->allocation.bytes) return &*freed;
    return nullptr;
}

Status Memory::check(const char* what, const void* address, size_t bytes, MemoryKind kind) const {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    {
        std::lock_guard lock(mutex_);
        const auto found = at_or_before(begin);
        if (found != live_.end()) {
            const Allocation& allocation = found->second;
            const bool inside = begin - found->first <= allocation.bytes &&
                                bytes <= allocation.bytes - (begin - found->first);
            if (inside && (allocation.kind == kind || kind == MemoryKind::device)) return success();
        }
    }
    return failure(Code::invalid_value, "%s: [%p, +%zu bytes) is not %s memory: it starts %s", what, address,
                   bytes, kind_name(kind), describe(address).c_str());
}

Status Memory::check_argument(const void* address) const {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    {
        std::lock_guard lock(mutex_);
        const auto found = at_or_before(begin);
        const size_t offset = found == live_.end() ? 0 : begin - found->first;
        const bool inside = found != live_.end() && offset < found->second.bytes;
        const bool just_behind = found != live_.end() && offset == found->second.bytes;
        if (inside || (just_behind && freed_at(begin) == nullptr)) return success();
    }
    return failure(Code::illegal_address, "%p is %s", address, describe(address).c_str());
}

std::string Memory::describe(const void* address) const {
    if (address == nullptr) return "a null pointer";
    std::lock_guard lock(mutex_);
    const auto at = reinterpret_cast<uintptr_t>(address);
    const auto found = at_or_before(at);
    const size_t offset = found == live_.end() ? 0 : at - found->first;
    const bool inside = found != live_.end() && offset < found->second.bytes;
    const Freed* freed = inside ? nullptr : freed_at(at);
    if (freed != nullptr) return text("inside a freed allocation of %zu bytes", freed->allocation.bytes);
    // Beyond its guard an allocation is no longer a plausible explanation.
    if (found == live_.end() || (!inside && offset - found->second.bytes > guard_bytes))
        return "in no allocation of this device";
    const Allocation& allocation = found->second;
    return text("%zu bytes %s the %zu-byte %s allocation at %p (allocation %llu)",
                inside ? offset : offset - allocation.bytes, inside ? "into" : "past the end of",
                allocation.bytes, kind_name(allocation.kind), reinterpret_cast<void*>(found->first),
                static_cast<unsigned long long>(allocation.serial));
}

bool Memory::is_pinned(const void* address) const {
    std::lock_guard lock(mutex_);
    const auto at = reinterpret_cast<uintptr_t>(address);
    const auto found = at_or_before(at);
    return found != live_.end() && found->second.kind == MemoryKind::pinned &&
           at - found->first < found->second.bytes;
}

size_t Memory::device_bytes() const {
    std::lock_guard lock(mutex_);
    return device_bytes_;
}

std::string Memory::leaks() const {
    std::lock_guard lock(mutex_);
    size_t count = 0;
    std::string list;
    for (const auto& [address, allocation] : live_) {
        if (allocation.kind != MemoryKind::device) continue;
        if (++count <= 4)
            list +=
                text("%s%zu bytes at %p (allocation %llu)", count > 1 ? ", " : "", allocation.bytes,
                     reinterpret_cast<void*>(address), static_cast<unsigned long long>(allocation.serial));
    }
    if (count == 0) return "";
    return text("%zu device allocations (%zu bytes) still live: %s%s", count, device_bytes_, list.c_str(),
                count > 4 ? ", ..." : "");
}

Memory& device_memory() {
    static auto& instance = *new Memory;
    return instance;
}

} // namespace host
