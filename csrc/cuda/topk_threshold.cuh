// Which keys are the best ones, found by a whole block: a histogram narrows the threshold to a bin, the few keys in
// that bin are ranked against each other. Exact for any keys; where many are equal or a sample misleads it takes more
// rounds.
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

// A key that at least `rank` of the warp's values reach and, but for a few more, no others.
__device__ __forceinline__ uint32_t warp_floor(uint32_t x, int rank, uint32_t* highest) {
    uint32_t low = __reduce_min_sync(kAllLanes, x), high = __reduce_max_sync(kAllLanes, x);
    *highest = high;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t middle = low + (high - low) / 2 + 1;
        if (__popc(__ballot_sync(kAllLanes, x >= middle)) >= rank)
            low = middle;
        else
            high = middle - 1;
        if (low >= high) break;
    }
    return low;
}

template <int kThreads>
struct BlockSelect {
    static constexpr int kWarps = kThreads / kWarp, kBinBits = 8, kBins = 1 << kBinBits, kBinsPerLane = kBins / kWarp;
    static_assert(kBinsPerLane == 8, "a lane reads its bins as two vectors");
    static constexpr int kSample = 128;  // four keys a lane

    struct Shared {
        alignas(16) uint32_t bins[kBins];
        uint32_t lows[kWarps], highs[kWarps], sums[kWarps];
        uint32_t num_candidates, candidates[kWarp];
    };
    Shared& shared;

    __device__ void clear_bins() {
        if (threadIdx.x < kBins) shared.bins[threadIdx.x] = 0;
        shared.num_candidates = 0;
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

    template <class ForEach>
    __device__ uint2 true_range(ForEach&& for_each) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        uint32_t low = 0xffffffffu, high = 0;
        for_each([&](uint32_t key) { low = min(low, key), high = max(high, key); });
        low = __reduce_min_sync(kAllLanes, low), high = __reduce_max_sync(kAllLanes, high);
        if (lane == 0) shared.lows[warp] = low, shared.highs[warp] = high;
        __syncthreads();
        return {__reduce_min_sync(kAllLanes, shared.lows[lane % kWarps]),
                __reduce_max_sync(kAllLanes, shared.highs[lane % kWarps])};
    }

    // The threshold of the `wanted` largest of `competing` keys, 1 <= wanted <= competing: keys above it are kept, and
    // of those that equal it *ties. for_each(f) calls f(key) for this thread's keys. `sampled`: the largest of this
    // lane's four of 128 keys spread over all, the same in every warp; the threshold is sought above a key that few of
    // them reach. Bins must be clear, with a barrier since.
    template <class ForEach>
    __device__ uint32_t threshold(ForEach&& for_each, uint32_t sampled, uint32_t wanted, uint32_t competing,
                                  uint32_t* ties) {
        const int lane = threadIdx.x % kWarp;
        const float expected =
            float(kSample) * wanted / competing;  // sampled keys above the threshold; then three deviations more
        const int rank = int(expected + 3.f * sqrtf(expected)) + 3;
        uint32_t low, high;
        if (rank <= 28 && competing >= kSample) {
            low = warp_floor(sampled, rank, &high);
        } else {
            const uint2 range = true_range(for_each);
            low = range.x, high = range.y;
        }
        uint32_t limit = 0xffffffffu;  // keys between high and the limit belong to the last bin
        while (true) {
            const int shift = max(32 - __clz(high - low) - kBinBits, 0);
            for_each([&](uint32_t key) {
                if (key >= low && key <= limit)
                    atomicAdd(&shared.bins[min((key - low) >> shift, uint32_t(kBins - 1))], 1u);
            });
            __syncthreads();
            // Every warp finds the bin by itself; lane i sums the bins from kBins - 1 - i * kBinsPerLane down.
            const int top = kBins - 1 - lane * kBinsPerLane;
            const uint4 upper = *reinterpret_cast<const uint4*>(&shared.bins[top - 3]),
                        lower = *reinterpret_cast<const uint4*>(&shared.bins[top - 7]);
            const uint32_t counts[kBinsPerLane] = {upper.w, upper.z, upper.y, upper.x,
                                                   lower.w, lower.z, lower.y, lower.x};
            const uint32_t sum = upper.x + upper.y + upper.z + upper.w + lower.x + lower.y + lower.z + lower.w;
            const uint32_t inclusive = warp_inclusive_sum(sum);
            const unsigned reached = __ballot_sync(kAllLanes, inclusive >= wanted);
            if (__builtin_expect(reached == 0, 0)) {  // the sample was too high
                __syncthreads();
                clear_bins();
                const uint2 range = true_range(for_each);
                low = range.x, high = range.y;
                continue;
            }
            uint32_t bin = 0, above = inclusive - sum, count = 0;
#pragma unroll
            for (int j = 0; j < kBinsPerLane; ++j) {
                if (count == 0 && above + counts[j] >= wanted) bin = top - j, count = counts[j];
                if (count == 0) above += counts[j];
            }
            const int finder = __ffs(reached) - 1;
            bin = __shfl_sync(kAllLanes, bin, finder), count = __shfl_sync(kAllLanes, count, finder);
            wanted -= __shfl_sync(kAllLanes, above, finder);
            low += bin << shift;
            if (bin < kBins - 1) limit = low + (1u << shift) - 1;
            if (count == wanted) {  // the whole bin is kept
                *ties = 0;
                return low - 1;
            }
            if (low == limit) {
                *ties = wanted;
                return low;
            }
            if (__builtin_expect(count <= kWarp, 1)) {
                for_each([&](uint32_t key) {
                    if (key >= low && key <= limit) shared.candidates[atomicAdd(&shared.num_candidates, 1u)] = key;
                });
                __syncthreads();
                const uint32_t candidate = lane < count ? shared.candidates[lane] : 0;
                uint32_t greater = 0, equal = 0;
                for (uint32_t i = 0; i < count; ++i) {
                    const uint32_t other = __shfl_sync(kAllLanes, candidate, i);
                    greater += other > candidate, equal += other == candidate;
                }
                const int found = __ffs(__ballot_sync(kAllLanes, greater < wanted && wanted <= greater + equal)) - 1;
                *ties = wanted - __shfl_sync(kAllLanes, greater, found);
                return __shfl_sync(kAllLanes, candidate, found);
            }
            high = limit;
            __syncthreads();
            clear_bins();
            __syncthreads();
        }
    }
};

}  // namespace quest::cuda
