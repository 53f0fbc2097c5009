// Barriers, shuffles, votes and reductions, under their CUDA names.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block.hpp"
#include "collective.hpp"
#include "sanitizer.hpp"
#include "source_line.hpp"
#include "thread.hpp"

namespace host {

/// A shuffle's lane: its value as bits, and the lane whose value it gets.
struct ShuffleOperands {
    uint64_t value;
    unsigned source;
    uint64_t result;
};

/// A vote, match or reduction of one 32- or 64-bit value per lane.
struct VoteOperands {
    uint64_t value;
    uint64_t result;
};

extern const Collective shfl_sync, shfl_up_sync, shfl_down_sync, shfl_xor_sync;
extern const Collective syncwarp, ballot_sync, match_any_sync;
extern const Collective reduce_add_sync, reduce_and_sync, reduce_or_sync, reduce_xor_sync;
extern const Collective reduce_min_sync, reduce_max_sync, reduce_min_sync_signed, reduce_max_sync_signed;

/// Fails unless `width` is a power of two up to 32.
void check_width(const Collective& shuffle, int width, SourceLine at);

inline uint64_t vote(const Collective& collective, uint32_t mask, uint64_t value, SourceLine at) {
    VoteOperands operands{value, 0};
    meet(collective, mask, &operands, at);
    return operands.result;
}

template <class T>
T shuffle(const Collective& collective, uint32_t mask, T value, unsigned source, SourceLine at) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves at most 64 bits");
    ShuffleOperands operands{0, source, 0};
    __builtin_memcpy(&operands.value, &value, sizeof value);
    meet(collective, mask, &operands, at);
    __builtin_memcpy(&value, &operands.result, sizeof value);
    return value;
}

/// Tags through which `__threadfence` orders memory for ThreadSanitizer.
void fence_block();
void fence_device();

} // namespace host

#define HOST_AT host::SourceLine at = host::SourceLine::here()

inline void __syncthreads(HOST_AT) { host::this_thread().block.sync_all(false, "__syncthreads", at); }

inline int __syncthreads_count(int predicate, HOST_AT) {
    return int(host::this_thread().block.sync_all(predicate != 0, "__syncthreads_count", at));
}

inline int __syncthreads_and(int predicate, HOST_AT) {
    host::Block& block = host::this_thread().block;
    return block.sync_all(predicate != 0, "__syncthreads_and", at) == block.size();
}

inline int __syncthreads_or(int predicate, HOST_AT) {
    return host::this_thread().block.sync_all(predicate != 0, "__syncthreads_or", at) != 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, HOST_AT) { host::vote(host::syncwarp, mask, 0, at); }

inline void __threadfence_block() { host::fence_block(); }
inline void __threadfence() { host::fence_device(); }
inline void __threadfence_system() { host::fence_device(); }

/// Lets the other threads of the block run.
inline void __nanosleep(unsigned) { host::this_thread().fiber.suspend(); }

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_AT) {
    host::check_width(host::shfl_sync, width, at);
    const unsigned segment = host::this_thread().lane() & ~unsigned(width - 1);
    return host::shuffle(host::shfl_sync, mask, value, segment | (unsigned(source) & unsigned(width - 1)),
                         at);
}

template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, HOST_AT) {
    host::check_width(host::shfl_up_sync, width, at);
    const unsigned lane = host::this_thread().lane();
    const bool inside = (lane & unsigned(width - 1)) >= delta;
    return host::shuffle(host::shfl_up_sync, mask, value, inside ? lane - delta : lane, at);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, HOST_AT) {
    host::check_width(host::shfl_down_sync, width, at);
    const unsigned lane = host::this_thread().lane();
    const bool inside = (lane & unsigned(width - 1)) + delta < unsigned(width);
    return host::shuffle(host::shfl_down_sync, mask, value, inside ? lane + delta : lane, at);
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, HOST_AT) {
    host::check_width(host::shfl_xor_sync, width, at);
    const unsigned lane = host::this_thread().lane();
    const unsigned source = lane ^ unsigned(lane_mask);
    // A lane of a later segment cannot be read; one of an earlier segment can.
    const bool inside = source <= (lane | unsigned(width - 1));
    return host::shuffle(host::shfl_xor_sync, mask, value, inside ? source : lane, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_AT) {
    return unsigned(host::vote(host::ballot_sync, mask, predicate != 0, at));
}

inline int __any_sync(unsigned mask, int predicate, HOST_AT) {
    return __ballot_sync(mask, predicate, at) != 0;
}

inline int __all_sync(unsigned mask, int predicate, HOST_AT) {
    return __ballot_sync(mask, !predicate, at) == 0;
}

/// CUDA promises no more than that the caller itself is active; so no more is said here.
inline unsigned __activemask() { return 1u << host::this_thread().lane(); }

template <class T> unsigned __match_any_sync(unsigned mask, T value, HOST_AT) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    return unsigned(host::vote(host::match_any_sync, mask, bits, at));
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, HOST_AT) {
    return unsigned(host::vote(host::reduce_add_sync, mask, value, at));
}
inline int __reduce_add_sync(unsigned mask, int value, HOST_AT) {
    return int(host::vote(host::reduce_add_sync, mask, unsigned(value), at));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, HOST_AT) {
    return unsigned(host::vote(host::reduce_min_sync, mask, value, at));
}
inline int __reduce_min_sync(unsigned mask, int value, HOST_AT) {
    return int(host::vote(host::reduce_min_sync_signed, mask, unsigned(value), at));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, HOST_AT) {
    return unsigned(host::vote(host::reduce_max_sync, mask, value, at));
}
inline int __reduce_max_sync(unsigned mask, int value, HOST_AT) {
    return int(host::vote(host::reduce_max_sync_signed, mask, unsigned(value), at));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, HOST_AT) {
    return unsigned(host::vote(host::reduce_and_sync, mask, value, at));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, HOST_AT) {
    return unsigned(host::vote(host::reduce_or_sync, mask, value, at));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, HOST_AT) {
    return unsigned(host::vote(host::reduce_xor_sync, mask, value, at));
}

#undef HOST_AT
