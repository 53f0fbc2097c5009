// Every warp and block collective once: each kernel writes what each thread received.

#include "../../../include/ptx.cuh"
#include "../../../include/types.cuh"

namespace {

constexpr unsigned every_lane = 0xffffffffu;

/// Result `i` of this thread; out is [results][threads].
template <class T> __device__ void put(T* out, int i, T value) {
    out[size_t(i) * gridDim.x * blockDim.x + blockIdx.x * blockDim.x + threadIdx.x] = value;
}

} // namespace

/// out [6][threads]: the four shuffles, an up and a down of segments; argument and width are the caller's.
extern "C" __global__ void shuffles(const int* in, int* out, int argument, int width) {
    const int x = in[threadIdx.x];
    put(out, 0, __shfl_sync(every_lane, x, argument, width));
    put(out, 1, __shfl_up_sync(every_lane, x, argument, width));
    put(out, 2, __shfl_down_sync(every_lane, x, argument, width));
    put(out, 3, __shfl_xor_sync(every_lane, x, argument, width));
}

/// out [3][threads]: 64-bit, 16-bit and half-warp shuffles in divergent branches.
extern "C" __global__ void shuffle_types(const double* in, double* out) {
    const int lane = threadIdx.x % 32;
    put(out, 0, __shfl_xor_sync(every_lane, in[threadIdx.x], 1));
    const bf16 narrow = from_float<bf16>(float(lane));
    put(out, 1, double(to_float(__shfl_down_sync(every_lane, narrow, 3))));
    double half_warp;
    if (lane < 16)
        half_warp = __shfl_xor_sync(0x0000ffffu, double(lane), 8);
    else
        half_warp = __shfl_xor_sync(0xffff0000u, double(lane), 4);
    put(out, 2, half_warp);
}

/// out [12][threads].
extern "C" __global__ void votes(const int* in, unsigned* out) {
    const int x = in[threadIdx.x];
    put(out, 0, __ballot_sync(every_lane, x & 1));
    put(out, 1, unsigned(__any_sync(every_lane, x == 5)));
    put(out, 2, unsigned(__all_sync(every_lane, x >= 0)));
    put(out, 3, __match_any_sync(every_lane, x & 3));
    put(out, 4, __reduce_add_sync(every_lane, unsigned(x)));
    put(out, 5, unsigned(__reduce_min_sync(every_lane, x - 16)));
    put(out, 6, unsigned(__reduce_max_sync(every_lane, x - 16)));
    put(out, 7, __reduce_and_sync(every_lane, unsigned(x) | 8u));
    put(out, 8, __reduce_or_sync(every_lane, unsigned(x)));
    put(out, 9, __reduce_xor_sync(every_lane, unsigned(x)));
    put(out, 10, __activemask());
    __syncwarp();
    put(out, 11, __reduce_min_sync(every_lane, unsigned(x) + 7u));
}

/// out [3][threads]: __syncthreads_count, _and, _or of in[thread] != 0.
extern "C" __global__ void block_votes(const int* in, int* out) {
    const int x = in[threadIdx.x];
    put(out, 0, __syncthreads_count(x));
    put(out, 1, __syncthreads_and(x));
    put(out, 2, __syncthreads_or(x));
}

/// Half of the warps produce, the others consume, through named barriers; out[i] = 2 in[i] for i < threads
/// / 2.
extern "C" __global__ void producer_consumer(const float* in, float* out) {
    float* buffer = dynamic_shared<float>();
    const unsigned half = blockDim.x / 2, lane = threadIdx.x % half;
    if (threadIdx.x < half) {
        buffer[lane] = 2 * in[lane];
        barrier_arrive(1, blockDim.x);
    } else {
        barrier_sync(1, blockDim.x);
        out[lane] = buffer[half - 1 - lane];
    }
}

/// Counters [8], each changed by every thread; see the test for what must come out.
extern "C" __global__ void atomics(int* counters, float* total, unsigned long long* wide) {
    __shared__ int shared_counter;
    if (threadIdx.x == 0) shared_counter = 0;
    __syncthreads();
    const int rank = int(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&counters[0], rank);
    atomicMax(&counters[1], rank);
    atomicMin(&counters[2], -rank);
    atomicOr(&counters[3], 1 << (rank % 31));
    atomicSub(&counters[4], 1);
    atomicInc(reinterpret_cast<unsigned*>(&counters[5]), 9);
    atomicAdd(total, 0.5f);
    atomicAdd(wide, 1ull << 32);
    atomicAdd(&shared_counter, 1);
    int old = atomicAdd(&counters[6], 0), seen;
    while ((seen = atomicCAS(&counters[6], old, old + 3)) != old) old = seen;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&counters[7], shared_counter);
}

/// Linear rank of every thread of a 3-D grid of 3-D blocks, at that rank.
extern "C" __global__ void indices(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned rank = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    out[rank] = int(rank);
}

EFFNETV2_KERNEL(shuffles)
EFFNETV2_KERNEL(shuffle_types)
EFFNETV2_KERNEL(votes)
EFFNETV2_KERNEL(block_votes)
EFFNETV2_KERNEL(producer_consumer)
EFFNETV2_KERNEL(atomics)
EFFNETV2_KERNEL(indices)
