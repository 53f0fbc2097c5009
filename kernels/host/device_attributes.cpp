#include "device_attributes.hpp"

#include "launch.hpp"

namespace host {

int device_attribute(int attribute) {
    switch (attribute) {
    case 1:
        return max_block_threads; // MAX_THREADS_PER_BLOCK
    case 2:
        return 1024; // MAX_BLOCK_DIM_X
    case 3:
        return 1024; // MAX_BLOCK_DIM_Y
    case 4:
        return 64; // MAX_BLOCK_DIM_Z
    case 5:
        return 0x7fffffff; // MAX_GRID_DIM_X
    case 6:
        return 65535; // MAX_GRID_DIM_Y
    case 7:
        return 65535; // MAX_GRID_DIM_Z
    case 8:
        return default_shared_bytes; // MAX_SHARED_MEMORY_PER_BLOCK
    case 10:
        return warp_size; // WARP_SIZE
    case 12:
        return 65536; // MAX_REGISTERS_PER_BLOCK
    case 13:
        return 1000000; // CLOCK_RATE, kHz
    case 14:
        return 512; // TEXTURE_ALIGNMENT
    case 16:
        return multiprocessors; // MULTIPROCESSOR_COUNT
    case 31:
        return 1; // CONCURRENT_KERNELS
    case 38:
        return 4 << 20; // L2_CACHE_SIZE
    case 39:
        return threads_per_multiprocessor; // MAX_THREADS_PER_MULTIPROCESSOR
    case 40:
        return 1; // ASYNC_ENGINE_COUNT
    case 41:
        return 1; // UNIFIED_ADDRESSING
    case 75:
        return 8; // COMPUTE_CAPABILITY_MAJOR
    case 76:
        return 0; // COMPUTE_CAPABILITY_MINOR
    case 78:
        return 1; // STREAM_PRIORITIES_SUPPORTED
    case 81:
        return 228 << 10; // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 82:
        return 65536; // MAX_REGISTERS_PER_MULTIPROCESSOR
    case 97:
        return max_shared_bytes; // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 106:
        return blocks_per_multiprocessor; // MAX_BLOCKS_PER_MULTIPROCESSOR
    case 111:
        return 1 << 10; // RESERVED_SHARED_MEMORY_PER_BLOCK
    case 115:
        return 1; // MEMORY_POOLS_SUPPORTED
    default:
        return 0;
    }
}

} // namespace host
