// How every block of a team finds the same selection: it reads all published keys, finds the threshold, and numbers the
// chosen pages: those above it in an order that all blocks agree on, then those at it, the better first. Of these
// numbers blocks take turns, and each lists the pages of its own.
#pragma once
#include "team.cuh"
#include "topk_threshold.cuh"

namespace quest::cuda {

constexpr int kKeysAtOnce = 4 * kTeamThreads;  // a chunk

// This thread's keys: four of every 1,024, of pages one after the other or, listed, of a shortlist's entries.
template <int kChunks, bool kListed>
struct TeamKeys {
    uint32_t key[kChunks][4], listed_page[kListed ? kChunks : 1][4];

    static __device__ constexpr uint32_t max_pages() { return kListed ? kMaxFusedPages : kChunks * kKeysAtOnce; }
    __device__ __forceinline__ uint32_t page(int c, int j) const {
        return kListed ? listed_page[c][j] : c * kKeysAtOnce + threadIdx.x * 4 + j;
    }
    template <class F>
    __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) f(key[c][j], page(c, j));
    }
    __device__ void order_equals(uint32_t equal) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t& x = key[c][j];
                x = x > equal ? kForcedKey : x == equal ? max_pages() - page(c, j) : 0;
            }
    }
};

// A block's turns, in shared memory.
struct ChosenPages {
    uint32_t* pages;
    int rank, size_log2;

    __device__ __forceinline__ void put(unsigned number, uint32_t page) const {
        if ((number & ((1u << size_log2) - 1)) == unsigned(rank)) pages[number >> size_log2] = page;
    }
};

// Lists the block's turns among the `kept` chosen pages.
template <class Keys>
__device__ __forceinline__ void list_pages(const ChosenPages& chosen, const Keys& keys, const Bracket& bracket,
                                           BlockSelect<kTeamThreads>& select, int kept) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const bool whole = bracket.count == bracket.wanted;
    const uint32_t above = whole ? bracket.low - 1 : bracket.limit;
    unsigned count = 0;
    bool holds_any = false;
    keys.for_each([&](uint32_t key, int) {
        count += __popc(__ballot_sync(kAllLanes, key > above));
        holds_any |= bracket.holds(key);
    });
    if (lane == 0) select.shared.counts[warp] = count;
    if (!whole && holds_any)
        keys.for_each([&](uint32_t key, int page) {
            if (bracket.holds(key)) select.offer(key, page);
        });
    __syncthreads();
    unsigned number = __reduce_add_sync(kAllLanes, lane < warp ? select.shared.counts[lane] : 0);
    keys.for_each([&](uint32_t key, int page) {
        const unsigned bits = __ballot_sync(kAllLanes, key > above);
        if (key > above) chosen.put(number + __popc(bits & ((1u << lane) - 1)), page);
        number += __popc(bits);
    });
    if (!whole && warp == 0) {
        uint2 candidate;
        const uint32_t better = select.rank_candidate(bracket, &candidate);
        if (better < bracket.wanted) chosen.put(kept - bracket.wanted + better, candidate.y);
    }
    __syncthreads();
}

// Waits until all blocks of the team have published what the flags stand for. Where blocks finish far apart, polling
// the published words themselves meanwhile would fill the L2's bandwidth. Teams of blocks that have the chip to
// themselves finish together and save the round trip.
__device__ __forceinline__ void wait_for_team(const TeamSpace& space, int size) {
    const int lane = threadIdx.x % kWarp;
    if (size < kMaxTeam)
        while (__any_sync(kAllLanes, lane < size && peek_word(space.done + lane) == 0)) {
        }
}

// Pages [0, first) and [last, num_pages) are kept whatever their score, `kept` >= their number in all.
template <int kChunks>
__device__ __forceinline__ void select_pages(const ChosenPages& chosen, const TeamSpace& space,
                                             BlockSelect<kTeamThreads> select, int num_pages, int first, int last,
                                             int kept) {
    const int lane = threadIdx.x % kWarp;
    TeamKeys<kChunks, false> keys;
    // Where a lane's part of the sample lies; where few pages compete, all of them are looked at instead.
    const int competing = last - first, sample = (first + lane * (competing / kWarp)) / 4 * 4;
    // A page that does not exist has the key 1. Whoever has a key has it for good.
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) keys.key[c][j] = int(keys.page(c, j)) < num_pages ? 0 : 1;
    uint4 s;
    bool pending;
    do {  // all loads, then the tests: polling one by one would serialise the round trips
        s = peek(space.keys + sample);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            uint32_t (&key)[4] = keys.key[c];
            if (complete({key[0], key[1], key[2], key[3]})) continue;
            const uint4 v = peek(space.keys + keys.page(c, 0));
            key[0] |= v.x, key[1] |= v.y, key[2] |= v.z, key[3] |= v.w;
        }
        pending = competing >= 4 * kWarp && !complete(s);
        keys.for_each([&](uint32_t key, int) { pending |= key == 0; });
    } while (pending);
    mark_phase(3);

    // Pages that compete are most; the others are few and at the ends.
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        const int page = keys.page(c, 0);
        if (page >= first && page + 4 <= last) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (page + j < first || (page + j >= last && page + j < num_pages)) keys.key[c][j] = kForcedKey;
    }
    const uint2 range = competing >= 4 * kWarp
                            ? sampled_range(min(min(s.x, s.y), min(s.z, s.w)), max(max(s.x, s.y), max(s.z, s.w)),
                                            kept - num_pages + competing, competing)
                            : select.true_range(keys);
    const Bracket bracket = select.bracket(keys, range, kept);
    mark_phase(4);
    list_pages(chosen, keys, bracket, select, kept);
}

}  // namespace quest::cuda
