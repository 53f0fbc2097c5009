// Atomic operations, relaxed as on the device: they order nothing but themselves.
#pragma once

#include <cstdint>

#include "bits.hpp"

namespace host {

/// Replaces `*address` by `update(old)` in one step and returns the old value.
template <class Bits, class T, class Update> T atomic_update(T* address, Update update) {
    static_assert(sizeof(Bits) == sizeof(T));
    auto* cell = reinterpret_cast<Bits*>(address);
    Bits old = __atomic_load_n(cell, __ATOMIC_RELAXED);
    for (;;) {
        const Bits wanted = bit_cast<Bits>(update(bit_cast<T>(old)));
        if (__atomic_compare_exchange_n(cell, &old, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return bit_cast<T>(old);
    }
}

} // namespace host

#define HOST_INTEGER_ATOMICS(T, Bits)                                                                        \
    inline T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); } \
    inline T atomicAnd(T* address, T value) { return __atomic_fetch_and(address, value, __ATOMIC_RELAXED); } \
    inline T atomicOr(T* address, T value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }   \
    inline T atomicXor(T* address, T value) { return __atomic_fetch_xor(address, value, __ATOMIC_RELAXED); } \
    inline T atomicExch(T* address, T value) {                                                               \
        return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);                                        \
    }                                                                                                        \
    inline T atomicCAS(T* address, T expected, T value) {                                                    \
        __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);   \
        return expected;                                                                                     \
    }                                                                                                        \
    inline T atomicMin(T* address, T value) {                                                                \
        return host::atomic_update<Bits>(address, [=](T old) { return value < old ? value : old; });         \
    }                                                                                                        \
    inline T atomicMax(T* address, T value) {                                                                \
        return host::atomic_update<Bits>(address, [=](T old) { return old < value ? value : old; });         \
    }

HOST_INTEGER_ATOMICS(int, uint32_t)
HOST_INTEGER_ATOMICS(unsigned, uint32_t)
HOST_INTEGER_ATOMICS(unsigned long long, uint64_t)

#undef HOST_INTEGER_ATOMICS

inline int atomicSub(int* address, int value) { return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicSub(unsigned* address, unsigned value) {
    return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED);
}

/// Counts up to `limit`, then starts again at zero.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
    return host::atomic_update<uint32_t>(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

/// Counts down, and from zero or above `limit` goes to `limit`.
inline unsigned atomicDec(unsigned* address, unsigned limit) {
    return host::atomic_update<uint32_t>(
        address, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

inline float atomicAdd(float* address, float value) {
    return host::atomic_update<uint32_t>(address, [=](float old) { return old + value; });
}
inline double atomicAdd(double* address, double value) {
    return host::atomic_update<uint64_t>(address, [=](double old) { return old + value; });
}
inline float atomicExch(float* address, float value) {
    return host::atomic_update<uint32_t>(address, [=](float) { return value; });
}
