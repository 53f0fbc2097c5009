// Warp collectives: every lane named in a mask meets at the same call, then values are exchanged. In those of a warpgroup
// all lanes of four warps meet.
#pragma once

#include <cstdint>

#include "source_line.hpp"

namespace host {

class Block;
struct Thread;

/// The lanes that met: their operands, and where an error of the exchange is reported. Lanes of several warps are
/// numbered on from one warp to the next.
class Lanes {
  public:
    Lanes(Block& block, unsigned first, uint32_t mask) : block_(block), first_(first), mask_(mask) {}

    /// The lanes of each warp that take part: named in the mask and existing.
    uint32_t mask() const { return mask_; }
    bool has(unsigned lane) const { return lane < 32 && (mask_ >> lane & 1u); }

    template <class Operands> Operands& operands(unsigned lane) const {
        return *static_cast<Operands*>(raw_operands(lane));
    }

    /// Ends the block with an error of this lane.
    [[gnu::format(printf, 3, 4)]] void fail(unsigned lane, const char* format, ...) const;

  private:
    void* raw_operands(unsigned lane) const;

    Block& block_;
    unsigned first_;
    uint32_t mask_;
};

struct Collective {
    const char* name;
    /// Reads and writes the operands of all lanes once they have met.
    void (*exchange)(const Lanes& lanes);
    /// `.aligned` instructions: all 32 lanes of the warp or none.
    bool whole_warp = false;
    /// Only `__syncwarp` orders memory accesses, and only it may be met from different lines.
    bool is_syncwarp = false;
    /// So many consecutive warps meet, the first a multiple of them; more than one only if they are whole.
    unsigned warps = 1;

    unsigned lanes() const { return 32 * warps; }
};

/// Called on a lane's fiber: waits for the lanes in `mask`, in each of the collective's warps, then returns with the
/// operands exchanged.
void meet(const Collective& collective, uint32_t mask, void* operands, SourceLine at);

} // namespace host
