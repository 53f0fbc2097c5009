// mma, ldmatrix, stmatrix, cp.async, packed conversions and the approximate functions against plain C++.

#include <cmath>

#include "../half_types.hpp"
#include "harness.hpp"

using namespace harness;

namespace {

uint16_t bits_of(__nv_bfloat16, float x) { return host::bfloat16_bits(x); }
uint16_t bits_of(__half, float x) { return host::half_bits(x); }

/// d = a b + c of small integers, which every format and every order of summation gives exactly.
template <class T> void check_mma(const char* name) {
    Numbers numbers;
    std::vector<uint16_t> a, b;
    std::vector<float> c, a_values, b_values;
    for (int i = 0; i < 16 * 16; ++i) a_values.push_back(float(numbers.integer(-9, 9)));
    for (int i = 0; i < 8 * 16; ++i) b_values.push_back(float(numbers.integer(-9, 9)));
    for (int i = 0; i < 16 * 8; ++i) c.push_back(float(numbers.integer(-99, 99)));
    for (float x : a_values) a.push_back(bits_of(T(), x));
    for (float x : b_values) b.push_back(bits_of(T(), x));
    Kernel kernel(name);
    Buffer<uint16_t> device_a(a), device_b(b);
    Buffer<float> device_c(c), device_d(c.size());
    OK(kernel.launch(1, 32, 0, device_a.pointer, device_b.pointer, device_c.pointer, device_d.pointer));
    const std::vector<float> d = device_d.read();
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float sum = c[8 * row + column];
            for (int k = 0; k < 16; ++k) sum += a_values[16 * row + k] * b_values[16 * column + k];
            CHECK_EQUAL(d[8 * row + column], sum);
        }
}

void check_ldmatrix(const std::string& name, int count, bool transposed) {
    std::vector<uint16_t> elements;
    for (int i = 0; i < 256; ++i) elements.push_back(uint16_t(1000 + 7 * i));
    Kernel kernel(name.c_str());
    Buffer<uint16_t> in(elements);
    Buffer<uint32_t> out(size_t(32 * count));
    OK(kernel.launch(1, 32, 512, in.pointer, out.pointer));
    const std::vector<uint32_t> got = out.read();
    for (int matrix = 0; matrix < count; ++matrix)
        for (int lane = 0; lane < 32; ++lane) {
            const auto element = [&](int half) {
                const int major = lane / 4, minor = lane % 4 * 2 + half;
                return uint32_t(elements[64 * matrix + (transposed ? 8 * minor + major : 8 * major + minor)]);
            };
            CHECK_EQUAL(got[32 * matrix + lane], element(0) | element(1) << 16);
        }
}

void check_stmatrix(const char* name, bool transposed) {
    std::vector<uint32_t> registers;
    for (int i = 0; i < 128; ++i) registers.push_back(uint32_t(2 * i) | uint32_t(2 * i + 1) << 16);
    Kernel kernel(name);
    Buffer<uint32_t> in(registers);
    Buffer<uint16_t> out(256);
    OK(kernel.launch(1, 32, 512, in.pointer, out.pointer));
    const std::vector<uint16_t> got = out.read();
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int lane = 0; lane < 32; ++lane)
            for (int half = 0; half < 2; ++half) {
                const int major = lane / 4, minor = lane % 4 * 2 + half;
                const int place = transposed ? 8 * minor + major : 8 * major + minor;
                CHECK_EQUAL(int(got[64 * matrix + place]), 2 * (32 * matrix + lane) + half);
            }
}

} // namespace

TEST(tensor_core_mma) {
    Context context;
    check_mma<__nv_bfloat16>("mma_bf16");
    check_mma<__half>("mma_f16");
}

TEST(tensor_core_mma_tf32) {
    Context context;
    Numbers numbers;
    // 10 fraction bits survive: each operand is an integer below 2^11 plus less than half of its last place.
    std::vector<float> a, b, c;
    for (int i = 0; i < 16 * 8; ++i) a.push_back(float(numbers.integer(1024, 2047)) + 0.25f);
    for (int i = 0; i < 8 * 8; ++i) b.push_back(float(numbers.integer(-8, 8)));
    for (int i = 0; i < 16 * 8; ++i) c.push_back(float(numbers.integer(-99, 99)));
    Kernel kernel("mma_tf32");
    Buffer<float> device_a(a), device_b(b), device_c(c), device_d(c.size());
    OK(kernel.launch(1, 32, 0, device_a.pointer, device_b.pointer, device_c.pointer, device_d.pointer));
    const std::vector<float> d = device_d.read();
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float sum = c[8 * row + column];
            for (int k = 0; k < 8; ++k) sum += floorf(a[8 * row + k]) * b[8 * column + k];
            CHECK_EQUAL(d[8 * row + column], sum);
        }
}

TEST(tensor_core_wgmma) {
    Context context;
    Numbers numbers;
    const unsigned k = 64;
    for (const bool is_bf16 : {false, true})
        for (const unsigned n : {16u, 32u, 48u, 64u, 96u, 128u})
            for (const unsigned groups : {1u, 2u}) {
                const unsigned m = 64 * groups;
                std::vector<uint16_t> a, b;
                std::vector<float> c, a_values, b_values, expected;
                const auto draw = [&](std::vector<uint16_t>& bits, std::vector<float>& values, size_t count) {
                    for (size_t i = 0; i < count; ++i) {
                        values.push_back(float(numbers.integer(-16, 16)));
                        bits.push_back(is_bf16 ? host::bfloat16_bits(values[i]) : host::half_bits(values[i]));
                    }
                };
                draw(a, a_values, m * k);
                draw(b, b_values, n * k);
                for (unsigned i = 0; i < m * n; ++i) {
                    c.push_back(float(numbers.integer(-99, 99)));
                    float sum = c[i];
                    for (unsigned j = 0; j < k; ++j) sum += a_values[i / n * k + j] * b_values[i % n * k + j];
                    expected.push_back(sum);
                }
                Kernel kernel(is_bf16 ? "wgmma_bf16" : "wgmma_f16");
                Buffer<uint16_t> device_a(a), device_b(b);
                Buffer<float> device_c(c);
                for (const int b_rows : {0, 1})
                    for (const unsigned swizzle : {32u, 64u, 128u}) {
                        if (b_rows && 2 * n % swizzle != 0) continue;
                        Buffer<float> device_d(m * n);
                        OK(kernel.launch(1, 128 * groups, 2 * n * k, device_a.pointer, device_b.pointer,
                                         device_c.pointer, device_d.pointer, n, k, b_rows, swizzle));
                        CHECK(device_d.read() == expected);
                    }
            }
}

TEST(tensor_core_ldmatrix) {
    Context context;
    for (int count : {1, 2, 4}) {
        check_ldmatrix("ldmatrix_x" + std::to_string(count), count, false);
        check_ldmatrix("ldmatrix_trans_x" + std::to_string(count), count, true);
    }
}

TEST(tensor_core_stmatrix) {
    Context context;
    check_stmatrix("stmatrix_x4", false);
    check_stmatrix("stmatrix_trans_x4", true);
}

TEST(copy_async_zero_fill) {
    Context context;
    Kernel kernel("copy_async");
    std::vector<unsigned char> bytes;
    for (int i = 0; i < 28; ++i) bytes.push_back(uint8_t(100 + i));
    Buffer<unsigned char> in(bytes);
    for (int source_bytes = 0; source_bytes <= 16; ++source_bytes) {
        Buffer<unsigned char> out(28);
        OK(kernel.launch(1, 32, 28, in.pointer, out.pointer, source_bytes));
        const std::vector<unsigned char> got = out.read();
        for (int i = 0; i < 28; ++i) {
            const int place = i < 16 ? i : i < 24 ? i - 16 : i - 24;
            CHECK_EQUAL(int(got[i]), place < source_bytes ? 100 + i : 0);
        }
    }
}

TEST(conversions_of_packs) {
    Context context;
    Numbers numbers;
    std::vector<float> values;
    std::vector<uint16_t> halves;
    for (int i = 0; i < 512; ++i) values.push_back(numbers.real() * ldexpf(1, numbers.integer(-20, 20)));
    for (float x : values) halves.push_back(host::half_bits(x));
    Buffer<float> in(values), wide(values.size());
    Buffer<uint16_t> narrow(values.size()), half_in(halves);
    OK(Kernel("convert_f32_bf16").launch(1, 64, 0, in.pointer, narrow.pointer));
    OK(Kernel("convert_f16_f32").launch(1, 64, 0, half_in.pointer, wide.pointer));
    const std::vector<uint16_t> bf16s = narrow.read();
    const std::vector<float> floats = wide.read();
    for (size_t i = 0; i < values.size(); ++i) {
        CHECK_EQUAL(bf16s[i], host::bfloat16_bits(values[i]));
        CHECK_EQUAL(floats[i], host::half_value(halves[i]));
    }
}

TEST(approximate_functions) {
    Context context;
    const std::vector<float> x = {0.0f, 1.0f, -1.0f, 0.3f, 4.0f, 1e-40f, 127.5f, -127.5f};
    Buffer<float> in(x), out(6 * x.size());
    OK(Kernel("approximate").launch(1, unsigned(x.size()), 0, in.pointer, out.pointer));
    const std::vector<float> got = out.read();
    const auto flushed = [](float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; };
    const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    for (size_t i = 0; i < x.size(); ++i) {
        const size_t n = x.size();
        CHECK(same(got[i], flushed(exp2f(flushed(x[i])))));
        CHECK(same(got[n + i], log2f(flushed(x[i]))));
        CHECK(same(got[2 * n + i], tanhf(x[i])));
        CHECK(same(got[3 * n + i], 1.0f / flushed(x[i])));
        CHECK(same(got[4 * n + i], 1.0f / sqrtf(flushed(x[i]))));
        CHECK(same(got[5 * n + i], expf(x[i])));
    }
}
