/* The host device's own functions, beside the driver API: how a test steers it and reads what it found.
 * Look them up with dlsym in the library that serves the driver; a real driver has none of them. */
#ifndef EFFNETV2_HOST_CONTROL_H
#define EFFNETV2_HOST_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Message of the last error of the calling thread: which kernel, block, thread, line, and what. Empty before
 * the first error. The text is never freed. cuGetErrorString returns the same for that error's code. */
const char* effnetv2_host_last_error(void);

/* The order in which warps, lanes and blocks run: 0 is first to last, anything else a shuffle (default 1). */
void effnetv2_host_set_seed(uint64_t seed);

/* Operating-system threads that the blocks of a launch are spread over, at least 1. */
void effnetv2_host_set_threads(unsigned threads);

/* Nonzero: work on a stream waits until something waits for it. Zero (default): it runs at once. */
void effnetv2_host_set_deferred(int deferred);

/* How many of the launches that have run were programmatic dependents. */
uint64_t effnetv2_host_dependent_count(void);

/* The kernels in this library, in no particular order; NULL if `index` is out of range or no such kernel
 * exists. A signature has one character for each parameter: p pointer; c C, s S, i I, l L integers of 8, 16,
 * 32, 64 bits (capitals unsigned); h f16, b bf16, f float, d double; {size:alignment} a struct by value. */
size_t effnetv2_host_kernel_count(void);
const char* effnetv2_host_kernel_name(size_t index);
const char* effnetv2_host_kernel_family(size_t index);
const char* effnetv2_host_kernel_signature(const char* name);

#ifdef __cplusplus
}
#endif

#endif
