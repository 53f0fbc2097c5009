// The scheduler's dice (splitmix64): the same seed and block always give the same order.
#pragma once

#include <cstdint>
#include <utility>

namespace host {

class Random {
  public:
    explicit Random(uint64_t seed = 0) : state_(seed) {}

    uint64_t next() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }

    /// Uniform in [0, bound), up to a bias of bound / 2^64.
    uint64_t below(uint64_t bound) { return next() % bound; }

    template <class Vector> void shuffle(Vector& items) {
        for (uint64_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
    }

  private:
    uint64_t state_;
};

} // namespace host
