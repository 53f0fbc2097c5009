// The optimizer over flat buffers: one launch updates every parameter.
//
// n elements, all arrays 16-byte aligned, f32 unless said otherwise. Parameters w, gradients g, the rule's
// slots, the moving average ema and the working copy (f16 or bf16, what the convolutions read) are each one
// flat buffer of n. `decay_bits` [ceil(n / 8)] has bit i % 8 of byte i / 8 set where weight decay applies to
// element i. `step` [8] holds the scalars of the step in the order of `Step`; it lies on the device, so that
// a captured graph sees new ones.
//
//   g' = gradient_scale g, d = weight_decay where the bit is set, else 0
//   rmsprop  g" = g' + d w;  ms = keep ms + add g"^2;  mom = momentum mom + lr g" / sqrt(ms + epsilon);  w =
//   w - mom sgd      g" = g' + d w;  mom = momentum mom + g";  w = w - lr (nesterov ? g" + momentum mom :
//   mom) adamw    m = keep1 m + add1 g';  v = keep2 v + add2 g'^2;
//            w = w - lr d w - lr (m / correction1) / (sqrt(v / correction2) + epsilon)
//   all      ema = ema + ema_approach (w - ema) and copy = round(w), for those of the two that are not null
//
// A gradient_scale that is not finite marks a step to be skipped: nothing changes. Grid ceil(n / 2048), block
// 256. Least bytes for each element: rmsprop and adamw 28, sgd 20; 8 more for ema, 2 for the copy; 1/8 for
// the decay bits.
//
// optimizer_norm_partial and optimizer_norm_finish: |g| as a sum of squares in f64, always in the same order.
// Grids ceil(n / 16384) and 1, block 256; 4 bytes for each element. The second also derives gradient_scale
// from it, if `step` is not null: min(1, max_norm / (norm / loss_scale)) / loss_scale, NaN where the norm is
// not finite.
//
// optimizer_average: ema as above, for buffers that no rule updates (batch-norm statistics); 12 bytes for
// each element. optimizer_cast_*: the working copy alone; 6 bytes. Grids ceil(n / 2048), block 256.

#include "include/predecessors.cuh"
#include "include/ptx.cuh"
#include "include/types.cuh"

namespace {

constexpr unsigned threads = 256, packs = 2, width = 4;
/// Blocks of an update on a multiprocessor, 64 registers a thread. Left alone, the compiler spills for one
/// block more.
constexpr unsigned resident = 4;
/// Elements of a block: thread t has elements 4 t .. 4 t + 3 of each of its packs, so that a warp's access is
/// 512 bytes in a row.
constexpr unsigned tile = threads * packs * width;
constexpr unsigned norm_rounds = 4, norm_packs = 4;
/// Elements of a block of the norm.
constexpr unsigned norm_tile = threads * width * norm_packs * norm_rounds;

struct Step {
    float learning_rate, weight_decay, gradient_scale, inverse_correction1, inverse_correction2, ema_approach,
        loss_scale, max_norm;
};

/// Four elements in a row.
struct Pack {
    float x[width];
};

__device__ __forceinline__ Pack load_pack(const float* from EFFNETV2_AT_PARAMETER) {
    const float4 v = load16<float4, Cache::streaming>(from EFFNETV2_AT_ARGUMENT);
    return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_pack(float* to, const Pack& p EFFNETV2_AT_PARAMETER) {
    store16<Cache::streaming>(to, make_float4(p.x[0], p.x[1], p.x[2], p.x[3]) EFFNETV2_AT_ARGUMENT);
}

template <class T> __device__ __forceinline__ void store_rounded(T* to, const Pack& p) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(p.x[0], p.x[1]), pack2<T>(p.x[2], p.x[3]));
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

__device__ __forceinline__ float averaged(float ema, float value, const Step& step) {
    return ema + step.ema_approach * (value - ema);
}

struct RmsProp {
    static constexpr int slots = 2;
    float keep, add, momentum, epsilon;

    __device__ __forceinline__ float operator()(float w, float g, float decay, float& mean_square,
                                                float& velocity, const Step& step) const {
        g += decay * w;
        mean_square = keep * mean_square + add * g * g;
        velocity = momentum * velocity + step.learning_rate * g / sqrtf(mean_square + epsilon);
        return w - velocity;
    }
};

struct Sgd {
    static constexpr int slots = 1;
    float momentum;
    bool nesterov;

    __device__ __forceinline__ float operator()(float w, float g, float decay, float& velocity, float&,
                                                const Step& step) const {
        g += decay * w;
        velocity = momentum * velocity + g;
        return w - step.learning_rate * (nesterov ? g + momentum * velocity : velocity);
    }
};

struct AdamW {
    static constexpr int slots = 2;
    float keep1, add1, keep2, add2, epsilon;

    __device__ __forceinline__ float operator()(float w, float g, float decay, float& first, float& second,
                                                const Step& step) const {
        first = keep1 * first + add1 * g;
        second = keep2 * second + add2 * g * g;
        const float direction =
            first * step.inverse_correction1 / (sqrtf(second * step.inverse_correction2) + epsilon);
        return w - step.learning_rate * decay * w - step.learning_rate * direction;
    }
};

/// The buffers of an update; the second slot, the average and the copy may be null.
template <class Copy> struct Buffers {
    float* parameters;
    const float* gradients;
    float* slot0;
    float* slot1;
    float* average;
    Copy* copy;
    const unsigned char* decay_bits;
    unsigned n;
};

template <class Rule, class Copy>
__device__ __forceinline__ void update_element(const Rule& rule, const Buffers<Copy>& b, const Step& step,
                                               unsigned i) {
    const float decay = b.decay_bits[i / 8] >> i % 8 & 1 ? step.weight_decay : 0.0f;
    float slot0 = b.slot0[i], slot1 = Rule::slots > 1 ? b.slot1[i] : 0.0f;
    const float w = rule(b.parameters[i], b.gradients[i] * step.gradient_scale, decay, slot0, slot1, step);
    b.parameters[i] = w;
    b.slot0[i] = slot0;
    if (Rule::slots > 1) b.slot1[i] = slot1;
    if (b.average != nullptr) b.average[i] = averaged(b.average[i], w, step);
    if constexpr (sizeof(Copy) == 2) b.copy[i] = from_float<Copy>(w);
}

/// Every load is issued before the first is used: 160 bytes a thread with two slots and an average.
template <class Rule, class Copy>
__device__ __forceinline__ void update_tile(const Rule& rule, const Buffers<Copy>& b, const Step& step,
                                            unsigned first) {
    Pack w[packs], g[packs], slot0[packs], slot1[packs], ema[packs];
    unsigned bits[packs];
#pragma unroll
    for (unsigned k = 0; k < packs; ++k) {
        const unsigned i = first + (k * threads + threadIdx.x) * width;
        w[k] = load_pack(b.parameters + i);
        g[k] = load_pack(b.gradients + i);
        slot0[k] = load_pack(b.slot0 + i);
        if (Rule::slots > 1) slot1[k] = load_pack(b.slot1 + i);
        if (b.average != nullptr) ema[k] = load_pack(b.average + i);
        bits[k] = b.decay_bits[i / 8] >> i % 8;
    }
#pragma unroll
    for (unsigned k = 0; k < packs; ++k) {
        const unsigned i = first + (k * threads + threadIdx.x) * width;
#pragma unroll
        for (unsigned j = 0; j < width; ++j) {
            const float decay = bits[k] >> j & 1 ? step.weight_decay : 0.0f;
            w[k].x[j] =
                rule(w[k].x[j], g[k].x[j] * step.gradient_scale, decay, slot0[k].x[j], slot1[k].x[j], step);
        }
        store_pack(b.parameters + i, w[k]);
        store_pack(b.slot0 + i, slot0[k]);
        if (Rule::slots > 1) store_pack(b.slot1 + i, slot1[k]);
        if constexpr (sizeof(Copy) == 2) store_rounded(b.copy + i, w[k]);
        if (b.average != nullptr) {
#pragma unroll
            for (unsigned j = 0; j < width; ++j) ema[k].x[j] = averaged(ema[k].x[j], w[k].x[j], step);
            store_pack(b.average + i, ema[k]);
        }
    }
}

template <class Rule, class Copy>
__device__ __forceinline__ void update(const Rule& rule, const Buffers<Copy>& b, const Step* from) {
    const Step step = *from;
    if (!is_finite(step.gradient_scale)) return;
    const unsigned first = blockIdx.x * tile;
    if (first + tile <= b.n) {
        update_tile(rule, b, step, first);
    } else {
        for (unsigned i = first + threadIdx.x; i < b.n; i += threads) update_element(rule, b, step, i);
    }
}

/// The sum over the block, in thread 0: pairs within a warp, then the warps in order.
__device__ __forceinline__ double block_sum(double sum) {
    __shared__ double warps[threads / 32];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
        for (unsigned warp = 1; warp < threads / 32; ++warp) sum += warps[warp];
    return sum;
}

__device__ __forceinline__ double square(float x) { return double(x) * double(x); }

template <class T> __device__ __forceinline__ void cast(const float* from, T* to, unsigned n) {
    const unsigned first = (blockIdx.x * threads + threadIdx.x) * 8;
    if (first + 8 <= n) {
        float x[8];
        load8<Cache::streaming>(from + first, x);
        store8(to + first, x);
    } else {
        for (unsigned i = first; i < n; ++i) to[i] = from_float<T>(from[i]);
    }
}

} // namespace

// The rules with each type of working copy; `_f32` has none, the parameters themselves are what the
// convolutions read.
#define EFFNETV2_RULES(suffix, Copy)                                                                         \
    extern "C" __global__ void __launch_bounds__(threads, resident) optimizer_rmsprop_##suffix(              \
        float* parameters, const float* gradients, float* mean_square, float* velocity, float* average,      \
        Copy* copy, const unsigned char* decay_bits, const Step* step, unsigned n, float keep, float add,    \
        float momentum, float epsilon) {                                                                     \
        after_predecessors();                                                                                \
        update(RmsProp{keep, add, momentum, epsilon},                                                        \
               Buffers<Copy>{parameters, gradients, mean_square, velocity, average, copy, decay_bits, n},    \
               step);                                                                                        \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads, resident) optimizer_sgd_##suffix(                  \
        float* parameters, const float* gradients, float* velocity, float* average, Copy* copy,              \
        const unsigned char* decay_bits, const Step* step, unsigned n, float momentum, int nesterov) {       \
        after_predecessors();                                                                                \
        update(Sgd{momentum, nesterov != 0},                                                                 \
               Buffers<Copy>{parameters, gradients, velocity, nullptr, average, copy, decay_bits, n}, step); \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads, resident) optimizer_adamw_##suffix(                \
        float* parameters, const float* gradients, float* first, float* second, float* average, Copy* copy,  \
        const unsigned char* decay_bits, const Step* step, unsigned n, float keep1, float add1, float keep2, \
        float add2, float epsilon) {                                                                         \
        after_predecessors();                                                                                \
        update(AdamW{keep1, add1, keep2, add2, epsilon},                                                     \
               Buffers<Copy>{parameters, gradients, first, second, average, copy, decay_bits, n}, step);     \
    }                                                                                                        \
    EFFNETV2_KERNEL(optimizer_rmsprop_##suffix)                                                              \
    EFFNETV2_KERNEL(optimizer_sgd_##suffix)                                                                  \
    EFFNETV2_KERNEL(optimizer_adamw_##suffix)

EFFNETV2_RULES(f32, float)
EFFNETV2_RULES(f16, f16)
EFFNETV2_RULES(bf16, bf16)

extern "C" __global__ void __launch_bounds__(threads)
    optimizer_norm_partial(const float* gradients, double* partial, unsigned n) {
    after_predecessors();
    const unsigned first = blockIdx.x * norm_tile;
    double sum = 0.0;
    if (first + norm_tile <= n) {
        for (unsigned round = 0; round < norm_rounds; ++round) {
            Pack g[norm_packs];
#pragma unroll
            for (unsigned k = 0; k < norm_packs; ++k)
                g[k] =
                    load_pack(gradients + first + ((round * norm_packs + k) * threads + threadIdx.x) * width);
#pragma unroll
            for (unsigned k = 0; k < norm_packs; ++k)
#pragma unroll
                for (unsigned j = 0; j < width; ++j) sum += square(g[k].x[j]);
        }
    } else {
        for (unsigned i = first + threadIdx.x; i < n; i += threads) sum += square(gradients[i]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(threads)
    optimizer_norm_finish(const double* partial, double* norm, Step* step, unsigned count) {
    after_predecessors();
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < count; i += threads) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    const double root = sqrt(sum);
    *norm = root;
    if (step == nullptr) return;
    const double unscaled = root / double(step->loss_scale), limit = double(step->max_norm);
    const double clip = unscaled > limit ? limit / unscaled : 1.0;
    // 0 times an infinity or NaN is NaN; times anything else it changes nothing.
    step->gradient_scale = float(clip / double(step->loss_scale) + 0.0 * unscaled);
}

extern "C" __global__ void __launch_bounds__(threads)
    optimizer_average(float* average, const float* values, const Step* from, unsigned n) {
    after_predecessors();
    const Step step = *from;
    if (!is_finite(step.gradient_scale)) return;
    const unsigned first = blockIdx.x * tile;
    if (first + tile <= n) {
        Pack ema[packs], value[packs];
#pragma unroll
        for (unsigned k = 0; k < packs; ++k) {
            const unsigned i = first + (k * threads + threadIdx.x) * width;
            ema[k] = load_pack(average + i);
            value[k] = load_pack(values + i);
        }
#pragma unroll
        for (unsigned k = 0; k < packs; ++k) {
#pragma unroll
            for (unsigned j = 0; j < width; ++j) ema[k].x[j] = averaged(ema[k].x[j], value[k].x[j], step);
            store_pack(average + first + (k * threads + threadIdx.x) * width, ema[k]);
        }
    } else {
        for (unsigned i = first + threadIdx.x; i < n; i += threads)
            average[i] = averaged(average[i], values[i], step);
    }
}

extern "C" __global__ void __launch_bounds__(threads)
    optimizer_cast_f16(const float* from, f16* to, unsigned n) {
    after_predecessors();
    cast(from, to, n);
}

extern "C" __global__ void __launch_bounds__(threads)
    optimizer_cast_bf16(const float* from, bf16* to, unsigned n) {
    after_predecessors();
    cast(from, to, n);
}

EFFNETV2_KERNEL(optimizer_norm_partial)
EFFNETV2_KERNEL(optimizer_norm_finish)
EFFNETV2_KERNEL(optimizer_average)
EFFNETV2_KERNEL(optimizer_cast_f16)
EFFNETV2_KERNEL(optimizer_cast_bf16)
