// Which pages are the best ones, found by a whole block: a histogram over the range the keys really span narrows the threshold to a bin,
// the few keys in that bin are ranked against each other. Exact for any keys; many equal keys take more rounds.
#pragma once
#include "device.cuh"

namespace quest::cuda {

constexpr uint32_t kNanKey = 0xffffffffu;

// Unsigned order of keys = order of scores; both zeros are one key, NaN is above everything. Never 0.
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

template <int kThreads>
struct BlockSelect {
    static constexpr int kWarps = kThreads / kWarp, kBinsPerThread = 4, kBinBits = kThreads == 512 ? 11 : 10, kBins = 1 << kBinBits;
    static constexpr int kMaxRanked = 64;
    static_assert(kBins == kThreads * kBinsPerThread, "a thread sums four bins");

    struct Shared {
        uint32_t bins[kBins];
        uint32_t lows[kWarps], highs[kWarps], sums[kWarps];
        uint32_t bin, above, count, num_ranked, threshold, ties;
        uint32_t ranked[kMaxRanked];
    };
    Shared& shared;

    __device__ void clear_bins() {
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
        shared.num_ranked = 0;
    }

    // Sum over the threads before this one; the block's total in *total. The caller separates two calls by a barrier.
    __device__ uint32_t exclusive_sum(uint32_t x, uint32_t* total) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        const uint32_t inclusive = warp_inclusive_sum(x);
        if (lane == kWarp - 1) shared.sums[warp] = inclusive;
        __syncthreads();
        const uint32_t sums = warp_inclusive_sum(lane < kWarps ? shared.sums[lane] : 0);
        *total = __shfl_sync(kAllLanes, sums, kWarps - 1);
        const uint32_t before = __shfl_sync(kAllLanes, sums, max(warp - 1, 0));
        return inclusive - x + (warp > 0 ? before : 0);
    }

    // The threshold key of the `wanted` largest keys, 1 <= wanted <= their number: keys above it are kept, and of those that equal it
    // *ties. for_each(f) calls f(key) for this thread's keys. Bins must be clear; ends with a barrier behind the last use of `shared`.
    template <class ForEach>
    __device__ uint32_t threshold(ForEach&& for_each, uint32_t wanted, uint32_t* ties) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        uint32_t low = 0xffffffffu, high = 0;
        for_each([&](uint32_t key) { low = min(low, key), high = max(high, key); });
        low = __reduce_min_sync(kAllLanes, low), high = __reduce_max_sync(kAllLanes, high);
        if (lane == 0) shared.lows[warp] = low, shared.highs[warp] = high;
        __syncthreads();
        low = __reduce_min_sync(kAllLanes, shared.lows[lane % kWarps]), high = __reduce_max_sync(kAllLanes, shared.highs[lane % kWarps]);

        uint32_t span = high - low;
        while (true) {
            const int shift = max(32 - __clz(span) - kBinBits, 0);  // bins of 2^shift keys cover the span
            for_each([&](uint32_t key) {
                const uint32_t offset = key - low;  // wraps for smaller keys
                if (offset <= span) atomicAdd(&shared.bins[offset >> shift], 1u);
            });
            __syncthreads();
            // Thread i sums bins from the top: its own are kBins - 1 - (i * kBinsPerThread + j).
            uint32_t counts[kBinsPerThread], sum = 0, total;
            const int top = kBins - 1 - int(threadIdx.x) * kBinsPerThread;
#pragma unroll
            for (int j = 0; j < kBinsPerThread; ++j) sum += counts[j] = shared.bins[top - j];
            uint32_t above = exclusive_sum(sum, &total);
#pragma unroll
            for (int j = 0; j < kBinsPerThread; ++j) {
                if (above < wanted && wanted <= above + counts[j]) shared.bin = top - j, shared.above = above, shared.count = counts[j];
                above += counts[j];
            }
            __syncthreads();
            wanted -= shared.above;
            low += shared.bin << shift;
            const uint32_t count = shared.count, last = shift == 0 ? 0 : min((1u << shift) - 1, high - low);
            if (count == wanted || last == 0) {  // the whole bin is kept, or it is a single key
                const bool whole = count == wanted;
                *ties = whole ? 0 : wanted;
                __syncthreads();
                return whole ? low - 1 : low;
            }
            if (count <= kMaxRanked) {
                for_each([&](uint32_t key) {
                    if (key - low <= last) shared.ranked[atomicAdd(&shared.num_ranked, 1u)] = key;
                });
                __syncthreads();
                if (threadIdx.x < count) {
                    const uint32_t key = shared.ranked[threadIdx.x];
                    uint32_t greater = 0, equal = 0;
                    for (uint32_t i = 0; i < count; ++i) greater += shared.ranked[i] > key, equal += shared.ranked[i] == key;
                    if (greater < wanted && wanted <= greater + equal) shared.threshold = key, shared.ties = wanted - greater;  // equal keys agree
                }
                __syncthreads();
                *ties = shared.ties;
                return shared.threshold;
            }
            span = last;
            clear_bins();
            __syncthreads();
        }
    }
};

}  // namespace quest::cuda
