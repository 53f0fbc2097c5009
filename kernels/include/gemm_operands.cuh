// Loaders for gemm.cuh of what training multiplies: a layer's input, which may owe a normalisation, SiLU and a gate, and
// the gradient of a raw output, which owes the backward of a batch norm. Rows are pixels, `pixels` to an image.
#pragma once

#include "activation.cuh"
#include "gemm.cuh"

/// `count` numbers, aligned to 16 bytes, that the kernel only reads.
template <unsigned count> __device__ __forceinline__ void load_vector(const float* from, float (&x)[count]) {
#pragma unroll
    for (unsigned i = 0; i < count; i += 4) {
        const float4 v = load16<float4, Cache::read_only>(from + i);
        x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
}

/// What a column of an input is normalised with.
template <unsigned chunk> struct NormColumns {
    float scale[chunk], shift[chunk];
    unsigned column;
};

/// x [height, width] as it is, or with `norm` [4, width] SiLU(scale x + shift), with `gate` [images, width] times that.
template <class T> struct GemmInput {
    static constexpr unsigned sources = 1, chunk = 16 / sizeof(T);
    static constexpr bool may_transform = true;
    const T* data;
    const float *norm, *gate;
    unsigned height, width;
    FastDivisor pixels;

    struct Row {
        unsigned offset, gate;
        bool inside;
    };
    using Columns = NormColumns<chunk>;

    __device__ __forceinline__ Row row(unsigned r) const {
        return {r * width, gate ? pixels.quotient(r) * width : 0, r < height};
    }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned column) const {
        return {row.offset + column, row.inside && column < width};
    }
    __device__ __forceinline__ const T* base(unsigned) const { return data; }
    __device__ __forceinline__ bool transforms() const { return norm != nullptr; }

    __device__ __forceinline__ Columns columns(unsigned column) const {
        Columns v{};
        v.column = column;
        if (column >= width) return v;
        load_vector(norm + column, v.scale);
        load_vector(norm + width + column, v.shift);
        return v;
    }
    __device__ __forceinline__ void transform(float (&x)[chunk], const float (&)[chunk], const Row& row,
                                              const Columns& v) const {
#pragma unroll
        for (unsigned j = 0; j < chunk; ++j) x[j] = silu(v.scale[j] * x[j] + v.shift[j]);
        if (!gate) return;
        float factor[chunk];
        load_vector(gate + row.gate + v.column, factor);
#pragma unroll
        for (unsigned j = 0; j < chunk; ++j) x[j] *= factor[j];
    }
};

/// What a column of a gradient owes.
template <unsigned chunk> struct OwedColumns {
    float a[chunk], b[chunk], c[chunk];
};

/// dy = a (factor g) + b y + c for g and y [height, width] and `owed` [3, width]; `factors` [images] are 1 if null. Without
/// `owed` g itself.
template <class T> struct GemmGradient {
    static constexpr unsigned sources = 2, chunk = 16 / sizeof(T);
    static constexpr bool may_transform = true;
    const T *g, *y;
    const float *owed, *factors;
    unsigned height, width;
    FastDivisor pixels;

    struct Row {
        unsigned offset;
        float factor;
        bool inside;
    };
    using Columns = OwedColumns<chunk>;

    __device__ __forceinline__ Row row(unsigned r) const {
        const bool inside = r < height;
        return {r * width, factors && inside ? __ldg(factors + pixels.quotient(r)) : 1.0f, inside};
    }
    __device__ __forceinline__ GemmPlace place(const Row& row, unsigned column) const {
        return {row.offset + column, row.inside && column < width};
    }
    __device__ __forceinline__ const T* base(unsigned source) const { return source == 0 ? g : y; }
    __device__ __forceinline__ bool transforms() const { return owed != nullptr; }

    __device__ __forceinline__ Columns columns(unsigned column) const {
        Columns v{};
        if (column >= width) return v;
        load_vector(owed + column, v.a);
        load_vector(owed + width + column, v.b);
        load_vector(owed + 2 * width + column, v.c);
        return v;
    }
    __device__ __forceinline__ void transform(float (&x)[chunk], const float (&second)[chunk], const Row& row,
                                              const Columns& v) const {
#pragma unroll
        for (unsigned j = 0; j < chunk; ++j) x[j] = v.a[j] * (row.factor * x[j]) + (v.b[j] * second[j] + v.c[j]);
    }
};
