// The page_budget best pages of each (row, head), exactly: sink and recent pages first, NaN above every number, ties to
// the earlier page. Grid (heads, R), one block each; shared memory: a histogram. Bound by the latency of its block-wide
// steps: the scores come from L1 or L2.
#pragma once
#include "topk_threshold.cuh"

namespace quest::cuda {

constexpr int kSelectThreads = 512;
constexpr int kPagesPerThread = 4;  // a contiguous run, so that a prefix sum over threads follows the order of pages

// Keys are made from the scores whenever they are looked at.
struct ScoreKeys {
    const float* scores;
    int first, last;
    uint32_t equal;  // where not 0, only pages of this key compete: the earlier, the better

    __device__ __forceinline__ uint32_t key(int page) const {
        const uint32_t x = sort_key(scores[page]);
        if (equal == 0) return x;
        return x > equal ? kForcedKey : x == equal ? max_pages() - page : 0;
    }
    template <class F>
    __device__ __forceinline__ void for_each(F&& f) const {
        for (int page = first + threadIdx.x; page < last; page += kSelectThreads) f(key(page), page);
    }
    __device__ void order_equals(uint32_t x) { equal = x; }
    __device__ uint32_t max_pages() const { return last; }
};

// Sum over the threads before this one; the block's total in *total. The caller separates two calls by a barrier.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t x, uint32_t (&sums)[kSelectThreads / kWarp],
                                                  uint32_t* total) {
    constexpr int kWarps = kSelectThreads / kWarp;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const uint32_t inclusive = warp_inclusive_sum(x);
    if (lane == kWarp - 1) sums[warp] = inclusive;
    __syncthreads();
    const uint32_t of_warps = warp_inclusive_sum(lane < kWarps ? sums[lane] : 0);
    *total = __shfl_sync(kAllLanes, of_warps, kWarps - 1);
    const uint32_t before = __shfl_sync(kAllLanes, of_warps, max(warp - 1, 0));
    return inclusive - x + (warp > 0 ? before : 0);
}

__global__ void __launch_bounds__(kSelectThreads) select_topk_pages_kernel(const SelectParams p) {
    __shared__ BlockSelect<kSelectThreads>::Shared shared;
    __shared__ uint32_t sums[kSelectThreads / kWarp];
    BlockSelect<kSelectThreads> select{shared};
    let_successor_start();
    select.clear_bins();
    wait_for_predecessor();

    const int head = blockIdx.x, row = blockIdx.y, tokens = min(max(p.seq_lens[row], 0), p.max_pages * p.page_size);
    const int64_t item = int64_t(row) * p.num_heads + head;
    const int num_pages = (tokens + p.page_size - 1) / p.page_size;
    const float* scores = p.scores + item * p.max_pages;
    int32_t* ids = p.page_ids + item * p.page_budget;

    const int always = p.sink_pages + p.recent_pages;
    int budget = p.page_budget;
    if (p.page_budgets) budget = min(max(p.page_budgets[p.budget_heads == 1 ? row : item], always), p.page_budget);
    const int kept = min(budget, num_pages);
    if (threadIdx.x == 0) p.page_counts[item] = kept;
    for (int i = kept + threadIdx.x; i < p.page_budget; i += kSelectThreads) ids[i] = -1;
    if (kept == num_pages) {
        for (int i = threadIdx.x; i < kept; i += kSelectThreads) ids[i] = i;
        return;
    }

    // Sink pages, then the best of the pages between, then the recent ones. Here always <= budget < num_pages.
    const int first = p.sink_pages, last = num_pages - p.recent_pages, wanted = kept - always;
    for (int i = threadIdx.x; i < p.sink_pages; i += kSelectThreads) ids[i] = i;
    for (int i = threadIdx.x; i < p.recent_pages; i += kSelectThreads) ids[kept - p.recent_pages + i] = last + i;
    if (wanted == 0) return;
    __syncthreads();  // bins are clear

    // A sample of 128 keys, the same in every warp.
    const int competing = last - first;
    uint32_t lowest = kForcedKey, highest = 0;
    ScoreKeys keys{scores, first, last, 0};
    uint2 range;
    if (competing >= 4 * kWarp) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t key = keys.key(first + threadIdx.x % kWarp * (competing / kWarp) + j);
            lowest = min(lowest, key), highest = max(highest, key);
        }
        range = sampled_range(lowest, highest, wanted, competing);
    } else {
        range = select.true_range(keys);
    }
    const Bracket bracket = select.bracket(keys, range, wanted);
    // Kept are the pages whose key is above `cut`, and those of that key up to page `cut_page`.
    uint32_t cut = bracket.low - 1;
    int cut_page = -1;
    if (bracket.count != bracket.wanted) {
        keys.for_each([&](uint32_t key, int page) {
            if (bracket.holds(key)) select.offer(key, uint32_t(page));
        });
        __syncthreads();
        select.rank_candidates<1>(bracket, 0, [&](const uint2& candidate, uint32_t better) {
            if (better + 1 == bracket.wanted) cut = candidate.x, cut_page = int(candidate.y);
        });
    }
    uint32_t before = 0;
    for (int start = first; start < last; start += kSelectThreads * kPagesPerThread) {
        const int run = start + threadIdx.x * kPagesPerThread;
        bool kept_here[kPagesPerThread];
        uint32_t count = 0, total;
#pragma unroll
        for (int j = 0; j < kPagesPerThread; ++j) {
            const uint32_t key = run + j < last ? keys.key(run + j) : 0;
            kept_here[j] = key > cut || (key == cut && run + j <= cut_page);
            count += kept_here[j];
        }
        uint32_t place = p.sink_pages + before + exclusive_sum(count, sums, &total);
#pragma unroll
        for (int j = 0; j < kPagesPerThread; ++j)
            if (kept_here[j]) ids[place++] = run + j;
        before += total;
        __syncthreads();
    }
}

}  // namespace quest::cuda
