#include "shared_memory.hpp"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "launch.hpp"
#include "sanitizer.hpp"
#include "thread.hpp"

namespace host {
namespace {

constexpr int poison = 0xff;
constexpr size_t alignment = 128;
constexpr size_t guard_bytes = 64 << 10;
constexpr size_t mapping_bytes = (max_shared_bytes + guard_bytes - 1) / guard_bytes * guard_bytes;
constexpr bool sanitized = sanitizer::address || sanitizer::thread;

struct Range {
    unsigned char* begin;
    size_t bytes;
};

/// dl_iterate_phdr callback: finds the thread-local block of the object that holds `running_thread_word`.
int find_thread_local_block(dl_phdr_info* object, size_t, void* result) {
    auto* block = static_cast<unsigned char*>(object->dlpi_tls_data);
    const auto* word = static_cast<const unsigned char*>(running_thread_word());
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const auto& header = object->dlpi_phdr[i];
        if (header.p_type != PT_TLS || block == nullptr) continue;
        if (word < block || word >= block + header.p_memsz) continue;
        *static_cast<Range*>(result) = {block, header.p_memsz};
        return 1;
    }
    return 0;
}

Range thread_local_block() {
    Range range{nullptr, 0};
    dl_iterate_phdr(find_thread_local_block, &range);
    return range;
}

/// Fills everything but the runtime's own word.
void poison_static(unsigned char* begin, size_t bytes) {
    const auto* word = static_cast<const unsigned char*>(running_thread_word());
    const size_t before = size_t(word - begin);
    const size_t after = before + sizeof(Thread*);
    memset(begin, poison, before);
    memset(begin + after, poison, bytes - after);
}

} // namespace

SharedMemory::SharedMemory() {
    const Range block = thread_local_block();
    static_.begin = block.begin;
    static_.bytes = block.bytes;
    static_.debts.assign((block.bytes + 3) / 4 + 1, 0);
    dynamic_.debts.assign(max_shared_bytes / 4 + 1, 0);
    marks_.assign(max_shared_bytes / 16 + 1, 0);
    if (sanitized) return;
    void* mapping = mmap(nullptr, mapping_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<unsigned char*>(mapping);
    mprotect(mapping_ + mapping_bytes, guard_bytes, PROT_NONE);
}

SharedMemory::~SharedMemory() {
    if (sanitized)
        free(dynamic_.begin);
    else
        munmap(mapping_, mapping_bytes + guard_bytes);
}

void SharedMemory::renew(size_t dynamic_bytes) {
    forget_debts();
    std::fill_n(marks_.begin(), dynamic_.bytes / 16 + 1, 0u);
    alignment_ = 0;
    dynamic_.bytes = dynamic_bytes;
    if (sanitized) {
        // A new allocation of exactly this size, so that AddressSanitizer knows where it ends.
        free(dynamic_.begin);
        void* begin = nullptr;
        if (dynamic_bytes != 0 && posix_memalign(&begin, alignment, dynamic_bytes) != 0)
            throw std::bad_alloc();
        dynamic_.begin = static_cast<unsigned char*>(begin);
    } else {
        // As close to the guard page as alignment allows, so that running over the end is a fault.
        dynamic_.begin = mapping_ + mapping_bytes - (dynamic_bytes + alignment - 1) / alignment * alignment;
    }
    if (dynamic_bytes != 0) memset(dynamic_.begin, poison, dynamic_bytes);
    if (static_.begin != nullptr) poison_static(static_.begin, static_.bytes);
}

bool SharedMemory::Window::contains(const void* address, size_t size) const {
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= begin && at + size <= begin + bytes;
}

unsigned char* SharedMemory::dynamic(unsigned alignment) {
    alignment_ = std::max(alignment_, alignment);
    return dynamic_.begin;
}

void SharedMemory::mark(const void* address, size_t bytes, uint32_t value) {
    if (!dynamic_.contains(address, bytes)) return;
    for (size_t i = offset(address) / 16; i <= (offset(address) + bytes - 1) / 16; ++i) marks_[i] = value;
}

uint32_t SharedMemory::mark_of(const void* address) const {
    return dynamic_.contains(address, 1) ? marks_[offset(address) / 16] : 0;
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
    return dynamic_.contains(address, bytes) || static_.contains(address, bytes);
}

bool SharedMemory::overrun(const void* address) const {
    const auto* at = static_cast<const unsigned char*>(address);
    return mapping_ != nullptr && at >= mapping_ + mapping_bytes &&
           at < mapping_ + mapping_bytes + guard_bytes;
}

SharedMemory::Window* SharedMemory::window(const void* address, size_t bytes) {
    if (dynamic_.contains(address, bytes)) return &dynamic_;
    if (static_.contains(address, bytes)) return &static_;
    return nullptr;
}

void SharedMemory::owe(const void* address, size_t bytes, unsigned debtor) {
    Window* window = this->window(address, bytes);
    const size_t first = size_t(static_cast<const unsigned char*>(address) - window->begin) / 4;
    for (size_t i = first; i < first + bytes / 4; ++i) {
        owed_ += window->debts[i] == 0;
        window->debts[i] = uint16_t(debtor + 1);
    }
    sanitizer::forbid(address, bytes);
}

void SharedMemory::settle(const void* address, size_t bytes) {
    sanitizer::allow(address, bytes);
    Window* window = this->window(address, bytes);
    const size_t first = size_t(static_cast<const unsigned char*>(address) - window->begin) / 4;
    for (size_t i = first; i < first + bytes / 4; ++i) {
        owed_ -= window->debts[i] != 0;
        window->debts[i] = 0;
    }
}

int SharedMemory::find_debtor(const void* address, size_t bytes) const {
    for (const Window* window : {&dynamic_, &static_}) {
        if (!window->contains(address, bytes)) continue;
        const size_t offset = size_t(static_cast<const unsigned char*>(address) - window->begin);
        for (size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i)
            if (window->debts[i] != 0) return window->debts[i] - 1;
    }
    return -1;
}

void SharedMemory::forget_debts() {
    if (owed_ == 0) return;
    for (Window* window : {&dynamic_, &static_}) {
        sanitizer::allow(window->begin, window->bytes);
        std::fill(window->debts.begin(), window->debts.end(), uint16_t(0));
    }
    owed_ = 0;
}

} // namespace host
