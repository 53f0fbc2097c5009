#include "collectives.hpp"

namespace host {
namespace {

template <class Visit> void for_each_lane(uint32_t mask, Visit visit) {
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1u) visit(lane);
}

void exchange_shuffle(const Lanes& lanes) {
    for_each_lane(lanes.mask(), [&](unsigned lane) {
        auto& operands = lanes.operands<ShuffleOperands>(lane);
        if (!lanes.has(operands.source))
            return lanes.fail(lane, "reads lane %u, which is not among the lanes 0x%08x that take part",
                              operands.source, lanes.mask());
        operands.result = lanes.operands<ShuffleOperands>(operands.source).value;
    });
}

void exchange_nothing(const Lanes&) {}

void exchange_ballot(const Lanes& lanes) {
    uint32_t ballot = 0;
    for_each_lane(lanes.mask(), [&](unsigned lane) {
        if (lanes.operands<VoteOperands>(lane).value != 0) ballot |= 1u << lane;
    });
    for_each_lane(lanes.mask(), [&](unsigned lane) { lanes.operands<VoteOperands>(lane).result = ballot; });
}

void exchange_matches(const Lanes& lanes) {
    for_each_lane(lanes.mask(), [&](unsigned lane) {
        auto& own = lanes.operands<VoteOperands>(lane);
        uint32_t same = 0;
        for_each_lane(lanes.mask(), [&](unsigned other) {
            if (lanes.operands<VoteOperands>(other).value == own.value) same |= 1u << other;
        });
        own.result = same;
    });
}

template <uint32_t (*combine)(uint32_t, uint32_t)> void exchange_reduction(const Lanes& lanes) {
    bool first = true;
    uint32_t total = 0;
    for_each_lane(lanes.mask(), [&](unsigned lane) {
        const auto value = uint32_t(lanes.operands<VoteOperands>(lane).value);
        total = first ? value : combine(total, value);
        first = false;
    });
    for_each_lane(lanes.mask(), [&](unsigned lane) { lanes.operands<VoteOperands>(lane).result = total; });
}

uint32_t add(uint32_t a, uint32_t b) { return a + b; }
uint32_t bit_and(uint32_t a, uint32_t b) { return a & b; }
uint32_t bit_or(uint32_t a, uint32_t b) { return a | b; }
uint32_t bit_xor(uint32_t a, uint32_t b) { return a ^ b; }
uint32_t smaller(uint32_t a, uint32_t b) { return b < a ? b : a; }
uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }
uint32_t smaller_signed(uint32_t a, uint32_t b) { return int32_t(b) < int32_t(a) ? b : a; }
uint32_t larger_signed(uint32_t a, uint32_t b) { return int32_t(a) < int32_t(b) ? b : a; }

char device_fence_tag;

} // namespace

const Collective shfl_sync{"__shfl_sync", exchange_shuffle};
const Collective shfl_up_sync{"__shfl_up_sync", exchange_shuffle};
const Collective shfl_down_sync{"__shfl_down_sync", exchange_shuffle};
const Collective shfl_xor_sync{"__shfl_xor_sync", exchange_shuffle};
const Collective syncwarp{"__syncwarp", exchange_nothing, false, true};
const Collective ballot_sync{"__ballot_sync", exchange_ballot};
const Collective match_any_sync{"__match_any_sync", exchange_matches};
const Collective reduce_add_sync{"__reduce_add_sync", exchange_reduction<add>};
const Collective reduce_and_sync{"__reduce_and_sync", exchange_reduction<bit_and>};
const Collective reduce_or_sync{"__reduce_or_sync", exchange_reduction<bit_or>};
const Collective reduce_xor_sync{"__reduce_xor_sync", exchange_reduction<bit_xor>};
const Collective reduce_min_sync{"__reduce_min_sync", exchange_reduction<smaller>};
const Collective reduce_max_sync{"__reduce_max_sync", exchange_reduction<larger>};
const Collective reduce_min_sync_signed{"__reduce_min_sync", exchange_reduction<smaller_signed>};
const Collective reduce_max_sync_signed{"__reduce_max_sync", exchange_reduction<larger_signed>};

void check_width(const Collective& shuffle, int width, SourceLine at) {
    if (width >= 1 && width <= 32 && (width & (width - 1)) == 0) return;
    fail(Code::launch_failed, at, "%s: width %d is not a power of two up to 32", shuffle.name, width);
}

// A fence publishes what the thread has written and adopts what others have published, so that "write, fence,
// count an arrival; if last: fence, read" is in order, and the same without a fence is a race.
void fence_block() {
    void* tag = this_thread().block.fence_tag();
    sanitizer::release(tag);
    sanitizer::acquire(tag);
}

void fence_device() {
    sanitizer::release(&device_fence_tag);
    sanitizer::acquire(&device_fence_tag);
}

} // namespace host
