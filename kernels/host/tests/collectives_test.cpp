// Shuffles, votes, reductions, barriers and atomics against what CUDA says they do.

#include <cmath>

#include "harness.hpp"

using namespace harness;

namespace {

constexpr int threads = 64;

void check_shuffles(int argument, int width) {
    Kernel kernel("shuffles");
    Buffer<int> in(iota<int>(threads)), out(4 * threads);
    OK(kernel.launch(1, threads, 0, in.pointer, out.pointer, argument, width));
    const std::vector<int> got = out.read();
    for (int thread = 0; thread < threads; ++thread) {
        const int warp = thread / 32 * 32, lane = thread % 32;
        const int first = lane / width * width, last = first + width - 1;
        const int up = lane - argument, down = lane + argument, crossed = lane ^ argument;
        CHECK_EQUAL(got[thread], warp + first + argument % width);
        CHECK_EQUAL(got[threads + thread], warp + (up < first ? lane : up));
        CHECK_EQUAL(got[2 * threads + thread], warp + (down > last ? lane : down));
        CHECK_EQUAL(got[3 * threads + thread], warp + (crossed > last ? lane : crossed));
    }
}

} // namespace

TEST(collectives_shuffles) {
    Context context;
    for (int width : {32, 16, 4, 1})
        for (int argument : {0, 1, 3, 5, 15, 16, 31}) check_shuffles(argument, width);
}

TEST(collectives_shuffle_types) {
    Context context;
    Kernel kernel("shuffle_types");
    std::vector<double> values;
    for (int i = 0; i < threads; ++i) values.push_back(1.0 / (i + 3));
    Buffer<double> in(values), out(3 * threads);
    OK(kernel.launch(1, threads, 0, in.pointer, out.pointer));
    const std::vector<double> got = out.read();
    for (int thread = 0; thread < threads; ++thread) {
        const int lane = thread % 32;
        CHECK_EQUAL(got[thread], values[thread ^ 1]);
        CHECK_EQUAL(got[threads + thread], lane + 3 < 32 ? lane + 3 : lane);
        CHECK_EQUAL(got[2 * threads + thread], lane < 16 ? lane ^ 8 : lane ^ 4);
    }
}

TEST(collectives_votes) {
    Context context;
    Kernel kernel("votes");
    Buffer<int> in(iota<int>(32));
    Buffer<unsigned> out(12 * 32);
    OK(kernel.launch(1, 32, 0, in.pointer, out.pointer));
    const std::vector<unsigned> got = out.read();
    for (int lane = 0; lane < 32; ++lane) {
        const unsigned expected[12] = {
            0xaaaaaaaau, 1, 1, 0x11111111u << lane % 4, 496, unsigned(-16), 15, 8, 31, 0, 1u << lane, 7};
        for (int i = 0; i < 12; ++i) CHECK_EQUAL(got[32 * i + lane], expected[i]);
    }
}

TEST(collectives_block_votes) {
    Context context;
    Kernel kernel("block_votes");
    for (int nonzero : {0, 1, 37, 48}) {
        std::vector<int> flags(48);
        for (int i = 0; i < nonzero; ++i) flags[i] = i + 1;
        Buffer<int> in(flags), out(3 * 48);
        OK(kernel.launch(1, 48, 0, in.pointer, out.pointer));
        const std::vector<int> got = out.read();
        for (int thread = 0; thread < 48; ++thread) {
            CHECK_EQUAL(got[thread], nonzero);
            CHECK_EQUAL(got[48 + thread], int(nonzero == 48));
            CHECK_EQUAL(got[96 + thread], int(nonzero > 0));
        }
    }
}

TEST(collectives_named_barriers) {
    Context context;
    Kernel kernel("producer_consumer");
    Buffer<float> in(iota<float>(64)), out(64);
    for (uint64_t seed = 0; seed < 8; ++seed) {
        effnetv2_host_set_seed(seed);
        OK(kernel.launch(1, 128, 64 * sizeof(float), in.pointer, out.pointer));
        const std::vector<float> got = out.read();
        for (int i = 0; i < 64; ++i) CHECK_EQUAL(got[i], 2.0f * float(63 - i));
    }
    effnetv2_host_set_seed(1);
}

TEST(collectives_atomics) {
    Context context;
    Kernel kernel("atomics");
    constexpr int blocks = 5, block = 70, count = blocks * block;
    Buffer<int> counters(std::vector<int>(8));
    Buffer<float> total(std::vector<float>(1));
    Buffer<unsigned long long> wide(std::vector<unsigned long long>(1));
    OK(kernel.launch(blocks, block, 0, counters.pointer, total.pointer, wide.pointer));
    const int expected[8] = {
        count * (count - 1) / 2, count - 1, 1 - count, 0x7fffffff, -count, count % 10, 3 * count, count};
    const std::vector<int> got = counters.read();
    for (int i = 0; i < 8; ++i) CHECK_EQUAL(got[i], expected[i]);
    CHECK_EQUAL(total.read()[0], count * 0.5f);
    CHECK_EQUAL(wide.read()[0], (unsigned long long)count << 32);
}

TEST(collectives_indices) {
    Context context;
    Kernel kernel("indices");
    const dim3 grid(3, 2, 4), block(5, 3, 2);
    constexpr int count = 24 * 30;
    for (uint64_t seed : {0, 1, 2}) {
        effnetv2_host_set_seed(seed);
        Buffer<int> out(count);
        OK(kernel.launch(grid, block, 0, out.pointer));
        CHECK(out.read() == iota<int>(count));
    }
    effnetv2_host_set_seed(1);
}
