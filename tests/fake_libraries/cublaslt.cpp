// The part of cuBLASLt that effnetv2 calls, computed by loops on this machine's memory: it says what the calls mean by
// NVIDIA's documentation, and so whether they are made rightly. FAKE_LIBRARIES=wrong spoils the results of the first
// algorithm, =all those of every one.
#include <cstdlib>
#include <cstring>
#include "numbers.h"

namespace {
enum { SUCCESS = 0, INVALID = 7, UNSUPPORTED = 15 };
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t pitch;
};
enum Compute { COMPUTE_F32 = 68, COMPUTE_FAST_TF32 = 77 };
struct Description {
    int compute, scale, transposed[2] = {0, 0};
};
struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
bool spoils(uint64_t algorithm) {
    const char* mode = std::getenv("FAKE_LIBRARIES");
    return mode && (!std::strcmp(mode, "all") || (!std::strcmp(mode, "wrong") && algorithm == 1));
}
}  // namespace

extern "C" {
int cublasLtCreate(void** handle) {
    *handle = new int(42);
    return SUCCESS;
}
int cublasLtDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return SUCCESS;
}
size_t cublasLtGetVersion() { return 130200; }
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
    *layout = new Layout{type, rows, columns, pitch};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
int cublasLtMatmulDescCreate(Description** description, int compute, int scale) {
    *description = new Description{compute, scale};
    return (compute == COMPUTE_F32 || compute == COMPUTE_FAST_TF32) && scale == F32 ? SUCCESS : UNSUPPORTED;
}
int cublasLtMatmulDescSetAttribute(Description* description, int name, const void* value, size_t size) {
    if ((name != 3 && name != 4) || size != sizeof(int)) return INVALID;
    std::memcpy(&description->transposed[name - 3], value, size);
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(Description* description) {
    delete description;
    return SUCCESS;
}
int cublasLtMatmulPreferenceCreate(size_t** preference) {
    *preference = new size_t(0);
    return SUCCESS;
}
int cublasLtMatmulPreferenceSetAttribute(size_t* preference, int name, const void* value, size_t size) {
    if (name != 1 || size != sizeof(size_t)) return INVALID;
    std::memcpy(preference, value, size);
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(size_t* preference) {
    delete preference;
    return SUCCESS;
}
int cublasLtMatmulAlgoGetHeuristic(void*, Description*, Layout*, Layout*, Layout*, Layout*, size_t* preference, int asked,
                                   Heuristic* found, int* count) {
    if (*preference == 0 || asked < 3) return INVALID;
    // The second cannot run.
    for (int i = 0; i < 3; ++i) found[i] = {{{uint64_t(i + 1)}}, 0, i == 1 ? UNSUPPORTED : SUCCESS, 1.0f, {}};
    *count = 3;
    return SUCCESS;
}
int cublasLtMatmul(void*, Description* description, const float* alpha, const void* a, Layout* a_layout, const void* b,
                   Layout* b_layout, const float* beta, const void* c, Layout* c_layout, void* d, Layout* d_layout,
                   const Algorithm* algorithm, void* workspace, size_t, void* stream) {
    const bool ta = description->transposed[0], tb = description->transposed[1];
    const uint64_t height = ta ? a_layout->columns : a_layout->rows, depth = ta ? a_layout->rows : a_layout->columns;
    const uint64_t width = tb ? b_layout->rows : b_layout->columns;
    if (depth != (tb ? b_layout->columns : b_layout->rows) || height != d_layout->rows || width != d_layout->columns ||
        c_layout != d_layout || !workspace || !stream)
        return INVALID;
    const bool in_tf32 = description->compute == COMPUTE_FAST_TF32;
    if (in_tf32 && (a_layout->type != F32 || b_layout->type != F32)) return UNSUPPORTED;
    const auto factor = [&](const void* data, uint64_t at, int type) {
        const float value = load(data, at, type);
        return in_tf32 ? to_tf32(value) : value;
    };
    for (uint64_t j = 0; j < width; ++j)
        for (uint64_t i = 0; i < height; ++i) {
            float sum = 0;
            for (uint64_t k = 0; k < depth; ++k) {
                const uint64_t at = ta ? k + i * a_layout->pitch : i + k * a_layout->pitch;
                const uint64_t bt = tb ? j + k * b_layout->pitch : k + j * b_layout->pitch;
                sum += factor(a, at, a_layout->type) * factor(b, bt, b_layout->type);
            }
            const uint64_t to = i + j * d_layout->pitch;
            float value = *alpha * sum;
            if (*beta != 0) value += *beta * load(c, to, c_layout->type);
            store(d, to, d_layout->type, spoils(algorithm->data[0]) ? value + 1 : value);
        }
    return SUCCESS;
}
}
