#include "collective.hpp"

#include <cstdarg>
#include <cstdio>

#include "block.hpp"
#include "sanitizer.hpp"

namespace host {
namespace {

/// Bit mask of the lanes that this warp has: fewer than 32 where the block is no multiple of it.
uint32_t existing_lanes(const Block& block, unsigned first) {
    const unsigned lanes = block.size() - first;
    return lanes >= warp_size ? ~0u : (1u << lanes) - 1u;
}

/// The first thread of those that meet with this one.
unsigned first_of(const Thread& thread, const Collective& collective) {
    return thread.rank / collective.lanes() * collective.lanes();
}

bool same_call(const Thread& a, const Thread& b) {
    return b.state == State::at_rendezvous && a.collective == b.collective && a.mask == b.mask &&
           (a.collective->is_syncwarp || a.at == b.at);
}

/// Whether everybody whom `thread` waits for has come. Fails the block if somebody no longer can.
bool complete(Block& block, const Thread& thread, uint32_t lanes) {
    const Collective& collective = *thread.collective;
    const unsigned first = first_of(thread, collective);
    for (unsigned lane = 0; lane < collective.lanes(); ++lane) {
        if (!(lanes >> lane % warp_size & 1u)) continue;
        const Thread& other = block.thread(first + lane);
        if (other.state == State::done) {
            const std::string whom =
                collective.warps == 1
                    ? text("names lane %u in its mask 0x%08x, but that lane", lane, thread.mask)
                    : text("waits for all %u threads of its warpgroup, but thread %u of the block",
                           collective.lanes(), first + lane);
            block.set_failure(thread, Code::launch_failed, thread.at,
                              text("%s %s has already returned", collective.name, whom.c_str()));
            return false;
        }
        if (!same_call(thread, other)) return false;
    }
    return true;
}

void release_lanes(Block& block, const Collective& collective, unsigned first, uint32_t lanes) {
    for (unsigned lane = 0; lane < collective.lanes(); ++lane)
        if (lanes >> lane % warp_size & 1u) block.thread(first + lane).state = State::ready;
}

/// Makes what each lane did before the `__syncwarp` visible to all after it. The lanes that met run once each
/// before any of them runs again, so every release precedes every acquire.
void order_memory(Thread& thread, Thread& lowest) {
    sanitizer::release(&lowest.syncwarp_tag);
    thread.fiber.suspend();
    sanitizer::acquire(&lowest.syncwarp_tag);
}

} // namespace

bool resolve_collectives(Block& block, unsigned warp) {
    const unsigned first = warp * warp_size;
    const uint32_t existing = existing_lanes(block, first);
    bool progress = false;
    for (unsigned lane = 0; lane < warp_size; ++lane) {
        if (!(existing >> lane & 1u)) continue;
        const Thread& thread = block.thread(first + lane);
        if (thread.state != State::at_rendezvous) continue;
        const uint32_t lanes = thread.mask & existing;
        if (!complete(block, thread, lanes)) continue;
        const Collective& collective = *thread.collective;
        const unsigned party = first_of(thread, collective);
        collective.exchange(Lanes(block, party, lanes));
        if (block.failed()) return false;
        release_lanes(block, collective, party, lanes);
        progress = true;
    }
    return progress;
}

void meet(const Collective& collective, uint32_t mask, void* operands, SourceLine at) {
    Thread& thread = this_thread();
    Block& block = thread.block;
    const unsigned first = thread.rank - thread.lane();
    if (!(mask >> thread.lane() & 1u))
        fail(Code::launch_failed, at, "%s: mask 0x%08x does not name the calling lane %u", collective.name,
             mask, thread.lane());
    if (collective.whole_warp && (mask & existing_lanes(block, first)) != ~0u)
        fail(Code::launch_failed, at,
             "%s needs all 32 lanes; the last warp of this block of %u threads is partial", collective.name,
             block.size());
    if (first_of(thread, collective) + collective.lanes() > block.size())
        fail(Code::launch_failed, at,
             "%s needs all %u warps of a warpgroup; the last one of this block of %u threads is partial",
             collective.name, collective.warps, block.size());
    thread.collective = &collective;
    thread.mask = mask;
    thread.operands = operands;
    thread.at = at;
    thread.state = State::at_rendezvous;

    thread.fiber.suspend();
    if (sanitizer::thread && collective.is_syncwarp)
        order_memory(thread, block.thread(first + unsigned(__builtin_ctz(mask))));
}

void* Lanes::raw_operands(unsigned lane) const { return block_.thread(first_ + lane).operands; }

void Lanes::fail(unsigned lane, const char* format, ...) const {
    const Thread& thread = block_.thread(first_ + lane);
    char message[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    block_.set_failure(thread, Code::launch_failed, thread.at,
                       text("%s: %s", thread.collective->name, message));
}

} // namespace host
