// Loaders for gemm.cuh of what training multiplies: a layer's input, which may owe a normalisation, SiLU and a gate, and
// the gradient of a raw output, which owes the backward of a batch norm. Rows are pixels, `pixels` to an image.
#pragma once

#include "activation.cuh"
#include "gemm.cuh"

/// Four numbers, aligned to 16 bytes.
__device__ __forceinline__ void load_vector(const float* from, float (&x)[4]) {
    const float4 v = load16<float4, Cache::read_only>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

/// What four columns of an input are normalised with.
struct NormColumns {
    float scale[4], shift[4];
    unsigned column;
};

/// x [height, width] as it is, or with `norm` [4, width] SiLU(scale x + shift), with `gate` [images, width] times that.
template <class T> struct GemmInput {
    static constexpr unsigned sources = 1;
    static constexpr bool may_transform = true, keeps_rows = false;
    const T* data;
    const float *norm, *gate;
    unsigned height, width;
    FastDivisor pixels;

    struct Row {
        unsigned offset, gate;
        bool inside;
    };
    using Columns = NormColumns;

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
    __device__ __forceinline__ void transform(float (&x)[4], const float (&)[4], const Row& row,
                                              const Columns& v) const {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) x[j] = silu(v.scale[j] * x[j] + v.shift[j]);
        if (!gate) return;
        float factor[4];
        load_vector(gate + row.gate + v.column, factor);
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) x[j] *= factor[j];
    }
};

/// What four columns of a gradient owe.
struct OwedColumns {
    float a[4], b[4], c[4];
};

/// dy = a (factor g) + b y + c for g and y [height, width], `pitch` elements from row to row, and `owed` [3, width];
/// `factors` [images] are 1 if null. Without `owed` g itself, of any width if it is 0 from there to the pitch.
template <class T> struct GemmGradient {
    static constexpr unsigned sources = 2;
    static constexpr bool may_transform = true, keeps_rows = false;
    const T *g, *y;
    const float *owed, *factors;
    unsigned height, width, pitch;
    FastDivisor pixels;

    struct Row {
        unsigned offset;
        float factor;
        bool inside;
    };
    using Columns = OwedColumns;

    __device__ __forceinline__ Row row(unsigned r) const {
        const bool inside = r < height;
        return {r * pitch, factors && inside ? __ldg(factors + pixels.quotient(r)) : 1.0f, inside};
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
    __device__ __forceinline__ void transform(float (&x)[4], const float (&second)[4], const Row& row,
                                              const Columns& v) const {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) x[j] = v.a[j] * (row.factor * x[j]) + (v.b[j] * second[j] + v.c[j]);
    }
};
