// The driver's entry points that the tests call, as the CUDA driver API declares them.
#pragma once

#include <cstddef>
#include <cstdint>

using CUdeviceptr = unsigned long long;

struct CUlaunchAttribute {
    unsigned id;
    char pad[4];
    union {
        char pad[64];
        int programmaticStreamSerializationAllowed;
        void* of_pointers;
    } value;
};

struct CUlaunchConfig {
    unsigned gridDimX, gridDimY, gridDimZ;
    unsigned blockDimX, blockDimY, blockDimZ;
    unsigned sharedMemBytes;
    void* hStream;
    CUlaunchAttribute* attrs;
    unsigned numAttrs;
};

struct alignas(128) CUtensorMap {
    uint64_t opaque[16];
};

extern "C" {
int cuInit(unsigned flags);
int cuDeviceGet(int* device, int ordinal);
int cuDeviceGetName(char* name, int length, int device);
int cuDeviceGetAttribute(int* value, int attribute, int device);
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuDevicePrimaryCtxRelease_v2(int device);
int cuCtxSetCurrent(void* context);
int cuCtxSynchronize();
int cuGetErrorName(int code, const char** name);
int cuGetErrorString(int code, const char** description);

int cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes);
int cuMemFree_v2(CUdeviceptr pointer);
int cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, void* stream);
int cuMemFreeAsync(CUdeviceptr pointer, void* stream);
int cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags);
int cuMemFreeHost(void* pointer);
int cuMemGetInfo_v2(size_t* free, size_t* total);
int cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes);
int cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes);
int cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, void* stream);
int cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, void* stream);
int cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void* stream);
int cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, void* stream);
int cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void* stream);
int cuDeviceGetDefaultMemPool(void** pool, int device);
int cuMemPoolSetAttribute(void* pool, int attribute, void* value);
int cuMemPoolGetAttribute(void* pool, int attribute, void* value);

int cuStreamCreate(void** stream, unsigned flags);
int cuStreamDestroy_v2(void* stream);
int cuStreamSynchronize(void* stream);
int cuStreamWaitEvent(void* stream, void* event, unsigned flags);
int cuStreamBeginCapture_v2(void* stream, unsigned mode);
int cuStreamEndCapture(void* stream, void** graph);
int cuStreamIsCapturing(void* stream, unsigned* state);
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags);
int cuGraphLaunch(void* executable, void* stream);
int cuGraphGetNodes(void* graph, void** nodes, size_t* count);
int cuGraphExecDestroy(void* executable);
int cuGraphDestroy(void* graph);
int cuEventCreate(void** event, unsigned flags);
int cuEventDestroy_v2(void* event);
int cuEventRecord(void* event, void* stream);
int cuEventSynchronize(void* event);
int cuEventQuery(void* event);
int cuEventElapsedTime(float* milliseconds, void* start, void* end);

int cuModuleLoadData(void** module, const void* image);
int cuModuleUnload(void* module);
int cuModuleGetFunction(void** function, void* module, const char* name);
int cuFuncSetAttribute(void* function, int attribute, int value);
int cuFuncGetAttribute(int* value, int attribute, void* function);
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size);
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** arguments,
                   void** extra);
int cuTensorMapEncodeTiled(CUtensorMap* map, int type, unsigned rank, void* address, const uint64_t* extents,
                           const uint64_t* strides, const unsigned* box, const unsigned* element_strides, int interleave,
                           int swizzle, int promotion, int fill);
int cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** arguments, void** extra);
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int block_threads,
                                                size_t shared);
}
