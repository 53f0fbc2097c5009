// Bugs on purpose. Each comes with a right twin that differs in nothing else: broken_<name> must be caught,
// with the line marked `bug: <name>`, and right_<name> must not be.
//
// All take (x, y, n): x and y hold n floats, the block is one of n threads unless a test says otherwise. Those of TENSOR_PAIR
// take x by a tensor map: a matrix with rows of 16 floats, and boxes of 4 of them.

#include <cstdlib>
#include <cstring>

#include "../../../include/predecessors.cuh"
#include "../../../include/ptx.cuh"
#include "../../../include/types.cuh"

#define PAIR(name)                                                                                           \
    extern "C" __global__ void broken_##name(const float* x, float* y, int n) { name<true>(x, y, n); }       \
    extern "C" __global__ void right_##name(const float* x, float* y, int n) { name<false>(x, y, n); }       \
    EFFNETV2_KERNEL(broken_##name)                                                                           \
    EFFNETV2_KERNEL(right_##name)

#define TENSOR_PAIR(name)                                                                                    \
    extern "C" __global__ void broken_##name(const __grid_constant__ TensorMap x, float* y, int n) {         \
        name<true>(x, y, n);                                                                                 \
    }                                                                                                        \
    extern "C" __global__ void right_##name(const __grid_constant__ TensorMap x, float* y, int n) {          \
        name<false>(x, y, n);                                                                                \
    }                                                                                                        \
    EFFNETV2_KERNEL(broken_##name)                                                                           \
    EFFNETV2_KERNEL(right_##name)

namespace {

constexpr unsigned every_lane = 0xffffffffu;

/// Reads what another warp has written to shared memory.
template <bool broken> __device__ void missing_barrier(const float* x, float* y, int n) {
    float* buffer = dynamic_shared<float>();
    buffer[threadIdx.x] = x[threadIdx.x];
    if (!broken) __syncthreads();
    y[threadIdx.x] = buffer[n - 1 - threadIdx.x]; // bug: missing_barrier
}

/// The same within one warp.
template <bool broken> __device__ void missing_syncwarp(const float* x, float* y, int) {
    float* buffer = dynamic_shared<float>();
    buffer[threadIdx.x] = x[threadIdx.x];
    if (!broken) __syncwarp();
    y[threadIdx.x] = buffer[threadIdx.x ^ 1]; // bug: missing_syncwarp
}

/// A buffer is filled again while others still read it.
template <bool broken> __device__ void missing_second_barrier(const float* x, float* y, int n) {
    float* buffer = dynamic_shared<float>();
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
        buffer[threadIdx.x] = x[threadIdx.x] + round; // bug: missing_second_barrier
        __syncthreads();
        sum += buffer[n - 1 - threadIdx.x];
        if (!broken) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

/// A barrier in both branches is two barriers.
template <bool broken> __device__ void divergent_barrier(const float* x, float* y, int) {
    y[threadIdx.x] = x[threadIdx.x];
    if (broken && threadIdx.x < 32) {
        __syncthreads(); // bug: divergent_barrier
    } else {
        __syncthreads(); // bug: divergent_barrier
    }
}

/// Some threads return before a barrier.
template <bool broken> __device__ void early_return(const float* x, float* y, int n) {
    if (broken && threadIdx.x >= unsigned(n) / 2) return;
    __syncthreads(); // bug: early_return
    y[threadIdx.x] = x[threadIdx.x];
}

/// A lane returns, and the others name it in their mask.
template <bool broken> __device__ void exited_lane(const float* x, float* y, int) {
    if (broken && threadIdx.x == 31) return;
    y[threadIdx.x] = __shfl_xor_sync(every_lane, x[threadIdx.x], 1); // bug: exited_lane
}

/// Half of a warp waits at a barrier, the other half for the first half.
template <bool broken> __device__ void deadlock(const float* x, float* y, int) {
    float value = x[threadIdx.x];
    if (!broken || threadIdx.x % 32 < 16) value += __shfl_xor_sync(every_lane, value, 1); // bug: deadlock
    __syncthreads();
    y[threadIdx.x] = value;
}

/// The mask leaves out a lane that calls.
template <bool broken> __device__ void mask_without_caller(const float* x, float* y, int) {
    y[threadIdx.x] =
        x[threadIdx.x] + __any_sync(broken ? 0x7fffffffu : every_lane, 1); // bug: mask_without_caller
}

/// A lane reads from one that does not take part.
template <bool broken> __device__ void reads_outside_mask(const float* x, float* y, int) {
    const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    y[threadIdx.x] = __shfl_xor_sync(half, x[threadIdx.x], broken ? 16 : 8); // bug: reads_outside_mask
}

template <bool broken> __device__ void odd_width(const float* x, float* y, int) {
    y[threadIdx.x] = __shfl_down_sync(every_lane, x[threadIdx.x], 1, broken ? 12 : 16); // bug: odd_width
}

/// Two groups of warps disagree about the size of a named barrier.
template <bool broken> __device__ void barrier_count(const float* x, float* y, int n) {
    barrier_sync(3, broken && threadIdx.x >= 32 ? unsigned(n) / 2 : unsigned(n)); // bug: barrier_count
    y[threadIdx.x] = x[threadIdx.x];
}

template <bool broken> __device__ void misaligned_load(const float* x, float* y, int n) {
    float values[8] = {};
    if (threadIdx.x < unsigned(n) / 16)
        load8(x + 8 * threadIdx.x + (broken ? 1 : 4), values); // bug: misaligned_load
    y[threadIdx.x] = values[7];
}

template <bool broken> __device__ void misaligned_ldmatrix(const float*, float* y, int) {
    uint16_t* tile = dynamic_shared<uint16_t>();
    for (int i = threadIdx.x; i < 8 * 12; i += blockDim.x) tile[i] = 0;
    __syncthreads();
    uint32_t fragment[1];
    ldmatrix<1>(fragment, tile + (broken ? 12 : 8) * (threadIdx.x % 8)); // bug: misaligned_ldmatrix
    y[threadIdx.x] = float(fragment[0]);
}

template <bool broken> __device__ void misaligned_copy(const float* x, float* y, int) {
    float* buffer = dynamic_shared<float>() + 2 * threadIdx.x;
    const float* source = x + (broken ? threadIdx.x : threadIdx.x & ~1u);
    cp_async<8>(buffer, source); // bug: misaligned_copy
    cp_async_wait_all();
    y[threadIdx.x] = *buffer;
}

/// Reads what an asynchronous copy has yet to bring: a wrapped load says so, a plain one finds NaN.
template <bool broken> __device__ void early_read(const float* x, float* y, int n) {
    float* buffer = dynamic_shared<float>();
    if (threadIdx.x < unsigned(n) / 4) cp_async<16>(buffer + 4 * threadIdx.x, x + 4 * threadIdx.x);
    cp_async_commit_group();
    if (!broken) cp_async_wait_group<0>();
    __syncthreads();
    float values[8] = {};
    if (threadIdx.x < unsigned(n) / 8) load8(buffer + 8 * threadIdx.x, values); // bug: early_read
    y[threadIdx.x] = values[0];
}

template <bool broken> __device__ void early_plain_read(const float* x, float* y, int) {
    float* buffer = dynamic_shared<float>();
    cp_async<4>(buffer + threadIdx.x, x + threadIdx.x);
    cp_async_commit_group();
    if (!broken) cp_async_wait_group<0>();
    y[threadIdx.x] = buffer[threadIdx.x]; // bug: early_plain_read
}

/// A copy into a place that an earlier copy has not reached yet.
template <bool broken> __device__ void copy_over_copy(const float* x, float* y, int) {
    float* buffer = dynamic_shared<float>();
    cp_async<4>(buffer + threadIdx.x, x + threadIdx.x);
    if (!broken) cp_async_wait_all();
    cp_async<4>(buffer + threadIdx.x, x + threadIdx.x); // bug: copy_over_copy
    cp_async_wait_all();
    y[threadIdx.x] = buffer[threadIdx.x];
}

template <bool broken> __device__ void copy_to_local(const float* x, float* y, int) {
    float local = 0;
    float* buffer = broken ? &local : dynamic_shared<float>() + threadIdx.x;
    cp_async<4>(buffer, x + threadIdx.x); // bug: copy_to_local
    cp_async_wait_all();
    y[threadIdx.x] = *buffer;
}

/// An mma of a warp that is not whole: for a block of 48 threads.
template <bool broken> __device__ void partial_warp(const float* x, float* y, int) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (broken || threadIdx.x < 32) mma_m16n8k16<bf16>(d, a, b, d); // bug: partial_warp
    y[threadIdx.x] = x[threadIdx.x] + d[0];
}

/// One page behind the end of y.
template <bool broken> __device__ void far_write(const float* x, float* y, int n) {
    y[threadIdx.x + (broken ? n : 0)] = x[threadIdx.x]; // bug: far_write
}

/// One element behind the end of y: within the padding of an allocation.
template <bool broken> __device__ void near_write(const float* x, float* y, int n) {
    y[threadIdx.x] = x[threadIdx.x];
    if (broken && threadIdx.x == 0) y[n] = 1; // bug: near_write
}

template <bool broken> __device__ void near_read(const float* x, float* y, int) {
    y[threadIdx.x] = x[threadIdx.x + (broken ? 1 : 0)]; // bug: near_read
}

/// Past the end of dynamic shared memory.
template <bool broken> __device__ void shared_overflow(const float* x, float* y, int n) {
    float* buffer = dynamic_shared<float>();
    buffer[threadIdx.x + (broken ? n : 0)] = x[threadIdx.x]; // bug: shared_overflow
    y[threadIdx.x] = x[threadIdx.x];
}

/// Past the end of an array in static shared memory.
template <bool broken> __device__ void static_overflow(const float* x, float* y, int n) {
    __shared__ float buffer[128];
    for (int i = threadIdx.x; i < 128; i += n) buffer[i] = 0;
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x] + buffer[threadIdx.x + (broken ? 65 : 64)]; // bug: static_overflow
}

/// Sums shared memory that nobody wrote.
template <bool broken> __device__ void uninitialised(const float* x, float* y, int) {
    __shared__ float buffer[1024];
    if (!broken || threadIdx.x != 5) buffer[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = buffer[threadIdx.x]; // bug: uninitialised
}

/// The C library writes where a kernel should not have sent it.
template <bool broken> __device__ void far_fill(const float* x, float* y, int n) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x == 0) memset(y, 0, size_t(n) * (broken ? 64 : 1));
}

/// A block of memory that no compiler leaves out.
__device__ void** allocate(size_t bytes) {
    void* volatile block = malloc(bytes);
    return static_cast<void**>(block);
}

/// Writes into the links of a freed block, which the GNU C library follows with its lock held.
template <bool broken> __device__ void fault_in_malloc(const float* x, float* y, int) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x != 0) return;
    constexpr size_t bytes = 16 << 10;
    void** const block = allocate(bytes);
    void** const neighbour = allocate(bytes);
    void* volatile* volatile links = block;
    free(block);
    if (broken) links[1] = reinterpret_cast<void*>(16);
    free(allocate(2 * bytes));
    free(neighbour);
}

/// The same in freed blocks of every small size: whoever wants the second of one size meets an address that there
/// is not, this kernel first, and then what explains its fault.
template <bool broken> __device__ void fault_in_explanation(const float* x, float* y, int) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x != 0) return;
    for (size_t bytes = 24; bytes < 1024; bytes += 16) {
        void** const first = allocate(bytes);
        void** const second = allocate(bytes);
        void* volatile* volatile link = first;
        free(second);
        free(first);
        // A link is kept with the bits of where it stands.
        if (broken) *link = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(link) >> 12 ^ 16);
    }
    for (int i = 0; i < 2 && broken; ++i) y[0] += float(allocate(24) == nullptr);
}

template <bool broken> __device__ void division_by_zero(const float* x, float* y, int n) {
    const int divisor = n - (broken ? int(blockDim.x) : 0);
    y[threadIdx.x] = x[threadIdx.x] + float(int(threadIdx.x) / divisor); // bug: division_by_zero
}

__device__ __noinline__ int depth(const volatile int* from, int levels) {
    volatile int frame[1024];
    frame[levels % 1024] = from[0] + 1;
    return levels == 0 ? frame[0] : depth(frame + levels % 1024, levels - 1) + frame[levels % 1024];
}

template <bool broken> __device__ void stack_overflow(const float* x, float* y, int) {
    volatile int start[1] = {0};
    y[threadIdx.x] = x[threadIdx.x] + float(depth(start, broken ? 1000 : 4) & 1);
}

template <bool broken> __device__ void trap(const float* x, float* y, int) {
    if (broken && threadIdx.x == 7) __trap(); // bug: trap
    y[threadIdx.x] = x[threadIdx.x];
}

template <bool broken> __device__ void assertion(const float* x, float* y, int n) {
    assert(int(threadIdx.x) < n - (broken ? 1 : 0)); // bug: assertion
    y[threadIdx.x] = x[threadIdx.x];
}

/// Two blocks write the same place: for a grid of 2 blocks of n / 2 threads.
template <bool broken> __device__ void race_of_blocks(const float* x, float* y, int n) {
    const int i = threadIdx.x + (broken ? 0 : blockIdx.x * (n / 2));
    y[i] = x[i]; // bug: race_of_blocks
}

/// The last block to arrive sums what all have written: for a grid of 2. y[n - 1] counts arrivals and starts
/// at 0.
template <bool broken> __device__ void missing_fence(const float* x, float* y, int n) {
    unsigned* arrivals = reinterpret_cast<unsigned*>(y + n - 1);
    if (threadIdx.x != 0) return;
    y[blockIdx.x] = x[blockIdx.x];
    if (!broken) __threadfence();
    if (atomicAdd(arrivals, 1u) + 1 < gridDim.x) return;
    if (!broken) __threadfence();
    y[gridDim.x] = y[0] + y[1]; // bug: missing_fence
}

/// A product of a warpgroup of ones and B, 32 columns of 16 k in rows of 128 bytes that `fill` writes: for blocks of 128
/// threads and 4 KiB of shared memory. y: each thread's first accumulator, the sum over k of a column.
struct Product {
    float* tile = dynamic_shared<float, 1024>();
    float acc[4][4] = {};
    uint32_t a[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};

    __device__ void fill() {
        for (int i = 0; i < 2; ++i) store16(tile + 8 * threadIdx.x + 4 * i, make_float4(1, 1, 1, 1));
    }
    __device__ uint64_t b() { return wgmma_descriptor<128>(tile, 0, 1024); }
    __device__ void publish() {
        fence_proxy_async_shared();
        __syncthreads();
    }
};

template <bool broken> __device__ void wgmma_early_read(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b());
    wgmma_commit_group();
    wgmma_wait_group<broken ? 1 : 0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// What was issued is in no group.
template <bool broken> __device__ void wgmma_missing_commit(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b());
    if (!broken) wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// Accumulators that others have written, and A that ldmatrix has.
template <bool broken> __device__ void wgmma_missing_fence(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    if (!broken) wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_missing_fence
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

template <bool broken> __device__ void wgmma_loaded_registers(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    if (broken) wgmma_fence();
    ldmatrix<4>(p.a, p.tile + 4 * threadIdx.x); // bug: wgmma_loaded_registers
    if (!broken) wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_loaded_registers
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// A barrier alone does not let wgmma see what was written, by a store or a copy.
template <bool broken> __device__ void wgmma_unseen_store(const float*, float* y, int) {
    Product p;
    if (broken) fence_proxy_async_shared();
    p.fill();
    if (!broken) fence_proxy_async_shared();
    __syncthreads();
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_unseen_store
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

template <bool broken> __device__ void wgmma_unseen_copy(const float* x, float* y, int) {
    Product p;
    for (int i = 0; i < 2; ++i) cp_async<16>(p.tile + 8 * threadIdx.x + 4 * i, x + threadIdx.x / 4 * 4);
    if (broken) fence_proxy_async_shared();
    cp_async_wait_all();
    if (!broken) fence_proxy_async_shared();
    __syncthreads();
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_unseen_copy
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// One of the four warps goes another way.
template <bool broken> __device__ void wgmma_divergence(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    wgmma_fence();
    if (!broken || threadIdx.x / 32 != 2)
        wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_divergence
    wgmma_commit_group();
    wgmma_wait_group<0>();
    __syncthreads();
    y[threadIdx.x] = p.acc[0][0];
}

template <bool broken> __device__ void wgmma_early_return(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    if (broken && threadIdx.x / 32 == 3) return;
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_early_return
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// The second warpgroup of a block of 192 threads has two warps.
template <bool broken> __device__ void wgmma_partial_warpgroup(const float*, float* y, int) {
    Product p;
    if (threadIdx.x < 128) p.fill();
    p.publish();
    if (broken || threadIdx.x < 128) {
        wgmma_fence();
        wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_partial_warpgroup
        wgmma_commit_group();
        wgmma_wait_group<0>();
    }
    y[threadIdx.x] = p.acc[0][0];
}

/// Each warp has its own idea of B.
template <bool broken> __device__ void wgmma_descriptors(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    const unsigned k = broken ? threadIdx.x / 32 : 0;
    const uint64_t b = wgmma_descriptor<128>(p.tile + 8 * k, 0, 1024);
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, b); // bug: wgmma_descriptors
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// An atom that is not aligned to its size; memory that is not said to be.
template <bool broken> __device__ void wgmma_misaligned_atom(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    const uint64_t b = wgmma_descriptor<64>(p.tile + (broken ? 64 : 128), 0, 512);
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, b); // bug: wgmma_misaligned_atom
    wgmma_commit_group();
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

template <bool broken> __device__ void wgmma_misaligned_memory(const float*, float* y, int) {
    const float* tile = dynamic_shared<float, broken ? 128 : 1024>();
    y[threadIdx.x] = float(wgmma_descriptor<128>(tile, 0, 1024) & 1); // bug: wgmma_misaligned_memory
}

/// What is being multiplied must stay as it is: B, and the accumulators.
template <bool broken> __device__ void wgmma_overwritten(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_overwritten
    wgmma_commit_group();
    if (!broken) wgmma_wait_group<0>();
    __syncthreads();
    store16(p.tile + 8 * threadIdx.x, make_float4(2, 2, 2, 2));
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

template <bool broken> __device__ void wgmma_written_accumulators(const float*, float* y, int) {
    Product p;
    p.fill();
    p.publish();
    wgmma_fence();
    wgmma_m64k16<bf16, 32, false>(p.acc, p.a, p.b()); // bug: wgmma_written_accumulators
    wgmma_commit_group();
    if (!broken) wgmma_wait_group<0>();
    p.acc[1][2] = 0;
    wgmma_wait_group<0>();
    y[threadIdx.x] = p.acc[0][0];
}

/// A box of 256 bytes and its barrier: for blocks of 64 threads.
struct Box {
    static constexpr unsigned bytes = 256;
    float* tile = dynamic_shared<float>();
    uint64_t* full = dynamic_shared<uint64_t>(2 * bytes);

    __device__ void begin() {
        if (threadIdx.x == 0) {
            mbarrier_init(full, 1);
            fence_proxy_async_shared();
        }
        __syncthreads();
    }
    __device__ float own() const { return tile[threadIdx.x]; }
};

template <bool broken> __device__ void tensor_copy_early_read(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        tensor_copy(box.tile, x, 0, 0, box.full);
    }
    if (broken) __syncthreads();
    if (!broken) mbarrier_wait(box.full, 0);
    y[threadIdx.x] = load16<float4>(box.tile + threadIdx.x / 4 * 4).x; // bug: tensor_copy_early_read
    mbarrier_wait(box.full, 0);
}

/// Waits for a phase that is over: a wrong parity is no wait.
template <bool broken> __device__ void tensor_copy_wrong_parity(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        tensor_copy(box.tile, x, 0, 0, box.full);
    }
    __syncthreads();
    mbarrier_wait(box.full, broken ? 1 : 0);
    y[threadIdx.x] = load16<float4>(box.tile + threadIdx.x / 4 * 4).x; // bug: tensor_copy_wrong_parity
    mbarrier_wait(box.full, 0);
}

template <bool broken> __device__ void tensor_copy_wrong_bytes(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes + (broken ? 64 : 0));
        tensor_copy(box.tile, x, 0, 0, box.full);
    }
    mbarrier_wait(box.full, 0); // bug: tensor_copy_wrong_bytes
    y[threadIdx.x] = box.own();
}

/// The next phase begins though the one before has not ended.
template <bool broken> __device__ void tensor_copy_early_phase(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        if (!broken) tensor_copy(box.tile, x, 0, 0, box.full);
    }
    if (!broken) mbarrier_wait(box.full, 0);
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive_expect(box.full, 0); // bug: tensor_copy_early_phase
    mbarrier_wait(box.full, 1);
    y[threadIdx.x] = box.own();
}

/// TMA does not see the barrier, or what was written, by a barrier of threads alone.
template <bool broken> __device__ void tensor_copy_unseen_barrier(const TensorMap& x, float* y, int) {
    Box box;
    if (threadIdx.x == 0) {
        if (broken) fence_proxy_async_shared();
        mbarrier_init(box.full, 1);
        if (!broken) fence_proxy_async_shared();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        tensor_copy(box.tile, x, 0, 0, box.full); // bug: tensor_copy_unseen_barrier
    }
    mbarrier_wait(box.full, 0);
    y[threadIdx.x] = box.own();
}

template <bool broken> __device__ void tensor_copy_unseen_store(const TensorMap& x, float* y, int) {
    Box box;
    if (threadIdx.x < 16) store16(box.tile + 4 * threadIdx.x, make_float4(1, 1, 1, 1));
    if (!broken) fence_proxy_async_shared();
    box.begin();
    if (threadIdx.x == 1) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        tensor_copy(box.tile, x, 0, 0, box.full); // bug: tensor_copy_unseen_store
    }
    mbarrier_wait(box.full, 0);
    y[threadIdx.x] = box.own();
}

/// A barrier that other threads use before it is there, which depends on who comes first, and one that never is.
template <bool broken> __device__ void tensor_copy_early_barrier(const TensorMap&, float* y, int) {
    Box box;
    if (threadIdx.x == 0) mbarrier_init(box.full, 1); // bug: tensor_copy_early_barrier
    if (!broken) __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive_expect(box.full, 0);
    mbarrier_wait(box.full, 0); // bug: tensor_copy_early_barrier
    y[threadIdx.x] = 0;
}

template <bool broken> __device__ void tensor_copy_unknown_barrier(const TensorMap&, float* y, int) {
    Box box;
    if (!broken) box.begin();
    if (!broken && threadIdx.x == 0) mbarrier_arrive_expect(box.full, 0);
    mbarrier_wait(box.full, 0); // bug: tensor_copy_unknown_barrier
    y[threadIdx.x] = 0;
}

/// The next box comes while others still read this one.
template <bool broken> __device__ void tensor_copy_overwrites(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    float sum = 0;
    for (unsigned phase = 0; phase < 2; ++phase) {
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(box.full, Box::bytes);
            tensor_copy(box.tile, x, 0, 0, box.full); // bug: tensor_copy_overwrites
        }
        mbarrier_wait(box.full, phase);
        sum += box.own(); // bug: tensor_copy_overwrites
        if (!broken) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

template <bool broken> __device__ void tensor_copy_never_awaited(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        tensor_copy(box.tile, x, 0, 0, box.full); // bug: tensor_copy_never_awaited
    }
    if (!broken) mbarrier_wait(box.full, 0);
    y[threadIdx.x] = 0;
}

template <bool broken> __device__ void tensor_copy_misaligned(const TensorMap& x, float* y, int) {
    Box box;
    box.begin();
    float* to = box.tile + (broken ? 16 : 32);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(box.full, Box::bytes);
        tensor_copy(to, x, 0, 0, box.full); // bug: tensor_copy_misaligned
    }
    mbarrier_wait(box.full, 0);
    y[threadIdx.x] = to[threadIdx.x];
}

/// A block with nothing to do returns before it has waited for the grid ahead of its own.
template <bool broken> __device__ void never_waits(const float* x, float* y, int) {
    if (broken && blockIdx.x == 1) return;
    after_predecessors();
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i];
}

/// Reads what the grid ahead of its own may be about to write.
template <bool broken> __device__ void waits_late(const float* x, float* y, int) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (!broken) after_predecessors();
    const float value = __ldg(x + i); // bug: waits_late
    if (broken) after_predecessors();
    y[i] = value;
}

} // namespace

PAIR(missing_barrier)
PAIR(missing_syncwarp)
PAIR(missing_second_barrier)
PAIR(divergent_barrier)
PAIR(early_return)
PAIR(exited_lane)
PAIR(deadlock)
PAIR(mask_without_caller)
PAIR(reads_outside_mask)
PAIR(odd_width)
PAIR(barrier_count)
PAIR(misaligned_load)
PAIR(misaligned_ldmatrix)
PAIR(misaligned_copy)
PAIR(early_read)
PAIR(early_plain_read)
PAIR(copy_over_copy)
PAIR(copy_to_local)
PAIR(partial_warp)
PAIR(far_write)
PAIR(near_write)
PAIR(near_read)
PAIR(shared_overflow)
PAIR(static_overflow)
PAIR(uninitialised)
PAIR(far_fill)
PAIR(fault_in_malloc)
PAIR(fault_in_explanation)
PAIR(division_by_zero)
PAIR(stack_overflow)
PAIR(trap)
PAIR(assertion)
PAIR(race_of_blocks)
PAIR(missing_fence)
PAIR(wgmma_early_read)
PAIR(wgmma_missing_commit)
PAIR(wgmma_missing_fence)
PAIR(wgmma_loaded_registers)
PAIR(wgmma_unseen_store)
PAIR(wgmma_unseen_copy)
PAIR(wgmma_divergence)
PAIR(wgmma_early_return)
PAIR(wgmma_partial_warpgroup)
PAIR(wgmma_descriptors)
PAIR(wgmma_misaligned_atom)
PAIR(wgmma_misaligned_memory)
PAIR(wgmma_overwritten)
PAIR(wgmma_written_accumulators)
TENSOR_PAIR(tensor_copy_early_read)
TENSOR_PAIR(tensor_copy_wrong_parity)
TENSOR_PAIR(tensor_copy_wrong_bytes)
TENSOR_PAIR(tensor_copy_early_phase)
TENSOR_PAIR(tensor_copy_unseen_barrier)
TENSOR_PAIR(tensor_copy_unseen_store)
TENSOR_PAIR(tensor_copy_early_barrier)
TENSOR_PAIR(tensor_copy_unknown_barrier)
TENSOR_PAIR(tensor_copy_overwrites)
TENSOR_PAIR(tensor_copy_never_awaited)
TENSOR_PAIR(tensor_copy_misaligned)
PAIR(never_waits)
PAIR(waits_late)
