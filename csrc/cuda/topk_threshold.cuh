// Which keys are the best ones, found by a whole block: a histogram narrows the threshold to a bin, the few keys in
// that bin are ranked against each other. Exact for any keys; where many are equal or a sample misleads it takes more
// rounds.
#pragma once
#include "device.cuh"

namespace quest::cuda {

constexpr uint32_t kNanKey = 0xfffffffeu, kForcedKey = 0xffffffffu;

// Unsigned order of keys = order of scores; both zeros are one key, NaN is above everything but a page that is kept
// whatever its score. Above 1, which a page that does not exist has.
__device__ __forceinline__ uint32_t sort_key(float score) {
    if (isnan(score)) return kNanKey;
    const uint32_t bits = __float_as_uint(score + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t below = __shfl_up_sync(kAllLanes, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

// Where the threshold lies: keys above `limit` are kept, and the `wanted` best of the `count` keys in [low, limit].
struct Bracket {
    uint32_t low, limit, wanted, count;

    __device__ __forceinline__ bool holds(uint32_t key) const { return key - low <= limit - low; }
};

// Where the threshold may lie, from a sample of four keys a lane: above nearly all of them, or, where few are wanted,
// above the least of the lanes' best.
__device__ __forceinline__ uint2 sampled_range(uint32_t lowest, uint32_t highest, int wanted, int competing) {
    return {__reduce_min_sync(kAllLanes, 4 * wanted <= competing ? highest : lowest),
            __reduce_max_sync(kAllLanes, highest)};
}

template <int kThreads>
struct BlockSelect {
    static constexpr int kWarps = kThreads / kWarp, kBinBits = 8, kBins = 1 << kBinBits, kBinsPerLane = kBins / kWarp;
    static_assert(kBinsPerLane == 8, "a lane reads its bins as two vectors");

    struct Shared {
        alignas(16) uint32_t bins[kBins + 1];  // the last: keys that do not count
        alignas(8) uint2 candidates[kWarp];    // key, page
        uint32_t lows[kWarps], highs[kWarps], counts[kWarps], num_candidates;
    };
    Shared& shared;

    __device__ __forceinline__ void clear_bins() {
        if (threadIdx.x < kBins) shared.bins[threadIdx.x] = 0;
        shared.num_candidates = 0;
    }

    // The range of the keys that are not forced, of pages that exist.
    template <class Keys>
    __device__ uint2 true_range(const Keys& keys) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        uint32_t low = kForcedKey, high = 1;
        keys.for_each([&](uint32_t key, int) {
            if (key > 1 && key < kForcedKey) low = min(low, key), high = max(high, key);
        });
        low = __reduce_min_sync(kAllLanes, low), high = __reduce_max_sync(kAllLanes, high);
        if (lane == 0) shared.lows[warp] = low, shared.highs[warp] = high;
        __syncthreads();
        low = __reduce_min_sync(kAllLanes, shared.lows[lane % kWarps]);
        return {low, max(low, __reduce_max_sync(kAllLanes, shared.highs[lane % kWarps]))};
    }

    // Brackets the threshold of the `wanted` >= 1 best keys. keys.for_each(f) calls f(key, page) for this
    // thread's keys, keys.order_equals(key) makes pages of that key differ, the earlier one the better, in (0,
    // keys.max_pages()]. `range`: where the threshold is first sought, up to the best key; a guess that may be wrong.
    // Bins must be clear, with a barrier since.
    template <class Keys>
    __device__ __forceinline__ Bracket bracket(Keys& keys, uint2 range, uint32_t wanted) {
        const int lane = threadIdx.x % kWarp;
        uint32_t low = range.x, high = range.y, limit = 0xffffffffu;  // keys above high belong to the last bin
        while (true) {
            const int shift = max(32 - __clz(high - low) - kBinBits, 0);
            keys.for_each([&](uint32_t key, int) {
                const uint32_t above_low = key - low;
                atomicAdd(&shared.bins[above_low <= limit - low ? min(above_low >> shift, kBins - 1u) : kBins], 1u);
            });
            __syncthreads();
            // Every warp finds the bin by itself; lane i sums the bins from kBins - 1 - i * kBinsPerLane down.
            const int top = kBins - 1 - lane * kBinsPerLane;
            const uint4 upper = *reinterpret_cast<const uint4*>(&shared.bins[top - 3]),
                        lower = *reinterpret_cast<const uint4*>(&shared.bins[top - 7]);
            const uint32_t counts[kBinsPerLane] = {upper.w, upper.z, upper.y, upper.x,
                                                   lower.w, lower.z, lower.y, lower.x};
            const uint32_t sum =
                ((upper.x + upper.y) + (upper.z + upper.w)) + ((lower.x + lower.y) + (lower.z + lower.w));
            const uint32_t inclusive = warp_inclusive_sum(sum);
            const unsigned reached = __ballot_sync(kAllLanes, inclusive >= wanted);
            if (__builtin_expect(reached == 0, 0)) {  // the guess was too high
                __syncthreads();
                clear_bins();
                const uint2 all = true_range(keys);
                low = all.x, high = all.y;
                continue;
            }
            uint32_t bin = top, above = inclusive - sum;  // the bin that reaches `wanted`, and the keys above it
#pragma unroll
            for (int j = 0; j < kBinsPerLane - 1; ++j) {
                const bool passes = above + counts[j] < wanted;
                if (passes && bin == top - j) --bin, above += counts[j];
            }
            const int finder = __ffs(reached) - 1;
            bin = __shfl_sync(kAllLanes, bin, finder);
            wanted -= __shfl_sync(kAllLanes, above, finder);
            const uint32_t count = shared.bins[bin];
            low += bin << shift;
            if (bin < kBins - 1) limit = low + min(limit - low, (1u << shift) - 1);
            if (count <= kWarp || count == wanted) return {low, limit, wanted, count};
            if (low == limit) {
                keys.order_equals(low);
                low = 1, limit = keys.max_pages();
            }
            high = limit;
            __syncthreads();
            clear_bins();
            __syncthreads();
        }
    }

    // Each thread offers its keys that the bracket holds; where all of them are kept, none is to be offered.
    __device__ __forceinline__ void offer(uint32_t key, uint32_t page) {
        uint32_t at;  // few lanes have one: nvcc's atomicAdd would first count them
        asm volatile("atom.shared.add.u32 %0, [%1], 1;"
                     : "=r"(at)
                     : "r"(uint32_t(__cvta_generic_to_shared(&shared.num_candidates)))
                     : "memory");
        shared.candidates[at] = {key, page};
    }

    // After a barrier, where candidates were offered: f(candidate, how many are better) of every kStep-th from `first`
    // on, for a whole warp. The first `wanted` are kept.
    template <int kStep, class F>
    __device__ __forceinline__ void rank_candidates(const Bracket& bracket, uint32_t first, F&& f) const {
        constexpr int kAtOnce = 4;
        const uint32_t lane = threadIdx.x % kWarp;
        const uint2 mine = shared.candidates[lane];
#pragma unroll 1
        for (uint32_t i = first; i < bracket.count; i += kAtOnce * kStep) {
            uint2 candidate[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) candidate[k] = shared.candidates[i + k * kStep];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const bool better = mine.x > candidate[k].x || (mine.x == candidate[k].x && mine.y < candidate[k].y);
                const uint32_t rank = __popc(__ballot_sync(kAllLanes, better && lane < bracket.count));
                if (i + k * kStep < bracket.count) f(candidate[k], rank);
            }
        }
    }
};

}  // namespace quest::cuda
