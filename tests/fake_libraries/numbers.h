// Numbers of the types that the fake libraries are tested with, as floats.
#pragma once
#include <cstdint>
#include <cstring>

// Codes as cuBLASLt has them; cuDNN's are translated to these.
enum Type { F32 = 0, BF16 = 14 };

inline float load(const void* data, size_t index, int type) {
    if (type == F32) return static_cast<const float*>(data)[index];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(void* data, size_t index, int type, float value) {
    if (type == F32) {
        static_cast<float*>(data)[index] = value;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits >> 16);
}

// The 10 bits of a fraction that tf32 has, to nearest.
inline float to_tf32(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x1000) & 0xffffe000u;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
