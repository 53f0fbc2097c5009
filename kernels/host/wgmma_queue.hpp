// The products of a warpgroup that a thread has issued and not yet waited for, and what must come before the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "source_line.hpp"

namespace host {

/// Accumulators under way: poisoned until their last group is waited for.
struct WgmmaProduct {
    float* accumulators;
    std::vector<float> sums;
    /// Which commit group it belongs to, counted from the thread's start.
    unsigned group;
    SourceLine at;
};

/// 16 bytes of shared memory that products under way read, as they were when the first of them was issued.
struct WgmmaPiece {
    const unsigned char* address;
    uint32_t words[4];
    unsigned group;
    SourceLine at;
};

class WgmmaQueue {
  public:
    /// The next registers that ordinary instructions write are known to the products after it, all so far are.
    void fence() {
        fenced_ = true;
        written_.clear();
    }
    bool fenced() const { return fenced_; }

    /// ldmatrix has written these registers of the thread. Only the latest are kept: kernels without products write
    /// many.
    void note_registers(const uint32_t* registers, unsigned count, SourceLine at) {
        if (written_.size() == 64) written_.clear();
        written_.push_back({registers, count, at});
    }

    /// Where ldmatrix has written any of these four since the last fence, or nullptr.
    const SourceLine* written(const uint32_t* registers) const {
        for (const Written& one : written_)
            if (one.registers < registers + 4 && registers < one.registers + one.count) return &one.at;
        return nullptr;
    }

    /// The product under way that has any of these accumulators, or nullptr.
    WgmmaProduct* find(const float* accumulators, size_t count) {
        for (WgmmaProduct& product : products_)
            if (product.accumulators < accumulators + count &&
                accumulators < product.accumulators + product.sums.size())
                return &product;
        return nullptr;
    }

    WgmmaProduct& push(float* accumulators, size_t count, SourceLine at) {
        products_.push_back({accumulators, {accumulators, accumulators + count}, open_group_, at});
        return products_.back();
    }

    /// The open group works on it, too.
    void join(WgmmaProduct& product, SourceLine at) {
        product.group = open_group_;
        product.at = at;
    }

    WgmmaPiece& read(const unsigned char* address, SourceLine at) {
        pieces_.push_back({address, {}, open_group_, at});
        return pieces_.back();
    }

    void commit() { ++open_group_; }

    /// Takes out everything that `wait_group pending` guarantees: all but the `pending` newest groups.
    template <class Check, class Deliver> void wait(unsigned pending, Check check, Deliver deliver) {
        const auto is_done = [&](unsigned group) { return group + pending < open_group_; };
        size_t done = 0;
        while (done < pieces_.size() && is_done(pieces_[done].group)) check(pieces_[done++]);
        pieces_.erase(pieces_.begin(), pieces_.begin() + long(done));
        for (size_t i = 0; i < products_.size();) {
            if (!is_done(products_[i].group)) {
                ++i;
                continue;
            }
            deliver(products_[i]);
            products_.erase(products_.begin() + long(i));
            fenced_ = false;
        }
    }

    /// What SharedMemory::mark keeps of a write by this thread: who, and how many fences before.
    uint32_t mark_of(unsigned rank) const { return (rank + 1) | proxy_fences_ << 11; }
    void fence_proxy() { ++proxy_fences_; }

    void clear() {
        products_.clear();
        pieces_.clear();
        written_.clear();
        open_group_ = proxy_fences_ = 0;
        fenced_ = false;
    }

  private:
    struct Written {
        const uint32_t* registers;
        unsigned count;
        SourceLine at;
    };

    std::vector<WgmmaProduct> products_;
    std::vector<WgmmaPiece> pieces_;
    std::vector<Written> written_;
    unsigned open_group_ = 0;
    uint32_t proxy_fences_ = 0;
    bool fenced_ = false;
};

} // namespace host
