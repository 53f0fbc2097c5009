// Boxes of a matrix as they lie in shared memory.

#include "../../../include/ptx.cuh"

/// y [count, bytes]: what the box from `column` and `row` on is in shared memory, and those `step` rows further each time, all to
/// one place. bytes is a multiple of 1024.
extern "C" __global__ void tensor_copy_boxes(const __grid_constant__ TensorMap x, uint4* y, unsigned bytes, unsigned column,
                                             unsigned row, unsigned step, unsigned count) {
    auto* box = dynamic_shared<unsigned char, 1024>();
    auto* full = dynamic_shared<uint64_t>(bytes);
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_proxy_async_shared();
    }
    for (unsigned i = 0; i < count; ++i) {
        __syncthreads();
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(full, bytes);
            tensor_copy(box, x, column, row + i * step, full);
        }
        mbarrier_wait(full, i % 2);
        for (unsigned piece = threadIdx.x; piece < bytes / 16; piece += blockDim.x)
            y[i * bytes / 16 + piece] = load16<uint4>(box + 16 * piece);
    }
}

EFFNETV2_KERNEL(tensor_copy_boxes)
