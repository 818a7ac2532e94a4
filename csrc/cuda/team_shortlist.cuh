// Where a team has many pages, a warp publishes its best keys alone, with their pages and a bound on the rest. Every
// block selects from these shortlists; where a page that is on none of them might belong to the selection, all blocks
// see it alike, and all keys are published after all.
#pragma once
#include "team_selection.cuh"

namespace quest::cuda {

constexpr int kShortlistChunks = kShortlistEntries / kKeysAtOnce;

// How many keys a warp may have.
__host__ __device__ inline int warp_keys_capacity(int max_pages, int size) {
    const int a_round = kTeamWarps * size * kTileTokens;
    return (max_pages + a_round - 1) / a_round * kTileTokens;
}

// The scores' sort keys of the pages that a warp was dealt.
struct WarpKeys {
    uint32_t* keys;  // in shared memory, [16 * tiles]
    int tiles;
    PageDeal<true> deal;

    __device__ __forceinline__ int page(int entry) const { return deal.page(entry / kTileTokens, entry % kTileTokens); }
    __device__ __forceinline__ unsigned count_from(uint32_t least) const {
        unsigned count = 0;
#pragma unroll 4
        for (int e = threadIdx.x % kWarp; e < tiles * kTileTokens; e += kWarp) count += keys[e] >= least;
        return __reduce_add_sync(kAllLanes, count);
    }

    // The key from which on this warp's keys are published: `slots` of them at most, and three quarters of that at
    // least, or all there are. 0: there is no such key, many are equal.
    __device__ __forceinline__ uint32_t least_listed(unsigned slots) const {
        uint32_t low = kForcedKey, high = 2;
#pragma unroll 4
        for (int e = threadIdx.x % kWarp; e < tiles * kTileTokens; e += kWarp) {
            const uint32_t key = keys[e];
            if (key > 1 && key < kForcedKey) low = min(low, key), high = max(high, key);
        }
        if (tiles * kTileTokens <= slots) return 2;
        low = __reduce_min_sync(kAllLanes, low), high = __reduce_max_sync(kAllLanes, high) + 1;
        if (count_from(low) <= slots) return low;
        while (low + 1 < high) {  // more than `slots` reach low, too few reach high
            const uint32_t middle = low + (high - low) / 2;
            const unsigned count = count_from(middle);
            if (count > slots)
                low = middle;
            else if (count < slots / 4 * 3)
                high = middle;
            else
                return middle;
        }
        return 0;
    }

    // To `slots` entries (key, page + 1) of the warp, and the largest key that is not among them, plus 1.
    __device__ __forceinline__ void publish_shortlist(uint32_t* entries, uint32_t* bound, unsigned slots) const {
        const unsigned lane = threadIdx.x % kWarp;
        const uint32_t least = least_listed(slots);
        unsigned listed = 0;
        if (least > 0)
#pragma unroll 4
            for (int start = 0; start < tiles * kTileTokens; start += kWarp) {
                const int e = start + lane;
                const uint32_t key = e < tiles * kTileTokens ? keys[e] : 0;
                const unsigned chosen = __ballot_sync(kAllLanes, key >= least);
                const unsigned slot = listed + __popc(chosen & ((1u << lane) - 1));
                if (key >= least) publish_pair(entries + 2 * slot, key, page(e) + 1);
                listed += __popc(chosen);
            }
#pragma unroll 1
        for (unsigned slot = listed + lane; slot < slots; slot += kWarp) publish_pair(entries + 2 * slot, 1, 1);
        if (lane == 0) publish(bound, least > 0 ? least : kForcedKey);
    }
    __device__ __forceinline__ void publish_all(uint32_t* to, int num_pages) const {
#pragma unroll 1
        for (int e = threadIdx.x % kWarp; e < tiles * kTileTokens; e += kWarp)
            if (page(e) < num_pages) publish(to + page(e), keys[e]);
    }
};

// Selects from the team's shortlists; false, in every block of the team, where they do not suffice.
__device__ __forceinline__ bool select_listed(const ChosenPages& chosen, const TeamSpace& space,
                                              BlockSelect<kTeamThreads> select, int kept, int size) {
    const int lane = threadIdx.x % kWarp;
    const bool has_bounds = lane * 4 < size * kTeamWarps;
    TeamKeys<kShortlistChunks, true> keys;
    uint4 bounds, sample[2];
    bool pending;
    do {
        bounds = has_bounds ? peek(space.bounds + lane * 4) : uint4{1, 1, 1, 1};
        sample[0] = peek(space.entries + lane * (2 * kShortlistEntries / kWarp));
        sample[1] = peek(space.entries + lane * (2 * kShortlistEntries / kWarp) + 4);
        pending = !complete(bounds) || !complete(sample[0]) || !complete(sample[1]);
#pragma unroll
        for (int i = 0; i < keys.kKeys; i += 2) {
            const uint4 v = peek(space.entries + 2 * keys.place(i));
            keys.key[i] = v.x, keys.listed_page[i] = v.y, keys.key[i + 1] = v.z, keys.listed_page[i + 1] = v.w;
            pending |= !complete(v);
        }
    } while (pending);
    mark_phase(3);
    const uint32_t bound = __reduce_max_sync(kAllLanes, max(max(bounds.x, bounds.y), max(bounds.z, bounds.w)));
    if (bound == kForcedKey) return false;
#pragma unroll
    for (int i = 0; i < keys.kKeys; ++i) --keys.listed_page[i];
    uint32_t lowest = kNanKey, highest = 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t key = i % 2 == 0 ? sample[i / 2].x : sample[i / 2].z;
        if (key > 1 && key < kForcedKey) lowest = min(lowest, key), highest = max(highest, key);
    }
    const uint2 range = sampled_range(lowest, highest, kept, kShortlistEntries / 2);
    const Bracket bracket = select.bracket(keys, {min(range.x, range.y), range.y}, kept);
    mark_phase(4);
    if (bracket.low < bound) return false;  // a key that is not listed might be kept
    list_pages(chosen, keys, bracket, select, kept);
    return true;
}

// All keys of the team, read from L2 whenever they are asked for: seldom needed, and as many as there are pages.
struct PublishedKeys {
    const uint32_t* keys;
    int num_pages;
    uint32_t equal = 0;  // not 0: keys are in order_equals()'s terms

    static __device__ constexpr uint32_t max_pages() { return kMaxFusedPages; }
    template <class F>
    __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll 1
        for (int start = 0; start < num_pages; start += kKeysAtOnce) {
            const int page = start + threadIdx.x * 4;
            const uint4 v = page < num_pages ? peek(keys + page) : uint4{};
            uint32_t key[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (page + j >= num_pages)
                    key[j] = equal == 0 ? 1 : 0;
                else if (equal != 0)
                    key[j] = key[j] > equal ? kForcedKey : key[j] == equal ? max_pages() - (page + j) : 0;
                f(key[j], page + j);
            }
        }
    }
    __device__ void order_equals(uint32_t key) { equal = key; }
    __device__ unsigned count_above(uint32_t limit) const {
        unsigned count = 0;
        for_each([&](uint32_t key, int) { count += key > limit; });
        return count;
    }
    template <class F>
    __device__ __forceinline__ void for_each_above(uint32_t limit, F&& f) const {
        for_each([&](uint32_t key, int page) {
            if (key > limit) f(page);
        });
    }
    template <class F>
    __device__ __forceinline__ void for_each_held(const Bracket& bracket, F&& f) const {
        for_each([&](uint32_t key, int page) {
            if (bracket.holds(key)) f(key, page);
        });
    }
};

// Selects from the keys of all pages, which every warp has published by now. Not inline: seldom needed.
static __device__ __noinline__ void select_published(ChosenPages chosen, uint32_t* done, const uint32_t* published,
                                                     BlockSelect<kTeamThreads>::Shared* selecting, int num_pages,
                                                     int kept) {
    const int rank = chosen.rank, size = 1 << chosen.size_log2;
    BlockSelect<kTeamThreads> select{*selecting};
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        publish(done + rank, 2u);
    }
    select.clear_bins();
    const int lane = threadIdx.x % kWarp;
    while (__any_sync(kAllLanes, lane < size && peek_word(done + lane) != 2)) {
    }
    __threadfence();
    __syncthreads();
    mark_phase(3);
    PublishedKeys keys{published, num_pages};
    const Bracket bracket = select.bracket(keys, select.true_range(keys), kept);
    mark_phase(4);
    list_pages(chosen, keys, bracket, select, kept);
}

}  // namespace quest::cuda
