// Every kind of parameter a kernel may take, for the signature strings.

#include "../../../include/types.cuh"

namespace {

struct Geometry {
    const float* data;
    int extent[3];
};

} // namespace

extern "C" __global__ void parameters(const void* pointer, int8_t i8, uint8_t u8, int16_t i16, uint16_t u16,
                                      int i32, unsigned u32, long long i64, unsigned long long u64, f16 half,
                                      bf16 brain, float single, double wide, Geometry geometry, double* out) {
    out[0] = pointer == nullptr ? 0.0 : 1.0;
    out[1] = i8, out[2] = u8, out[3] = i16, out[4] = u16, out[5] = i32, out[6] = u32;
    out[7] = double(i64), out[8] = double(u64), out[9] = to_float(half), out[10] = to_float(brain);
    out[11] = single, out[12] = wide;
    out[13] = geometry.data[0] + geometry.extent[0] + 10 * geometry.extent[1] + 100 * geometry.extent[2];
}

EFFNETV2_KERNEL(parameters)
