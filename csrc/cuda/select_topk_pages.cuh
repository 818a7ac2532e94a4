// The page_budget best pages of each (row, head), exactly: sink and recent pages first, NaN above every number, ties to
// the earlier page. Grid (heads, R), one block each; shared memory: a histogram. Bound by the latency of its block-wide
// steps: the scores come from L1 or L2.
#pragma once
#include "topk_threshold.cuh"

namespace quest::cuda {

constexpr int kSelectThreads = 512;
constexpr int kPagesPerThread = 4;  // a contiguous run, so that a prefix sum over threads follows the order of pages

__global__ void __launch_bounds__(kSelectThreads) select_topk_pages_kernel(const SelectParams p) {
    __shared__ BlockSelect<kSelectThreads>::Shared shared;
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

    const int competing = last - first;
    uint32_t sampled = 0, ties;
    if (competing >= select.kSample)
#pragma unroll
        for (int j = 0; j < select.kSample / kWarp; ++j)
            sampled = max(sampled, sort_key(scores[first + threadIdx.x % kWarp * (competing / kWarp) + j]));
    const uint32_t threshold = select.threshold(
        [&](auto&& f) {
            for (int page = first + threadIdx.x; page < last; page += kSelectThreads) f(sort_key(scores[page]));
        },
        sampled, wanted, competing, &ties);
    // How many pages before this thread's run are above the threshold, and how many equal it.
    uint32_t above = 0, equal = 0;
    for (int start = first; start < last; start += kSelectThreads * kPagesPerThread) {
        const int run = start + threadIdx.x * kPagesPerThread;
        uint32_t keys[kPagesPerThread], packed = 0, total;
#pragma unroll
        for (int j = 0; j < kPagesPerThread; ++j) {
            keys[j] = run + j < last ? sort_key(scores[run + j]) : 0;
            packed += (keys[j] > threshold ? 1u : 0u) + (keys[j] == threshold ? 0x10000u : 0u);
        }
        const uint32_t before = select.exclusive_sum(packed, &total);
        uint32_t my_above = above + (before & 0xffff), my_equal = equal + (before >> 16);
#pragma unroll
        for (int j = 0; j < kPagesPerThread; ++j) {
            const bool is_above = keys[j] > threshold, is_tie = keys[j] == threshold;
            if (is_above || (is_tie && my_equal < ties)) ids[p.sink_pages + my_above + min(my_equal, ties)] = run + j;
            my_above += is_above;
            my_equal += is_tie;
        }
        above += total & 0xffff;
        equal += total >> 16;
        __syncthreads();
    }
}

}  // namespace quest::cuda
