// The example family: a pipelined tensor-core product with awkward shapes, exact on small integers.

#include "../half_types.hpp"
#include "harness.hpp"

using namespace harness;

namespace {

struct Shape {
    int m, n, k;
};

void check_gemm(const char* name, uint16_t (*round)(float), Shape shape) {
    const auto [m, n, k] = shape;
    Numbers numbers;
    std::vector<int> a(size_t(m * k)), b(size_t(k * n));
    for (int& x : a) x = numbers.integer(-2, 2);
    for (int& x : b) x = numbers.integer(-2, 2);
    std::vector<uint16_t> a_bits, b_bits;
    for (int x : a) a_bits.push_back(round(float(x)));
    for (int x : b) b_bits.push_back(round(float(x)));

    const unsigned tiles_m = unsigned(m + 63) / 64, tiles_n = unsigned(n + 63) / 64;
    Buffer<uint16_t> device_a(a_bits), device_b(b_bits), device_c(size_t(m * n));
    Buffer<float> device_sums(size_t(tiles_m) * size_t(n));
    constexpr unsigned shared = 2 * (64 * 40 + 32 * 72) * 2 + 2 * 64 * 4;
    OK(Kernel(name).launch({tiles_n, tiles_m}, 128, shared, device_a.pointer, device_b.pointer,
                           device_c.pointer, device_sums.pointer, m, n, k));
    const std::vector<uint16_t> c = device_c.read();
    const std::vector<float> sums = device_sums.read();
    std::vector<float> expected_sums(sums.size());
    for (int row = 0; row < m; ++row)
        for (int column = 0; column < n; ++column) {
            int sum = 0;
            for (int i = 0; i < k; ++i) sum += a[size_t(row * k + i)] * b[size_t(i * n + column)];
            CHECK_EQUAL(c[size_t(row * n + column)], round(float(sum)));
            expected_sums[size_t(row / 64 * n + column)] += float(sum);
        }
    CHECK(sums == expected_sums);
}

} // namespace

TEST(example_gemm) {
    Context context;
    for (Shape shape : {Shape{1, 8, 8}, {64, 64, 32}, {65, 72, 40}, {127, 136, 104}}) {
        check_gemm("example_gemm_bf16", host::bfloat16_bits, shape);
        check_gemm("example_gemm_f16", host::half_bits, shape);
    }
}

TEST(example_gemm_seeds) {
    Context context;
    for (uint64_t seed : {0, 7, 12345}) {
        effnetv2_host_set_seed(seed);
        for (unsigned threads : {1u, 3u}) {
            effnetv2_host_set_threads(threads);
            check_gemm("example_gemm_bf16", host::bfloat16_bits, {130, 72, 40});
        }
    }
    effnetv2_host_set_seed(1);
    effnetv2_host_set_threads(2);
}
