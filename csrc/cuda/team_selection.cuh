// How every block of a team finds the same selection: it reads all published keys, finds the threshold, and notes a bit
// for each chosen place. The n-th set bit is the n-th chosen page, in an order that all blocks agree on; blocks take
// turns.
#pragma once
#include "team.cuh"
#include "topk_threshold.cuh"

namespace quest::cuda {

constexpr int kKeysAtOnce = 4 * kTeamThreads;  // a chunk of places

// This thread's keys: four of every 1,024 places. A place is a page's number, or, listed, an entry of a shortlist.
template <int kChunks, bool kListed>
struct TeamKeys {
    uint32_t key[kChunks][4], listed_page[kListed ? kChunks : 1][4];

    static __device__ constexpr int chunks() { return kChunks; }
    static __device__ constexpr uint32_t max_pages() { return kListed ? kMaxFusedPages : kChunks * kKeysAtOnce; }
    __device__ __forceinline__ uint32_t page(int c, int j) const {
        return kListed ? listed_page[c][j] : c * kKeysAtOnce + threadIdx.x * 4 + j;
    }
    template <class F>
    __device__ __forceinline__ void for_chunks(F&& f) const {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) f(c, key[c]);
    }
    template <class F>
    __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) f(key[c][j], page(c, j), c * kKeysAtOnce + threadIdx.x * 4 + j);
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

// The chosen places, as bits in shared memory: word 4 w + j of a chunk has one for each lane of warp w, its j-th key.
struct Selection {
    unsigned before, here;  // set bits in lower lanes' words, and in this lane's

    // The n-th chosen place; asked by a whole warp.
    __device__ __forceinline__ int place(const uint32_t* words, int chunks, unsigned n) const {
        const int lane = threadIdx.x % kWarp;
        n -= before;
        const bool mine = n < here;
        if (!mine) n = 0;
        uint32_t word = words[lane];
        int base = (lane >> 2) * 128 + (lane & 3);
        for (int c = 1; c < chunks; ++c) {
            const unsigned count = __popc(word);
            if (n < count) break;
            n -= count, word = words[c * kWarp + lane], base += kKeysAtOnce;
        }
        for (; n > 0; --n) word &= word - 1;
        return __shfl_sync(kAllLanes, base + (__ffs(word) - 1) * 4, __ffs(__ballot_sync(kAllLanes, mine)) - 1);
    }
};

// Sets the bits of the keys that are kept, in kWarp words of every chunk.
template <class Keys>
__device__ __forceinline__ Selection mark_places(const Keys& keys, const Bracket& bracket,
                                                 BlockSelect<kTeamThreads>& select, uint32_t* words) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const bool whole = bracket.count == bracket.wanted;
    const uint32_t above = whole ? bracket.low - 1 : bracket.limit;
    bool holds_any = false;
    keys.for_chunks([&](int c, const uint32_t (&key)[4]) {
        const uint4 bits{__ballot_sync(kAllLanes, key[0] > above), __ballot_sync(kAllLanes, key[1] > above),
                         __ballot_sync(kAllLanes, key[2] > above), __ballot_sync(kAllLanes, key[3] > above)};
        if (lane == 0) *reinterpret_cast<uint4*>(&words[c * kWarp + warp * 4]) = bits;
#pragma unroll
        for (int j = 0; j < 4; ++j) holds_any |= bracket.holds(key[j]);
    });
    if (!whole && holds_any)
        keys.for_each([&](uint32_t key, int page, int place) {
            if (bracket.holds(key)) select.offer(key, page, place);
        });
    __syncthreads();
    if (!whole) {
        uint2 candidate;
        if (select.keeps_candidate(bracket, &candidate)) {  // all warps set the same bits
            const uint32_t place = select.shared.places[lane];
            atomicOr(&words[place / kKeysAtOnce * kWarp + place % kKeysAtOnce / 128 * 4 + place % 4],
                     1u << place % 128 / 4);
        }
        __syncwarp();
    }
    Selection selection{0, 0};
#pragma unroll
    for (int c = 0; c < keys.chunks(); ++c) selection.here += __popc(words[c * kWarp + lane]);
    selection.before = warp_inclusive_sum(selection.here) - selection.here;
    return selection;
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
__device__ __forceinline__ Selection select_pages(const TeamSpace& space, BlockSelect<kTeamThreads> select,
                                                  uint32_t* words, int num_pages, int first, int last, int kept) {
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
        keys.for_chunks([&](int, const uint32_t (&key)[4]) { pending |= !complete({key[0], key[1], key[2], key[3]}); });
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
    return mark_places(keys, bracket, select, words);
}

}  // namespace quest::cuda
