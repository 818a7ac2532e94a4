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
    static constexpr int kKeys = 4 * kChunks;
    uint32_t key[kKeys], listed_page[kListed ? kKeys : 1];

    static __device__ constexpr uint32_t max_pages() { return kListed ? kMaxFusedPages : kChunks * kKeysAtOnce; }
    static __device__ __forceinline__ int place(int i) { return i / 4 * kKeysAtOnce + threadIdx.x * 4 + i % 4; }
    // i: known to the compiler.
    __device__ __forceinline__ uint32_t page(int i) const { return kListed ? listed_page[i] : place(i); }
    template <class F>
    __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll
        for (int i = 0; i < kKeys; ++i) f(key[i], page(i));
    }
    __device__ void order_equals(uint32_t equal) {
#pragma unroll
        for (int i = 0; i < kKeys; ++i)
            key[i] = key[i] > equal ? kForcedKey : key[i] == equal ? max_pages() - page(i) : 0;
    }

    // Few of a thread's keys belong to a selection: finding these takes no branches, and no time is spent on others.
    __device__ __forceinline__ unsigned count_above(uint32_t limit) const {
        return __popc(marks([&](uint32_t k) { return k > limit; }));
    }
    template <class F>
    __device__ __forceinline__ void for_each_above(uint32_t limit, F&& f) const {
        for_each_marked(marks([&](uint32_t k) { return k > limit; }), [&](int i) { f(page_at(i)); });
    }
    template <class F>
    __device__ __forceinline__ void for_each_held(const Bracket& bracket, F&& f) const {
        for_each_marked(marks([&](uint32_t k) { return bracket.holds(k); }),
                        [&](int i) { f(pick(key, i), page_at(i)); });
    }

private:
    template <class F>
    __device__ __forceinline__ uint32_t marks(F&& f) const {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) bits |= f(key[i]) ? 1u << i : 0u;
        return bits;
    }
    template <class F>
    static __device__ __forceinline__ void for_each_marked(uint32_t bits, F&& f) {
#pragma unroll 1
        for (; bits != 0; bits &= bits - 1) f(__ffs(bits) - 1);
    }
    // Registers have no addresses.
    static __device__ __forceinline__ uint32_t pick(const uint32_t (&from)[kKeys], int i) {
        uint32_t x[kKeys];
#pragma unroll
        for (int k = 0; k < kKeys; ++k) x[k] = from[k];
#pragma unroll
        for (int half = kKeys / 2; half > 0; half /= 2)
#pragma unroll
            for (int k = 0; k < half; ++k) x[k] = i & half ? x[k + half] : x[k];
        return x[0];
    }
    __device__ __forceinline__ uint32_t page_at(int i) const {
        if constexpr (kListed)
            return pick(listed_page, i);
        else
            return place(i);
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
    const unsigned count = keys.count_above(above);
    if (!whole) keys.for_each_held(bracket, [&](uint32_t key, uint32_t page) { select.offer(key, page); });
    const unsigned inclusive = warp_inclusive_sum(count);
    if (lane == kWarp - 1) select.shared.counts[warp] = inclusive;
    __syncthreads();
    unsigned number = inclusive - count + __reduce_add_sync(kAllLanes, lane < warp ? select.shared.counts[lane] : 0);
    keys.for_each_above(above, [&](uint32_t page) { chosen.put(number++, page); });
    if (!whole)
        select.template rank_candidates<kTeamWarps>(bracket, warp, [&](const uint2& candidate, uint32_t better) {
            if (lane == 0 && better < bracket.wanted) chosen.put(kept - bracket.wanted + better, candidate.y);
        });
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
    uint4 sampled = competing >= 4 * kWarp ? uint4{} : uint4{1, 1, 1, 1}, v[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) v[c] = keys.place(4 * c) < num_pages ? uint4{} : uint4{1, 1, 1, 1};
    bool pending;
    do {  // all loads, then the tests: one by one they would wait for each other
        peek_missing(sampled, space.keys + sample);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) peek_missing(v[c], space.keys + keys.place(4 * c));
        pending = !complete(sampled);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) pending |= !complete(v[c]);
    } while (pending);
    mark_phase(3);

    // Pages that compete are most; the others are few and at the ends.
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        uint32_t* key = keys.key + 4 * c;
        key[0] = v[c].x, key[1] = v[c].y, key[2] = v[c].z, key[3] = v[c].w;
        const int page = keys.place(4 * c);
        if (page >= first && page + 4 <= last) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (page + j < first || (page + j >= last && page + j < num_pages)) key[j] = kForcedKey;
    }
    const uint2 range = competing >= 4 * kWarp
                            ? sampled_range(min(min(sampled.x, sampled.y), min(sampled.z, sampled.w)),
                                            max(max(sampled.x, sampled.y), max(sampled.z, sampled.w)),
                                            kept - num_pages + competing, competing)
                            : select.true_range(keys);
    const Bracket bracket = select.bracket(keys, range, kept);
    mark_phase(4);
    list_pages(chosen, keys, bracket, select, kept);
}

}  // namespace quest::cuda
