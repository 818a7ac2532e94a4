// Where a team has many pages, a warp publishes its best keys alone, with their pages and a bound on the rest. Every
// block selects from these shortlists; where a page that is on none of them might belong to the selection, all blocks
// see it alike, and all keys are published after all.
#pragma once
#include "team_selection.cuh"

namespace quest::cuda {

constexpr int kShortlistChunks = kShortlistEntries / kKeysAtOnce;
static_assert(kShortlistChunks <= 2, "as many keys a thread as are looked at without asking");

// How many keys a warp may have.
__host__ __device__ inline int warp_keys_capacity(int max_pages, int size) {
    const int a_round = kTeamWarps * size * kTileTokens;
    return (max_pages + a_round - 1) / a_round * kTileTokens;
}

// The scores' sort keys of one warp's pages: tile n holds pages first + n * step .. + 15.
struct WarpKeys {
    uint32_t* keys;  // in shared memory, [16 * tiles]
    int tiles, first, step;

    __device__ __forceinline__ int page(int entry) const {
        return first + entry / kTileTokens * step + entry % kTileTokens;
    }
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
            for (int start = 0; start < tiles * kTileTokens; start += kWarp) {
                const int e = start + lane;
                const uint32_t key = e < tiles * kTileTokens ? keys[e] : 0;
                const unsigned chosen = __ballot_sync(kAllLanes, key >= least);
                const unsigned slot = listed + __popc(chosen & ((1u << lane) - 1));
                if (key >= least) publish_pair(entries + 2 * slot, key, page(e) + 1);
                listed += __popc(chosen);
            }
        for (unsigned slot = listed + lane; slot < slots; slot += kWarp) publish_pair(entries + 2 * slot, 1, 1);
        if (lane == 0) publish(bound, least > 0 ? least : kForcedKey);
    }
    __device__ __forceinline__ void publish_all(uint32_t* to, int num_pages) const {
        for (int e = threadIdx.x % kWarp; e < tiles * kTileTokens; e += kWarp)
            if (page(e) < num_pages) publish(to + page(e), keys[e]);
    }
};

// Entries of the shortlists, four of every 1,024 a thread.
struct ListedKeys {
    uint32_t key[kShortlistChunks][4], page[kShortlistChunks][4];

    __device__ static constexpr bool has(int chunk) { return chunk < kShortlistChunks; }
    template <class F>
    __device__ __forceinline__ void for_each(F&& f) const {
#pragma unroll
        for (int c = 0; c < kShortlistChunks; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) f(key[c][j], page[c][j], c * kKeysAtOnce + threadIdx.x * 4 + j);
    }
    __device__ void order_equals(uint32_t equal) {
#pragma unroll
        for (int c = 0; c < kShortlistChunks; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t& x = key[c][j];
                x = x > equal ? kForcedKey : x == equal ? max_pages() - page[c][j] : 0;
            }
    }
    __device__ static constexpr uint32_t max_pages() { return kMaxFusedPages; }
};

// Selects from the team's shortlists; false, in every block of the team, where they do not suffice. pages: of all
// places.
template <int kChunks>
__device__ __forceinline__ bool select_listed(Selection* selection, const TeamSpace& space,
                                              SelectionShared<kChunks>& shared, uint32_t (&pages)[kShortlistEntries],
                                              int kept, int size) {
    BlockSelect<kTeamThreads> select{shared.select};
    const int lane = threadIdx.x % kWarp;
    const bool has_bounds = lane * 4 < size * kTeamWarps;
    ListedKeys keys;
    uint4 bounds, sample[2];
    bool pending;
    do {
        bounds = has_bounds ? peek(space.bounds + lane * 4) : uint4{1, 1, 1, 1};
        sample[0] = peek(space.entries + lane * (2 * kShortlistEntries / kWarp));
        sample[1] = peek(space.entries + lane * (2 * kShortlistEntries / kWarp) + 4);
        pending = !complete(bounds) || !complete(sample[0]) || !complete(sample[1]);
#pragma unroll
        for (int c = 0; c < kShortlistChunks; ++c)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const uint4 v = peek(space.entries + 2 * (c * kKeysAtOnce + threadIdx.x * 4 + j));
                keys.key[c][j] = v.x, keys.page[c][j] = v.y, keys.key[c][j + 1] = v.z, keys.page[c][j + 1] = v.w;
                pending |= !complete(v);
            }
    } while (pending);
    mark_phase(3);
    const uint32_t bound = __reduce_max_sync(kAllLanes, max(max(bounds.x, bounds.y), max(bounds.z, bounds.w)));
    if (bound == kForcedKey) return false;
#pragma unroll
    for (int c = 0; c < kShortlistChunks; ++c) {
#pragma unroll
        for (int j = 0; j < 4; ++j) --keys.page[c][j];
        *reinterpret_cast<uint4*>(&pages[c * kKeysAtOnce + threadIdx.x * 4]) = {keys.page[c][0], keys.page[c][1],
                                                                                keys.page[c][2], keys.page[c][3]};
    }
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
    *selection = mark_places(keys, bracket, select, shared.words);
    return true;
}

}  // namespace quest::cuda
