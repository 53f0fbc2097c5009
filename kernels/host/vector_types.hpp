// CUDA's built-in vector types, with CUDA's alignment: a misplaced 16-byte access is one here too.
#pragma once

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define HOST_VECTOR2(Type, Element, Alignment)                                                               \
    struct alignas(Alignment) Type {                                                                         \
        Element x, y;                                                                                        \
    };                                                                                                       \
    inline Type make_##Type(Element x, Element y) { return {x, y}; }

#define HOST_VECTOR4(Type, Element, Alignment)                                                               \
    struct alignas(Alignment) Type {                                                                         \
        Element x, y, z, w;                                                                                  \
    };                                                                                                       \
    inline Type make_##Type(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }

HOST_VECTOR2(char2, signed char, 2)
HOST_VECTOR2(uchar2, unsigned char, 2)
HOST_VECTOR2(short2, short, 4)
HOST_VECTOR2(ushort2, unsigned short, 4)
HOST_VECTOR2(int2, int, 8)
HOST_VECTOR2(uint2, unsigned, 8)
HOST_VECTOR2(float2, float, 8)
HOST_VECTOR2(double2, double, 16)
HOST_VECTOR2(longlong2, long long, 16)
HOST_VECTOR2(ulonglong2, unsigned long long, 16)

HOST_VECTOR4(char4, signed char, 4)
HOST_VECTOR4(uchar4, unsigned char, 4)
HOST_VECTOR4(short4, short, 8)
HOST_VECTOR4(ushort4, unsigned short, 8)
HOST_VECTOR4(int4, int, 16)
HOST_VECTOR4(uint4, unsigned, 16)
HOST_VECTOR4(float4, float, 16)

#undef HOST_VECTOR2
#undef HOST_VECTOR4

struct int3 {
    int x, y, z;
};

struct float3 {
    float x, y, z;
};

inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
