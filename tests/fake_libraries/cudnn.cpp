// The part of cuDNN that effnetv2 calls, computed by loops on this machine's memory; see cublaslt.cpp.
#include <cstdlib>
#include <cstring>
#include "numbers.h"

namespace {
enum { SUCCESS = 0, INVALID = 2000, UNSUPPORTED = 3000, NHWC = 1 };
struct Tensor {
    int type, n, c, h, w;
};
struct Filter {
    int type, out, in, h, w;
};
struct Convolution {
    int pad, stride, groups, math;
};
struct Performance {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};
int known(int type) { return type == 0 ? F32 : type == 9 ? BF16 : -1; }
bool spoils(int algorithm) {
    const char* mode = std::getenv("FAKE_LIBRARIES");
    return mode && (!std::strcmp(mode, "all") || (!std::strcmp(mode, "wrong") && algorithm == 1));
}
// As documented the results come sorted, and those that failed say so; the second needs more memory than there is.
int found(Performance* results, int asked, int* count, int math) {
    if (asked < 4) return INVALID;
    results[0] = {1, SUCCESS, 0.5f, 0, 0, math, {}};
    results[1] = {5, SUCCESS, 0.7f, size_t(1) << 40, 0, math, {}};
    results[2] = {0, SUCCESS, 1.0f, 0, 1, 3, {}};
    results[3] = {2, UNSUPPORTED, -1.0f, 0, 0, math, {}};
    *count = 4;
    return SUCCESS;
}
bool fits(const Tensor& x, const Filter& w, const Convolution& conv, const Tensor& y) {
    return x.type >= 0 && x.type == w.type && x.type == y.type && x.n == y.n && x.c == w.in * conv.groups &&
           y.c == w.out && (x.h + 2 * conv.pad - w.h) / conv.stride + 1 == y.h &&
           (x.w + 2 * conv.pad - w.w) / conv.stride + 1 == y.w;
}
// Calls visit(index in x, index in w, index in y) for every product of the convolution.
template <class Visit>
void products(const Tensor& x, const Filter& w, const Convolution& conv, const Tensor& y, Visit visit) {
    const int per_group = w.out / conv.groups;
    for (int n = 0; n < y.n; ++n)
        for (int i = 0; i < y.h; ++i)
            for (int j = 0; j < y.w; ++j)
                for (int o = 0; o < y.c; ++o)
                    for (int r = 0; r < w.h; ++r)
                        for (int s = 0; s < w.w; ++s) {
                            const int row = i * conv.stride + r - conv.pad, column = j * conv.stride + s - conv.pad;
                            if (row < 0 || row >= x.h || column < 0 || column >= x.w) continue;
                            for (int c = 0; c < w.in; ++c)
                                visit(((size_t(n) * x.h + row) * x.w + column) * x.c + o / per_group * w.in + c,
                                      ((size_t(o) * w.h + r) * w.w + s) * w.in + c,
                                      ((size_t(n) * y.h + i) * y.w + j) * y.c + o);
                        }
}
int finish(float* sums, size_t length, void* to, int type, int algorithm) {
    for (size_t i = 0; i < length; ++i) store(to, i, type, spoils(algorithm) ? sums[i] + 1 : sums[i]);
    delete[] sums;
    return SUCCESS;
}
}  // namespace

extern "C" {
int cudnnCreate(void** handle) {
    *handle = new int(42);
    return SUCCESS;
}
int cudnnDestroy(void* handle) {
    delete static_cast<int*>(handle);
    return SUCCESS;
}
size_t cudnnGetVersion() { return 91300; }
int cudnnSetStream(void*, void* stream) { return stream ? SUCCESS : INVALID; }
int cudnnCreateTensorDescriptor(Tensor** tensor) {
    *tensor = new Tensor{};
    return SUCCESS;
}
int cudnnSetTensor4dDescriptor(Tensor* tensor, int format, int type, int n, int c, int h, int w) {
    *tensor = {known(type), n, c, h, w};
    return format == NHWC ? SUCCESS : UNSUPPORTED;
}
int cudnnDestroyTensorDescriptor(Tensor* tensor) {
    delete tensor;
    return SUCCESS;
}
int cudnnCreateFilterDescriptor(Filter** filter) {
    *filter = new Filter{};
    return SUCCESS;
}
int cudnnSetFilter4dDescriptor(Filter* filter, int type, int format, int out, int in, int h, int w) {
    *filter = {known(type), out, in, h, w};
    return format == NHWC ? SUCCESS : UNSUPPORTED;
}
int cudnnDestroyFilterDescriptor(Filter* filter) {
    delete filter;
    return SUCCESS;
}
int cudnnCreateConvolutionDescriptor(Convolution** conv) {
    *conv = new Convolution{};
    return SUCCESS;
}
int cudnnSetConvolution2dDescriptor(Convolution* conv, int pad_h, int pad_w, int u, int v, int dilation_h, int dilation_w,
                                    int mode, int compute) {
    // Cross-correlation, summed in f32.
    if (pad_h != pad_w || u != v || dilation_h != 1 || dilation_w != 1 || mode != 1 || compute != 0) return UNSUPPORTED;
    *conv = {pad_h, u, 1, 0};
    return SUCCESS;
}
int cudnnSetConvolutionGroupCount(Convolution* conv, int groups) {
    conv->groups = groups;
    return SUCCESS;
}
int cudnnSetConvolutionMathType(Convolution* conv, int math) {
    conv->math = math;
    return SUCCESS;
}
int cudnnDestroyConvolutionDescriptor(Convolution* conv) {
    delete conv;
    return SUCCESS;
}
int cudnnFindConvolutionForwardAlgorithmEx(void*, Tensor* x, const void*, Filter* w, const void*, Convolution* conv,
                                           Tensor* y, void*, int asked, int* count, Performance* results, void* scratch,
                                           size_t) {
    return fits(*x, *w, *conv, *y) && scratch ? found(results, asked, count, conv->math) : INVALID;
}
int cudnnFindConvolutionBackwardDataAlgorithmEx(void*, Filter* w, const void*, Tensor* dy, const void*, Convolution* conv,
                                                Tensor* dx, void*, int asked, int* count, Performance* results,
                                                void* scratch, size_t) {
    return fits(*dx, *w, *conv, *dy) && scratch ? found(results, asked, count, conv->math) : INVALID;
}
int cudnnFindConvolutionBackwardFilterAlgorithmEx(void*, Tensor* x, const void*, Tensor* dy, const void*,
                                                  Convolution* conv, Filter* dw, void*, int asked, int* count,
                                                  Performance* results, void* scratch, size_t) {
    return fits(*x, *dw, *conv, *dy) && scratch ? found(results, asked, count, conv->math) : INVALID;
}
int cudnnConvolutionForward(void*, const float* alpha, Tensor* x, const void* x_data, Filter* w, const void* w_data,
                            Convolution* conv, int algorithm, void*, size_t, const float* beta, Tensor* y, void* y_data) {
    if (*alpha != 1 || *beta != 0 || !fits(*x, *w, *conv, *y)) return INVALID;
    const size_t length = size_t(y->n) * y->h * y->w * y->c;
    float* sums = new float[length]();
    products(*x, *w, *conv, *y, [&](size_t i, size_t k, size_t o) {
        sums[o] += load(x_data, i, x->type) * load(w_data, k, x->type);
    });
    return finish(sums, length, y_data, y->type, algorithm);
}
int cudnnConvolutionBackwardData(void*, const float* alpha, Filter* w, const void* w_data, Tensor* dy, const void* dy_data,
                                 Convolution* conv, int algorithm, void*, size_t, const float* beta, Tensor* dx,
                                 void* dx_data) {
    if (*alpha != 1 || *beta != 0 || !fits(*dx, *w, *conv, *dy)) return INVALID;
    const size_t length = size_t(dx->n) * dx->h * dx->w * dx->c;
    float* sums = new float[length]();
    products(*dx, *w, *conv, *dy, [&](size_t i, size_t k, size_t o) {
        sums[i] += load(dy_data, o, dy->type) * load(w_data, k, dy->type);
    });
    return finish(sums, length, dx_data, dx->type, algorithm);
}
int cudnnConvolutionBackwardFilter(void*, const float* alpha, Tensor* x, const void* x_data, Tensor* dy,
                                   const void* dy_data, Convolution* conv, int algorithm, void*, size_t, const float* beta,
                                   Filter* dw, void* dw_data) {
    if (*alpha != 1 || *beta != 0 || !fits(*x, *dw, *conv, *dy)) return INVALID;
    const size_t length = size_t(dw->out) * dw->h * dw->w * dw->in;
    float* sums = new float[length]();
    products(*x, *dw, *conv, *dy, [&](size_t i, size_t k, size_t o) {
        sums[k] += load(x_data, i, x->type) * load(dy_data, o, x->type);
    });
    return finish(sums, length, dw_data, x->type, algorithm);
}
}
