// f32 to f16 and bf16 against rounding by definition: the nearest representable value, ties to the even one.

#include <cmath>

#include "../half_types.hpp"
#include "harness.hpp"

namespace {

/// All finite non-negative values of a format, ascending; the index of a value is its bit pattern.
std::vector<double> values_of(int exponent_bits, int fraction_bits) {
    std::vector<double> values;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    for (int exponent = 0; exponent < (1 << exponent_bits) - 1; ++exponent)
        for (int fraction = 0; fraction < 1 << fraction_bits; ++fraction) {
            const double significand = (exponent == 0 ? 0.0 : 1.0) + ldexp(fraction, -fraction_bits);
            values.push_back(ldexp(significand, (exponent == 0 ? 1 : exponent) - bias));
        }
    return values;
}

float next(float x, int steps) {
    for (; steps > 0; --steps) x = nextafterf(x, INFINITY);
    for (; steps < 0; ++steps) x = nextafterf(x, -INFINITY);
    return x;
}

/// Every value of the format, every midpoint between neighbours, and the floats next to both.
void check_format(const std::vector<double>& values, uint16_t (*round)(float), float (*widen)(uint16_t)) {
    const uint16_t infinity = uint16_t(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
        CHECK(double(widen(uint16_t(i))) == values[i]);
        CHECK(double(widen(uint16_t(i | 0x8000u))) == -values[i]);
        // Above the largest value the next step of the same size stands for infinity.
        const double above = i + 1 < values.size() ? values[i + 1] : 2 * values[i] - values[i - 1];
        const float middle = float((values[i] + above) / 2);
        CHECK(double(middle) == (values[i] + above) / 2);
        const uint16_t low = uint16_t(i), high = i + 1 < values.size() ? uint16_t(i + 1) : infinity;
        const uint16_t even = low % 2 == 0 ? low : high;
        CHECK_EQUAL(round(float(values[i])), low);
        CHECK_EQUAL(round(middle), even);
        CHECK_EQUAL(round(next(middle, -1)), low);
        CHECK_EQUAL(round(next(middle, 1)), high);
        CHECK_EQUAL(round(-middle), uint16_t(even | 0x8000u));
    }
    CHECK_EQUAL(round(INFINITY), infinity);
    CHECK_EQUAL(round(-INFINITY), uint16_t(infinity | 0x8000u));
    for (uint32_t bits : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu})
        CHECK_EQUAL(round(host::bit_cast<float>(bits)), 0x7fff);
}

} // namespace

TEST(rounding_f16) {
    check_format(values_of(5, 10), host::half_bits, host::half_value);
    CHECK(std::isinf(host::half_value(0x7c00)) && std::isnan(host::half_value(0x7c01)));
    CHECK_EQUAL(host::half_bits(65504.0f), 0x7bff);
    CHECK_EQUAL(host::half_bits(3.4e38f), 0x7c00);
    CHECK_EQUAL(host::half_bits(1e-30f), 0);
}

TEST(rounding_bf16) {
    check_format(values_of(8, 7), host::bfloat16_bits, host::bfloat16_value);
    CHECK_EQUAL(host::bfloat16_bits(1.0f), 0x3f80);
    CHECK_EQUAL(host::bfloat16_bits(-0.0f), 0x8000);
}
